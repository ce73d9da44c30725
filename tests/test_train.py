"""Whole runs of train.py, from files to files.

In this order: what is the same on any number of ranks; kills, resumes and checkpoints; errors and
bad data; T-GRPO; updates and what a step logs of them; flags; the real tokenizer and video.
"""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import bench
import data
import eval
import grpo
import model
import report
import tgrpo
import toy
import train
from conftest import ROOT, SHARED, Script, flags, needs_shared, run
from infra import fsdp, run_folder
from infra.checkpoints import torn
from infra.files import append
from infra.flags import flag_lines
from infra.model_folder import checkpoints
from infra.optimizer import Update, make_optimizer, update
from infra.packing import pack
from infra.progress import LoadErrors, advice
from infra.run_folder import claimed, resumable, stop_signals
from infra.step_log import LossTotals, trained_metrics, update_metrics
from rollout import Group, generate

slow = pytest.mark.slow
FILES = ["--model", "m", "--data", "d"]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(entries):
    return [
        {k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second")} for e in entries
    ]


def lines_of(file):
    """How many lines a file has, 0 while it is not there."""
    return file.read_text().count("\n") if file.exists() else 0


def weights(out, step):
    return load_file(out / f"checkpoint-{step:06d}" / "model.safetensors")


def without_vision(command):
    return [x for x in command if x != "--train_vision"]


def test_grpo_from_files_to_files(tmp_path, world, cold_start):
    extra = dict(steps=2, eval_data=world / "test.json", model=cold_start, workers=2)
    out = run(*flags(world, tmp_path / "rl", **extra))
    assert "step     2" in out and "held-out accuracy" in out
    first, *steps = log(tmp_path / "rl")
    assert first["step"] == 0 and 0 <= first["eval_accuracy"] <= 1
    assert first["eval_questions"] == len(data.load_samples(world / "test.json"))
    expected = {
        "step",
        "reward",
        "accuracy",
        "format",
        "kl",
        "entropy",
        "grad_norm",
        "lr",
        "response_length",
        "truncated",
        "zero_std_groups",
        "skipped_samples",
        "frames",
        "pixels",
        "seconds",
        "tokens_per_second",
    }
    assert (
        [s["step"] for s in steps] == [1, 2]
        and all(expected <= set(s) for s in steps)
        and "eval_accuracy" in steps[-1]
    )
    assert {"data", "encode", "rollout", "train", "optimizer"} <= set(
        steps[0]["seconds"]
    ) and steps[0]["pixels"] == 784
    assert steps[0]["grad_norm"] > 0 and steps[0]["entropy"] > 0 and steps[0]["mismatch"] < 1e-5
    assert (steps[0]["updates"], steps[0]["skipped_updates"], steps[0]["skipped_update"]) == (
        1,
        0,
        False,
    )
    assert re.search(
        r"step     1  .*  zero_std_groups \d\.\d+  truncated \d\.\d+  skipped_updates \d", out
    )
    assert out.rstrip().endswith(f"`python report.py {tmp_path}/rl --open` shows it")
    again = (tmp_path / "rl" / "config.txt").read_text()
    assert "--lr 0.001" in again and train.parse_args([f"@{tmp_path}/rl/config.txt"]).prompts == 4


def test_all_responses_of_two_groups_of_a_step_are_written_with_their_advantages(
    tmp_path, world, cold_start
):
    """The same two groups on two ranks, of which one has prompts 0 and 2, the other 1 and 3."""
    texts = []
    for ranks in (1, 2):
        run(*flags(world, tmp_path / f"{ranks}", steps=1, model=cold_start), ranks=ranks)
        lines = [
            json.loads(x)
            for x in (tmp_path / f"{ranks}" / "samples.jsonl").read_text().splitlines()
        ]
        assert [(x["step"], x["position"]) for x in lines] == [(1, 0)] * 4 + [(1, 1)] * 4
        texts.append([x["response"] for x in lines])
    assert texts[0] == texts[1]
    records = {str(r["problem_id"]): r for r in json.loads((world / "train.json").read_text())}
    for group in (lines[:4], lines[4:]):
        rewards = torch.tensor(
            [[x["reward"] + x["temporal_bonus"] for x in group]], dtype=torch.float64
        )
        assert [x["advantage"] for x in group] == pytest.approx(
            grpo.group_advantages(rewards)[0].tolist()
        )
        for x in group:
            record = records[x["id"]]
            assert (x["question"], x["options"]) == (record["problem"], record["options"])
            assert {
                "response",
                "reward",
                "accuracy",
                "format",
                "length_bonus",
                "answer",
                "path",
            } <= set(x)


def gradients(tmp_path, world, start, ranks, *extra):
    """What tests/gradient_worker.py saves on each rank."""
    run("tests/gradient_worker.py", world, start, tmp_path / "g", *extra, ranks=ranks)
    return [torch.load(tmp_path / f"g.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize(
    "flags, many",
    [
        ("--algo sft", ["3", "2 --sp 2", "3 --fsdp"]),
        pytest.param(
            "--algo grpo --average token",
            ["2", "2 --sp 2", "3 --sp 3", "4 --sp 4", "4 --sp 2", "2 --fsdp", "4 --sp 2 --fsdp"],
            marks=slow,
        ),
        pytest.param("--algo grpo frozen", ["2", "2 --fsdp"], marks=slow),
        ("--algo sft --lora 4", ["2 --sp 2 --fsdp"]),
        pytest.param("--algo grpo --lora 4", ["2", "2 --sp 2", "2 --fsdp"], marks=slow),
        pytest.param(
            "--algo tgrpo --group 4 --temporal contrast --correct 0.01 --lora 4",
            ["2 --fsdp"],
            marks=slow,
        ),
        pytest.param(
            "--algo tgrpo --group 4 --temporal advantage --shuffle grid",
            ["4 --sp 2"],
            marks=slow,
        ),
        pytest.param(
            "--algo tgrpo --group 4 --temporal contrast",
            ["4 --sp 2 --fsdp"],
            marks=slow,
        ),
        pytest.param(
            "--algo grpo --drop_zero_std --refill 2 --prompts 7 --minibatches 2",
            ["2", "2 --sp 2"],
            marks=slow,
        ),
    ],
)
def test_gradients_are_the_same_on_one_and_on_many_ranks(tmp_path, world, cold_start, flags, many):
    """The same global batch gives the same gradient and the same log entry.

    It has 5 prompts: videos of two shapes, an image and a text, groups of unequal length, several
    rows a rank, right and wrong responses, truncated ones masked, a KL term, the tower trained or
    frozen and called a different number of times on each rank. `many` lists what is compared with
    one rank: the number of ranks and how they share the work. Each prompt is on one rank, or on a
    group of `sp` ranks; the policy and the reference are whole on each rank, or sharded.

    In float64, but transformers computes RMSNorm and RoPE in fp32: hence 1e-5.
    """
    flags = flags.split()
    (one,) = gradients(tmp_path, world, cold_start, 1, *flags)
    assert any(g.abs().max() > 1e-4 for g in one["grads"].values())
    if "sft" not in flags:  # the rewards differ within groups
        assert 0 < one["entry"]["accuracy"] < 1 and 0 < one["entry"]["truncated"] < 1
        assert one["entry"]["zero_std_groups"] < 0.5
    for how in many:
        ranks, *how = how.split()
        for other in gradients(tmp_path, world, cold_start, int(ranks), *flags, *how):
            assert other["grads"].keys() == one["grads"].keys()
            for name, g in one["grads"].items():
                bound = 1e-5 * float(g.abs().max()) + 1e-12
                torch.testing.assert_close(other["grads"][name], g, atol=bound, rtol=0, msg=name)
            for key, value in one["entry"].items():
                assert other["entry"][key] == pytest.approx(value, abs=1e-6), key
    if "--temporal" in flags:
        (without,) = gradients(tmp_path, world, cold_start, 1, *flags, "--alpha", "0")
        assert one["entry"]["temporal_bonus"] > 0 == without["entry"]["temporal_bonus"]
        assert any(
            (without["grads"][name] - g).abs().max() > 1e-4 for name, g in one["grads"].items()
        )
    if "--refill" in flags:
        assert one["entry"]["refills"] > 0


def test_the_rank_test_catches_a_loss_that_bypasses_ddp(tmp_path, world, cold_start):
    """Gradients through anything but the wrapped forward stay a rank's own, without any error.

    The test above would see it.
    """
    a, b = (g["grads"] for g in gradients(tmp_path, world, cold_start, 2, "bypass"))
    assert any((a[name] - b[name]).abs().max() > 1e-4 for name in a)


@slow
def test_two_ranks_take_the_same_steps(tmp_path, world, cold_start):
    """Three steps on two ranks, whole or sharded: the same samples, figures and parameters.

    The sharded ones are started by torchrun, so each hashes its strings in its own way. Where a
    gradient is only rounding, Adam's step has its full size all the same: hence a small --lr.
    """
    extra = dict(steps=3, model=cold_start, eval_data=world / "few.json", prompts=6, beta=0.1)
    extra |= dict(lr=1e-4, workers=2)
    run(*flags(world, tmp_path / "one", **extra))
    one, start = weights(tmp_path / "one", 3), weights(cold_start, 60)
    assert log(tmp_path / "one")[1]["grad_norm"] > 0
    assert max((one[n] - start[n]).abs().max() for n in one) > 1e-4  # three steps of Adam
    run(*flags(world, tmp_path / "whole", **extra), ranks=2)
    run(*flags(world, tmp_path / "sharded", **extra, fsdp=True), ranks=2, torchrun=True)
    for name in ("whole", "sharded"):
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / name), strict=True):
            for key in a.keys() - {"seconds", "tokens_per_second", "eval_by_source"}:
                assert b[key] == pytest.approx(a[key], abs=1e-4), key
        assert_same_steps(one, weights(tmp_path / name, 3))


