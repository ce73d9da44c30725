"""The policy against transformers' own forward (the slow way: every response a row of its own, pixels and all), in float64."""

import json
import shutil

import pytest
import torch
from conftest import SHARED, needs_shared
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

import attention
import data
import model
import mrsp
import toy

VIDEO, IMAGE, TEXT = 9, 8, 1


def positions(ids, media, **kw):
    where, following = model.mrope_positions(torch.tensor(ids), media, video_token=VIDEO, image_token=IMAGE, **kw)
    return where.tolist(), following


# ---- M-RoPE by hand


def test_mrope_text_only():
    assert positions([TEXT] * 4, []) == ([[0, 1, 2, 3]] * 3, 4)


def test_mrope_long_seconds_per_grid():
    """Grid (8, 16, 32) in patches, 7.5 s per grid, the video at 5: 15 ids a grid, the last is 5 + 105, text goes on at 111."""
    where, following = positions([TEXT] * 5 + [VIDEO] * (8 * 8 * 16) + [TEXT] * 2, [((8, 16, 32), 7.5)])
    assert [max(axis[:-2]) for axis in where] == [110, 12, 20]
    assert [axis[-2:] for axis in where] == [[111, 112]] * 3 and following == 113


def test_mrope_many_grids():
    """256 grids of 1 s, the video at 5: ids 5, 7, ..., 515, and the text goes on at 516."""
    where, following = positions([TEXT] * 5 + [VIDEO] * 256, [((256, 2, 2), 1.0)])
    assert where[0][5:8] == [5, 7, 9] and where[0][-1] == 515 and following == 516


def test_mrope_image_advances_by_its_larger_side():
    where, following = positions([TEXT] + [IMAGE] * 6 + [TEXT], [((1, 4, 6), 0.0)])
    assert where == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]] and following == 5


def test_mrope_two_media_in_one_prompt():
    where, following = positions([IMAGE] + [TEXT] + [VIDEO] * 2 + [TEXT], [((1, 2, 2), 0.0), ((2, 2, 2), 0.75)])
    assert where == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4]] and following == 5  # floor(0.75 * 2) = 1


def test_mrope_qwen2_vl_counts_grids():
    assert positions([VIDEO] * 3, [((3, 2, 2), 7.5)], tokens_per_second=None)[0][0] == [0, 1, 2]


@pytest.mark.parametrize(
    "ids, media",
    [
        ([VIDEO] * 3, [((2, 2, 2), 1.0)]),
        ([VIDEO], [((2, 2, 2), 1.0)]),
        ([VIDEO, TEXT, VIDEO], [((2, 2, 2), 1.0)]),
        ([TEXT], [((1, 2, 2), 1.0)]),
        ([VIDEO], []),
    ],
)
def test_mrope_refuses_tokens_that_do_not_fit_the_media(ids, media):
    with pytest.raises(ValueError, match="visual tokens"):
        positions(ids, media)


# ---- fast = slow


def random_responses(prompts, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(10, 250, (n,), generator=g) for n in ns] for _, ns in zip(prompts, lengths)]


LENGTHS = ([3, 1, 7], [5], [2, 9, 1, 1], [4, 4], [6, 2], [1])


def plain_log_probs(net, policy, prompts, responses):
    """One row per response, pixels encoded for each: what the packed row must equal. [(R_i,), ...]"""
    out = []
    for prompt, group in zip(prompts, responses):
        where, following = policy.positions(prompt)
        (media,) = prompt.media
        pixels = data.patchify(data.normalize(media.frames, torch.float64))[0]
        grid = torch.tensor([media.grid])
        inputs = (
            dict(pixel_values_videos=pixels, video_grid_thw=grid)
            if media.kind == "video"
            else dict(pixel_values=pixels, image_grid_thw=grid)
        )
        for r in group:
            position_ids = torch.cat([where, (following + torch.arange(len(r))).expand(3, -1)], dim=1)[:, None]
            logits = net(input_ids=torch.cat([prompt.ids, r])[None], position_ids=position_ids, **inputs).logits[0]
            logp = logits.index_fill(-1, policy.banned, -1e30).log_softmax(-1)
            out.append(logp[len(prompt.ids) - 1 : -1].gather(-1, r[:, None])[:, 0])
    return out


def weighted(logps):
    """A scalar whose gradient tells every token apart."""
    return sum((x * torch.linspace(0.5, 2, len(x), dtype=x.dtype)).sum() * (i + 1) for i, x in enumerate(logps))


