"""The training step on fake GPUs: at a 7B's width, with two layers, it runs as on a GPU would.

Each case is a function of simulate_worker.py, which says what it checks. It runs in a process of
its own, because it makes torch believe in a GPU.
"""

import json
import os
import shutil

import pytest

import simulate
import toy
from conftest import SHARED, needs_shared, run
from infra import fake_cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(fake_cuda.unsupported()), reason=str(fake_cuda.unsupported())),
]

SFT = "--algo sft --data - --prompts 1 --frames 4 --size 56x84 --max_new 16 --gpus 1".split()


@pytest.fixture(scope="session")
def wide_model(made_once):
    """A folder without weights: a Qwen2.5-VL of the 7B's width with two layers."""

    def make(folder):
        folder.mkdir()
        tokenizer = toy.write_tokenizer(folder, ["What happens first in the video?"])
        size = dict(hidden=3584, layers=2, heads=28, kv_heads=4, vision_hidden=1280)
        config = toy.tiny_config(tokenizer, **size)
        text, vision = config.text_config, config.vision_config
        text.intermediate_size, text.vocab_size = 18944, 152064
        vision.intermediate_size, vision.num_heads = 3420, 16
        config.tie_word_embeddings = text.tie_word_embeddings = False
        config.save_pretrained(folder)

    return made_once("wide_model", make)


@pytest.fixture(scope="session")
def wide_qwen3(made_once):
    """A folder without weights: a Qwen3-VL of the 4B's width with two layers."""

    def make(folder):
        folder.mkdir()
        tokenizer = toy.write_tokenizer(folder, ["What happens first in the video?"])
        size = dict(hidden=2560, layers=2, heads=32, kv_heads=8, vision_hidden=1024)
        config = toy.tiny_qwen3_config(tokenizer, **size)
        text, vision = config.text_config, config.vision_config
        text.intermediate_size, text.vocab_size, text.head_dim = 9728, 151936, 128
        text.rope_parameters["mrope_section"] = [24, 20, 20]
        vision.intermediate_size, vision.num_heads = 4096, 16
        vision.num_position_embeddings = 2304
        config.save_pretrained(folder)

    return made_once("wide_qwen3", make)


@pytest.mark.parametrize(
    ("case", "gpus"),
    [
        ("machine", 1),  # the fake GPU itself: memory, operations, syncs and numbers by hand
        ("fsdp", 8),  # tgrpo, the tower trained
        ("ddp", 8),  # grpo, the tower frozen
        ("sp", 8),  # grpo, two ranks share a row
        ("sft", 8),
        ("lora", 1),  # grpo
        ("greedy", 1),  # and other ways to sample
        ("faults", 1),
    ],
)
def test_steps_run_on_fake_gpus(case, gpus, wide_model):
    ranks = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(gpus))
    print(run("tests/simulate_worker.py", case, wide_model, **ranks))


def test_a_qwen3_vl_runs_on_fake_gpus(wide_qwen3):
    """grpo, sharded, the tower trained; heads that are wider than the model, with deepstack."""
    ranks = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8")
    print(run("tests/simulate_worker.py", "qwen3_vl", wide_qwen3, **ranks))


def test_a_folder_that_is_not_there_is_named_with_what_to_download(tmp_path):
    command = ["simulate.py", *SFT, "--model", "Qwen/Qwen2.5-VL-7B-Instruct"]
    output = run(*command, "--write", tmp_path / "x.json", expect=1, RANK="0", WORLD_SIZE="1")
    assert "error: Qwen/Qwen2.5-VL-7B-Instruct: no folder with config.json" in output
    assert "hf download Qwen/Qwen2.5-VL-7B-Instruct" in output and "tokenizer.json" in output


@needs_shared
def test_the_command_prints_what_fits_and_what_would_help(tmp_path):
    """Of the real checkpoint's files, with two layers."""
    folder = tmp_path / "model"
    shutil.copytree(SHARED / "qwen2_5_vl", folder)
    os.chmod(folder, 0o755)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["depth"] = 2
    config["vision_config"]["fullatt_block_indexes"] = [1]
    os.chmod(folder / "config.json", 0o644)
    (folder / "config.json").write_text(json.dumps(config))
    words = [*SFT, "--config", folder, "--memory", "20", "--train_vision"]
    words += ["--grad_checkpointing", "0"]  # the one thing that would help
    output = run("simulate.py", *words, "--write", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    for name in ("load", "encode", "forward", "backward", "optimizer"):
        assert found["phases"][name]["peak"] > 0 and f"\n{name} " in output
    assert "does not fit in 18 GB" in output and simulate.UNKNOWN in output
    assert "with --grad_checkpointing 1: peak " in output
    (other,) = found["tried"]
    assert other["with"] == ["--grad_checkpointing", "1"]
    assert simulate.peak_of(other)[0] <= simulate.peak_of(found)[0]


def test_what_may_make_a_step_fit():
    """Each alone: nothing that the run has already, nor what it cannot have."""
    flags = dict(fsdp=False, grad_checkpointing=0, lora=0, train_vision=False)
    found = dict(flags=flags, gpus=4, sp=1, frames=16)
    all_of_them = [["--fsdp"], ["--grad_checkpointing", "1"], ["--lora", "16"], ["--sp", "2"]]
    assert simulate.remedies(found) == [*all_of_them, ["--frames", "8"]]
    assert simulate.remedies(found | dict(sp=2, frames=18)) == [
        *all_of_them[:3],
        ["--sp", "4"],
        ["--frames", "8"],
    ]
    flags |= dict(fsdp=True, grad_checkpointing=1, train_vision=True)
    assert simulate.remedies(found | dict(sp=4, frames=6)) == []
    assert simulate.remedies(dict(flags=flags | dict(lora=8), gpus=1, sp=1, frames=6)) == []
