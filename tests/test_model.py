"""The policy against transformers' own forward in float64: a row for each response, with pixels."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import attention
import data
import model
import mrsp
import rollout
import toy
from conftest import SHARED, needs_shared, pixel_inputs
from infra import model_folder

VIDEO, IMAGE, TEXT = 9, 8, 1


def positions(ids, media, **kw):
    where, following = model.mrope_positions(
        torch.tensor(ids), media, video_token=VIDEO, image_token=IMAGE, **kw
    )
    return where.tolist(), following


# ---- M-RoPE by hand


def test_mrope_text_only():
    assert positions([TEXT] * 4, []) == ([[0, 1, 2, 3]] * 3, 4)


def test_mrope_long_seconds_per_grid():
    """Grid (8, 16, 32) in patches, 7.5 s per grid, the video at 5.

    15 ids a grid, the last is 5 + 105, the text continues at 111.
    """
    where, following = positions(
        [TEXT] * 5 + [VIDEO] * (8 * 8 * 16) + [TEXT] * 2, [((8, 16, 32), 7.5)]
    )
    assert [max(axis[:-2]) for axis in where] == [110, 12, 20]
    assert [axis[-2:] for axis in where] == [[111, 112]] * 3 and following == 113


def test_mrope_many_grids():
    """256 grids of 1 s, the video at 5: ids 5, 7, ..., 515, and the text continues at 516."""
    where, following = positions([TEXT] * 5 + [VIDEO] * 256, [((256, 2, 2), 1.0)])
    assert where[0][5:8] == [5, 7, 9] and where[0][-1] == 515 and following == 516


def test_mrope_image_advances_by_its_larger_side():
    where, following = positions([TEXT] + [IMAGE] * 6 + [TEXT], [((1, 4, 6), 0.0)])
    assert (
        where == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
        and following == 5
    )


def test_mrope_two_media_in_one_prompt():
    where, following = positions(
        [IMAGE] + [TEXT] + [VIDEO] * 2 + [TEXT], [((1, 2, 2), 0.0), ((2, 2, 2), 0.75)]
    )
    assert (
        where == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4]] and following == 5
    )  # floor(0.75 * 2) = 1


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
    return [
        [torch.randint(10, 250, (n,), generator=g) for n in ns] for _, ns in zip(prompts, lengths)
    ]


LENGTHS = ([3, 1, 7], [5], [2, 9, 1, 1], [4, 4], [6, 2], [1])


def plain_log_probs(net, policy, prompts, responses):
    """What the packed row must equal: a row per response, pixels encoded in each. [(R_i,), ...]"""
    out = []
    for prompt, group in zip(prompts, responses):
        where, following = policy.positions(prompt)
        inputs = pixel_inputs(prompt)
        for r in group:
            position_ids = torch.cat(
                [where, (following + torch.arange(len(r))).expand(3, -1)], dim=1
            )[:, None]
            logits = net(
                input_ids=torch.cat([prompt.ids, r])[None], position_ids=position_ids, **inputs
            ).logits[0]
            logp = logits.index_fill(-1, policy.banned, -1e30).log_softmax(-1)
            out.append(logp[len(prompt.ids) - 1 : -1].gather(-1, r[:, None])[:, 0])
    return out


def weighted(logps):
    """A scalar whose gradient tells every token apart."""
    return sum(
        (x * torch.linspace(0.5, 2, len(x), dtype=x.dtype)).sum() * (i + 1)
        for i, x in enumerate(logps)
    )


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
        expected = slow[name].grad
        if expected is None:  # the tower, where no prompt has a medium
            expected = torch.zeros_like(p)
        scale = expected.abs().max() + 1e-12
        assert (p.grad - expected).abs().max() / scale < 1e-5, (
            name
        )  # fp32 inside RMSNorm and RoPE bounds it
    tower = [p for name, p in policy.net.named_parameters() if "visual" in name]
    assert any(p.grad.any() for p in tower) == any(prompt.media for prompt in prompts)


@pytest.mark.parametrize(
    "checkpointing",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)],
)
def test_packed_groups_equal_separate_rows(world, prompts, text_prompts, checkpointing):
    """Unequal prompts, several sizes of video, images, text alone, groups of 1 to 4."""
    policy = model.Policy.load(
        world / "model", dtype=torch.float64, grad_checkpointing=checkpointing
    ).train()
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    mixed = [text_prompts[0], *prompts[:3], text_prompts[1], *prompts[3:]]
    lengths = ([2, 5], *LENGTHS[:3], [4], *LENGTHS[3:])
    assert_equals_plain(policy, net, mixed, random_responses(mixed, lengths))


def test_a_row_of_text_alone(world, policy, text_prompts):
    """No visual token: the tower's gradient is there, and zero. transformers' own positions."""
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    responses = random_responses(text_prompts, ([3, 1], [6]))
    assert_equals_plain(policy, net, text_prompts, responses)
    for prompt, group in zip(text_prompts, responses):
        P, response = len(prompt.ids), group[0]
        assert policy.positions(prompt)[0].tolist() == [list(range(P))] * 3
        logits = net(input_ids=torch.cat([prompt.ids, response])[None]).logits[0, P - 1 : -1]
        expected = logits.index_fill(-1, policy.banned, -1e30).log_softmax(-1)
        expected = expected.gather(-1, response[:, None])[:, 0]
        found = policy([prompt], [[response]])[0][0]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_more_responses_than_tokens_in_a_row(world, policy, prompts):
    """A group of 120 responses on a prompt of some 60 tokens."""
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", dtype=torch.float64)
    assert_equals_plain(policy, net, prompts[:1], random_responses(prompts, [[1, 2] * 60]))


@pytest.mark.slow
def test_qwen2_vl_too(tmp_path, world, builder, prompts):
    """The same through the older architecture: another vision tower, time ids that count grids."""
    from transformers import Qwen2VLConfig

    c = toy.tiny_config(builder.tokenizer).to_dict()
    text = c["text_config"] | {"model_type": "qwen2_vl_text"}
    vision = dict(
        depth=2, embed_dim=64, hidden_size=128, num_heads=2, mlp_ratio=2, initializer_range=0.08
    )
    tokens = {
        k: c[k]
        for k in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    shutil.copytree(
        world / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
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


def masked_attention(q, k, v, mask, scale):
    """What PyTorch gives for a mask: q (1, Hq, S, d), k and v (1, Hkv, S, d) -> (1, S, Hq, d)."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def test_who_sees_whom_by_hand():
    """Two groups: a prompt of 2, responses of 1 and 2; a prompt of 1, a response of 1."""
    rows = """
        1 . . . . . .
        1 1 . . . . .
        1 1 1 . . . .
        1 1 . 1 . . .
        1 1 . 1 1 . .
        . . . . . 1 .
        . . . . . 1 1
    """
    expected = [[cell == "1" for cell in row.split()] for row in rows.strip().splitlines()]
    assert attention.visible([(2, [1, 2]), (1, [1])]).tolist() == expected