@slow
def test_a_checkpoint_is_the_same_from_whole_and_from_sharded_ranks(tmp_path, world, cold_start):
    """A checkpoint of one process resumes sharded over three ranks, one of two ranks on one.

    The tower is frozen and its embeddings are cached.
    """
    extra = dict(
        model=cold_start,
        prompts=6,
        beta=0.1,
        save_every=2,
        embedding_cache=tmp_path / "cache",
        fsdp=True,
    )

    def command(name, steps):
        return without_vision(flags(world, tmp_path / name, steps=steps, **extra))

    run(*command("one", 3))  # one process: --fsdp has nothing to shard
    shutil.copytree(tmp_path / "one", tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-000003")
    run(*command("sharded", 3), "--resume", ranks=3)
    run(*command("whole", 2), ranks=2)
    run(*command("whole", 3), "--resume")
    files, state = {}, {}
    for name in ("one", "sharded", "whole"):
        folder = tmp_path / name / "checkpoint-000003"
        files[name] = sorted(
            (f.name, f.stat().st_size) for f in folder.iterdir() if f.suffix != ".pt"
        )
        state[name] = torch.load(folder / "optimizer.pt")
        assert (
            files[name] == files["one"]
            and state[name]["param_groups"] == state["one"]["param_groups"]
        )
        assert_same_steps(weights(tmp_path / "one", 3), weights(tmp_path / name, 3))
        for i, moments in state["one"]["state"].items():
            assert state[name]["state"][i]["step"] == moments["step"] == 3
            torch.testing.assert_close(
                state[name]["state"][i]["exp_avg"], moments["exp_avg"], atol=1e-4, rtol=1e-3
            )


def test_more_ranks_than_prompts(tmp_path, world):
    run(*flags(world, tmp_path / "a", steps=1, prompts=1), ranks=2)
    assert log(tmp_path / "a")[0]["step"] == 1


@pytest.mark.parametrize(
    "algo, ranks",
    [("sft", 1), pytest.param("grpo", 1, marks=slow), pytest.param("grpo", 2, marks=slow)],
)
def test_killed_in_the_middle_of_a_step_and_resumed(tmp_path, world, cold_start, algo, ranks):
    """SIGKILL after a step that no checkpoint holds yet, then --resume: as if it had not happened.

    Parameters and log are those of a run that was left alone, bit for bit. Two ranks are sharded,
    and one of them is killed.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = 7 if algo == "sft" else 5  # those of sft are short, and the kill comes before the last
    extra = dict(steps=steps, save_every=2, eval_every=3, model=cold_start)
    extra |= dict(eval_data=world / "few.json")
    if algo == "grpo":
        extra |= dict(beta=0.1)
    if ranks > 1:
        extra |= dict(fsdp=True)
    run(*flags(world, whole, algo, **extra), ranks=ranks)
    script = Script(*flags(world, cut, algo, **extra), ranks=ranks)
    script.wait_until(lambda: lines_of(cut / "log.jsonl") >= 4)  # step 0 is the first line
    os.kill(script.pids()[-1], signal.SIGKILL)
    script.output(timeout=90)
    assert not (cut / f"checkpoint-00000{steps}").exists() and (cut / "checkpoint-000002").exists()
    with open(cut / "log.jsonl", "a") as f:
        f.write('{"step": 99, "lo')  # half a line, as a kill in mid-write leaves it
    run(*flags(world, cut, algo, **extra), "--resume", ranks=ranks)
    assert without_times(log(cut)) == without_times(log(whole))
    assert any(e.get("grad_norm") for e in log(cut))
    for name, tensor in weights(whole, steps).items():
        assert torch.equal(tensor, weights(cut, steps)[name]), name
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())


def here(*command):
    """Runs train.py's command line in this process -> its error line or exit code, or None."""
    try:
        train.main([str(x) for x in command[1:]])
    except SystemExit as e:
        return e.code


def test_a_run_is_not_written_over_nor_resumed_as_another(tmp_path, world, cold_start):
    """What changes a run's results may not change on --resume; records count by their content."""
    out, records = tmp_path / "a", tmp_path / "r.json"
    content = (world / "cot.json").read_text()
    records.write_text(content)
    command = flags(world, out, "sft", steps=1, model=cold_start, data=records, media_root=world)
    assert here(*command) is None
    lines = (out / "config.txt").read_text().splitlines()
    assert (
        lines[0].startswith("# commit ")
        and lines[1].startswith("# records ")
        and "--lr 0.001" in lines
    )
    assert "holds a run: add --resume to resume it" in here(*command)
    for flag, was, now in (
        ("prompts", "--prompts 4", "3"),
        ("group", "--group 4", "6"),
        ("max_frames", "--max_frames 16", "8"),
        ("fps", "--fps 2.0", "1.0"),
        ("lr", "--lr 0.001", "0.1"),
        ("model", f"--model {cold_start}", f"{world}/model"),
        ("eval_every", None, "7"),
        ("media_root", None, f"{world}/."),
        ("steps", None, "1"),
    ):
        message = here(*command, f"--{flag}", now, "--resume")
        if was is None:
            assert message is None, flag
        else:
            start = f"error: {out} cannot be resumed with other settings: --{flag} {now} now, "
            assert message.startswith(f"{start}{was} when it started. "), flag
    assert "--drop_zero_std now, none when it started. " in here(
        *command, "--drop_zero_std", "--resume"
    )
    records.write_text(content.replace("red", "RED", 1))
    assert " now, # records " in here(*command, "--resume")
    (tmp_path / "moved.json").write_text(content)
    assert here(*command, "--resume", "--data", tmp_path / "moved.json") is None
    config = [
        line
        for line in (out / "config.txt").read_text().splitlines()
        if line[0] != "#" and "--kl " not in line
    ]
    (out / "config.txt").write_text(
        "\n".join(config) + "\n"
    )  # as older code wrote it: without a flag that is newer
    assert here(*command, "--resume") is None


def test_a_failed_start_does_not_block_the_corrected_command(tmp_path, world, capsys):
    """A model that cannot be loaded, a log without a checkpoint; what starts anew says so."""
    out = tmp_path / "a"
    command = flags(world, out, "sft", steps=1)
    assert "no such model folder" in here(*command, "--model", "./nowhere")
    (out / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert here(*command, "--seed", "5") is None
    anew = "no checkpoint to resume from, so the run starts from the beginning"
    assert f"{out}: {anew}" in capsys.readouterr().out
    assert [e["step"] for e in log(out)] == [1]
    assert here(*flags(world, tmp_path / "b", "sft", steps=1), "--resume") is None
    assert f"{tmp_path / 'b'}: {anew}" in capsys.readouterr().out


def test_a_folder_is_written_to_by_one_run(tmp_path, world):
    out = tmp_path / "a"
    command = flags(world, out, "sft", steps=1)
    with claimed(out):
        assert (
            here(*command)
            == f"error: other processes are writing to {out}: wait for them, or end them"
        )
    assert here(*command) is None


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, world, cold_start):
    """A run of three steps with a checkpoint for each."""
    out = tmp_path_factory.mktemp("steps") / "whole"
    assert here(*flags(world, out, "sft", steps=3, save_every=1, keep=9, model=cold_start)) is None
    return out


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda c: cut(c / "optimizer.pt"), "optimizer.pt: File is not a zip file"),
        (lambda c: (c / "optimizer.pt").write_bytes(b""), "optimizer.pt: File is not a zip file"),
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt: no such file"),
        (
            lambda c: cut(c / "model.safetensors"),
            "model.safetensors: Error while deserializing header",
        ),
        (lambda c: (c / "model.safetensors").unlink(), "no weights"),
        (lambda c: (c / "state.json").write_text(""), "state.json: Expecting value"),
        (lambda c: (c / "state.json").write_text("[]"), "state.json: list indices"),
        (lambda c: (c / "state.json").write_text('{"step": 2}'), "state.json: of another step"),
        (lambda c: (c / "state.json").unlink(), "state.json: no such file"),
        (lambda c: cut(c / "config.json"), "config.json: "),
        (lambda c: None, None),
    ],
)
def test_a_torn_checkpoint_is_recognised(tmp_path, three_steps, damage, reason):
    checkpoint = tmp_path / "checkpoint-000003"
    shutil.copytree(three_steps / "checkpoint-000003", checkpoint)
    damage(checkpoint)
    found = torn(checkpoint)
    assert found is None if reason is None else found.startswith(reason)


