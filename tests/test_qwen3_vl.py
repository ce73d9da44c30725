"""Qwen3-VL: its prompts as its processor's, the policy as transformers' own forward, in float64.

transformers' side is given pixels, ids and the kind of every token, and finds positions by itself.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

import attention
import bench
import clips
import data
import model
import rollout
import tgrpo
import toy
import train
import ways
from conftest import SHARED, flags, needs_shared, run
from experiments.plain import PlainPolicy
from infra import families, model_folder, video
from infra.errors import DataError, ModelError
from infra.flags import peek
from test_model import random_responses, weighted


@pytest.fixture(scope="module")
def world(made_once):
    """The toy world with a Qwen3-VL."""

    def make(folder):
        toy.write(folder, seed=7, clips={"cot": 20, "train": 20, "test": 4}, family="qwen3_vl")

    return made_once("world_qwen3_vl", make)


@pytest.fixture(scope="module")
def builder(world):
    return data.PromptBuilder(world / "model", min_pixels=1024)


@pytest.fixture(scope="module")
def prompts(world, builder):
    """Unequal prompts: two videos, an image, no medium, an image and two videos."""
    samples = data.load_samples(world / "train.json")
    images = [s for s in samples if s.data_type == "image"]
    videos = [s for s in samples if s.data_type == "video"]
    large = builder(videos[1], max_frames=6, min_pixels=64 * 96)
    image = builder(images[0], min_pixels=9000)
    media = [*image.media, *large.media, *builder(videos[2], max_frames=4).media]
    return [
        builder(videos[0]),
        large,
        builder(images[1]),
        builder.build(videos[0], []),
        builder.build(videos[3], media),
    ]


LENGTHS = ([3, 1, 7], [5], [2, 4], [1, 6], [2, 2])


@pytest.fixture()
def policy(world):
    return model.Policy.load(world / "model", dtype=torch.float64, grad_checkpointing=0)


@pytest.fixture(scope="module")
def net(world):
    """transformers' own network."""
    folder = world / "model"
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)


def kinds(ids, config):
    """The kind of every token, as transformers numbers them: 0 text, 1 image, 2 video."""
    return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()


def pixels_and_grids(prompt, family):
    """The prompt's media as transformers' forward takes them."""
    inputs = {}
    names = {"video": ("pixel_values_videos", "video_grid_thw")}
    names["image"] = ("pixel_values", "image_grid_thw")
    for kind, (pixels, grids) in names.items():
        media = [m for m in prompt.media if m.kind == kind]
        if media:
            frames = [
                data.normalize(m.frames, torch.float64, family.mean, family.std) for m in media
            ]
            inputs[pixels] = torch.cat([data.patchify(x, 16)[0] for x in frames])
            inputs[grids] = torch.tensor([m.grid for m in media])
    return inputs


def plain_log_probs(net, policy, prompts, responses):
    """A row for each response, pixels encoded in each, by transformers alone. [(R_i,), ...]"""
    out = []
    for prompt, group in zip(prompts, responses):
        for r in group:
            ids = torch.cat([prompt.ids, r])[None]
            inputs = pixels_and_grids(prompt, policy.family)
            logits = net(ids, mm_token_type_ids=kinds(ids, net.config), **inputs).logits[0]
            logp = logits.index_fill(-1, policy.banned, -1e30).log_softmax(-1)
            out.append(logp[len(prompt.ids) - 1 : -1].gather(-1, r[:, None])[:, 0])
    return out