@pytest.mark.parametrize("lengths", ROWS)
def test_block_attention_equals_masked_attention(lengths):
    """Unequal groups, grouped-query heads: the output and gradients of the mask, in float64."""
    torch.manual_seed(0)
    mask = attention.visible(lengths)
    q, k, v = (
        torch.randn(1, h, len(mask), 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2)
    )
    plain = masked_attention(q, k, v, mask, 0.3)
    ours = attention.PackedRow(lengths, "cpu").attend(0, q, k, v, 0.3)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), (q, k, v))
    found = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", ROWS)
def test_ranks_that_share_a_row_attend_as_one(lengths, size):
    """Every rank's tokens, given the keys and values of all.

    Also where a prompt is as long as the part of a response that an earlier rank has.
    """
    torch.manual_seed(0)
    mask = attention.visible(lengths)
    q, k, v = (torch.randn(1, h, len(mask), 8, dtype=torch.float64) for h in (6, 2, 2))
    plain = masked_attention(q, k, v, mask, 8**-0.5)[0]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    seen = []
    for rank, share in enumerate(mrsp.shares_of_row(lengths, size)):
        row = mrsp.ShardedRow(lengths, "cpu", mrsp.SequenceParallel(size, rank))
        held = len(mrsp.tokens_of_share(share))  # after these, padding
        out = row.attend_row(0, q[row.held], k, v, 8**-0.5)[0]
        torch.testing.assert_close(out[:held], plain[row.held][:held], rtol=0, atol=1e-12)
        seen += row.held[:held].tolist()
    assert sorted(seen) == list(range(len(mask)))


