"""bench.py end to end at its smallest, on one rank and on two."""

import json

import torch
from conftest import run

import bench
from plain import PlainPolicy, generate_plainly
from rollout import generate


def test_every_way_is_timed_and_gives_the_same_log_probs(tmp_path):
    small = ("--frames", 4, 8, "--group", 3, "--new", 4, "--text", 8, "--height", 56, "--width", 56, "--repeat", 1)
    output = run("bench.py", *small, "--json", tmp_path / "two.json", ranks=2)
    figures = json.loads((tmp_path / "two.json").read_text())
    assert figures["ranks"] == 2 and figures["commit"] and figures["flags"]["group"] == 3
    names = ["plain", *(name.format(2) for name, way, _ in bench.STEPS if way != "graph")]
    for frames, result in zip((4, 8), figures["results"], strict=True):
        assert result["frames"] == frames and result["prompt_tokens"] == 8 + frames // 2 * 4
        assert [row["name"] for row in result["rows"]] == names
        assert all(row[phase] > 0 for row in result["rows"] for phase in set(bench.PHASES) - {"decode"})
        assert result["difference"] < 1e-5
        assert 1 < result["expected"]["train"] < 3 and 1 < result["expected"]["decode"] < 3  # at most G
    assert all(name in output for name in names)


def test_the_plain_way_gives_the_same_responses_and_gradients(world, policy, prompts):
    """Of videos and of images, with the same dice: tokens, log-probs, entropies, and the gradient of their sum."""
    plain = PlainPolicy.load(world / "model", dtype=torch.float64, checkpointing=0)
    how = dict(max_new=6, seeds=range(len(prompts)))
    ours, theirs = generate(policy, prompts, 3, **how), generate_plainly(plain, prompts, 3, **how)
    for a, b in zip(ours, theirs, strict=True):
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses] and a.truncated == b.truncated
        for x, y in zip(a.logps, b.logps, strict=True):
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
            torch.testing.assert_close(p.grad, grads[name].grad, atol=1e-4 * float(p.grad.abs().max()) + 1e-9, rtol=0, msg=name)


def test_the_model_of_the_cost_grows_towards_G(policy):
    """With ever longer prompts, the plain way costs G times as much."""
    ratio = lambda P: [plain / ours for plain, ours in zip(*bench.cost(policy, P, 8, 32, torch.float32).values())]
    for short, long in zip(ratio(100), ratio(100_000)):
        assert 1 < short < long < 8 and long > 7.5


def test_a_model_that_is_none_is_said_before_the_work(tmp_path):
    assert "error: " in run("bench.py", "--model", tmp_path / "none", expect=1)