def test_a_run_resumes_from_the_newest_whole_checkpoint(
    tmp_path, world, cold_start, three_steps, capsys
):
    """Torn checkpoints are set aside, by name, and the run ends as if nothing had happened.

    Where all are torn, the run is an error, and nothing is deleted.
    """
    out = tmp_path / "a"
    shutil.copytree(three_steps, out)
    cut(out / "checkpoint-000003" / "optimizer.pt")
    (out / "checkpoint-000002" / "state.json").write_text("")
    (out / "checkpoint-000009.partial").mkdir()
    command = flags(world, out, "sft", steps=3, save_every=1, keep=9, model=cold_start)
    assert here(*command, "--resume") is None
    printed = capsys.readouterr().out
    assert "nothing left to do" not in printed and here(*command, "--resume") is None
    done = f"{out}/checkpoint-000003: 3 steps are done and --steps is 3, so there is nothing "
    assert done + "left to do" in capsys.readouterr().out
    for n, file in ((3, "optimizer.pt"), (2, "state.json")):
        assert f"{out}/checkpoint-00000{n}: {file}: " in printed
        assert (
            f"moved to checkpoint-00000{n}.torn; the run resumes from checkpoint-000001" in printed
        )
    assert all(torch.equal(x, weights(three_steps, 3)[name]) for name, x in weights(out, 3).items())
    assert (
        without_times(log(out)) == without_times(log(three_steps))
        and not (out / "checkpoint-000009.partial").exists()
    )
    for n in (1, 2, 3):
        cut(out / f"checkpoint-00000{n}" / "optimizer.pt")
    assert "no checkpoint is whole (checkpoint-000003: optimizer.pt" in here(*command, "--resume")
    assert len(log(out)) == 3 and len(checkpoints(out)) == 3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=slow)])
def test_a_half_model_is_saved_in_half_and_resumes_bit_for_bit(tmp_path, world, cold_start, ranks):
    """A model folder keeps its dtype; a run resumes from fp32 master weights beside the moments.

    Two ranks are sharded.
    """
    half = tmp_path / "half"
    shutil.copytree(cold_start / "checkpoint-000060", half)
    start = {name: x.bfloat16() for name, x in load_file(half / "model.safetensors").items()}
    save_file(start, half / "model.safetensors", metadata={"format": "pt"})
    extra = dict(steps=3, save_every=1, keep=9, model=half, fsdp=True)
    run(*flags(world, tmp_path / "whole", "sft", **extra), ranks=ranks)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for n in (2, 3):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-00000{n}")
    run(*flags(world, tmp_path / "cut", "sft", **extra), "--resume", ranks=ranks)
    masters = [
        torch.load(tmp_path / name / "checkpoint-000003" / "optimizer.pt")["weights"]
        for name in ("whole", "cut")
    ]
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*masters, strict=True)
    )
    saved = weights(tmp_path / "cut", 3)
    assert {x.dtype for x in saved.values()} == {torch.bfloat16} and any(
        (saved[n] != start[n]).any() for n in start
    )
    assert sorted(float(x.float().sum()) for x in saved.values()) == sorted(
        float(x.bfloat16().float().sum()) for x in masters[0]
    )
    assert without_times(log(tmp_path / "cut")) == without_times(log(tmp_path / "whole"))


@pytest.mark.parametrize("algo", ["sft", "grpo"])
def test_a_policy_that_is_not_finite_ends_the_run_and_is_not_saved(
    tmp_path, world, cold_start, algo
):
    message = here(
        *flags(world, tmp_path / "a", algo, steps=4, save_every=1, model=cold_start, prompts=2),
        "--lr",
        "1e38",
    )
    expected = "error: step 1: the policy's logits are not finite, so no checkpoint is saved; "
    assert message == f"{expected}try a lower --lr"
    assert not list((tmp_path / "a").glob("checkpoint*"))
    message = here(
        *flags(world, tmp_path / "b", algo, steps=4, model=cold_start, prompts=2), "--lr", "1e38"
    )
    assert "not finite" in message and len(log(tmp_path / "b")) == 1


@pytest.mark.parametrize(
    "number, ranks, code",
    [
        (signal.SIGINT, 1, 130),
        pytest.param(signal.SIGTERM, 1, 0, marks=slow),
        pytest.param(signal.SIGTERM, 2, 0, marks=slow),
    ],
)
def test_a_signal_ends_the_run_after_a_step_and_its_checkpoint(
    tmp_path, world, cold_start, forked_python, number, ranks, code
):
    """The last line is the command that resumes, and there is no traceback.

    Of two ranks of torchrun one gets the signal, and both stop after the same step.
    """
    out = tmp_path / "a"
    often = 10**6
    command = flags(world, out, "sft", steps=often, save_every=often, model=cold_start, prompts=2)
    script = Script(*command, ranks=ranks, torchrun=ranks > 1, PYTHON_EXEC=str(forked_python))
    script.wait_until(lambda: lines_of(out / "log.jsonl") >= 2)
    if ranks > 1:
        os.kill(script.pids()[-1], number)
    else:
        os.killpg(script.pids()[0], number)  # ctrl-C reaches all processes of a terminal
    printed = script.output(timeout=120)
    assert script.process.returncode == code and "Traceback" not in printed, printed[-3000:]
    done = log(out)[-1]["step"]
    (checkpoint,) = checkpoints(out)
    assert checkpoint.name == f"checkpoint-{done:06d}" and torn(checkpoint) is None
    (last,) = [line for line in printed.splitlines() if line.startswith("stopped after step")]
    launched = "torchrun --nproc_per_node 2 -- train.py" if ranks > 1 else "python train.py"
    assert (
        f"step {done} of 1000000 by {signal.Signals(number).name}; to resume: {launched} --algo sft"
        in last
    )
    assert last.endswith(" --resume")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second):
    child = os.fork()
    if child == 0:
        signal.signal(second, signal.SIG_DFL)  # a shell's background jobs ignore ctrl-C
        with stop_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            if noted == [signal.SIGTERM]:
                signal.raise_signal(second)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


@slow
@pytest.mark.parametrize(
    "change, message, torchrun",
    [
        (["--model", "./nowhere"], "no such model folder", True),
        (["--group", "1"], "--group 1", False),
    ],
)
def test_of_two_ranks_an_error_is_one_line_of_one(
    tmp_path, world, forked_python, change, message, torchrun
):
    """Nothing of the other rank, no usage, no traceback but torchrun's own."""
    command = [*flags(world, tmp_path / "a", steps=1), *change]
    out = run(*command, ranks=2, torchrun=torchrun, expect=1, PYTHON_EXEC=str(forked_python))
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "usage:" not in out and out.count("Traceback") <= 1 and 'train.py", line' not in out