@pytest.mark.parametrize(
    "n, runs", [(0, [1, 1, 1, 1]), (1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2])]
)
def test_every_nth_layer_is_recomputed(policy, prompts, n, runs):
    policy.train().set_grad_checkpointing(n)
    seen = []
    for i, layer in enumerate(policy.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    policy(prompts[:1], [[torch.arange(100, 105)]])[0].sum().backward()
    assert [seen.count(i) for i in range(4)] == runs


def test_log_probs_in_chunks_equal_one_chunk(policy, prompts, monkeypatch):
    responses = random_responses(prompts, LENGTHS)
    whole = policy(prompts, responses)
    monkeypatch.setattr(attention, "LOGITS_PER_CHUNK", 7 * policy.config.text_config.vocab_size)
    for a, b in zip(policy(prompts, responses), whole):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_encoding_in_pieces_equals_encoding_at_once(policy, prompts, monkeypatch):
    """The tower sees one 2-frame grid at a time: it may be called on any split between them."""
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


def test_one_file_of_weights_goes_before_an_index(tmp_path, world):
    """As in transformers: an old checkpoint's index beside model.safetensors is not read."""
    shutil.copytree(world / "model", tmp_path / "both")
    index = tmp_path / "both" / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"x": "gone.safetensors"}}')
    assert model_folder.weight_files(tmp_path / "both") == [index.with_name("model.safetensors")]
    model.Policy.load(tmp_path / "both")


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
    assert (
        {x.device.type for x in (*policy.parameters(), *policy.buffers())}
        == {"meta"}
        == {policy.device.type}
    )


def test_attention_without_a_plan_is_refused(policy, prompts):
    with pytest.raises(TypeError, match="plan"):
        policy.net(input_ids=prompts[0].ids[None])


# ---- files


def test_save_and_load(tmp_path, policy, prompts, builder):
    """transformers and the prompt builder open a saved folder; log-probs are the same bits."""
    policy.save(tmp_path / "a")
    again = model.Policy.load(tmp_path / "a", dtype=torch.float64)
    responses = random_responses(prompts, LENGTHS)
    assert torch.equal(again(prompts, responses)[0], policy(prompts, responses)[0])
    assert (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(
            tmp_path / "a"
        ).config._attn_implementation
        != attention.NAME
    )
    assert data.PromptBuilder(tmp_path / "a").tokenizer.get_vocab() == builder.tokenizer.get_vocab()


def rewrite(file, change):
    """Changes a JSON or safetensors file in place."""
    if file.suffix == ".json":
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    else:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(key):
    return lambda content: {k: v for k, v in content.items() if k != key}


NORM, PROJECTION = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", None, "no config.json, so not a model folder"),
        ("config.json", "[1, 2]", "config.json holds a list, expected an object"),
        (
            "config.json",
            '{"model_type": "bert"}',
            "model type 'bert', expected one of qwen2_vl, qwen2_5_vl",
        ),
        ("config.json", '{"model_type": ', "config.json: not JSON, or cut off"),
        (
            "config.json",
            lambda c: c | {"quantization_config": {"quant_method": "awq"}},
            "quantised weights, expected",
        ),
        ("generation_config.json", "garbage", "generation_config.json: not JSON, or cut off"),
        ("generation_config.json", "[]", "generation_config.json holds a list, expected an object"),
        (
            "generation_config.json",
            '{"eos_token_id": ["2"]}',
            r"'eos_token_id' is \['2'\], expected token ids",
        ),
        ("model.safetensors.index.json", "[]", "expected an object with a 'weight_map'"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model-1.safetensors"}}',
            "cannot be loaded.*model-1.safetensors",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "shard.safetensors"}}',
            "index.json: no object 'metadata'",
        ),
        ("config.json", lambda c: c | {"text_config": 5}, "cannot be loaded"),
        (
            "config.json",
            lambda c: (
                c
                | {
                    "text_config": {
                        k: v for k, v in c["text_config"].items() if k != "rope_parameters"
                    }
                }
            ),
            "config.json: 'mrope_section' of the rotary embedding is None, "
            "expected three numbers with the sum",
        ),
        ("config.json", lambda c: c | {"vision_config": 5}, "cannot be loaded"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", b"0123456789", "cannot be loaded"),
        ("model.safetensors", "cut", "cannot be loaded"),
        ("model.safetensors", without(PROJECTION), "1 weights are missing, first .*q_proj"),
        (
            "model.safetensors",
            lambda w: w | {NORM: w[NORM][:64].clone()},
            r"norm.weight has the shape \[64\], expected \[128\]",
        ),
        (
            "model.safetensors",
            lambda w: w | {NORM: w[NORM] * float("nan")},
            "norm.weight is not finite",
        ),
        ("model.safetensors", lambda w: w | {NORM: w[NORM] / 0}, "norm.weight is not finite"),
        ("tokenizer.json", None, "no tokenizer"),
        ("tokenizer.json", "garbage", "the tokenizer cannot be read"),
        ("tokenizer.json", "{}", "the tokenizer cannot be read|has the vision tokens"),
        ("tokenizer_config.json", "garbage", "the tokenizer cannot be read"),
        ("chat_template.jinja", None, "the tokenizer has no chat template"),
        ("chat_template.jinja", b"\xff\xfe{", "the tokenizer cannot be read"),
        ("chat_template.jinja", "{% for m in messages %}", "the chat template is broken"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "the chat template is broken"),
        (
            "chat_template.jinja",
            "{% for m in messages %}{{ 'a' + m['content'] }}{% endfor %}",
            "made for text only",
        ),
        ("chat_template.jinja", "{{ messages[0]['role'] }}", "0 places for one video"),
    ],
)
def test_a_broken_model_folder_is_one_error_that_names_it(tmp_path, world, file, change, message):
    folder = tmp_path / "m"
    shutil.copytree(world / "model", folder)
    if "index" in file:  # it is read if there is no model.safetensors
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
    if change is None:
        (folder / file).unlink()
    elif change == "cut":
        (folder / file).write_bytes((folder / file).read_bytes()[:-9999])
    elif callable(change):
        rewrite(folder / file, change)
    else:
        (folder / file).write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises((model.ModelError, data.DataError), match=message) as e:
        model.Policy.load(folder)
        data.PromptBuilder(folder)
    assert str(folder) in str(e.value)


