"""What the tests share: a tiny world of real files, a tiny random Qwen2.5-VL in float64, run().

torch and the project are imported where they are used: pytest-xdist's controller, which reads this
file before it starts its workers and runs no test, would take 5 s for them.
"""

import atexit
import fcntl
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several processes share the cores

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real tokenizer, videos and records, where they are at hand
sys.path.insert(0, str(ROOT))

import forkserver  # noqa: E402

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real tokenizer, videos and records in ../shared"
)


# ---- several workers, by pytest-xdist


def pytest_xdist_auto_num_workers(config):
    """For `-n auto` of pytest.ini: a worker for each core, but none for single tests."""
    single = config.option.keyword or any("::" in arg for arg in config.args)
    return 0 if single else min(os.cpu_count(), 8)


def pytest_configure(config):
    """The controller of several workers starts the fork server that they share."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ["FORK_SERVER"] = fork_server()


def pytest_collection_modifyitems(items):
    """Whole runs first, so that what is left for the end is short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function made_once(name, make) -> a folder that the first worker fills, by make(folder)."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the session's

    def folder_of(name, make):
        folder, done = base / name, base / f"{name}.done"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return folder_of


# ---- fixtures


@pytest.fixture(scope="session")
def world(made_once):
    """A small toy world: train.json, cot.json, test.json, media/, model/. few.json is two records
    of test.json, a video and an image, for runs that evaluate often."""
    import toy

    def make(folder):
        toy.write(folder, seed=7, clips={"cot": 20, "train": 20, "test": 4})
        held = {r["data_type"]: r for r in json.loads((folder / "test.json").read_text())}
        (folder / "few.json").write_text(json.dumps([held["video"], held["image"]]))

    return made_once("world", make)


@pytest.fixture(scope="session")
def builder(world):
    import data

    return data.PromptBuilder(world / "model", min_pixels=784)


@pytest.fixture(scope="session")
def prompts(world, builder):
    """Six prompts of unequal length: videos of 16, 8 and 6 frames, of three sizes; two images."""
    import data

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


@pytest.fixture(scope="session")
def text_prompts(builder):
    """Two prompts of unequal length without a medium."""
    import data

    questions = ["How many are 3 and 4?", "A lamp flashes twice a minute. How often in an hour?"]
    about = dict(options=[], problem_type="numerical", data_type="text", path="", answer="7")
    return [builder(data.Sample(f"text {i}", q, **about)) for i, q in enumerate(questions)]


def pixel_inputs(prompt):
    """What transformers' forward takes of a prompt's medium: pixels and grid; {} for text."""
    import torch

    import data

    inputs = {}
    for media in prompt.media:  # one, or none
        pixels = data.patchify(data.normalize(media.frames, torch.float64))[0]
        name = "pixel_values_videos" if media.kind == "video" else "pixel_values"
        inputs = {name: pixels, f"{media.kind}_grid_thw": torch.tensor([media.grid])}
    return inputs


@pytest.fixture()
def policy(world):
    """The toy's checkpoint in float64, checkpointing off."""
    import torch

    import model

    return model.Policy.load(world / "model", dtype=torch.float64, grad_checkpointing=0)


# ---- scripts in processes of their own

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]  # standalone: on a port that is free


@functools.cache
def fork_server():
    """The address of this session's fork server, which starts with the first command."""
    if "FORK_SERVER" in os.environ:
        return os.environ["FORK_SERVER"]
    server = forkserver.Server()
    atexit.register(server.close)
    return server.address


class Script:
    """A script of the project that runs: .process (forkserver.Forked, or a Popen) and its output.

    It runs in a fork of the fork server, or with torchrun=True under the real torchrun.
    """

    def __init__(self, *command, ranks=1, torchrun=False, **env):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        out, error = self.files
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        if torchrun:
            command = [*TORCHRUN, "--nproc_per_node", ranks, "--", *command]
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=out, stderr=error
            )
        else:
            self.process = forkserver.start(
                fork_server(), command, out, error, cwd=ROOT, env=env, ranks=ranks
            )

    def output(self, timeout=300):
        """Waits for the end -> standard output, then standard error. Kills it after `timeout` s."""
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()  # does nothing to what has ended
        for file in self.files:
            file.seek(0)
        return "".join(file.read() for file in self.files)

    def pids(self):
        """Of the ranks."""
        if isinstance(self.process, forkserver.Forked):
            return self.process.pids
        found = ["pgrep", "-P", str(self.process.pid)]
        return [int(x) for x in subprocess.run(found, capture_output=True).stdout.split()]

    def wait_until(self, condition):
        """Returns once condition() is true; fails where the script ends before."""
        while not condition():
            assert self.process.poll() is None, self.output()[-4000:]
            time.sleep(0.005)


def run(*command, expect=0, timeout=300, **how):
    """Runs `python command` at the project's root -> its output. how: ranks and others of Script.

    expect: 0 where the command must succeed, anything else where it must fail.
    """
    script = Script(*command, **how)
    output = script.output(timeout)
    assert (script.process.returncode == 0) == (expect == 0), output[-4000:]
    return output


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory):
    """For torchrun's PYTHON_EXEC: an executable that runs a rank in a fork, without its imports."""
    file = tmp_path_factory.mktemp("forked") / "python"
    words = shlex.join([sys.executable, f"{ROOT}/tests/forked_python.py", fork_server()])
    file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    file.chmod(0o755)
    return file


TINY = "--min_pixels 784 --max_new 16 --prompts 4 --group 4 --log_every 1 --train_vision".split()
TINY += ["--workers", "1"]  # each is a process that imports NumPy and PyAV


def flags(world, out, algo="grpo", **extra):
    """The command line of a small run of train.py. extra: more flags, True for those without value.

    The last of two equal flags counts, so extra can replace those of here.
    """
    records = "cot.json" if algo == "sft" else "train.json"
    command = ["train.py", "--algo", algo, "--model", world / "model", "--data", world / records]
    command += ["--out", out, "--lr", "1e-3", *TINY]
    for name, value in extra.items():
        command += [f"--{name}"] if value is True else [f"--{name}", value]
    return command


@pytest.fixture(scope="session")
def cold_start(made_once, world):
    """A run folder whose policy keeps the format and guesses.

    Rewards differ within a group, so there is something to learn, and they depend on the order of
    frames, so T-GRPO's bonus moves gradients.
    """

    def make(folder):
        run(*flags(world, folder, "sft", steps=60, lr=2e-3, grad_checkpointing=0))

    return made_once("cold_start", make)
