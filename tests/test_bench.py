"""bench.py end to end at its smallest, on one rank and on two."""

import json

import pytest
import torch

import bench
import gpu_check
import model
import rollout
import simulate
import train
from conftest import run
from experiments.plain import PlainPolicy
from rollout import generate


@pytest.mark.slow
@pytest.mark.parametrize("ranks, shown", [(1, [4]), (2, [4, 8])])
def test_every_way_is_timed_and_gives_the_same_log_probs(tmp_path, world, ranks, shown):
    """On one rank the default model, on two a checkpoint."""
    small = ["--frames", *shown, *"--group 3 --new 4 --text 8 --height 56 --width 56".split()]
    small += ["--repeat", 1, *(["--model", world / "model"] if ranks > 1 else [])]
    file = tmp_path / "figures.json"
    output = run("bench.py", *small, "--json", file, ranks=ranks)
    figures = json.loads(file.read_text())
    assert figures["ranks"] == ranks and figures["commit"] and figures["flags"]["group"] == 3
    absent = {"graph"} if ranks > 1 else {"graph", "ranks"}
    names = ["plain", *(name.format(2) for name, way, _ in bench.STEPS if way not in absent)]
    for frames, result in zip(shown, figures["results"], strict=True):
        assert result["frames"] == frames and result["prompt_tokens"] == 8 + frames // 2 * 4
        assert [row["name"] for row in result["rows"]] == names
        for phase in set(bench.PHASES) - {"decode"}:
            assert all(row[phase] > 0 for row in result["rows"])
        assert result["difference"] < 1e-5
        share = result["decode_products_share"]  # None if the machine was busy
        decode = result["rows"][-1]["decode"]
        if share is not None and ranks == 1:
            assert share == pytest.approx(3 * figures["products_seconds"] / decode)
        assert 1 < result["expected"]["train"] < 3  # at most G
        assert 1 < result["expected"]["decode"] < 3
    assert all(name in output for name in names)
    assert output.rstrip().endswith(f"{file} holds these figures; `cat {file}` shows them")


def test_a_decode_step_multiplies_g_rows_by_every_weight(policy):
    weights = [m.weight for m in policy.net.modules() if isinstance(m, torch.nn.Linear)]
    rows = [torch.ones(3, w.shape[1], dtype=w.dtype) for w in weights]
    found = bench.matrix_products(rows, weights)
    assert len(found) == len(weights) > 20
    for x, w in zip(found, weights):
        torch.testing.assert_close(x, w.sum(1).expand(3, -1))
    assert set(bench.limits(policy, 3, torch.float64)) == {
        "matrix_flops",
        "copy_bytes",
        "products_seconds",
    }


def test_the_plain_way_gives_the_same_responses_and_gradients(world, policy, prompts):
    """For videos and images, with the same seeds: tokens, log-probs, entropies, and the gradient of
    the log-probs' sum."""
    plain = PlainPolicy.load(world / "model", dtype=torch.float64, grad_checkpointing=0)
    how = dict(max_new=6, seeds=range(len(prompts)))
    ours, theirs = generate(policy, prompts, 3, **how), generate(plain, prompts, 3, **how)
    for a, b in zip(ours, theirs, strict=True):
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]
        assert a.truncated == b.truncated
        for x, y in zip(a.logps + a.entropies, b.logps + b.entropies, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0, check_dtype=False)
    responses = [group.responses for group in ours]
    for x, y in zip(policy(prompts, responses), plain(prompts, responses), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0, check_dtype=False)
    for way in (policy, plain):
        way(prompts, responses)[0].sum().backward()
    grads = dict(plain.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 1e-2 for p in policy.parameters())
    for name, p in policy.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad,
                grads[name].grad,
                atol=1e-4 * float(p.grad.abs().max()) + 1e-9,
                rtol=0,
                msg=name,
            )


def test_the_model_of_the_cost_grows_towards_G(policy):
    """With a long prompt, the plain way costs almost G times as much."""

    def ratio(P):
        cost = bench.cost(policy, P, 8, 32, torch.float32)
        return [plain / ours for plain, ours in zip(cost["plain"], cost["ours"])]

    for short, long in zip(ratio(100), ratio(100_000)):
        assert 1 < short < long < 8 and long > 7.5


@pytest.mark.parametrize(
    "share, possible", [(0.59, True), (1.0, True), (1.13, False), (0.0, False), (-0.2, False)]
)
def test_a_share_of_a_rate_that_cannot_be_is_refused_by_name(share, possible):
    kept, refused = (share, {}) if possible else (None, {"b": share})
    assert bench.refuse({"a": 0.5, "b": share}) == {"a": 0.5, "b": kept, "refused": refused}
    rows = [dict.fromkeys(bench.PHASES, 1.0) | {"name": "plain"}]
    figures = dict(
        frames=4,
        prompt_tokens=9,
        rows=rows,
        memory={},
        difference=0.0,
        expected={"train": 2.0, "decode": 2.0},
        faster=dict.fromkeys(("training pass", "rollout", "train", "decode"), 2.0),
    )
    figures |= bench.refuse(
        {"train_utilisation": 0.5, "decode_floor_share": share, "decode_products_share": 0.6}
    )
    text = bench.table(figures, bench.parse_args([]))
    assert "ours trains at 50% of the matrix rate" in text
    assert "ours decodes at 60% of the rate of its matrix products alone" in text
    assert (f"decodes at {share:.0%} of the copy rate" in text) == possible
    assert (f"decode_floor_share refused: {share:.0%} of the copy rate" in text) == (not possible)


@pytest.mark.slow
def test_what_a_gpu_must_confirm_runs_on_a_cpu_too(monkeypatch, tmp_path):
    """gpu_check.py at its smallest. On a CPU there are no graphs and no TF32: nothing differs."""
    monkeypatch.setattr(rollout, "WINDOW", 4)
    for name in ("local_folder", "find_weights", "read_weights", "weights_dtype"):
        monkeypatch.setattr(model, name, getattr(model, name))  # put back: `steps` replaces them
    monkeypatch.setattr(train, "local_folder", train.local_folder)
    monkeypatch.setattr(train, "timed", train.timed)
    monkeypatch.setattr(rollout, "prefill", rollout.prefill)
    words = [
        *gpu_check.FLAGS["cpu"].split(),
        "--new",
        "4",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    args = bench.parse_args([*words, "--gpu_check"])
    found = gpu_check.run(args, torch.device("cpu"))
    assert [*found] == [*gpu_check.CHECKS]
    assert not [name for name, figures in found.items() if "failed" in figures]
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    for way in ("plain", "ours"):
        assert 0 < found["log_probs"][way]["logp_error_mean"] < 0.1  # bf16 against fp32
        assert 0 < found["log_probs"][way]["gradient_error"] < 0.1
    assert found["graphs"]["same_tokens"] and found["graphs"]["logp_difference"] == 0
    assert found["options"]["TF32 changes"] == {"logp": 0, "gradient of the head": 0}
    (step,) = found["steps"].values()
    assert step["mismatch"] < 1e-4 and step["response_tokens"] == 2 * 8
    assert {*step["phases"]} == {*simulate.PHASES} - {"load"}


def test_a_missing_model_is_an_error_before_the_work(tmp_path):
    assert "error: " in run("bench.py", "--model", tmp_path / "none", expect=1)
