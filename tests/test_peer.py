"""The comparison with TRL: both ways see one prompt, and the figures by hand."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from experiments import peer
from infra.model_folder import load_tokenizer


def step(seconds, reward):
    """A step's figures, all of whose phases take as long."""
    phases = dict.fromkeys(("step", "rollout", "training"), seconds)
    return phases | {"memory": 2 * seconds, "reward": reward}


def test_the_figures_by_hand():
    """The first step of each way warms up and is not counted; memory is that of the last."""
    timed = {
        "ours": [step(9, 0), step(1, 0), step(2, 0)],
        "TRL": [step(1, 0), step(4, 0), step(6, 0)],
    }
    learned = {
        "steps": {"ours": [step(1, 0.5), step(1, 1.5)], "TRL": [step(9, 1.0), step(3, 2.0)]},
        "accuracy": {"start": 0.25, "ours": 0.75, "TRL": 0.5},
    }
    found = {"toy": {"steps": timed}, "long video": {"steps": timed}}
    values = peer.summary(found | {"learning 0": learned, "learning 1": learned})
    assert values["seconds"]["toy: step"]["ours"]["mean"] == 1.5
    assert values["times as long"]["toy"]["step"]["seeds"] == [4, 3]
    assert values["times as long"]["learning"]["step"]["seeds"] == [3, 3]
    assert values["memory"]["long video"]["TRL"]["mean"] == 12
    assert (
        values["reward"]["ours"]["1"]["mean"] == 0.5 and values["reward"]["TRL"]["2"]["mean"] == 2
    )
    assert values["ours minus TRL"]["mean reward"]["mean"] == -0.5
    assert values["ours minus TRL"]["accuracy at the end"]["mean"] == 0.25


def test_trl_scores_our_prompts_as_we_do(world, policy, prompts):
    """Token ids, pixels and positions that TRL hands to transformers' model, padded on the left,
    give the log-probs of our packed rows."""
    pytest.importorskip("trl", reason="needs TRL, which is installed by hand")
    from experiments import peer_trl

    shown = [p for p in prompts if p.media[0].seconds_per_grid in (0.0, 1.0)]
    assert {p.media[0].kind for p in shown} == {"video", "image"}
    assert len({len(p.ids) for p in shown}) > 1
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    net.model.get_rope_index = peer_trl.positions_like_ours(net.config)
    tokenizer = load_tokenizer(world / "model")
    processor = peer_trl.PromptProcessor(tokenizer, shown, net.config, policy.family)
    inputs = dict(processor(images=[[str(i)] for i in range(len(shown))], padding=True))
    response = torch.arange(30, 36)
    after = response.expand(len(shown), -1)  # (B, R)
    for name, more in (
        ("input_ids", after),
        ("attention_mask", torch.ones_like(after)),
        ("mm_token_type_ids", torch.zeros_like(after)),
    ):
        inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        logits = net(**inputs).logits[:, -1 - len(response) : -1]
        logp = logits.index_fill(-1, policy.banned, -1e30).log_softmax(-1)
        expected, _ = policy(shown, [[response]] * len(shown))
    found = logp.gather(-1, after[..., None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # pixels are fp32 there