def assert_equals_plain(policy, net, prompts, responses):
    plain = plain_log_probs(net, policy, prompts, responses)
    packed, entropy = policy(prompts, responses)
    packed_list = [row[: len(x)] for row, x in zip(packed, plain)]
    for a, b in zip(packed_list, plain):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert all((row[len(x) :] == 0).all() for row, x in zip(packed, plain)) and (entropy >= 0).all()
    weighted(plain).backward()
    weighted(packed_list).backward()
    slow = dict(net.named_parameters())
    for name, p in policy.net.named_parameters():
        scale = slow[name].grad.abs().max() + 1e-12
        assert (p.grad - slow[name].grad).abs().max() / scale < 1e-5, name  # fp32 inside RMSNorm and RoPE bounds it
    assert any("visual" in name and p.grad.abs().max() > 0 for name, p in policy.net.named_parameters())


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
def test_packed_groups_equal_separate_rows(world, prompts, checkpointing):
    """Unequal prompts, several sizes of video, an image, groups of 1 to 4 (more responses than a short row has tokens)."""
    policy = model.Policy.load(world / "model", dtype=torch.float64, checkpointing=checkpointing).train()
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    assert_equals_plain(policy, net, prompts, random_responses(prompts, LENGTHS))


def test_more_responses_than_tokens_in_a_row(world, policy, prompts):
    """A group of 120 responses on a prompt of some 60 tokens."""
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    assert_equals_plain(policy, net, prompts[:1], random_responses(prompts, [[1, 2] * 60]))


