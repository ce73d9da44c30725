"""Rollouts against transformers' generate and the log-probs of the training pass, in float64."""

import math

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import model
import rollout
from conftest import pixel_inputs


@pytest.fixture()
def talkative(policy):
    """A policy for which a tenth of the vocabulary ends the turn, so that lengths differ."""
    policy.eos_ids = list(range(20, 66))
    return policy


@pytest.fixture()
def calls(talkative):
    """A list that grows by (rows, tokens of a row) with each call of the language model."""
    seen = []

    def note(module, args, kwargs):
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    talkative.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_greedy_equals_transformers_generate(world, policy, prompts, text_prompts):
    """transformers' cached greedy decoding with our positions is the oracle; several prompts of
    unequal length at once, with a video, an image or only text."""
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    mixed = [text_prompts[1], *prompts, text_prompts[0]]
    groups = rollout.generate(policy, mixed, 1, max_new=24, temperature=0)
    for prompt, group in zip(mixed, groups, strict=True):
        where = torch.cat([torch.arange(len(prompt.ids))[None], policy.positions(prompt)[0]])[
            :, None
        ]  # text row, then M-RoPE
        out = net.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones_like(prompt.ids)[None],
            position_ids=where,
            **pixel_inputs(prompt),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=policy.banned.tolist(),
        )
        assert group.responses[0].tolist() == out[0, len(prompt.ids) :].tolist()


def test_greedy_on_text_alone_equals_transformers_generate(world, policy, text_prompts):
    """A batch without any visual token, against transformers' own positions."""
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    groups = rollout.generate(policy, text_prompts, 1, max_new=24, temperature=0)
    for prompt, group in zip(text_prompts, groups, strict=True):
        how = dict(do_sample=False, max_new_tokens=24, suppress_tokens=policy.banned.tolist())
        attended = torch.ones_like(prompt.ids)[None]
        out = net.generate(input_ids=prompt.ids[None], attention_mask=attended, **how)
        assert group.responses[0].tolist() == out[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_of_the_sampler_are_those_of_the_scorer(
    talkative, prompts, temperature
):
    """Every token, the first included, through compaction and unequal lengths."""
    groups = rollout.generate(
        talkative, prompts, 8, max_new=40, temperature=temperature, seeds=range(6)
    )
    scored = talkative(prompts, [g.responses for g in groups], temperature=temperature)
    assert len({len(x) for g in groups for x in g.logps}) > 5
    for rows, name in zip(scored, ("logps", "entropies")):
        for row, x in zip(rows, [x for g in groups for x in getattr(g, name)], strict=True):
            torch.testing.assert_close(row[: len(x)], x, atol=1e-9, rtol=0)


def test_a_rollout_does_not_depend_on_its_batch(talkative, prompts):
    together = rollout.generate(talkative, prompts, 5, max_new=30, seeds=[10, 11, 12, 13, 14, 15])
    reverse = rollout.generate(
        talkative, prompts[::-1], 5, max_new=30, seeds=[15, 14, 13, 12, 11, 10]
    )[::-1]
    alone = [
        rollout.generate(talkative, [p], 5, max_new=30, seeds=[10 + i])[0]
        for i, p in enumerate(prompts)
    ]
    for a, b, c in zip(together, reverse, alone):
        assert (
            [x.tolist() for x in a.responses]
            == [x.tolist() for x in b.responses]
            == [x.tolist() for x in c.responses]
        )
    other = rollout.generate(talkative, prompts[:1], 5, max_new=30, seeds=[99])[0]
    assert [x.tolist() for x in other.responses] != [x.tolist() for x in together[0].responses]


def test_responses_end_with_eos_or_are_truncated(talkative, prompts):
    groups = rollout.generate(talkative, prompts, 8, max_new=12, seeds=range(6))
    for group in groups:
        for r, logp, cut in zip(group.responses, group.logps, group.truncated):
            assert 1 <= len(r) == len(logp) <= 12
            assert not any(int(t) in talkative.eos_ids for t in r[:-1])
            assert cut == (int(r[-1]) not in talkative.eos_ids) and (len(r) == 12 or not cut)
            assert not torch.isin(r, talkative.banned).any()
    assert any(any(g.truncated) for g in groups) and not all(all(g.truncated) for g in groups)


def test_finished_rows_stop_costing(talkative, prompts, calls):
    """Fewer and fewer rows are decoded: in all, fewer than responses times steps."""
    groups = rollout.generate(talkative, prompts, 8, max_new=40, seeds=range(6))
    rows = [n for n, tokens in calls if tokens == 1]
    assert max(rows) == 48 and min(rows) < 24
    longest = max(len(r) for g in groups for r in g.responses)
    assert sum(rows) < 0.75 * 48 * longest


def test_a_step_that_could_be_a_cuda_graph(talkative, prompts, monkeypatch):
    """Windows reach beyond the tokens written so far, and each shape of a step is recorded once:
    the responses stay the same. Without a GPU nothing can be recorded: the step replays itself."""
    shapes = []
    monkeypatch.setattr(rollout, "WINDOW", 16)
    monkeypatch.setattr(rollout.Decoding, "warm_up", rollout.Decoding.step)
    monkeypatch.setattr(
        rollout.Decoding, "record", lambda self: shapes.append(len(self.alive)) or self.step
    )
    plain = rollout.generate(talkative, prompts, 8, max_new=40, seeds=range(6))
    talkative.cuda_graph = True
    recorded = rollout.generate(talkative, prompts, 8, max_new=40, seeds=range(6))
    assert 2 <= len(shapes) < 12 and shapes == sorted(shapes, reverse=True)
    for a, b in zip(plain, recorded, strict=True):
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]
        torch.testing.assert_close(torch.cat(a.logps), torch.cat(b.logps), rtol=0, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_is_eager(world, prompts, monkeypatch):
    policy = model.Policy.load(world / "model", device="cuda", dtype=torch.bfloat16)
    policy.cuda_graph = True
    graph = rollout.generate(policy, prompts, 8, max_new=40, seeds=range(6))
    monkeypatch.setattr(rollout.Decoding, "record", lambda self: self.step)
    eager = rollout.generate(policy, prompts, 8, max_new=40, seeds=range(6))
    for a, b in zip(eager, graph, strict=True):
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]
        assert torch.equal(torch.cat(a.logps), torch.cat(b.logps))