# ---- the policy


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_packed_groups_equal_transformers_row_by_row(policy, net, prompts, checkpointing):
    """Log-probs, and the gradient of every weight, those of the vision tower included."""
    policy.train().set_grad_checkpointing(checkpointing)
    net.zero_grad()
    responses = random_responses(prompts, LENGTHS)
    plain = plain_log_probs(net, policy, prompts, responses)
    packed, _ = policy(prompts, responses)
    packed = [row[: len(x)] for row, x in zip(packed, plain, strict=True)]
    for a, b in zip(packed, plain):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    weighted(plain).backward()
    weighted(packed).backward()
    slow = dict(net.named_parameters())
    for name, p in policy.net.named_parameters():
        expected = slow[name].grad
        assert expected.abs().max() > 0, name
        error = (p.grad - expected).abs().max() / expected.abs().max()
        assert error < 1e-6, (name, error)  # fp32 inside RMSNorm and RoPE bounds it


def test_positions_are_those_of_get_rope_index(policy, net, prompts):
    """Every grid has t = 1, so that transformers is right about the text after it, too."""
    for prompt in prompts:
        found, following = policy.positions(prompt)
        ids = prompt.ids[None]
        inputs = pixels_and_grids(prompt, policy.family)
        grids = {name: x for name, x in inputs.items() if name.endswith("grid_thw")}
        expected, delta = net.model.get_rope_index(ids, kinds(ids, net.config), **grids)
        assert torch.equal(found, expected[:, 0])
        assert following == len(prompt.ids) + int(delta)


def test_positions_by_hand():
    """Two grids of 2 x 3 visual tokens, each after a word; t stays, rows and columns advance."""
    ids = [1, 9, 9, 9, 9, 9, 9, 1, 9, 9, 9, 9, 9, 9, 1]
    where, following = model.mrope_positions(
        ids, [((1, 4, 6), 0.0)] * 2, video_token=9, image_token=8, tokens_per_second=None
    )
    assert where.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 5, 5, 5, 5, 8],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 5, 5, 6, 6, 6, 8],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8],
    ]
    assert following == 9


def test_greedy_equals_transformers_generate(policy, net, prompts):
    """Deepstack in the prefill; a head of 40 numbers, not 128 / 4, in the decode cache."""
    assert model_folder.head_size(policy.config.text_config) == 40
    groups = rollout.generate(policy, prompts, 1, max_new=12, temperature=0)
    for prompt, group in zip(prompts, groups):
        out = net.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones_like(prompt.ids)[None],
            mm_token_type_ids=kinds(prompt.ids[None], net.config),
            **pixels_and_grids(prompt, policy.family),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.banned.tolist(),
        )
        assert group.responses[0].tolist() == out[0, len(prompt.ids) :].tolist()


def test_log_probs_of_the_sampler_are_those_of_the_scorer(policy, prompts):
    policy.eos_ids = list(range(20, 66))  # so that lengths differ
    groups = rollout.generate(policy, prompts, 4, max_new=20, seeds=range(5))
    scored, _ = policy(prompts, [g.responses for g in groups])
    sampled = [x for g in groups for x in g.logps]
    assert len({len(x) for x in sampled}) > 3
    for row, x in zip(scored, sampled, strict=True):
        torch.testing.assert_close(row[: len(x)], x, atol=1e-9, rtol=0)


def test_visual_features_reach_the_first_layers_again(policy, prompts):
    """An embedding and three layers' features, in one row for each visual token."""
    with torch.no_grad():
        embeds = policy.encode(prompts)
        assert [len(x) for x in embeds] == [sum(m.tokens for m in p.media) for p in prompts]
        assert {x.shape[1] for x in embeds} == {policy.visual_width} == {4 * 128}
        response = [[torch.arange(20, 25)]]
        logp = policy(prompts[:1], response, embeds[:1])[0]
        without = embeds[0].clone()
        without[:, 128:] = 0
        assert not torch.allclose(policy(prompts[:1], response, [without])[0], logp, atol=1e-3)


def test_cached_embeddings_are_the_fresh_ones(world, policy, prompts, tmp_path):
    cached = model.Policy.load(
        world / "model", dtype=torch.float64, embedding_cache=(tmp_path / "cache", 1.0)
    )
    with torch.no_grad():
        fresh = policy.encode(prompts)
        cached.encode(prompts)
        cached.net.model.visual = None  # whoever encodes again fails
        again = cached.encode(prompts)
    for a, b in zip(again, fresh, strict=True):
        assert torch.equal(a, b)