@pytest.mark.parametrize(
    "content, message",
    [
        ("--data 'no end\n", "f.txt, line 1: cannot be read: No closing quotation"),
        ("--lr 1\n@f.txt\n", "f.txt, line 2: @f.txt: a flag file that includes itself"),
        (
            "--lr 1\n@nowhere.txt\n",
            "f.txt, line 2: nowhere.txt: cannot be read: No such file or directory",
        ),
        ("--lr 1\n--\n", "f.txt, line 2: -- is not a flag"),
        (
            "--lr 1\n\n--lr abc # no number\n--seed 3\n",
            "f.txt, line 3: --lr abc: expected a finite number",
        ),
        ("--lrr=3\n", "f.txt, line 1: unrecognized arguments: --lrr=3"),
        ("--lr 1 extra\n", "f.txt, line 1: unrecognized arguments: extra"),
        ("--algo max\n", "f.txt, line 1: argument --algo: invalid choice: 'max'"),
        ("--group 1\n", "f.txt, line 1: --group 1: expected at least 2"),
        ("--seed\n", "f.txt, line 1: argument --seed: expected one argument"),
        ("--lr 1\n".encode("utf-16"), "f.txt: not UTF-8 text"),
        (None, "f.txt: cannot be read: No such file or directory"),
    ],
)
def test_an_error_of_a_flag_file_names_file_and_line(
    tmp_path, monkeypatch, capsys, content, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "f.txt").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", "@f.txt"])
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


def test_an_error_of_the_command_line_names_no_flag_file(tmp_path, capsys):
    (tmp_path / "f.txt").write_text("--lr 1\n")
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", f"@{tmp_path}/f.txt", "--lr", "abc"])
    assert capsys.readouterr().err.startswith("error: --lr abc: ")


@pytest.mark.parametrize(
    "mark", [b"", b"\xef\xbb\xbf"], ids=["without a mark", "with a byte order mark"]
)
@pytest.mark.parametrize(
    "text, out",
    [
        (r"--out C:\runs\a", r"C:\runs\a"),
        (r'--out "C:\my runs\a"  # a comment', r"C:\my runs\a"),
        ("--out=läufe", "läufe"),
        ("--out ''", ""),
    ],
)
def test_a_flag_file_is_read_as_it_is_written(tmp_path, mark, text, out):
    """A backslash is a backslash, and the flags that a run writes are read back as they were."""
    (tmp_path / "f.txt").write_bytes(mark + f"{text}\n--model 'a \"b\" # c'\n--data d\n".encode())
    args = train.parse_args([f"@{tmp_path}/f.txt"])
    assert (args.out, args.model) == (out, 'a "b" # c')
    args.model = 'it\'s a\\ "b" #1'
    (tmp_path / "again.txt").write_text("\n".join(flag_lines(args)), encoding="utf-8")
    assert train.parse_args([f"@{tmp_path}/again.txt"]) == args


def test_log_lines_that_are_lost_on_resume_are_counted(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b'{"step": 1}\ngarbled\n{"step": null}\n\xff\xfe\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo'
    )
    run_folder._rewind(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (
        capsys.readouterr().out == f"{log}: dropped 3 of 6 lines, which are not entries of a step\n"
    )
    run_folder._rewind(log, 2)
    log.unlink()
    run_folder._rewind(log, -1)  # a run that begins
    assert capsys.readouterr().out == ""
    run_folder._rewind(log, 2)
    assert (
        capsys.readouterr().out
        == f"{log}: no such file, so the log up to step 2 is lost; a new one begins\n"
    )


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda state: state.clear(), "KeyError: 'state'"),
        (lambda state: state.pop("param_groups"), "KeyError: 'param_groups'"),
        (
            lambda state: state["state"].update({99: {"step": torch.tensor(1.0)}}),
            "IndexError: list index out of range",
        ),
        (
            lambda state: state["param_groups"].pop(),
            "ValueError: loaded state dict has a different number of parameter groups",
        ),
        (lambda state: state.update(weights=[]), "ValueError: zip"),
    ],
)
def test_a_file_that_is_no_state_of_the_optimizer_is_named(tmp_path, change, error):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}])
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    change(state)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(
        model.ModelError, match=f"optimizer.pt: not the state of this run's optimizer: {error}"
    ):
        fsdp.load_optimizer(optimizer, tmp_path / "optimizer.pt")


@pytest.mark.parametrize(
    "given, said",
    [
        (["--lr", "0"], ["--lr 0: no step changes the weights"]),
        (
            ["--w_accuracy", "0", "--w_format", "0"],
            ["--w_accuracy 0, --w_format 0 and --len_bonus 0: every reward is 0, so"],
        ),
        (
            ["--w_accuracy", "0", "--w_format", "0", "--algo", "tgrpo"],
            ["every reward is 0 but for the temporal bonus"],
        ),
        (["--w_accuracy", "0", "--w_format", "0", "--algo", "sft"], []),
        (["--w_accuracy", "0"], []),
        (
            ["--warmup", "10", "--steps", "10"],
            ["--warmup 10: the run has 10 steps, so the learning rate rises until its end"],
        ),
        (["--warmup", "9", "--steps", "10"], []),
    ],
)
def test_flags_that_keep_a_run_from_learning_are_named_before_it(capsys, given, said):
    train.warn(train.parse_args(["--model", "m", "--data", "d", *given]))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(said) and all(text in line for text, line in zip(said, printed))


def test_every_bad_record_is_named(tmp_path, world, capsys):
    records = json.loads((world / "train.json").read_text())[:1]
    (tmp_path / "bad.json").write_text(json.dumps(records + [records[0] | {"solution": None}] * 12))
    train.read_data(
        train.parse_args(
            ["--model", "m", "--data", str(tmp_path / "bad.json"), "--media_root", str(world)]
        )
    )
    printed = capsys.readouterr().out
    assert all(f"skipped: {tmp_path}/bad.json, record {i}" in printed for i in range(1, 13))


def test_bad_samples_are_skipped_named_and_counted(tmp_path, world):
    """A broken video, a missing one, a record without solution: none is replaced."""
    records = json.loads((world / "train.json").read_text())[:4]
    (tmp_path / "broken.y4m").write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    records[1]["path"], records[2]["path"] = (
        str(tmp_path / "broken.y4m"),
        str(tmp_path / "nowhere.y4m"),
    )
    records.append(records[0] | {"solution": None, "problem_id": 77})
    (tmp_path / "bad.json").write_text(json.dumps(records))
    (tmp_path / "held.json").write_text(json.dumps(records[:4]))
    files = dict(data=tmp_path / "bad.json", eval_data=tmp_path / "held.json", media_root=world)
    out = run(*flags(world, tmp_path / "a", steps=2, prompts=4, **files))
    assert "skipped: " in out and "record 4 (id 77): no 'solution'" in out
    assert "record 1: " in out and "broken.y4m" in out and "nowhere.y4m: no such file" in out
    first, *steps = log(tmp_path / "a")
    assert [s["skipped_samples"] for s in steps] == [2, 2]
    assert (
        first["eval_failures"] == 2 and first["eval_questions"] == 4
    )  # a failure is a wrong answer, and is counted


def test_steps_without_any_sample_are_skipped(tmp_path, world):
    records = json.loads((world / "train.json").read_text())[:2]
    (tmp_path / "half.json").write_text(
        json.dumps([records[0], records[1] | {"path": "./nowhere.y4m"}])
    )
    run(
        *flags(
            world,
            tmp_path / "half",
            steps=4,
            prompts=1,
            data=tmp_path / "half.json",
            media_root=world,
        )
    )
    entries = log(tmp_path / "half")
    assert sorted(e["skipped_samples"] for e in entries) == [0, 0, 1, 1]
    assert all(e["skipped_update"] and "reward" not in e for e in entries if e["skipped_samples"])