def test_sampling_follows_the_distribution():
    """Inverse transform: u picks the first token whose cumulative probability exceeds it; top-p
    cuts off the tail."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().expand(5, 4)
    u = torch.tensor([0.0, 0.0999, 0.11, 0.59, 0.999], dtype=torch.float64)
    token, logp, entropy = rollout.sample(logits, u, 1.0, 1.0)
    assert token.tolist() == [0, 0, 1, 2, 3]
    torch.testing.assert_close(
        logp, torch.tensor([0.1, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    )
    assert entropy.tolist() == pytest.approx(
        [-sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))] * 5
    )
    assert rollout.sample(logits, u, 1.0, 0.69)[0].tolist() == [
        2,
        2,
        2,
        3,
        3,
    ]  # 3/7 and 4/7 are left
    assert rollout.sample(logits, u, 1.0, 0.3)[0].tolist() == [3] * 5
    assert rollout.sample(logits, u, 0, 1.0)[0].tolist() == [3] * 5


def test_prompts_that_do_not_fit_the_cache_together_are_decoded_in_parts(
    talkative, prompts, calls, monkeypatch
):
    together = rollout.generate(talkative, prompts, 3, max_new=10, seeds=range(6))
    lengths = [len(p.ids) for p in prompts]
    assert calls[:2] == [(1, sum(lengths)), (18, 1)]
    calls.clear()
    monkeypatch.setattr(rollout, "CACHE_TOKENS", 200)
    parts = rollout.generate(talkative, prompts, 3, max_new=10, seeds=range(6))
    prefilled = [tokens for _, tokens in calls if tokens > 1]
    assert sum(prefilled) == sum(lengths) and len(prefilled) > 2
    assert max(rows for rows, _ in calls) < 18
    for a, b in zip(together, parts, strict=True):
        assert a.prompt is b.prompt
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]


def test_no_prompts():
    assert rollout.generate(None, [], 8) == []


def test_training_mode_is_restored(policy, prompts):
    policy.train()
    rollout.generate(policy, prompts[:1], 2, max_new=2)
    assert policy.training


def test_bf16_compute_with_fp32_weights_as_on_a_gpu(world, prompts):
    """Under autocast the same path runs in bf16: sampler and scorer stay close, log-probs and
    gradients are fp32."""
    policy = model.Policy.load(world / "model").train()
    policy.eos_ids = list(range(20, 66))
    with torch.autocast("cpu", torch.bfloat16):
        groups = rollout.generate(policy, prompts, 4, max_new=20, seeds=range(6))
        logp, _ = policy(prompts, [g.responses for g in groups])
    assert logp.dtype == torch.float32 == groups[0].logps[0].dtype
    logp.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())
    sampled = torch.cat([x for g in groups for x in g.logps])
    scored = torch.cat(
        [row[: len(x)] for row, x in zip(logp.detach(), [x for g in groups for x in g.logps])]
    )
    exact = torch.cat(
        [
            row[: len(x)]
            for row, x in zip(
                policy(prompts, [g.responses for g in groups])[0].detach(),
                [x for g in groups for x in g.logps],
            )
        ]
    )
    assert (sampled - scored).abs().mean() < 0.05 and (scored - exact).abs().mean() < 0.05