def test_the_segments_of_the_tower_are_its_grids(policy, prompts):
    """Embeddings of any split between grids are those at once, and of transformers' own loop."""
    with torch.no_grad():
        at_once = policy.encode(prompts)
        grids = [(m, i) for p in prompts for m in p.media for i in range(m.grid[0])]
        one_by_one = torch.cat([policy.encode_grids([g]) for g in grids])
        torch.testing.assert_close(torch.cat(at_once), one_by_one, atol=1e-12, rtol=0)
        policy.net.set_attn_implementation({"vision_config": "sdpa"})
        torch.testing.assert_close(
            torch.cat(policy.encode(prompts)), one_by_one, atol=1e-12, rtol=0
        )


# ---- ranks


@pytest.mark.slow
def test_two_ranks_that_share_rows_compute_what_one_computes(world, tmp_path):
    """Deepstack of a rank's own tokens, in the prefill as in the scored row."""
    results = []
    for ranks in (1, 2):
        run("tests/mrsp_worker.py", world, tmp_path / f"of{ranks}", ranks=ranks)
        results.append([torch.load(tmp_path / f"of{ranks}.{r}") for r in range(ranks)])
    (one,), both = results
    for many in both:
        for name in ("visual_embeds", "logp", "entropy", "sampled logps", "greedy scored"):
            torch.testing.assert_close(many[name], one[name], atol=2e-6, rtol=0)
        for name in ("greedy", "sampled"):
            for g, h in zip(many[name], one[name], strict=True):
                assert [x.tolist() for x in g] == [x.tolist() for x in h]


@pytest.mark.slow
@pytest.mark.parametrize("many", ["--sp 2", "--fsdp"])
def test_two_ranks_have_the_gradient_of_one(world, tmp_path, many, gradient_of_one):
    """The tower is trained: the gradient of deepstack's features flows back to who encoded them."""
    how = [world, world / "model", tmp_path / "g", "--algo", "sft", *many.split()]
    run("tests/gradient_worker.py", *how, ranks=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"g.{rank}")["grads"]
        assert found.keys() == gradient_of_one.keys()
        for name, expected in gradient_of_one.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[name], expected, atol=1e-5 * scale, rtol=0, msg=name)


@pytest.fixture(scope="module")
def gradient_of_one(world, made_once):
    """What one rank computes of the same step."""

    def make(folder):
        folder.mkdir()
        command = [world, world / "model", folder / "g", "--algo", "sft"]
        run("tests/gradient_worker.py", *command)

    found = torch.load(made_once("gradient_qwen3_vl", make) / "g.0")["grads"]
    assert max(float(x.abs().max()) for n, x in found.items() if "deepstack" in n) > 1e-6
    return found


# ---- shuffled videos


def test_shuffled_frames_stand_at_the_times_that_they_had_in_order(policy, prompts):
    """The text of the prompt is as before: an ordinary video whose content is out of order."""
    args = SimpleNamespace(shuffle="frame", seed=0)
    (s,) = tgrpo.shuffle_prompts([(0, prompts[0])], [None], 0, args)
    before, after = prompts[0].media[0], s.prompt.media[0]
    assert torch.equal(after.frames, before.frames[s.order]) and s.order != sorted(s.order)
    assert after.times == before.times == sorted(before.times)
    assert torch.equal(s.prompt.ids, prompts[0].ids)


def test_shuffled_grids_are_the_encoding_of_the_shuffled_video(policy, prompts):
    args = SimpleNamespace(shuffle="grid", seed=0)
    with torch.no_grad():
        embeds = policy.encode(prompts[1:2])
        (s,) = tgrpo.shuffle_prompts([(0, prompts[1])], embeds, 0, args)
        torch.testing.assert_close(
            s.visual_embeds, policy.encode([s.prompt])[0], atol=1e-12, rtol=0
        )
    assert not torch.equal(s.visual_embeds, embeds[0])
    assert s.prompt.media[0].grid_times == prompts[1].media[0].grid_times