@pytest.mark.parametrize("steps, judged", [(3, 3), (50, 10)])
def test_a_run_ends_when_most_samples_cannot_be_loaded(tmp_path, world, steps, judged):
    """All files are there, but 3 of the 4 samples of every step cannot be decoded."""
    records = json.loads((world / "train.json").read_text())[:4]
    (tmp_path / "broken.y4m").write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    records[1:] = [r | {"path": str(tmp_path / "broken.y4m")} for r in records[1:]]
    (tmp_path / "bad.json").write_text(json.dumps(records))
    command = flags(
        world, tmp_path / "bad", "grpo", steps=steps, data=tmp_path / "bad.json", media_root=world
    )
    message = f"error: {3 * judged} of the {4 * judged} samples of {judged} steps in a row "
    message += "could not be loaded; the last: "
    with pytest.raises(SystemExit, match=message + ".*bad.json, record [123]: .*broken.y4m: "):
        train.main([str(x) for x in command[1:]])
    assert [e["skipped_samples"] for e in log(tmp_path / "bad")] == [3] * (judged - 1)
    assert not list((tmp_path / "bad").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "failures, ends",
    [
        ([2, 2, 2], False),  # half of the samples of a run of 3 steps
        ([0, 4, 3], True),  # 7 of 12
        ([4, 4], False),  # a resumed run: its first steps are not known
        ([4] * 9, False),
        ([0] * 5 + [4] * 10, True),
        ([4, 4, 4, 4, 4, 4, 4, 4, 4, 3], True),  # one good sample in forty
    ],
)
def test_most_samples_of_ten_steps_or_of_a_whole_run(failures, ends):
    errors = LoadErrors(4, 3 if len(failures) < 4 else 50)

    def fail():
        for n in failures:
            errors.next_step()
            errors.usable([(i, data.DataError("x.mp4: no such file")) for i in range(n)])
            errors.check()

    if ends:
        with pytest.raises(data.DataError, match="not be loaded; the last: x.mp4: no such file"):
            fail()
    else:
        fail()


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_missing_media_end_a_run_before_its_model_is_loaded(tmp_path, world, flag):
    """No run folder is left, so the corrected command starts. (A missing model would be next.)"""
    records = json.loads((world / "train.json").read_text())[:4]
    there = [r | {"path": str(world / r["path"])} for r in records]
    (tmp_path / "there.json").write_text(json.dumps(there))
    (tmp_path / "most.json").write_text(json.dumps([there[0], *records[1:]]))
    files = {"data": tmp_path / "there.json", "eval_data": tmp_path / "there.json"} | {
        flag: tmp_path / "most.json"
    }
    command = [
        str(x) for x in flags(world, tmp_path / "a", steps=1, **files, model="./nowhere")[1:]
    ]
    message = f"error: .*most.json: the media of 3 of 4 records are missing: 3 in {tmp_path}/media;"
    message += " the first: record 1, "
    root = (
        f"{tmp_path}/media/train_0000.*; --media_root was not set, so paths start from {tmp_path}$"
    )
    with pytest.raises(SystemExit, match=message + root):
        train.main(command)
    assert not (tmp_path / "a").exists()
    with pytest.raises(SystemExit, match="no such model folder"):
        train.main([*command, "--media_root", str(world)])


def test_a_few_missing_media_are_counted_before_the_run(tmp_path, world, capsys):
    records = json.loads((world / "train.json").read_text())[:4]
    (tmp_path / "few.json").write_text(
        json.dumps([*records[:2], *(r | {"path": "nowhere.y4m"} for r in records[2:])])
    )
    args = train.parse_args(
        ["--model", "m", "--data", str(tmp_path / "few.json"), "--media_root", str(world)]
    )
    assert len(train.read_data(args)[0]) == 4
    assert (
        f"the media of 2 of 4 records are missing: 2 in {world}; the first: record 2"
        in capsys.readouterr().out
    )


def test_held_out_media_that_cannot_be_read_are_an_error(tmp_path, world):
    (tmp_path / "broken.y4m").write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    record = json.loads((world / "train.json").read_text())[0] | {
        "path": str(tmp_path / "broken.y4m")
    }
    (tmp_path / "held.json").write_text(json.dumps([record, record]))
    command = flags(world, tmp_path / "a", steps=1, eval_data=tmp_path / "held.json")
    with pytest.raises(
        SystemExit,
        match="held.json: none of the 2 held-out media could be loaded; the first: .*broken.y4m: ",
    ):
        train.main([str(x) for x in command[1:]])


def test_a_gradient_that_is_not_finite_skips_the_update(world, prompts):
    policy = model.Policy.load(world / "model").train()
    args = train.parse_args(["--model", "m", "--data", "d"])
    optimizer = make_optimizer(policy, args)
    before = [p.clone() for p in policy.parameters()]
    (policy(prompts[:1], [[torch.arange(20, 30)]])[0].sum() * float("nan")).backward()
    made = update(policy, optimizer, 0, args)
    assert made.skipped and math.isnan(made.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize(
    "change",
    [
        dict(
            beta=0.5,
            kl="k2",
            average="constant",
            norm="none",
            mask_truncated=True,
            len_bonus=0.2,
            len_lo=1,
            len_hi=30,
        ),
        dict(
            beta=0.0,
            average="token",
            norm="batch",
            drop_zero_std=True,
            schedule="cosine",
            warmup=1,
            top_p=0.95,
            temperature=0.9,
        ),
    ],
)
def test_the_flags_of_reward_and_loss(tmp_path, world, cold_start, change):
    run(*flags(world, tmp_path / "a", steps=3, model=cold_start, grad_checkpointing=0, **change))
    entries = log(tmp_path / "a")
    assert any(e["grad_norm"] > 0 for e in entries) and (entries[-1]["kl"] > 0) == (
        change["beta"] > 0
    )
    assert entries[0]["length_bonus"] >= 0 and all(
        e["skipped_update"] == (e["trained_groups"] == 0) for e in entries
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        pytest.param(dict(temporal="advantage", shuffle="grid"), marks=slow),
        pytest.param(dict(temporal="contrast"), marks=slow),
    ],
)
def test_tgrpo_on_videos_and_images_mixed(tmp_path, world, cold_start, change):
    """On two ranks with one prompt each: an image beside a video, two images, two videos."""
    records = json.loads((world / "train.json").read_text())
    videos = [r for r in records if r["data_type"] == "video"][:4]
    images = [r for r in records if r["data_type"] == "image"][:4]
    (tmp_path / "mixed.json").write_text(json.dumps(videos + images))
    extra = dict(model=cold_start, prompts=2, data=tmp_path / "mixed.json", media_root=world)
    run(*flags(world, tmp_path / "a", "tgrpo", steps=4, **extra, **change), ranks=2)
    entries = log(tmp_path / "a")
    images = [e["temporal_not_applicable"] for e in entries]  # their share of a step's prompts
    assert sum(images) == 2.0 and 0.5 in images
    contrast = change.get("temporal") == "contrast"
    for e in entries:
        if not contrast:
            assert 0 <= e["temporal_vacuous"] <= e["temporal_passed"]
            assert e["temporal_passed"] <= 1 - e["temporal_not_applicable"]
        if e["temporal_not_applicable"] < 1:
            assert ("probability_drop" if contrast else "shuffled_accuracy") in e
    run(*flags(world, tmp_path / "b", "grpo", steps=1, **extra))
    assert (
        log(tmp_path / "b")[0]["accuracy"] == entries[0]["accuracy"]
    )  # the ordered rollouts are those of GRPO


@slow
def test_tgrpo_on_text_beside_images_and_videos(tmp_path, world, cold_start, builder):
    """Two of each, three a step, with a reference; on two ranks as on one. Text has no order to
    shuffle, and no part in the means over frames and pixels."""
    records = json.loads((world / "train.json").read_text())
    mixed = [r for r in records if r["data_type"] == "video"][:2]
    mixed += [r for r in records if r["data_type"] == "image"][:2]
    about = dict(data_type="text", problem_type="numerical", solution="<answer>7</answer>")
    mixed += [about | {"problem": question} for question in ("3 and 4?", "9 less 2?")]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    extra = dict(model=cold_start, prompts=3, steps=2, beta=0.1, lr=1e-4)
    extra |= dict(data=tmp_path / "mixed.json", media_root=world)
    for ranks in (1, 2):
        run(*flags(world, tmp_path / f"{ranks}", "tgrpo", **extra), ranks=ranks)
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    samples = data.load_samples(tmp_path / "mixed.json", media_root=world)
    loader = data.Loader(samples, None, prompts=3)
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        drawn = [loader.sample(step, i) for i in range(3)]
        shown = [builder(s).frames_x_pixels for s in drawn if s.data_type != "text"]
        assert a["frames"] == sum(frames for frames, _ in shown) / len(shown)
        assert a["pixels"] == sum(pixels for _, pixels in shown) / len(shown)
        still = sum(s.data_type != "video" for s in drawn)
        assert a["temporal_not_applicable"] == pytest.approx(still / 3)
        assert a["skipped_samples"] == 0 and a["grad_norm"] > 0 and a["mismatch"] < 1e-5
        for key in a.keys() - {"seconds", "tokens_per_second"}:
            assert b[key] == pytest.approx(a[key], abs=1e-4), key
    assert_same_steps(weights(tmp_path / "1", 2), weights(tmp_path / "2", 2))
    lines = [json.loads(x) for x in (tmp_path / "1" / "samples.jsonl").read_text().splitlines()]
    text = [x for x in lines if x["data_type"] == "text"]
    assert text and all(x["temporal_bonus"] == 0 and "orders" not in x for x in text)
    assert '"sheet":null' in report.page(tmp_path / "1")  # the card of a text has no picture


