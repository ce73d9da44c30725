"""What the tests share: a tiny world of real files, written once, and a tiny random Qwen2.5-VL in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real tokenizer, videos and records, where they are at hand
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
import toy  # noqa: E402

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real tokenizer, videos and records in ../shared"
)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world: train.json, cot.json, test.json, media/, model/."""
    return toy.write(
        tmp_path_factory.mktemp("toy") / "world", seed=7, clips={"cot": 20, "train": 20, "test": 4}
    )


@pytest.fixture(scope="session")
def builder(world):
    return data.PromptBuilder(world / "model", min_pixels=784)


@pytest.fixture(scope="session")
def prompts(world, builder):
    """Six prompts of unequal length: videos of 16, 8 and 6 frames and of three sizes, and two images."""
    samples = data.load_samples(world / "train.json")
    images = [s for s in samples if s.data_type == "image"]
    videos = [s for s in samples if s.data_type == "video"]
    return [
        builder(videos[0]),
        builder(videos[5], max_frames=8),
        builder(images[0]),
        builder(videos[2], min_pixels=56 * 84),
        builder(videos[1], max_frames=6, min_pixels=5000),
        builder(images[1], min_pixels=9000),
    ]


@pytest.fixture()
def policy(world):
    """The toy's checkpoint in float64, checkpointing off."""
    return model.Policy.load(world / "model", dtype=torch.float64, grad_checkpointing=0)


def run(*command, ranks=1, expect=0, timeout=300, **env):
    """Runs `python command` (or torchrun on several ranks) at the project's root -> its output."""
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(29500 + os.getpid() % 1000),
            "--",
        ]
        if ranks > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), output[-4000:]
    return output


TINY = [
    "--min_pixels",
    784,
    "--max_new",
    16,
    "--prompts",
    4,
    "--group",
    4,
    "--log_every",
    1,
    "--train_vision",
]


def flags(world, out, algo="grpo", **extra):
    records = "cot.json" if algo == "sft" else "train.json"
    return [
        "train.py",
        "--algo",
        algo,
        "--model",
        world / "model",
        "--data",
        world / records,
        "--out",
        out,
        "--lr",
        "1e-3",
        *TINY,
        *(x for k, v in extra.items() for x in ((f"--{k}",) if v is True else (f"--{k}", v))),
    ]


@pytest.fixture(scope="session")
def cold_start(tmp_path_factory, world):
    """A run folder whose policy keeps the format and guesses: rewards differ within a group, so there is something to learn."""
    out = tmp_path_factory.mktemp("cold") / "sft"
    run(*flags(world, out, "sft", steps=60, prompts=16))
    return out