# ---- prompts


def expansion(folder, chat, media, indices, fps):
    """The token ids of a chat with one medium, by the code of transformers' processor.

    (Its __init__ alone needs torchvision, for the video processor.)
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = object.__new__(Qwen3VLProcessor)
    processor.tokenizer = tokenizer
    processor.image_processor = processor.video_processor = SimpleNamespace(
        merge_size=2, temporal_patch_size=2
    )
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.vision_start_token = "<|vision_start|>"
    processor.vision_end_token = "<|vision_end|>"
    inputs = {f"{media.kind}_grid_thw": torch.tensor([media.grid])}
    if media.kind == "video":
        inputs["video_metadata"] = [VideoMetadata(100, fps=fps, frames_indices=indices)]
        replaced = dict(videos_replacements=[processor.replace_video_token(inputs, 0)])
    else:
        replaced = dict(images_replacements=[processor.replace_image_token(inputs, 0)])
    (text,), _ = processor.get_text_with_replacements([chat], **replaced)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_prompts(folder, world):
    """A video at three rates, a video of two fractions of seconds, and an image."""
    builder = data.PromptBuilder(folder, min_pixels=1024)
    samples = data.load_samples(world / "train.json")
    for sample, frames in [
        (next(s for s in samples if s.data_type == "video"), 16),
        (next(s for s in samples if s.data_type == "video"), 6),
        (next(s for s in samples if s.data_type == "image"), 1),
    ]:
        prompt = builder(sample, max_frames=max(2, frames))
        (media,) = prompt.media
        chat = builder._chat([media.kind], builder.text(sample))
        indices = np.linspace(0, 15, frames).round().astype(int).tolist()
        assert prompt.ids.tolist() == expansion(folder, chat, media, indices, 2.0)
    return builder


def test_prompts_are_the_processors(world):
    builder = check_prompts(world / "model", world)
    sample = data.load_samples(world / "train.json")[0]
    text = builder.tokenizer.decode(builder(sample, max_frames=4).ids)
    start, pad, end = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
    first = f"<1.2 seconds>{start}{pad}{end}"  # frames 0 and 5 of 16, at 2 frames a second
    second = f"<6.2 seconds>{start}{pad}{end}"  # 10 and 15
    assert f"{start}{first}{second}{end}{sample.question}" in text


@pytest.mark.slow
@needs_shared
def test_prompts_are_the_processors_with_the_real_tokenizer(world, tmp_path):
    """Qwen2.5-VL's: Qwen3-VL's has the same vision tokens."""
    real_folder(tmp_path)
    check_prompts(tmp_path, world)


def real_folder(folder):
    """A small random Qwen3-VL with Qwen2.5-VL's tokenizer and chat template."""
    names = "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"
    for name in names:
        shutil.copyfile(SHARED / "qwen2_5_vl" / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = toy.tiny_qwen3_config(tokenizer, hidden=64, vision_hidden=32)
    toy.write_model(folder, config, tokenizer)


def test_times_of_a_constant_rate_are_the_numbers_of_frames_over_it(tmp_path):
    """As in the processor. The stamps in the file are rounded, and "<12.9 seconds>" became 12.8."""
    clips.write(tmp_path / "a.mp4", range(48), rate=30)
    clip = video.read_clip(tmp_path / "a.mp4", target_fps=30, max_frames=48)
    assert clip.times == [i / 30 for i in clip.indices] and len(clip.times) == 48


def test_times_are_those_of_the_file(world, tmp_path):
    """Also in a segment of it; a folder's are its number over the record's rate."""
    sample = next(s for s in data.load_samples(world / "train.json") if s.data_type == "video")
    whole = data.load_media(sample, max_frames=4)
    assert whole.times == [0.0, 2.5, 5.0, 7.5] and whole.grid_times == [1.25, 6.25]
    part = data.load_media(replace(sample, segment=(3.0, 7.0)), max_frames=4)
    assert part.times == [3.0, 4.0, 5.5, 6.5]  # frames 6, 8, 11 and 13 of the file
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    frames = replace(sample, path=str(tmp_path), data_type="frame", fps=4.0)
    assert data.load_media(frames, max_frames=4).times == [0.0, 1.0, 1.75, 2.75]
    clip = replace(frames, segment=(1.0, 2.0))
    assert data.load_media(clip, max_frames=2).times == [1.0, 1.75]


def test_times_of_a_variable_frame_rate(tmp_path):
    """When each picture appears, not its number over a mean rate."""
    images = [Image.new("RGB", (32, 32), (60 * i, 0, 0)) for i in range(4)]
    shown = [1000, 200, 200, 200]  # milliseconds
    images[0].save(
        tmp_path / "x.gif", save_all=True, append_images=images[1:], duration=shown, loop=0
    )
    sample = data.Sample("0", "?", [], "free-form", "video", str(tmp_path / "x.gif"), "")
    media = data.load_media(sample, fps=float("inf"), max_frames=4)
    # on the screen after 0, 0.47, 0.93 and 1.4 seconds
    assert media.times == pytest.approx([0.0, 0.0, 0.0, 1.4])


def test_frames_are_multiples_of_32_and_patches_of_16(world, builder):
    """The processor's pixels of an image, its order of patches, its mean and std of 0.5."""
    sample = next(s for s in data.load_samples(world / "train.json") if s.data_type == "image")
    media = builder(sample, min_pixels=9000).media[0]
    assert media.frames.shape[2:] == (96, 96) and media.grid == (1, 6, 6) and media.tokens == 9
    half = (0.5, 0.5, 0.5)
    size = {"shortest_edge": 9000, "longest_edge": 256 * 28 * 28}
    theirs = Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half, size=size)
    theirs = theirs(Image.open(sample.path).convert("RGB"), return_tensors="pt")
    patches, grid = data.patchify(data.normalize(media.frames, mean=half, std=half), 16)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, theirs["pixel_values"], atol=1e-5, rtol=0)