@slow
def test_a_file_of_text_alone(tmp_path, world):
    """GSM8K's form, on two ranks: a cold start, then T-GRPO. Nothing was shown."""
    sums = [(3, 4), (5, 2), (8, 1), (6, 6)]
    lines = [f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}" for a, b in sums]
    records = [{"question": f"{a} and {b}?", "answer": x} for (a, b), x in zip(sums, lines)]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    extra = dict(data=file, eval_data=file)
    run(*flags(world, tmp_path / "sft", "sft", steps=2, **extra), ranks=2)
    start, first, second = log(tmp_path / "sft")
    assert start["eval_questions"] == 4 and start["eval_failures"] == 0
    assert second["loss"] < first["loss"] and second["eval_loss"] < start["eval_loss"]
    extra |= dict(model=tmp_path / "sft", temporal="advantage")
    run(*flags(world, tmp_path / "rl", "tgrpo", steps=1, **extra), ranks=2)
    (_, entry) = log(tmp_path / "rl")
    assert entry["temporal_not_applicable"] == 1 and entry["temporal_bonus"] == 0
    assert entry["response_length"] > 0 and entry["skipped_samples"] == 0
    for key in ("frames", "pixels", "shuffled_accuracy"):
        assert key not in first and key not in entry


def sorted_frames(media):
    return sorted(frame.numpy().tobytes() for frame in media.frames)


def test_shuffled_prompts_differ_in_their_pixels_only(world, builder, prompts, policy):
    """The same tokens, the same time, the same frames in another order; images are left out."""
    args = train.parse_args(["--algo", "tgrpo", *FILES, "--group", "4", "--max_new", "3"])
    placed = list(enumerate(prompts))
    shuffled = tgrpo.shuffle_prompts(placed, [None] * 6, 0, args)
    assert [s.position for s in shuffled] == [0, 1, 3, 4]
    for s in shuffled:
        (before,), (after,) = prompts[s.position].media, s.prompt.media
        assert s.prompt.ids is prompts[s.position].ids and s.visual_embeds is None
        assert after.seconds_per_grid == before.seconds_per_grid and after.grid == before.grid
        assert sorted_frames(after) == sorted_frames(before)
        assert not torch.equal(after.frames, before.frames)
        assert torch.equal(after.frames, before.frames[s.order])
    found = tgrpo.run_on_shuffled(policy, placed, None, [None] * 6, builder, 0, args)
    assert sorted(found) == [0, 1, 3, 4]
    assert all(len(x.accuracies) == 2 and x.drops is None for x in found.values())


@pytest.mark.parametrize("shuffle", ["frame", "grid"])
def test_the_probability_drop_is_that_of_a_forward_pass_of_its_own(policy, prompts, shuffle):
    """Packed rows, all responses of a group on one prompt, against one response at a time."""
    how = "--algo tgrpo --temperature 0.8 --group 3 --row_tokens 500".split()
    args = train.parse_args([*how, *FILES, "--shuffle", shuffle])

    def total(prompt, response):
        return policy([prompt], [[response]], temperature=0.8)[0].sum()

    with torch.no_grad():
        visual_embeds = policy.encode(prompts)
        groups = generate(policy, prompts, 3, max_new=6, temperature=0.8)
        for group in groups:  # the sampler's log-probs have no part in it: they may be rounded
            group.logps = [x + 1 for x in group.logps]
        shuffled = tgrpo.shuffle_prompts(list(enumerate(prompts)), visual_embeds, 0, args)
        ordered = dict(enumerate(zip(groups, visual_embeds)))
        found = tgrpo.rescore(policy, shuffled, ordered, args)
        assert sorted(found) == [0, 1, 3, 4]
        for s in shuffled:
            expected = [
                1 - (total(s.prompt, r) - total(prompts[s.position], r)).exp()
                for r in groups[s.position].responses
            ]
            expected = [max(0.0, float(x)) for x in expected]
            assert found[s.position].order == s.order
            assert found[s.position].drops == pytest.approx(expected, abs=1e-5)
    assert max(max(x.drops) for x in found.values()) > 1e-3


def assert_same_steps(one, two):
    """Two bounds: where a gradient is only rounding, Adam's step has its full size all the same."""
    for name in one:
        difference = (one[name] - two[name]).abs()
        assert difference.mean() < 5e-6 and difference.max() < 1e-3, name


@slow
@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
def test_several_updates_on_one_rollout(tmp_path, world, cold_start, variant):
    """By the last update the policy has moved away from the one that sampled. On 1 rank as on 2."""
    extra = dict(steps=1, model=cold_start, prompts=6, variant=variant, minibatches=3)
    if variant != "cispo":
        extra |= dict(dual_clip=3.0)
    run(*flags(world, tmp_path / "one", **extra))
    run(*flags(world, tmp_path / "two", **extra), ranks=2)
    one, two = log(tmp_path / "one")[0], log(tmp_path / "two")[0]
    assert one["mismatch"] < 1e-5 and abs(one["ratio"] - 1) > 1e-6 and one["grad_norm"] > 0
    assert (
        two["ratio"] == pytest.approx(one["ratio"], abs=1e-4) and two["accuracy"] == one["accuracy"]
    )
    assert_same_steps(weights(tmp_path / "one", 1), weights(tmp_path / "two", 1))


def test_the_reward_is_the_weighted_sum_of_its_parts(tmp_path, prompts):
    """Two responses: right, 2 tokens, not in the format; wrong, 3 tokens, in the format."""
    file = tmp_path / "own.py"
    file.write_text("def brief(response, sample): return 0\nkind = brief\n")
    own = ["--reward", f"{file}:brief=-3", f"{file}:kind"]
    weights = "--w_accuracy 2 --w_format 0.5 --len_bonus 0.2 --len_lo 2 --len_hi 2".split()
    args = train.parse_args(["--algo", "grpo", *FILES, *weights, *own])
    responses = [torch.tensor([5, 6]), torch.tensor([5, 6, 7])]
    group = Group(prompts[0], responses, truncated=[False, False], entropies=[torch.ones(2)] * 2)
    texts = ["red", "<think>a</think><answer>red</answer>"]
    extra = {"brief": [0.25, 0.5], "kind": [1.0, 0.0]}
    scored = train.score_group(0, group, texts, [1.0, 0.0], extra, None, args)
    assert scored.reward == pytest.approx([2 + 0 + 0.2 - 0.75 + 1, 0 + 0.5 + 0 - 1.5 + 0])
    assert scored.parts == {
        "accuracy": [1.0, 0.0],
        "format": [0.0, 1.0],
        "length_bonus": [0.2, 0.0],
        **extra,
    }