def test_qwen2_vl_too(tmp_path, world, builder, prompts):
    """The same through the older architecture: another vision tower, time ids that count grids."""
    from transformers import Qwen2VLConfig

    c = toy.tiny_config(builder.tokenizer).to_dict()
    text = c["text_config"] | {"model_type": "qwen2_vl_text"}
    vision = dict(depth=2, embed_dim=64, hidden_size=128, num_heads=2, mlp_ratio=2, initializer_range=0.08)
    tokens = {k: c[k] for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    shutil.copytree(world / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    ).save_pretrained(tmp_path / "model")
    policy = model.Policy.load(tmp_path / "model", dtype=torch.float64)
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert policy.tokens_per_second is None
    assert_equals_plain(policy, net, prompts, random_responses(prompts, LENGTHS))


ROWS = [
    [(7, [3, 1, 5]), (7, [2]), (40, []), (9, [4, 4])],
    [(1, [1])],
    [(30, [1] * 40)],
    [(4, [8])],
    [(10, [30, 30]), (11, [40])],
]


def dense_mask(lengths):
    """Who attends to whom in a packed row, as one matrix."""
    size = sum(P + sum(responses) for P, responses in lengths)
    mask, start = torch.zeros(size, size, dtype=torch.bool), 0
    for P, responses in lengths:
        first = start
        for R in (P, *responses):
            mask[start : start + R, first : first + P] = start != first
            mask[start : start + R, start : start + R] = torch.ones(R, R).tril().bool()
            start += R
    return mask


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_rows_of_a_group_attend_as_one(size):
    """Every rank's part, given the keys and values of all, in each layer and (where it is read) in the last; also where a prompt
    is as long as the part of a response that an earlier rank has."""
    torch.manual_seed(0)
    for lengths in ROWS:
        mask = dense_mask(lengths)
        q, k, v = (torch.randn(1, h, len(mask), 8, dtype=torch.float64) for h in (6, 2, 2))
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        for rank in range(size):
            row = mrsp.ShardedRow(lengths, "cpu", mrsp.Group(size, rank))
            mine = len(row.place)  # without the tail that makes all ranks equally long
            for last, tokens in ((False, slice(mine)), (True, row.reads)):
                out = row.attend_row(0, q[row.own], k, v, 8**-0.5, last)[0]
                torch.testing.assert_close(out[tokens], plain[row.own][tokens], rtol=0, atol=1e-12)


def test_block_attention_equals_masked_attention():
    """Rows of unequal groups in random order, grouped-query heads: output and gradients of a dense mask, in float64."""
    torch.manual_seed(0)
    for lengths in ROWS:
        mask = dense_mask(lengths)
        q, k, v = (torch.randn(1, h, len(mask), 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(
            1, 2
        )
        ours = attention.PackedRow(lengths, "cpu").attend(0, q, k, v, 0.3)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
        weights = torch.randn_like(plain)
        for a, b in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, plain))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n, runs", [(0, [1, 1, 1, 1]), (1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2])])
def test_every_nth_layer_is_recomputed(policy, prompts, n, runs):
    policy.train().set_checkpointing(n)
    seen = []
    for i, layer in enumerate(policy.text.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    policy(prompts[:1], [[torch.arange(100, 105)]])[0].sum().backward()
    assert [seen.count(i) for i in range(4)] == runs


def test_the_last_layer_computes_what_predicts_a_token(policy, prompts):
    seen = []
    policy.text.layers[-1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    responses = [[torch.arange(100, 100 + n) for n in lengths] for lengths in ([5, 1], [3], [1, 1, 1])]
    policy(prompts[:3], responses)
    assert seen == [(1 + 4) + (1 + 2) + 1]  # the last token of each prompt, and all but the last of each response


def test_log_probs_in_chunks_equal_one_chunk(policy, prompts, monkeypatch):
    responses = random_responses(prompts, LENGTHS)
    whole = policy(prompts, responses)
    monkeypatch.setattr(attention, "LOGITS_PER_CHUNK", 7 * policy.config.text_config.vocab_size)
    for a, b in zip(policy(prompts, responses), whole):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_encoding_in_pieces_equals_encoding_at_once(policy, prompts, monkeypatch):
    """The vision tower sees one 2-frame grid at a time, so it may be called on any split between grids."""
    whole = policy.encode(prompts)
    monkeypatch.setattr(model, "PATCHES_PER_CALL", 20)
    for a, b in zip(policy.encode(prompts), whole):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert [len(x) for x in whole] == [sum(m.tokens for m in p.media) for p in prompts]


def test_entropy_and_temperature(policy, prompts):
    responses = random_responses(prompts, LENGTHS)
    logp, entropy = policy(prompts, responses, temperature=1e6)
    n = policy.config.text_config.vocab_size - len(policy.banned)
    torch.testing.assert_close(entropy[0, 0], torch.tensor(n).double().log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logp[0, 0], -entropy[0, 0], atol=1e-3, rtol=0)


def test_vision_tokens_are_impossible(policy, prompts):
    for banned in (
        policy.config.video_token_id,
        policy.config.image_token_id,
        policy.config.vision_start_token_id,
        policy.config.vision_end_token_id,
    ):
        logp, _ = policy(prompts[:1], [[torch.tensor([20, banned])]])
        assert logp[0, 0] > -100 and logp[0, 1] < -1e20


def test_no_groups_still_touches_every_parameter(policy):
    logp, _ = policy([], [])
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_everything_moves_to_the_device_together(world):
    policy = model.Policy.load(world / "model", device="meta")
    assert {x.device.type for x in (*policy.parameters(), *policy.buffers())} == {"meta"} == {policy.device.type}


def test_attention_without_a_plan_is_refused(policy, prompts):
    with pytest.raises(TypeError, match="plan"):
        policy.net(input_ids=prompts[0].ids[None])


# ---- files


def test_save_and_load(tmp_path, policy, prompts, builder):
    """Saved folders are whole: transformers opens them, the prompt builder too, and log-probs are the same bits."""
    policy.save(tmp_path / "a")
    again = model.Policy.load(tmp_path / "a", dtype=torch.float64)
    responses = random_responses(prompts, LENGTHS)
    assert torch.equal(again(prompts, responses)[0], policy(prompts, responses)[0])
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "a").config._attn_implementation != attention.NAME
    assert data.PromptBuilder(tmp_path / "a").tokenizer.get_vocab() == builder.tokenizer.get_vocab()


def test_bad_model_folders_say_what_is_wrong(tmp_path, world):
    with pytest.raises(model.ModelError, match="no such model folder"):
        model.Policy.load(tmp_path / "nowhere")
    with pytest.raises(model.ModelError, match="no config.json"):
        model.Policy.load(tmp_path)
    shutil.copytree(world / "model", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.rename(tmp_path / "kept")
    with pytest.raises(model.ModelError, match="no weights"):
        model.Policy.load(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "kept")
    del tensors[next(k for k in tensors if "q_proj.weight" in k)]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(model.ModelError, match="1 weights are missing, first .*q_proj"):
        model.Policy.load(tmp_path / "m")
    weights.write_bytes((tmp_path / "kept").read_bytes()[:9999])
    with pytest.raises(model.ModelError, match="cannot be loaded"):
        model.Policy.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(model.ModelError, match="model type 'bert'"):
        model.Policy.load(tmp_path / "m")


@needs_shared
def test_the_real_7b_has_the_weight_names_of_its_index(tmp_path):
    """The true configuration on the meta device, its names as save_pretrained writes them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(SHARED / "qwen2_5_vl")
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config)
    index = json.loads((SHARED / "qwen2_5_vl" / "model.safetensors.index.json").read_text())
    names = {n.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for n, _ in net.named_parameters()}
    assert names == set(index["weight_map"])
    assert sum(p.numel() for p in net.parameters()) * 2 == index["metadata"]["total_size"]


def test_segments_of_the_tower_taken_together_are_the_segments_one_by_one(policy, prompts):
    """Windows and grids of several lengths, against transformers' own loop: embeddings and gradients in float64."""
    results = []
    for name in ("sdpa", attention.SEGMENTS):
        policy.net.set_attn_implementation({"vision_config": name})
        policy.zero_grad()
        features = torch.cat(policy.encode([*prompts, *prompts[3:4]]))
        (features * torch.arange(features.numel()).view_as(features).sin()).sum().backward()
        results.append([features, *(p.grad for p in policy.net.model.visual.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, float(a.detach().abs().max())), rtol=0)