def test_an_older_chat_template_that_cannot_be_read_is_named(tmp_path, world):
    shutil.copytree(world / "model", tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    for content in (b'{"chat_template": "\xff"}', b'{"chat_template"', b"[]"):
        (tmp_path / "m" / "chat_template.json").write_bytes(content)
        with pytest.raises(data.DataError, match="m/chat_template.json: "):
            data.PromptBuilder(tmp_path / "m")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "no such model folder"),
        ("/nowhere/a", "no such model folder"),
        ("./a/b", "no such model folder"),
        ("out/my model", "no such folder, and not a name that the hub could have"),
        ("models/модель", "no such folder, and not a name that the hub could have"),
        ("a/..", "no such folder, and not a name that the hub could have"),
    ],
)
def test_a_name_that_is_no_model_is_one_error(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.ModelError, match=message):
        model.local_folder(name)


def test_a_run_without_a_checkpoint_yet_says_so(tmp_path):
    (tmp_path / "config.txt").write_text("--algo sft\n")
    (tmp_path / "checkpoint-backup").mkdir()  # no number, so no checkpoint
    with pytest.raises(model.ModelError, match="a run folder that holds no checkpoint yet"):
        model.local_folder(tmp_path)


@pytest.mark.parametrize(
    "at_the_root, found",
    [
        (
            ("config.json", "model.safetensors"),
            ".",
        ),  # a trainer's last model, with checkpoints of its training inside
        (("config.json",), "checkpoint-10"),
        ((), "checkpoint-10"),
    ],
)
def test_a_model_folder_is_itself_and_a_run_folder_its_newest_checkpoint(
    tmp_path, at_the_root, found
):
    for folder in (".", "checkpoint-9", "checkpoint-10"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in at_the_root if folder == "." else ("config.json", "model.safetensors"):
            (tmp_path / folder / name).write_text("{}")
    assert model.local_folder(str(tmp_path)) == tmp_path / found


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
    ],
)
def test_the_texts_of_a_model_tell_it_from_others_by_their_whole_content(tmp_path, name):
    content = b"a" * 200_000
    (tmp_path / name).write_bytes(content)
    before = model_folder.text_fingerprint(tmp_path)
    (tmp_path / "config.txt").write_text("of a run, as other files beside the model")
    assert model_folder.text_fingerprint(tmp_path) == before
    (tmp_path / name).write_bytes(content[:100_001] + b"b" + content[100_002:])
    assert model_folder.text_fingerprint(tmp_path) != before