@pytest.mark.parametrize(
    "with_gradient, updates, expected",
    [
        ("11111111", 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("11111111", 5, [[0, 1], [2, 3], [4], [5, 6], [7]]),
        ("1111111", 2, [[0, 1, 2, 3], [4, 5, 6]]),
        ("111", 5, [[0], [1], [2]]),  # fewer groups than updates
        ("00001111", 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),  # no update without a gradient
        ("0010", 3, [[0, 1, 2, 3]]),
        ("000", 2, [[0, 1, 2]]),
        ("", 2, [[]]),
    ],
)
def test_groups_are_shared_out_to_the_updates(with_gradient, updates, expected):
    assert train.split_evenly([x == "1" for x in with_gradient], updates) == expected


@pytest.mark.parametrize(
    "temporal, reward, bonus, taught",
    [
        (
            "reward",
            [2, 2, 2, 2],
            [0.3] * 4,
            False,
        ),  # all correct: the bonus is the same for all, and subtracting the mean removes it
        ("advantage", [2, 2, 2, 2], [0.3] * 4, True),
        ("contrast", [2, 2, 2, 2], [0.3, 0.1, 0.0, 0.2], True),
        ("contrast", [2, 2, 2, 2], [0.3] * 4, False),
        ("advantage", [0, 0, 0, 0], [0.0] * 4, False),
        ("contrast", [0, 0, 0, 0], [0.0] * 4, False),
        ("reward", [2, 1, 1, 1], [0.0] * 4, True),
        (
            "reward",
            [1.0, 1.3, 1.3, 1.3],
            [0.3, 0.0, 0.0, 0.0],
            False,
        ),  # rewards differ, what the gradient sees does not
    ],
)
@pytest.mark.parametrize("norm", grpo.NORMS)
def test_a_group_teaches_where_the_gradient_sees_an_advantage(
    temporal, reward, bonus, taught, norm
):
    how = ["--algo", "tgrpo", "--model", "m", "--data", "d", "--group", "4"]
    args = train.parse_args([*how, "--temporal", temporal, "--norm", norm])
    reward = torch.tensor([reward, [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    bonus = torch.tensor([bonus, [0.0] * 4], dtype=torch.float64)
    assert train.advantages(reward, bonus, args).any(dim=1).tolist() == [taught, True]
    assert train.advantages(reward[:0], bonus[:0], args).shape == (0, 4)


def test_what_a_step_logs_of_its_updates_by_hand():
    sums = dict(loss=0.5, tokens=10, ratio=11.0, clipped=1.0, kl=0.0, entropy=4.0, mismatch=0.1)
    one = LossTotals(**sums), Update(2.0)
    sums = dict(loss=0.1, tokens=30, ratio=29.0, clipped=3.0, kl=2.0, entropy=2.0, mismatch=9.0)
    two = LossTotals(**sums), Update(3.0)
    infinite = LossTotals(**(sums | dict(loss=math.nan))), Update(math.inf, skipped=True)
    empty = LossTotals(), Update(skipped=True)

    def trained(*made):
        return trained_metrics([total for total, _ in made], [update for _, update in made])

    def counted(*made):
        entry = update_metrics([update for _, update in made])
        names = ("updates", "skipped_updates", "skipped_update", "grad_norm")
        return tuple(entry[name] for name in names)

    expected = dict(loss=0.3, ratio=1.0, clipped=0.1, kl=0.05, entropy_trained=0.15, mismatch=0.01)
    assert trained(one, two) == pytest.approx(expected)
    assert trained(empty, one, two) == pytest.approx(expected)
    assert trained(one, infinite)["loss"] == 0.5
    assert trained(empty) == {"kl": 0.0}
    assert counted(one, two) == (2, 0, False, 3.0)
    assert counted(empty) == (0, 1, True, 0.0)
    assert counted(one, infinite) == (1, 1, False, math.inf)


@pytest.fixture(scope="module")
def one_step(world, cold_start):
    """A function: a step of GRPO on eight prompts -> (log entry, samples, norms of updates)."""
    policy = model.Policy.load(cold_start, grad_checkpointing=0)
    builder, samples = (
        data.PromptBuilder(policy.folder, min_pixels=784),
        data.load_samples(world / "train.json"),
    )
    prompts = [(i, builder(samples[i])) for i in range(8)]

    def do(*changed):
        how = ["--model", "m", "--data", "d", "--max_new", "16", "--group", "4", "--train_vision"]
        args, made = train.parse_args([*how, *changed]), []

        def optimize(step):
            made.append(float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])))
            policy.zero_grad()
            return Update(made[-1])

        this_run = train.Run(args, policy, None, builder, None, optimize)
        entry, lines, _ = train.grpo_step(this_run, prompts, 0)
        return entry, lines, made

    return do


def test_as_many_updates_as_groups_allow(one_step):
    first, _, _ = one_step()
    taught = round(8 * (1 - first["zero_std_groups"]))
    assert 2 < taught < 8
    for updates in (2, taught, taught + 1, 8):
        entry, _, made = one_step("--minibatches", str(updates))
        assert entry["updates"] == len(made) == min(updates, taught) and entry[
            "skipped_updates"
        ] == 0 < min(made)
        assert entry["grad_norm"] == max(made)
    dropped, _, _ = one_step("--drop_zero_std")
    assert (dropped["trained_groups"], dropped["zero_std_groups"]) == (
        taught,
        first["zero_std_groups"],
    )


def test_entropy_is_of_everything_that_was_sampled(one_step):
    """Trained groups are those that still vary: their entropy hides that of the others."""
    first, _, _ = one_step()
    assert 0 < first["zero_std_groups"] and abs(first["entropy"] - first["entropy_trained"]) > 1e-3
    masked, _, _ = one_step(
        "--mask_truncated", "--max_new", "2"
    )  # all are cut off, so that no token is trained
    assert masked["truncated"] == 1 and masked["entropy"] > 0
    assert (
        not {"entropy_trained", "ratio", "loss", "mismatch"} & set(masked)
        and masked["skipped_updates"] == 1
    )


def test_an_update_under_autocast_is_seen_by_the_next_forward(world, prompts):
    """autocast keeps bf16 copies of the weights; the next update must not train on old ones."""
    policy = model.Policy.load(world / "model").train()
    args = train.parse_args(["--model", "m", "--data", "d", "--lr", "1e-2"])
    optimizer = make_optimizer(policy, args)
    responses = [[torch.arange(20, 30)]]
    with torch.autocast("cpu", torch.bfloat16):
        policy(prompts[:1], responses)[0].sum().backward()
        update(policy, optimizer, 0, args)
        within = policy(prompts[:1], responses)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy(prompts[:1], responses)[0], within)


@slow
def test_dynamic_sampling_refills_up_to_its_bound_and_says_what_is_left(
    tmp_path, world, cold_start
):
    dapo = dict(
        drop_zero_std=True,
        refill=3,
        average="token",
        clip_high=0.28,
        mask_truncated=True,
        prompts=4,
    )
    run(*flags(world, tmp_path / "a", steps=2, model=cold_start, **dapo), ranks=2)
    for entry in log(tmp_path / "a"):
        assert 0 < entry["trained_groups"] <= 4 and entry["refills"] <= 3
        assert entry["trained_groups"] == 4 or entry["refills"] == 3
    out = run(*flags(world, tmp_path / "b", steps=1, **dapo))  # a random model: every reward is 0
    assert "step 1: 0 of 4 groups have an advantage after 3 refills" in out
    (entry,) = log(tmp_path / "b")
    assert (entry["trained_groups"], entry["refills"], entry["skipped_update"]) == (0, 3, True)
    start = load_file(world / "model" / "model.safetensors")
    assert all(
        torch.equal(x, start[name]) for name, x in weights(tmp_path / "b", 1).items()
    )  # no gradient, no step


def test_a_run_that_teaches_nothing_says_so_once_and_counts_its_updates(tmp_path, world):
    command = flags(world, tmp_path / "a", steps=21, prompts=1, log_every=7)
    out = run(*command, "--max_new", 2, "--group", 2)
    assert out.count("no learning in") == 1
    assert "step 10: no learning in 10 steps; 100% of the responses are truncated" in out
    assert "truncated at --max_new 2: raise it" in out
    assert "zero_std_groups 1.000  truncated 1.000  skipped_updates 14  " in out
    entries = log(tmp_path / "a")
    assert all(
        (e["updates"], e["skipped_updates"], e["skipped_update"]) == (0, 1, True) for e in entries
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(grad_norm=math.nan), "not finite: lower --lr"),
        (dict(truncated=0.6), "60% of the responses are truncated at --max_new 768"),
        (dict(format=0.0), "no response has the format"),
        (dict(), "the same reward"),
    ],
)
def test_advice(change, words):
    entry = dict(grad_norm=0.0, truncated=0.1, format=0.4, accuracy=0.0) | change
    assert words in advice(entry, train.parse_args(["--model", "m", "--data", "d"]))


def test_supervised_runs_log_a_validation_loss(tmp_path, world, cold_start):
    run(
        *flags(
            world, tmp_path / "a", "sft", steps=1, eval_data=world / "few.json", model=cold_start
        )
    )
    run(*flags(world, tmp_path / "b", "sft", steps=1, eval_data=world / "few.json"))
    assert 0 < log(tmp_path / "a")[0]["eval_loss"] < 2 < log(tmp_path / "b")[0]["eval_loss"]