# ---- checkpoints

DEPTH_24 = dict(depth=24, hidden_size=1024, intermediate_size=4096)
DEPTH_24 |= dict(deepstack_visual_indexes=[5, 11, 17])
DEPTH_27 = dict(depth=27, hidden_size=1152, intermediate_size=4304)
DEPTH_27 |= dict(deepstack_visual_indexes=[8, 16, 24])


def published(hidden, layers, heads, intermediate, tied, vision):
    """The content of a published config.json."""
    text = dict(
        model_type="qwen3_vl_text",
        attention_bias=False,
        head_dim=128,
        hidden_size=hidden,
        intermediate_size=intermediate,
        max_position_embeddings=262144,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=8,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
        rope_theta=5000000,
        tie_word_embeddings=tied,
        vocab_size=151936,
    )
    vision = vision | dict(
        model_type="qwen3_vl",
        num_heads=16,
        num_position_embeddings=2304,
        out_hidden_size=hidden,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    return dict(
        architectures=["Qwen3VLForConditionalGeneration"],
        image_token_id=151655,
        model_type="qwen3_vl",
        text_config=text,
        tie_word_embeddings=tied,
        video_token_id=151656,
        vision_config=vision,
        vision_end_token_id=151653,
        vision_start_token_id=151652,
    )


SHAPES = {
    "2B": (published(2048, 28, 16, 6144, True, DEPTH_24), 2_127_532_032),
    "4B": (published(2560, 36, 32, 9728, True, DEPTH_24), 4_437_815_808),
    "8B": (published(4096, 36, 32, 12288, False, DEPTH_27), 8_767_123_696),
}


def published_names(config):
    """The names of the weights in the published files."""
    text, vision = config["text_config"], config["vision_config"]
    of_layer = "input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj "
    of_layer += "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    of_layer += "self_attn.q_norm self_attn.k_norm"
    names = {"embed_tokens.weight", "norm.weight"}
    for i in range(text["num_hidden_layers"]):
        names |= {f"layers.{i}.{name}.weight" for name in of_layer.split()}
    names = {f"model.language_model.{name}" for name in names}
    modules = ["patch_embed.proj"]
    for i in range(vision["depth"]):
        of_block = "norm1 norm2 attn.qkv attn.proj mlp.linear_fc1 mlp.linear_fc2"
        modules += [f"blocks.{i}.{name}" for name in of_block.split()]
    for merger in ("merger", *(f"deepstack_merger_list.{i}" for i in range(3))):
        modules += [f"{merger}.{name}" for name in ("norm", "linear_fc1", "linear_fc2")]
    names |= {f"model.visual.{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    names |= {"model.visual.pos_embed.weight"}
    return names if text["tie_word_embeddings"] else names | {"lm_head.weight"}


def test_bench_times_the_shape_of_the_4b():
    """bench.py --model qwen3-4b: deepstack from layers 5, 11 and 17, as published."""
    policy = ways.random_policy("qwen3-4b", torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in policy.parameters()) == SHAPES["4B"][1]
    vision, text = policy.config.vision_config, policy.config.text_config
    assert vision.deepstack_visual_indexes == DEPTH_24["deepstack_visual_indexes"]
    assert text.rope_parameters["mrope_section"] == [24, 20, 20] and text.head_dim == 128
    # a query and a key meet in 32 heads of 128, not in 2,560 numbers
    flops, _ = bench.cost(policy, 1000, 1, 1, torch.bfloat16)["ours"]
    attention_only = 3 * 4 * 36 * 32 * 128 * (1000 * 1000 / 2 + 1000.5)
    layers = sum(p.numel() for p in policy.language_model.layers.parameters())
    assert flops == 3 * 2 * (layers * 1001 + 151936 * 2560) + attention_only


@pytest.mark.parametrize("size", SHAPES)
def test_the_published_shapes(tmp_path, monkeypatch, size):
    """The true configuration on the meta device: every published weight has its place, and no
    other is missing."""
    content, parameters = SHAPES[size]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config)
    assert {name for name, _ in net.named_parameters()} == published_names(content)
    assert sum(p.numel() for p in net.parameters()) == parameters
    model_folder.check_rotary_sections(tmp_path, net.config.text_config)
    policy = model.Policy(net, tmp_path)
    assert policy.family == families.Family(
        patch=16, mean=(0.5,) * 3, std=(0.5,) * 3, time_text=True, deepstack=3
    )
    cache = attention.DecodeCache(
        config.text_config, [10], 2, 16, device="meta", dtype=torch.bfloat16
    )
    assert cache.response_kv[0][0].shape == (2, 8, 16, 128)


def test_transformers_opens_what_is_saved(tmp_path, policy, net, prompts):
    """Bit for bit, with a tied head in the file once; and Policy.load opens what transformers
    saved."""
    policy.save(tmp_path / "ours")
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    found = again.state_dict()
    for name, x in net.state_dict().items():
        assert torch.equal(found[name], x), name
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    with safe_open(file, "pt") as f:
        assert set(f.keys()) == set(dict(net.named_parameters()))
    shutil.copytree(policy.folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    net.save_pretrained(tmp_path / "theirs")
    loaded = model.Policy.load(tmp_path / "theirs", dtype=torch.float64)
    responses = random_responses(prompts, LENGTHS)
    assert torch.equal(loaded(prompts, responses)[0], policy(prompts, responses)[0])


def test_numbers_of_the_checkpoint_count(tmp_path, world):
    """The patch size in config.json; mean and std in preprocessor_config.json, if there is one."""
    config = json.loads((world / "model" / "config.json").read_text())
    read = families.read_family(world / "model", config)
    assert (read.patch, read.mean, read.std, read.deepstack) == (16, (0.5,) * 3, (0.5,) * 3, 3)
    assert families.read_family(tmp_path, config) == read  # the table's, without the file
    own = dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    config["vision_config"] |= dict(patch_size=12, deepstack_visual_indexes=[0])
    read = families.read_family(tmp_path, config)
    assert (read.patch, read.mean, read.std, read.deepstack) == (12, (0.1, 0.2, 0.3), (1, 2, 3), 1)
    config["vision_config"]["patch_size"] = [16, 16]
    with pytest.raises(ModelError, match="expected a 'vision_config' with a 'patch_size'"):
        families.read_family(tmp_path, config)
    config["vision_config"]["patch_size"] = 16
    for numbers in (dict(image_mean=0.5, image_std=0.5), own | dict(image_std=[1, 0, 1])):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
        with pytest.raises(ModelError, match="preprocessor_config.json: expected three numbers"):
            families.read_family(tmp_path, config)
    for layers in ([0, 0], [4], [-1]):
        config["vision_config"]["deepstack_visual_indexes"] = layers
        with pytest.raises(ModelError, match="expected different layers of the vision tower"):
            families.read_family(tmp_path, config)


def test_the_normalisation_is_read_wherever_a_processor_keeps_it(tmp_path, world):
    """transformers 5 writes processor_config.json alone; videos may have a file of their own."""
    config = json.loads((world / "model" / "config.json").read_text())
    own = dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3])
    nested = dict(image_processor=own, video_processor=own)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    read = families.read_family(tmp_path, config)
    assert (read.mean, read.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    other = tmp_path / "video_preprocessor_config.json"
    other.write_text(json.dumps(own | dict(image_std=[1, 2, 4])))
    with pytest.raises(ModelError, match="normalise pixels differently"):
        families.read_family(tmp_path, config)
    other.write_text(json.dumps(own | dict(do_normalize=False)))
    with pytest.raises(ModelError, match="video_preprocessor_config.json: expected pixels norm"):
        families.read_family(tmp_path, config)


def test_a_vision_token_beyond_the_vocabulary_is_named(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    del config["vision_start_token_id"]  # transformers' default is an id of the real vocabulary
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="leaves out or misnames a vision token"):
        model.Policy.load(tmp_path / "m")


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5"])
def test_other_families_are_refused_by_name(world, tmp_path, model_type):
    shutil.copytree(world / "model", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(model_type=model_type)))
    for load in (model.Policy.load, data.PromptBuilder):
        with pytest.raises(ModelError, match=f"model type '{model_type}', expected one of .*qwen3"):
            load(tmp_path / "m")