def test_weights_without_a_place_are_named_and_not_used(tmp_path, world, capsys):
    shutil.copytree(world / "model", tmp_path / "m")
    rewrite(
        tmp_path / "m" / "model.safetensors", lambda w: w | {"model.layers.9.extra": torch.ones(2)}
    )
    model.Policy.load(tmp_path / "m")
    printed = capsys.readouterr().err
    assert (
        "1 weights have no place in this architecture and are not used, "
        "first model.language_model.layers.9.extra" in printed
    )


@pytest.mark.parametrize(
    "dtypes, kept",
    [(["bfloat16"], "bfloat16"), (["float16"], "float16"), (["bfloat16", "float16"], "float32")],
)
def test_weights_are_saved_in_the_dtype_they_came_in(tmp_path, world, dtypes, kept):
    """Half the bytes for a half dtype; of two that do not hold each other, one that holds both."""
    folder, dtypes = tmp_path / "m", [getattr(torch, name) for name in dtypes]
    shutil.copytree(world / "model", folder)
    size = (folder / "model.safetensors").stat().st_size

    def mixed(weights):
        return {name: x.to(dtypes[i % len(dtypes)]) for i, (name, x) in enumerate(weights.items())}

    rewrite(folder / "model.safetensors", mixed)
    policy = model.Policy.load(folder)
    assert policy.net.dtype == torch.float32
    policy.save(tmp_path / "saved")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[n].float(), x.float()) for n, x in after.items()
    )
    assert {x.dtype for x in after.values()} == {getattr(torch, kept)}
    assert ((tmp_path / "saved" / "model.safetensors").stat().st_size < 0.6 * size) == (
        kept != "float32"
    )
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (
        config["dtype"]
        == config["text_config"]["dtype"]
        == config["vision_config"]["dtype"]
        == kept
    )


@pytest.mark.parametrize("listed", [[0], 0, None])
def test_responses_end_at_the_tokenizers_end_too_and_it_is_saved(tmp_path, world, listed):
    """--algo sft teaches <|im_end|>; a generation config may list only <|endoftext|>."""
    shutil.copytree(world / "model", tmp_path / "m")
    change = {} if listed is None else {"eos_token_id": listed}
    rewrite(
        tmp_path / "m" / "generation_config.json", lambda g: without("eos_token_id")(g) | change
    )
    policy = model.Policy.load(tmp_path / "m")
    end = data.PromptBuilder(tmp_path / "m").tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert policy.eos_ids == ([end] if listed is None else [0, end])
    policy.save(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
        == policy.eos_ids
    )


def test_the_newer_chat_template_wins(tmp_path, world, builder):
    """chat_template.jinja over chat_template.json, as in transformers; alone, the older is read."""
    shutil.copytree(world / "model", tmp_path / "m")
    new = builder.tokenizer.chat_template
    (tmp_path / "m" / "chat_template.json").write_text(
        json.dumps({"chat_template": new.replace("<|im_start|>", "###")})
    )
    assert data.PromptBuilder(tmp_path / "m").tokenizer.chat_template == new
    (tmp_path / "m" / "chat_template.jinja").unlink()
    assert "###" in data.PromptBuilder(tmp_path / "m").tokenizer.chat_template


@pytest.mark.slow
def test_the_cases_of_checkpoints_that_went_wrong(tmp_path, world, builder, prompts):
    """shared/cases/make_checkpoints.py, where it is at hand."""
    cases = SHARED / "cases" / "make_checkpoints.py"
    if not cases.exists():
        pytest.skip("needs ../shared/cases")
    subprocess.run([sys.executable, cases, world / "model", tmp_path], check=True)
    policy = model.Policy.load(tmp_path / "eos_is_endoftext_only")
    assert set(policy.eos_ids) == {0, builder.tokenizer.eos_token_id}
    old = data.PromptBuilder(tmp_path / "old_template_beside_new")
    assert old.tokenizer.chat_template == builder.tokenizer.chat_template
    with pytest.raises(model.ModelError, match="norm.weight is not finite"):
        model.Policy.load(tmp_path / "nan")
    with pytest.raises(model.ModelError, match="norm.weight has the shape"):
        model.Policy.load(tmp_path / "wrong_shape")


def test_a_policy_that_broke_in_training_does_not_answer(policy, prompts):
    policy.language_model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    assert not policy.is_sound()
    with pytest.raises(model.ModelError, match="the logits are not finite"):
        rollout.generate(policy, prompts[:1], 2, max_new=2)


