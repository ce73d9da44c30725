"""Speed, side by side: a GRPO step the plain way, and with each idea of this code added in turn.

    python bench.py                                    a 17 M model on this machine's CPU, 2 minutes
    python bench.py --model 3b --frames 16 64 256 --grad_checkpointing 1     a real shape, for a GPU
    python bench.py --model DIR --json results/x.json  any checkpoint; the figures also as JSON
    torchrun --nproc_per_node 2 -- bench.py            also with each row sharded across all ranks

The plain way (class Plain) is what a trainer does that calls transformers: `generate` with G
copies of the prompt, G full rows in every log-prob pass, and the video encoded again for every row
of every pass. Ours (class Ours) adds, one after the other:
    encode once      the vision tower runs once a step              (model.Policy.encode)
    shared prefill   the prompt is prefilled once, not G times      (rollout.prefill)
    shared decode    G rows read one copy of the prompt's K and V   (attention.DecodeCache)
    packed rows      [prompt | o_1 ... o_G] in log-prob passes      (attention.PackedRow)
    CUDA graph       decode steps are replayed, on a GPU            (rollout.record)
    embedding cache  embeddings from disk, with a frozen tower      (infra.embedding_cache)
    N ranks          the row is sharded across torchrun's ranks     (mrsp.ShardedRow)

Each phase is timed every way in turn, `--repeat` times, and the median is taken. A line of the
table is the sum of its phases. Every way does the same work: all responses have their full length,
and no end of turn is drawn. The plain way's time in the vision tower counts as encode, wherever it
is spent.

A model of the cost is printed beside the measurement. The training pass computes (P + G R) tokens
instead of G (P + R). Decoding reads the weights and one copy of the prompt's keys and values
instead of G.
"""

import json
import platform
import shlex
import statistics
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

import attention
import mrsp
import toy
from data import Prompt, Sample, load_media, normalize, patchify
from infra.embedding_cache import EmbeddingCache
from infra.flags import Parser
from infra.model_folder import head_size
from infra.ranks import RANK, WORLD, ranks, say
from infra.run_folder import commit
from infra.video import close_workers
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
TIME_TOKENS = 9  # of a Qwen3-VL's grid, beside its pixels: <|vision_start|>, <12.5 seconds>, ...
STEPS = (  # lines of the table: the name, the way (see all_ways), and the phases that it changes
    ("+ encode once", "ours", ["encode"]),
    ("+ shared prefill", "ours", ["prefill"]),
    ("+ shared decode", "ours", ["decode"]),
    ("+ packed rows", "ours", ["reference", "train"]),
    ("+ CUDA graph", "graph", ["decode"]),
    ("+ embedding cache", "cache", ["encode"]),
    ("+ {} ranks a row", "ranks", ["prefill", "decode", "reference", "train"]),
)
SHARES = {  # of a measured rate
    "train_utilisation": ("trains", "matrix rate measured (recomputation not counted)"),
    "decode_floor_share": ("decodes", "copy rate measured"),
}
PHASES = ("video", "encode", "prefill", "decode", "reference", "train", "optimizer")


def parse_args(argv=None):
    """The flags."""
    p = Parser(__doc__)
    g = p.section("what is measured")
    g.value(
        "model",
        "tiny",
        "tiny (17 M parameters), 3b or 7b (Qwen2.5-VL's shapes), or qwen3-4b (Qwen3-VL's), with "
        "random weights; or a checkpoint",
    )
    g.value("frames", [16, 64, 128], "of the video, one or more numbers", "at least 2", nargs="+")
    g.value("height", 112, "pixels of a frame", "at least 28")
    g.value("width", 112, "pixels of a frame", "at least 28")
    g.value("text", 32, "tokens of the question", "at least 1")
    g.value("group", 8, "G", "at least 1")
    g.value("new", 32, "tokens of every response", "at least 2")
    g.value(
        "grad_checkpointing",
        0,
        "recompute the activations of every n-th layer in the backward pass; 0: keep them all",
    )
    g.value("repeat", 3, "measurements of each phase, each way", "at least 1")
    g.value("json", None, "file for the figures")
    return p.parse_args(argv)


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


# ---- what is measured


def random_policy(shape, device, dtype):
    """A Qwen2.5-VL or Qwen3-VL of a shape in SHAPES with random weights."""
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
    config = add_own_parts(text, vision)(
        text_config=text,
        vision_config=vision,
        image_token_id=0,
        video_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        tie_word_embeddings=shape != "7b",
    )
    torch.set_default_dtype(dtype)
    with device:
        net = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = 4
    return Policy(net, "random weights")  # no such folder: there are no files to copy when saving


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


# ---- measuring


def clock(f, device):
    """Seconds that f() takes, including the GPU's work."""
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - start


