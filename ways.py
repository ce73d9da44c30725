"""Two ways to run a GRPO step, the plain one and ours, at true sizes with random weights.

bench.py times their phases, and gpu_check.py compares their numbers. The plain way (class Plain) is
what a trainer does that calls transformers: `generate` with G copies of the prompt, G full rows in
every log-prob pass, and the video encoded again for every row of every pass. Ours (class Ours)
encodes once, prefills once, reads one copy of the prompt's keys and values, and scores all
responses in one row.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

import attention
import mrsp
import toy
from data import Prompt, Sample, load_media, normalize, patchify
from infra.embedding_cache import EmbeddingCache
from infra.ranks import RANK, WORLD
from model import Policy
from rollout import generate

# hidden, intermediate, layers, heads, K/V heads, vocabulary; of the vision tower: hidden,
# intermediate, layers, heads
SHAPES = {
    "tiny": (384, 1024, 8, 6, 2, 4096, 192, 384, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151936, 1280, 3420, 32, 16),
    "7b": (3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, 1024, 4096, 24, 16),
}
VISION_IDS = dict(
    image_token_id=0, video_token_id=1, vision_start_token_id=2, vision_end_token_id=3
)
TIME_TOKENS = 9  # of a Qwen3-VL's grid, beside its pixels: <|vision_start|>, <12.5 seconds>, ...


def timed(f, device):
    """f() -> (its result, seconds, with the GPU's work)."""
    wait(device)
    start = time.perf_counter()
    out = f()
    wait(device)
    return out, time.perf_counter() - start


def wait(device):
    """Waits until the GPU, if it is one, has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_figures(file, found):
    """Writes figures as JSON, if a file is given."""
    if file and RANK == 0:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


# ---- the two ways


class Plain:
    """The phases of a step as transformers runs them. responses: G of them, (R,) each."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.net = policy, policy.net
        self.G, device = len(responses), policy.device
        self.medium = {}
        for media in prompt.media:  # one, or none
            family, dtype = policy.family, policy.net.model.visual.dtype
            frames = normalize(media.frames.to(device), dtype, family.mean, family.std)
            patches, grid = patchify(frames, family.patch)
            pixels = "pixel_values_videos" if media.kind == "video" else "pixel_values"
            grids = torch.tensor([grid], device=device)
            self.medium = {pixels: patches, f"{media.kind}_grid_thw": grids}
        self.copies = {name: x.repeat(self.G, 1) for name, x in self.medium.items()}
        self.ids = prompt.ids[None].to(device)
        self.responses = torch.stack(responses).to(device)
        positions, following = policy.positions(prompt)
        R = self.responses.shape[1]
        after = (following + torch.arange(R)).expand(3, -1)
        positions = torch.cat([positions, after], dim=1)  # (3, P + R)
        self.positions = positions[:, None].expand(-1, self.G, -1).to(device)  # (3, G, P + R)

    def encode(self):
        """Encodes nothing: every pass encodes for itself."""

    def rollout(self, new):
        """Samples G responses of `new` tokens."""
        self.net.generate(
            self.ids,
            **self.medium,
            num_return_sequences=self.G,
            do_sample=True,
            max_new_tokens=new,
            min_new_tokens=new,
            use_cache=True,
            top_k=0,
            mm_token_type_ids=self.kinds(self.ids),
        )

    def kinds(self, ids):
        """The kind of every token, as transformers numbers them: 0 text, 1 image, 2 video."""
        image = (ids == self.net.config.image_token_id).int()
        video = (ids == self.net.config.video_token_id).int()
        return image + 2 * video

    def distribution(self):
        """Log-probs of the whole vocabulary at each token of the responses, (G, R, vocabulary)."""
        rows = torch.cat([self.ids.expand(self.G, -1), self.responses], dim=1)
        R = self.responses.shape[1]
        out = self.net(
            rows,
            **self.copies,
            position_ids=self.positions,
            logits_to_keep=R + 1,
            use_cache=False,
            mm_token_type_ids=self.kinds(rows),
        )
        logits = out.logits[:, :-1].float().index_fill(-1, self.policy.banned, -1e30)
        return logits.log_softmax(-1)

    def log_probs(self):
        """Log-probs of the responses' tokens, (G, R)."""
        return self.distribution().gather(-1, self.responses[..., None])[..., 0]


class Ours:
    """The phases of a step as this code runs them, in the order and with the names of Plain."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.prompt, self.responses = policy, prompt, responses
        self.encode()

    def encode(self):
        """Encodes the video, for all the passes of the step."""
        with torch.no_grad():
            self.visual_embeds = self.policy.encode([self.prompt])

    def rollout(self, new):
        """Samples G responses of `new` tokens."""
        G, embeds = len(self.responses), self.visual_embeds
        generate(self.policy, [self.prompt], G, max_new=new, visual_embeds=embeds)

    def log_probs(self):
        """Log-probs of the responses' tokens, (G, R)."""
        return self.policy([self.prompt], [self.responses], self.visual_embeds)[0]


def switch(policy, *, plain=False, embedding_cache=None, cuda_graph=False, sp=mrsp.ONE_RANK):
    """Sets the policy up for one way: transformers' attention or ours, and what ours adds -> the
    way's class."""
    text, vision = ("sdpa", "sdpa") if plain else (attention.NAME, attention.SEGMENTS)
    policy.net.set_attn_implementation({"text_config": text, "vision_config": vision})
    policy.embedding_cache, policy.cuda_graph, policy.sp = embedding_cache, cuda_graph, sp
    return Plain if plain else Ours


def all_ways(cuda, folder):
    """The ways that this machine has -> {name: keyword arguments of switch}."""
    ways = {
        "plain": {"plain": True},
        "ours": {},
        "cache": {"embedding_cache": EmbeddingCache(folder / "cache", 100.0, "bench")},
    }
    if cuda:
        ways["graph"] = {"cuda_graph": True}
    if WORLD > 1:
        ways["ranks"] = {"sp": mrsp.sequence_parallel(WORLD)}
    return ways


# ---- random weights, random videos


def shape_config(shape, **tokens):
    """The configuration of a Qwen2.5-VL or Qwen3-VL of a shape in SHAPES. tokens: ids of special
    tokens, by their names in config.json."""
    D, inner, layers, heads, kv, vocabulary, v_D, v_inner, v_layers, v_heads = SHAPES[shape]
    text = dict(
        vocab_size=vocabulary,
        hidden_size=D,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        initializer_range=D**-0.5,
        max_position_embeddings=2**18,
        bos_token_id=4,
        eos_token_id=4,
        pad_token_id=4,
    )
    vision = dict(
        hidden_size=v_D,
        intermediate_size=v_inner,
        depth=v_layers,
        num_heads=v_heads,
        out_hidden_size=D,
    )
    add_own_parts = add_qwen3_parts if shape.startswith("qwen3") else add_qwen2_5_parts
    return add_own_parts(text, vision)(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape != "7b",
        **(tokens or VISION_IDS),
    )


def random_policy(shape, device, dtype):
    """A policy of a shape in SHAPES with random weights."""
    config = shape_config(shape)
    torch.set_default_dtype(dtype)
    with device:
        net = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = 4
    policy = Policy(net, "random weights")  # no such folder: there are no files to copy when saving
    return policy.to(device)


def add_qwen2_5_parts(text, vision):
    """Adds to the sizes what only Qwen2.5-VL has -> the class of its configuration."""
    d = text["hidden_size"] // text["num_attention_heads"]
    t, h = d // 8, 3 * d // 16  # of M-RoPE
    sections = [t, h, d // 2 - t - h]
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    vision["tokens_per_second"] = 2
    depth = vision["depth"]
    vision["fullatt_block_indexes"] = list(range(7, depth, 8)) or [depth - 1]
    return Qwen2_5_VLConfig


def add_qwen3_parts(text, vision):
    """As add_qwen2_5_parts, of Qwen3-VL."""
    text["head_dim"] = 128
    text["rope_parameters"] = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True)
    text["rope_parameters"]["mrope_section"] = [24, 20, 20]
    quarter = vision["depth"] // 4
    vision["deepstack_visual_indexes"] = [n * quarter - 1 for n in (1, 2, 3)]
    return Qwen3VLConfig


def write_video(file, frames, args):
    """Writes a video of random pixels."""
    shape = (frames, args.height, args.width, 3)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    toy.write_y4m(file, pixels, 2)


def video_prompt(policy, file, args):
    """A prompt of random words about a video -> (prompt, seconds to read, resize and sample the
    video)."""
    sample = Sample("-", "", [], "free-form", "video", str(file), "")
    start = time.perf_counter()
    media = load_media(
        sample,
        fps=float("inf"),
        max_frames=10**6,
        max_pixels=args.height * args.width,
        patch=policy.family.patch,
    )
    seconds = time.perf_counter() - start
    vocabulary, half = policy.config.text_config.vocab_size, args.text // 2
    before = torch.randint(8, vocabulary, (half,))
    after = torch.randint(8, vocabulary, (args.text - half,))
    shown = policy.family.shown_as(media)
    parts = [before]
    for t, h, w in shown:
        if policy.family.time_text:
            parts.append(torch.randint(8, vocabulary, (TIME_TOKENS,)))
        n = t * h * w // policy.merge**2
        parts.append(torch.full((n,), policy.config.video_token_id))
    return Prompt(sample, torch.cat([*parts, after]), [media]), seconds