def test_every_flag_file_is_a_command(world):
    for file in sorted((ROOT / "configs").glob("*.txt")):
        parse = eval.parse_args if file.stem == "toy_eval" else train.parse_args
        assert (
            file.read_text().startswith("# ")
            and parse([f"@{file}", "--model", "m", "--data", "d"]).out != ""
        )


def test_a_frozen_vision_tower_stays_as_it_is(tmp_path, world, cold_start):
    run(*without_vision(flags(world, tmp_path / "a", steps=1, model=cold_start)))
    before, after = weights(cold_start, 60), weights(tmp_path / "a", 1)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)


@contextlib.contextmanager
def files_of_at_most(size):
    """Inside, a write beyond this size of a file fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_unwritable_run_folder_and_full_disk(tmp_path, world):
    (tmp_path / "file").write_text("")
    assert "run folder" in here(*flags(world, tmp_path / "file" / "a", steps=1))
    command = [*flags(world, tmp_path / "a", "sft", steps=2), "--resume"]
    for before, message in (
        ([], "The run has no checkpoint before it"),
        (["checkpoint-000001"], "The checkpoint before it is whole; --resume resumes from there"),
    ):
        if before:
            assert here(*flags(world, tmp_path / "a", "sft", steps=1)) is None
        with files_of_at_most(2**20):
            error = here(*command)
        assert "checkpoint-000002 could not be written" in error and message in error
        assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == before


def test_a_write_that_fails_names_its_file_and_leaves_what_was_there(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    page, log = tmp_path / "report.html", tmp_path / "log.jsonl"
    report.main([str(tmp_path)])
    whole = page.read_text()
    with files_of_at_most(1000):
        with pytest.raises(SystemExit, match=f"error: .*File too large: '{page}'"):
            report.main([str(tmp_path)])
        message = f"error: .*File too large: '{log}'; to resume: python .* --resume"
        with pytest.raises(SystemExit, match=message), resumable():
            append(log, [{"step": i} for i in range(1000)])
    assert page.read_text() == whole and not list(tmp_path.glob("*.partial"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append("/dev/full", [{"step": 1}])


@pytest.mark.parametrize("script, required", [(train, FILES), (eval, FILES), (bench, [])])
def test_no_flag_takes_a_number_that_makes_no_sense(script, required, capsys):
    """Of every flag that is a number: nan, infinity, negative numbers and words are errors."""
    defaults = {
        k: v[0] if isinstance(v, list) else v for k, v in vars(script.parse_args(required)).items()
    }
    numbers = {
        k: v for k, v in defaults.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    assert len(numbers) >= 8
    for name, default in numbers.items():
        values = [
            "nan",
            "inf",
            "-1",
            "-0.5",
            "-1e-3",
            "-inf",
            "many",
            "",
            *(["2.5"] if isinstance(default, int) else []),
        ]
        for value in (
            values[:1] + values[2:] if default == math.inf else values
        ):  # fps of eval.py: all frames
            with pytest.raises(SystemExit):
                script.parse_args([*required, f"--{name}", value])
            error = capsys.readouterr().err.splitlines()[-1]
            assert re.search(rf"error: --{name} \S*: expected ", error)


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        *[
            (name, 0, "at least 1")
            for name in (
                "steps",
                "prompts",
                "max_new",
                "minibatches",
                "row_tokens",
                "log_every",
            )
        ],
        *[(name, 0.0, "above 0") for name in ("fps", "cache_gb")],
        ("clip_grad", 0.0, "at least 1e-6"),
        ("temperature", 0.0, "at least 1e-6, at most 100"),
        ("temperature", 1e9, "at least 1e-6, at most 100"),
        ("top_p", 1.5, "above 0, at most 1"),
        ("clip_low", 2.0, "at least 0, at most 1"),
        ("correct", 1.0, "at least 0, below 1"),
        ("beta2", 1.0, "at least 0, below 1"),
        ("group", 1, "at least 2"),
        ("min_frames", 1, "at least 2"),
        ("decode_timeout", 1e6, "above 0, at most 86400"),
        ("max_frames", 2, "at least 4, the value of --min_frames"),
        ("image_max_pixels", 784, "at least 3136, the value of --min_pixels"),
        ("len_hi", 100, "at least 320, the value of --len_lo"),
        (
            "dual_clip",
            0.5,
            "above 1, and not with --variant cispo or sapo, which do not clip below",
        ),
        ("refill", 1, "--drop_zero_std beside it"),
        ("sp", "²", "auto or a divisor of the 1 ranks"),
    ],
)
def test_bounds_of_flags(flag, value, expected, capsys):
    """The flag, the value and what is expected, on one line."""
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", f"--{flag}={value}"])
    assert capsys.readouterr().err.endswith(f"error: --{flag} {value}: expected {expected}\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--model", "./nowhere"], "no such model folder"),
        (["--prompts", "0"], "--prompts 0: expected at least 1"),
        (["--norm", "max"], "invalid choice"),
        (["--group", "1"], "--group 1: expected at least 2"),
        (["--max_pixels", "100"], "--max_pixels 100: expected at least 784"),
        (["--temperature", "0"], "expected at least 1e-6"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
    ],
)
def test_bad_flags_end_with_one_clear_line(tmp_path, world, change, message):
    out = run(*flags(world, tmp_path / "a", steps=1), *change, expect=1)
    assert message in out and "Traceback" not in out


def test_everything_can_be_imported_where_there_is_no_fcntl():
    """As on Windows."""
    run(
        "-c", "import sys; sys.modules['fcntl'] = None; import eval, report, train, experiments.lab"
    )


def test_packing_keeps_order_and_budget():
    assert pack("abcde", [3, 4, 9, 1, 2], 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert pack("", [], 7) == []


@slow
@needs_shared
def test_the_real_tokenizer_template_and_video_through_a_training_step(tmp_path):
    """Qwen2.5-VL's own tokenizer and chat template, a small random model, Video-R1's example."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "chat_template.json",
        "preprocessor_config.json",
    ):
        shutil.copyfile(SHARED / "qwen2_5_vl" / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = toy.tiny_config(tokenizer, hidden=32, layers=2, heads=2, kv_heads=1, vision_hidden=32)
    real = json.loads((SHARED / "qwen2_5_vl" / "config.json").read_text())
    assert (config.video_token_id, config.image_token_id) == (
        real["video_token_id"],
        real["image_token_id"],
    )
    config.text_config.vocab_size = real["vocab_size"]
    toy.write_model(folder, config, tokenizer)
    record = dict(
        problem_id=0,
        problem="How does the video end?",
        options=["A. well", "B. badly"],
        data_type="video",
        problem_type="multiple choice",
        solution="<answer>A</answer>",
        path="./video_r1_example.mp4",
    )
    (tmp_path / "r.json").write_text(
        json.dumps(
            [
                record,
                record | {"path": "./image_10095.png", "data_type": "image"},
                record | {"path": "", "data_type": "text"},
            ]
        )
    )
    video, _, text = data.load_samples(tmp_path / "r.json", media_root=SHARED / "media")
    builder = data.PromptBuilder(folder)
    without = tokenizer.decode(builder(text).ids)
    prompt = builder(video)
    text = tokenizer.decode(prompt.ids)
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(f"{start}<|vision_start|><|video_pad|>")
    assert without == start + text.split("<|vision_end|>")[1]
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.media[0].tokens == 8 * 8 * 15 == text.count("<|video_pad|>")
    command = ["train.py", "--model", folder, "--data", tmp_path / "r.json"]
    command += ["--media_root", SHARED / "media", "--out", tmp_path / "run"]
    command += "--steps 1 --prompts 3 --group 2 --max_new 8 --beta 0.04 --train_vision".split()
    run(*command)
    (entry,) = log(tmp_path / "run")
    assert entry["frames"] == 8.5 and entry["response_length"] == 8 and entry["mismatch"] < 1e-4


@slow
def test_a_run_without_a_reference_resumes_when_its_first_model_is_gone(tmp_path, world):
    """All that it needs is in its checkpoint."""
    first = shutil.copytree(world / "model", tmp_path / "first")
    how = dict(algo="sft", model=first, data=world / "cot.json", prompts=2)
    run(*flags(world, tmp_path / "run", **how, steps=1))
    shutil.rmtree(first)
    run(*flags(world, tmp_path / "run", **how, steps=2, resume=True))
    assert [entry["step"] for entry in log(tmp_path / "run")] == [1, 2]