def wait(device):
    """Waits until the GPU, if it is one, has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up the time of a module's forward, in `seconds`."""

    def __init__(self, module, device):
        self.seconds, self.device = 0.0, device
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, *_):
        wait(self.device)
        self.started = time.perf_counter()

    def stop(self, *_):
        wait(self.device)
        self.seconds += time.perf_counter() - self.started


def reference_pass(way):
    """The reference's log-probs."""
    way.policy.eval()
    with torch.no_grad():
        way.log_probs()


def training_pass(way):
    """The policy's log-probs, and a gradient."""
    way.policy.train()
    way.log_probs().sum().backward()


def phases(way, new, optimizer, tower):
    """Seconds of each phase of a step, but for reading the video. "encode" has all the time in the
    vision tower."""
    way.policy.eval()
    parts = {
        "encode": way.encode,
        "prefill": partial(way.rollout, 1),
        "decode": partial(way.rollout, new),
        "reference": partial(reference_pass, way),
        "train": partial(training_pass, way),
        "optimizer": optimizer.step,
    }
    total, encoding = {}, {}  # seconds of a part, and those of them in the tower
    for name, part in parts.items():
        tower.seconds = 0.0
        total[name] = clock(part, way.policy.device)
        encoding[name] = tower.seconds
    optimizer.zero_grad()
    spent = {name: total[name] - encoding[name] for name in parts}
    # a rollout of `new` tokens prefills too, so the prefill's own encoding is not counted
    again = encoding["decode"] + encoding["reference"] + encoding["train"]
    spent["encode"] = total["encode"] + again
    spent["decode"] -= spent["prefill"]
    return spent | {
        "training pass": total["train"],
        "rollout": total["encode"] + total["decode"],
    }