def test_a_thinking_checkpoint_is_refused(world, tmp_path):
    """Its template ends with <think>: no response would have one."""
    shutil.copytree(world / "model", tmp_path / "m")
    template = tmp_path / "m" / "chat_template.jinja"
    opened = template.read_text().replace("assistant\n{%", "assistant\n<think>\n{%")
    template.write_text(opened)
    with pytest.raises(
        DataError, match="m: a Thinking checkpoint: its chat template opens <think>"
    ):
        data.PromptBuilder(tmp_path / "m")


# ---- whole runs


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_sft_tgrpo_and_evaluation_run(world, tmp_path):
    """Each goes on from the run before; frames, grids and contrast; a frozen tower with a cache."""
    sft, tgrpo_run, contrast = tmp_path / "sft", tmp_path / "tgrpo", tmp_path / "contrast"
    run(*flags(world, sft, "sft", steps=2, fsdp=True), ranks=2)
    saved = AutoModelForImageTextToText.from_pretrained(model_folder.newest_checkpoint(sft))
    assert saved.lm_head.weight is saved.model.language_model.embed_tokens.weight
    how = dict(model=sft, steps=2, beta=0.04, max_frames=8)
    run(*flags(world, tgrpo_run, "tgrpo", **how))
    how = dict(model=tgrpo_run, steps=1, temporal="contrast", embedding_cache=tmp_path / "cache")
    command = flags(world, contrast, "tgrpo", shuffle="grid", **how)
    run(*(x for x in command if x != "--train_vision"))
    for out, steps in ((sft, 2), (tgrpo_run, 2), (contrast, 1)):
        entries = log(out)
        assert len(entries) == steps and entries[0]["skipped_samples"] == 0
        assert entries[0]["pixels"] == 32 * 32
    assert log(sft)[1]["loss"] < log(sft)[0]["loss"] and log(sft)[1]["updates"] == 1
    assert log(tgrpo_run)[0]["updates"] == 1 and log(tgrpo_run)[0]["mismatch"] < 1e-4
    assert 0 < log(contrast)[0]["probability_drop"] < 1
    assert any((tmp_path / "cache").iterdir())
    command = ["eval.py", "--model", contrast, "--data", world / "test.json", "--tts"]
    command += ["--out", tmp_path / "eval", "--min_pixels", "784"]
    run(*command, *"--start 4 --cap 8 --m 2 --max_new 8".split())
    (answers,) = (tmp_path / "eval").glob("s2d-*.jsonl")
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {r["frames"] for line in lines for r in line["rounds"]} >= {4, 8}