def test_processors_open_the_toy_and_what_is_saved(tmp_path, world, policy):
    """AutoProcessor needs torchvision; without it, all that it lacks is torchvision."""
    policy.save(tmp_path / "saved")
    for folder in (world / "model", tmp_path / "saved"):
        images = AutoImageProcessor.from_pretrained(folder)
        assert (images.patch_size, images.merge_size, tuple(images.image_mean)) == (
            14,
            2,
            data.MEAN,
        )
        try:
            assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen2_5_VLProcessor"
        except ImportError as e:
            assert "requires the Torchvision library" in str(e)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_has_all_files_that_vllm_reads(tmp_path, family):
    """From a model as published: weights in shards; template and video processor in own files."""
    base, saved = tmp_path / "base", tmp_path / "saved"
    tokenizer = toy.write_tokenizer(base, ["Which lamp flashes?"])
    toy.write_model(base, toy.TINY[family](tokenizer), tokenizer)
    net = AutoModelForImageTextToText.from_pretrained(base)
    (base / "model.safetensors").unlink()
    net.save_pretrained(base, max_shard_size="1MB")
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": toy.CHAT_TEMPLATE}))
    processor = json.loads((base / "preprocessor_config.json").read_text())
    processor["video_processor_type"] = "Qwen3VLVideoProcessor"
    (base / "video_preprocessor_config.json").write_text(json.dumps(processor))
    shards = model_folder.weight_files(base)
    assert len(shards) > 1

    model.Policy.load(base).save(saved)
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.json"]
    copied += ["preprocessor_config.json", "video_preprocessor_config.json"]
    for name in copied:
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        found, expected = (json.loads((folder / name).read_text()) for folder in (saved, base))
        assert found == expected
    assert found["eos_token_id"] and not (saved / "model.safetensors.index.json").exists()
    weights = load_file(saved / "model.safetensors")
    published = {name: x for shard in shards for name, x in load_file(shard).items()}
    assert weights.keys() == published.keys()
    assert all(torch.equal(x, published[name]) for name, x in weights.items())
    parts = {"qwen2_5_vl": ("visual.", "model."), "qwen3_vl": ("model.",)}  # as on the hub
    assert all(name.startswith(parts[family]) for name in weights)


@pytest.mark.slow
@needs_shared
def test_a_small_model_of_the_real_architecture(tmp_path, prompts):
    """The real configuration and tokenizer at a small size; it saves, loads and answers."""
    toy.main(["--like", str(SHARED / "qwen2_5_vl"), str(tmp_path / "small")])
    policy = model.Policy.load(tmp_path / "small")
    assert mrsp.count(policy.language_model.layers) < 2e6 and policy.eos_ids == [
        151645,
        151643,
    ]
    assert policy.config.text_config.vocab_size == 152064 and policy.saved_dtype == torch.bfloat16
    builder = data.PromptBuilder(tmp_path / "small", min_pixels=784)
    (group,) = rollout.generate(policy, [builder(prompts[0].sample)], 2, max_new=3)
    assert all(0 < len(r) <= 3 for r in group.responses)
    for argv in (
        ["--like", "nowhere/at all", str(tmp_path / "a")],
        ["--like", str(tmp_path / "small"), str(tmp_path / "small")],
    ):
        with pytest.raises(SystemExit, match="error: "):
            toy.main(argv)


@needs_shared
def test_the_real_7b_has_the_weight_names_of_its_index(tmp_path):
    """The true configuration on the meta device, its names as save_pretrained writes them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(SHARED / "qwen2_5_vl")
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config)
    index = json.loads((SHARED / "qwen2_5_vl" / "model.safetensors.index.json").read_text())
    names = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        for n, _ in net.named_parameters()
    }
    assert names == set(index["weight_map"])
    assert sum(p.numel() for p in net.parameters()) * 2 == index["metadata"]["total_size"]


def test_segments_of_the_tower_taken_together_are_the_segments_one_by_one(policy, prompts):
    """Windows and grids of several lengths, against transformers' loop: embeddings, gradients."""
    results = []
    for name in ("sdpa", attention.SEGMENTS):
        policy.net.set_attn_implementation({"vision_config": name})
        policy.zero_grad()
        visual_embeds = torch.cat(policy.encode([*prompts, *prompts[3:4]]))
        (
            visual_embeds * torch.arange(visual_embeds.numel()).view_as(visual_embeds).sin()
        ).sum().backward()
        results.append([visual_embeds, *(p.grad for p in policy.net.model.visual.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, b, atol=1e-12 * max(1.0, float(a.detach().abs().max())), rtol=0
        )