def measure(policy, ways, frames, args, folder, tower):
    """Times every way at one number of frames. ways: {name: keyword arguments of switch}.

    Returns the prompt's tokens, {way: {phase: median seconds}}, {way: peak memory in GB}, and the
    largest difference of a log-prob from the plain way's."""
    device, file = policy.device, folder / f"{frames}.y4m"
    write_video(file, frames, args)
    vocabulary = policy.config.text_config.vocab_size
    responses = [torch.randint(8, vocabulary, (args.new,)) for _ in range(args.group)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    runs, memory, log_probs = {name: [] for name in ways}, {}, {}
    for i in range(args.repeat + 1):  # the first is a warm-up
        prompt, video = video_prompt(policy, file, args)
        for name, settings in ways.items():
            kind = switch(policy, **settings)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            way = kind(policy, prompt, responses)
            runs[name].append({"video": video, **phases(way, args.new, optimizer, tower)})
            memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            if i == 0:
                with torch.no_grad():
                    log_probs[name] = way.log_probs().float()
    times = {}
    for name, timed in runs.items():
        times[name] = {phase: statistics.median(t[phase] for t in timed[1:]) for phase in timed[0]}
    apart = max(float((log_probs["plain"] - x).abs().max()) for x in log_probs.values())
    return len(prompt.ids), times, memory, apart


# ---- figures


def rates(device, dtype):
    """The machine's limits, the best of ten: (FLOP/s of a matrix product, bytes/s of a copy)."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    x = torch.zeros(2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    product = min(clock(partial(torch.matmul, a, b), device) for _ in range(10))
    copy = min(clock(x.clone, device) for _ in range(10))
    return 2 * n**3 / product, 2 * x.numel() / copy


def cost(policy, P, G, R, dtype):
    """The model of the cost, for P prompt tokens and G responses of R tokens -> {"plain", "ours":
    (FLOPs of a training pass without recomputation, bytes read in decoding)}."""
    c = policy.config.text_config
    layers = sum(p.numel() for p in policy.language_model.layers.parameters())
    head = c.vocab_size * c.hidden_size
    size = torch.finfo(dtype).bits // 8
    d = head_size(c)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * d * size  # bytes of a token's K and V
    heads = c.num_attention_heads * d
    pair = 4 * c.num_hidden_layers * heads  # FLOPs for a query and a key that it sees
    weights = (layers + head) * size
    found = {}
    for way, copies in (("plain", G), ("ours", 1)):  # of the prompt
        forward = 2 * layers * (copies * P + G * R)  # the weights
        forward += pair * copies * P * P / 2  # the prompt attends to itself
        forward += pair * G * R * (P + R / 2)  # the responses to it and to themselves
        forward += 2 * head * G * R
        read = (R - 1) * (weights + copies * P * kv) + G * kv * R * R / 2
        found[way] = 3 * forward, read  # the backward pass costs twice the forward pass
    return found


def figures(policy, args, frames, measured, matrix, copy, dtype):
    """All numbers of one number of frames. measured: by `measure`; matrix, copy: by `rates`."""
    P, times, memory, apart = measured
    now = {phase: times["plain"][phase] for phase in PHASES}
    rows = [{"name": "plain", **now}]
    for name, way, changed in STEPS:
        if way in times:
            now = now | {phase: times[way][phase] for phase in changed}
            rows.append({"name": name.format(WORLD), **now})
    plain, ours = times["plain"], times["ours"]
    model = cost(policy, P, args.group, args.new, dtype)
    shares = {
        "train_utilisation": model["ours"][0] / matrix / ours["train"],
        "decode_floor_share": model["ours"][1] / copy / ours["decode"],
    }
    parts = ("training pass", "rollout", "train", "decode")
    return {
        "frames": frames,
        "prompt_tokens": P,
        "rows": rows,
        "memory": memory,
        "faster": {part: plain[part] / ours[part] for part in parts},
        "difference": apart,
        "expected": {
            "train": model["plain"][0] / model["ours"][0],
            "decode": model["plain"][1] / model["ours"][1],
        },
        **refuse(shares),
    }


def refuse(shares):
    """Drops shares of a rate that cannot be: above 1, or not above 0, because the machine was busy
    while the rate or the phase was measured. {name: share} -> the same, with None for those, and
    their values under "refused"."""
    possible = {name: x if 0 < x <= 1 else None for name, x in shares.items()}
    return possible | {"refused": {name: x for name, x in shares.items() if possible[name] is None}}


def table(f, args):
    """The figures of one number of frames as text."""
    rows = f["rows"]
    head = f"\n{f['frames']} frames, {f['prompt_tokens']} prompt tokens, "
    head += f"{args.group} responses of {args.new} tokens; seconds"
    names = "".join(f"{phase:>11}" for phase in PHASES)
    out = [head, f"{'':18}{names}       step    faster   tokens/s"]
    first = sum(rows[0][phase] for phase in PHASES)
    for row in rows:
        step = sum(row[phase] for phase in PHASES)
        seconds = "".join(f"{row[phase]:11.3f}" for phase in PHASES)
        rate = args.group * args.new / step
        out.append(f"{row['name']:18}{seconds}{step:11.3f}{first / step:9.2f}x{rate:10.0f}")
    times = {part: f"{part} {x:.1f}x" for part, x in f["faster"].items()}
    expected = f["expected"]
    out.append(
        f"with the encoding that each does: {times['training pass']}, {times['rollout']}; "
        f"without: {times['train']} (operations: {expected['train']:.1f}x), "
        f"{times['decode']} (bytes: {expected['decode']:.1f}x); "
        f"log-probs differ by {f['difference']:.1e} at most"
    )
    last = []
    for name, (verb, rate) in SHARES.items():
        if f[name] is not None:
            last.append(f"ours {verb} at {f[name]:.0%} of the {rate}")
    for name, x in f["refused"].items():
        last.append(
            f"{name} refused: {x:.0%} of the {SHARES[name][1]}, expected above 0 and at most 100%: "
            f"the machine was busy, run again"
        )
    last += [f"{name} {x:.1f} GB" for name, x in f["memory"].items() if x]
    out.append("; ".join(last))
    return "\n".join(out)


def benchmark(args, device):
    """Times every way at each number of frames, prints the tables and writes the figures."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if args.model in SHAPES:
        policy = random_policy(args.model, device, torch.float32)
    else:
        policy = Policy.load(args.model, device=device)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    policy.set_grad_checkpointing(args.grad_checkpointing)
    policy.freeze_vision()
    policy.eos_ids = []
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    matrix, copy = rates(device, dtype)
    head = {
        "model": args.model,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "machine": torch.cuda.get_device_name() if cuda else threads,
        "ranks": WORLD,
        "torch": torch.__version__,
        "commit": commit(),
        "matrix_flops": matrix,
        "copy_bytes": copy,
        "flags": vars(args),
    }
    say(
        f"{head['model']}: {head['parameters'] / 1e6:.1f} M parameters; {head['machine']}, "
        f"torch {torch.__version__}: matrix product {matrix / 1e9:.0f} GFLOP/s, "
        f"copy {copy / 1e9:.1f} GB/s"
    )
    results, tower = [], Stopwatch(policy.net.model.visual, device)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.autocast(device.type, torch.bfloat16, enabled=cuda),
    ):
        ways = all_ways(cuda, Path(folder))
        for frames in args.frames:
            measured = measure(policy, ways, frames, args, Path(folder), tower)
            results.append(figures(policy, args, frames, measured, matrix, copy, dtype))
            say(table(results[-1], args))
    close_workers()
    report(args.json, head | {"results": results})


def report(file, found):
    """Writes the figures to the file, if one is given, and prints where they are."""
    if not file:
        say("\nThese figures are on the console only; --json FILE writes them to a file")
        return
    if RANK == 0:
        Path(file).write_text(json.dumps(found, indent=1) + "\n")
    say(f"\n{file} holds these figures; `cat {shlex.quote(file)}` shows them")


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    with ranks(timedelta(minutes=30)) as device:
        benchmark(args, device)


if __name__ == "__main__":
    main()