def test_the_plain_way_gives_the_same(world, policy, prompts):
    """transformers' forward and cache with our sampler, as bench.py has it."""
    plain = PlainPolicy.load(world / "model", dtype=torch.float64)
    how = dict(max_new=5, seeds=[0, 1, 2])
    ours, theirs = (rollout.generate(x, prompts[:3], 2, **how) for x in (policy, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]
        for x, y in zip(a.logps, b.logps, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0, check_dtype=False)


def test_the_toy_of_this_family_has_its_own_folder(world, capsys):
    argv = ["--family", "qwen3_vl", "--algo", "tgrpo", "--seed", "1"]
    given = dict(model=None, data=None, algo="grpo", out=None, seed=0)
    sft, rl = train.toy_runs(peek(argv, **given, family="qwen2_5_vl", lora=0), argv)
    assert sft.model == "out/toy_qwen3_vl-seed1/world/model"
    assert (sft.out, rl.out) == ("out/toy_qwen3_vl-seed1/sft", "out/toy_qwen3_vl-seed1/tgrpo")
    assert toy.root(0) == toy.root(0, "qwen2_5_vl") != toy.root(0, "qwen3_vl")
    assert "family" not in vars(rl)  # config.txt names the model
    for argv in (["--family", "qwen3_vl", "--model", "x", "--data", "y"], ["--family", "qwen3"]):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
    toy.check_family(world, "qwen3_vl")
    with pytest.raises(ModelError, match="a qwen3_vl, expected --family's qwen2_5_vl: give each"):
        toy.check_family(world, "qwen2_5_vl")
    printed = capsys.readouterr().err
    assert "--family qwen3_vl: chooses the toy's model, expected without --model" in printed


@pytest.mark.slow
@needs_shared
def test_a_small_model_like_a_real_one(tmp_path):
    """toy.py --like: the configuration and files of a checkpoint, at a small size."""
    (tmp_path / "real").mkdir()
    real_folder(tmp_path / "real")
    content, _ = SHAPES["4B"]
    (tmp_path / "real" / "config.json").write_text(json.dumps(content))
    toy.main(["--like", str(tmp_path / "real"), str(tmp_path / "small")])
    small = model.Policy.load(tmp_path / "small")
    text = small.config.text_config
    assert (text.vocab_size, text.head_dim, text.rope_parameters["rope_theta"]) == (151936, 40, 5e6)
    assert small.family.deepstack == 3
    assert sum(p.numel() for p in small.language_model.layers.parameters()) < 2e6
