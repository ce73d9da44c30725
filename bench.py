"""Speed, side by side: one GRPO step the plain way, and with each idea of this code added one by one.

    python bench.py                                    a 17 M model on this machine's CPU, 2 minutes
    python bench.py --model 3b --frames 16 64 256 --checkpointing 1      a true shape with random weights, for a GPU
    python bench.py --model DIR --json results/x.json  any checkpoint; the figures also as JSON
    torchrun --nproc_per_node 2 -- bench.py            also with each row shared by all ranks

The plain way is what a trainer does that calls transformers: `generate` with G copies of the prompt, G full rows in every
log-prob pass, and the video encoded again for every row of every pass. Then, one after the other:
    encode once      the vision tower once a step, whatever happens to the embeddings        (model.Policy.encode)
    shared prefill   the prompt once through the language model, not G times                  (rollout.prefill)
    shared decode    G rows that read one copy of the prompt's keys and values                (attention.DecodeCache)
    packed rows      [prompt | o_1 ... o_G] in the reference and the training pass            (attention.PackedRow)
    CUDA graph       decode steps replayed, on a GPU                                          (rollout.record)
    embedding cache  embeddings read from disk: every epoch but the first, frozen tower       (EmbeddingCache)
    N ranks          the row dealt over the ranks of torchrun                                 (mrsp.ShardedRow)
A phase is timed every way in turn, `--repeat` times, and the median taken; a line of the table is the sum of its phases. All
responses have their full length, no end of turn is taken: every way does the same work. What the plain way spends in the vision
tower is counted under encode, wherever it happens.

The model of the cost, printed beside the measurement: floating-point operations of the training pass, (P + G R) tokens instead
of G (P + R), and bytes read in decoding, the weights and one copy of the prompt's keys and values instead of G.
"""

import json
import platform
import shlex
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import attention
import mrsp
import toy
from data import Prompt, Sample, load_media, normalize, patchify
from infra.embedding_cache import EmbeddingCache
from infra.flags import Parser
from infra.ranks import RANK, WORLD, ranks, say
from infra.run_folder import commit
from infra.video import close_workers
from model import Policy
from rollout import generate

SHAPES = {  # hidden, intermediate, layers, heads, K/V heads, vocabulary; vision hidden, intermediate, layers, heads
    "tiny": (384, 1024, 8, 6, 2, 4096, 192, 384, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151936, 1280, 3420, 32, 16),
    "7b": (3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16),
}
STEPS = (  # of the table: the name, the way, and the phases that it changes
    ("+ encode once", "ours", ["encode"]),
    ("+ shared prefill", "ours", ["prefill"]),
    ("+ shared decode", "ours", ["decode"]),
    ("+ packed rows", "ours", ["reference", "train"]),
    ("+ CUDA graph", "graph", ["decode"]),
    ("+ embedding cache", "cache", ["encode"]),
    ("+ {} ranks a row", "ranks", ["prefill", "decode", "reference", "train"]),
)
SHARES = {
    "train_utilisation": ("trains", "matrix rate measured (recomputation not counted)"),
    "decode_floor_share": ("decodes", "copy rate measured"),
}  # what a share is of
PHASES = ("video", "encode", "prefill", "decode", "reference", "train", "optimizer")


def parse_args(argv=None):
    """The flags."""
    p = Parser(__doc__)
    g = p.section("what is measured")
    g.value(
        "model",
        "tiny",
        "tiny (17 M parameters), 3b or 7b (Qwen2.5-VL's shapes), with random weights; or a checkpoint",
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


# ---- what is measured


def random_policy(shape, device, dtype):
    """A Qwen2.5-VL of a true or small shape with random weights, its tower frozen."""
    D, inner, layers, heads, kv, vocabulary, v_D, v_inner, v_layers, v_heads = SHAPES[shape]
    d = D // heads
    t, h = d // 8, 3 * d // 16
    tokens = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            range(4),
        )
    )
    config = Qwen2_5_VLConfig(
        text_config=dict(
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
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [t, h, d // 2 - t - h],
            },
        ),
        vision_config=dict(
            hidden_size=v_D,
            intermediate_size=v_inner,
            depth=v_layers,
            num_heads=v_heads,
            out_hidden_size=D,
            tokens_per_second=2,
            fullatt_block_indexes=list(range(7, v_layers, 8)) or [v_layers - 1],
        ),
        **tokens,
        tie_word_embeddings=shape != "7b",
    )
    torch.set_default_dtype(dtype)
    with device:
        net = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = 4
    return Policy(net, "random weights")  # a folder that is not there: no files to save beside


def video_prompt(policy, file, args):
    """A prompt of random words about a video file -> (prompt, seconds that the video took to read, resize and sample)."""
    sample = Sample("-", "", [], "free-form", "video", str(file), "")
    start = time.perf_counter()
    media = load_media(
        sample, fps=float("inf"), max_frames=10**6, max_pixels=args.height * args.width
    )
    seconds = time.perf_counter() - start
    words = lambda n: torch.randint(8, policy.config.text_config.vocab_size, (n,))
    visual = torch.full((media.tokens,), policy.config.video_token_id)
    return Prompt(
        sample,
        torch.cat([words(args.text // 2), visual, words(args.text - args.text // 2)]),
        [media],
    ), seconds


class Plain:
    """One step's phases as transformers does them."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.net = policy, policy.net
        self.G, device = len(responses), policy.device
        self.medium = {}
        for media in prompt.media:  # one, or none
            patches, grid = patchify(
                normalize(media.frames.to(device), policy.net.model.visual.dtype)
            )
            pixels = "pixel_values_videos" if media.kind == "video" else "pixel_values"
            self.medium = {
                pixels: patches,
                f"{media.kind}_grid_thw": torch.tensor([grid], device=device),
            }
        self.copies = {name: x.repeat(self.G, 1) for name, x in self.medium.items()}
        self.ids = prompt.ids[None].to(device)
        self.responses = torch.stack(responses).to(device)
        where, following = policy.positions(prompt)
        R = self.responses.shape[1]
        where = torch.cat([where, (following + torch.arange(R)).expand(3, -1)], dim=1)
        self.positions = where[:, None].expand(-1, self.G, -1).to(device)

    def encode(self):
        """Nothing: every pass encodes for itself."""

    def rollout(self, new):
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
        """Of every token, what transformers has it for: 0 text, 1 image, 2 video."""
        return (ids == self.net.config.image_token_id).int() + 2 * (
            ids == self.net.config.video_token_id
        ).int()

    def distribution(self):
        """(G, R, vocabulary): log-probs of every token that each response could have gone on with."""
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
        return self.distribution().gather(-1, self.responses[..., None])[..., 0]


class Ours:
    """One step's phases as this code does them (plain.Plain: as transformers does)."""

    def __init__(self, policy, prompt, responses):
        self.policy, self.prompt, self.responses = policy, prompt, responses
        self.encode()

    def encode(self):
        with torch.no_grad():
            self.visual_embeds = self.policy.encode([self.prompt])

    def rollout(self, new):
        generate(
            self.policy,
            [self.prompt],
            len(self.responses),
            max_new=new,
            visual_embeds=self.visual_embeds,
        )

    def log_probs(self):
        return self.policy([self.prompt], [self.responses], self.visual_embeds)[0]


# ---- measuring


def clock(f, device):
    """Seconds of f(), the GPU's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


class Stopwatch:
    """Adds up what a module's forward takes."""

    def __init__(self, module, device):
        self.seconds, self.device = 0.0, device
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, *_):
        clock(lambda: None, self.device)  # what came before is done
        self.started = time.perf_counter()

    def stop(self, *_):
        clock(lambda: None, self.device)
        self.seconds += time.perf_counter() - self.started


def phases(way, new, optimizer, tower):
    """Seconds of each phase of a step, without the video's; the vision tower's are all in "encode"."""
    policy = way.policy

    def timed(f):
        tower.seconds = 0.0
        return clock(f, policy.device) - tower.seconds, tower.seconds

    def train():
        policy.train()
        way.log_probs().sum().backward()

    def reference():
        policy.eval()
        with torch.no_grad():
            way.log_probs()

    policy.eval()
    parts = {
        "encode": way.encode,
        "prefill": lambda: way.rollout(1),
        "decode": lambda: way.rollout(new),
        "reference": reference,
        "train": train,
        "optimizer": optimizer.step,
    }
    times = {name: timed(f) for name, f in parts.items()}
    optimizer.zero_grad()
    spent = {name: seconds for name, (seconds, _) in times.items()}
    spent["encode"] = sum(times["encode"]) + sum(
        times[name][1] for name in ("decode", "reference", "train")
    )
    spent["decode"] -= spent["prefill"]
    once = times["encode"][0] + times["encode"][1]  # of ours; the plain way encodes in each pass
    return spent | {"training pass": sum(times["train"]), "rollout": once + sum(times["decode"])}


def rates(device, dtype):
    """What the machine gives: (matrix product FLOP/s, copy bytes/s), best of ten."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (
        torch.randn(n, n, device=device, dtype=dtype),
        torch.randn(n, n, device=device, dtype=dtype),
    )
    x = torch.zeros(2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    best = lambda f: min(clock(f, device) for _ in range(10))
    return 2 * n**3 / best(lambda: a @ b), 2 * x.numel() / best(x.clone)


def cost(policy, P, G, R, dtype):
    """The model of the cost -> {"plain", "ours": (FLOPs of a training pass without recomputation, bytes read in decoding)}."""
    c = policy.config.text_config
    layers = sum(p.numel() for p in policy.text.layers.parameters())
    size = torch.finfo(dtype).bits // 8
    kv = (
        2
        * c.num_hidden_layers
        * c.num_key_value_heads
        * (c.hidden_size // c.num_attention_heads)
        * size
    )  # of a token
    width = 4 * c.num_hidden_layers * c.hidden_size  # FLOPs for a query and a key that it sees
    answers = 2 * c.vocab_size * c.hidden_size * G * R + width * G * R * (
        P + R / 2
    )  # the head, and what responses attend to
    flops = lambda prompts: (
        3 * (2 * layers * (prompts * P + G * R) + width * prompts * P * P / 2 + answers)
    )  # backward is twice
    weights = (layers + c.vocab_size * c.hidden_size) * size
    bytes_ = lambda prompts: (R - 1) * (weights + prompts * P * kv) + G * kv * R * R / 2
    return {"plain": (flops(G), bytes_(G)), "ours": (flops(1), bytes_(1))}


def measure(policy, frames, args, matrix, copy, dtype, folder, everybody, tower):
    """Every way at one number of frames -> the figures."""
    device, file, video = policy.device, folder / f"{frames}.y4m", []
    toy.write_y4m(
        file,
        np.random.default_rng(0).integers(
            256, size=(frames, args.height, args.width, 3), dtype=np.uint8
        ),
        2,
    )
    responses = [
        torch.randint(8, policy.config.text_config.vocab_size, (args.new,))
        for _ in range(args.group)
    ]
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=0.0, fused=True
    )
    ways = {
        "plain": {},
        "ours": {},
        "cache": {"embedding_cache": EmbeddingCache(folder / "cache", 100.0, "bench")},
    }
    ways |= {"graph": {"cuda_graph": True}} if device.type == "cuda" else {}
    ways |= {"ranks": {"sp": everybody}} if WORLD > 1 else {}
    seen, memory, log_probs = {name: [] for name in ways}, {}, {}
    for i in range(args.repeat + 1):  # the first warms up
        prompt, seconds = video_prompt(policy, file, args)
        video.append(seconds)
        for name, settings in ways.items():
            text, vision = (
                ("sdpa", "sdpa") if name == "plain" else (attention.NAME, attention.SEGMENTS)
            )
            policy.net.set_attn_implementation({"text_config": text, "vision_config": vision})
            for key, value in (
                {"embedding_cache": None, "cuda_graph": False, "sp": mrsp.UNSHARDED} | settings
            ).items():
                setattr(policy, key, value)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            way = (Plain if name == "plain" else Ours)(policy, prompt, responses)
            seen[name].append(phases(way, args.new, optimizer, tower))
            memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            if i == 0:
                with torch.no_grad():
                    log_probs[name] = way.log_probs().float()
    median = {
        name: {p: statistics.median(s[p] for s in runs[1:]) for p in runs[0]}
        for name, runs in seen.items()
    }
    now = {"video": statistics.median(video[1:]), **{p: median["plain"][p] for p in PHASES[1:]}}
    rows = [dict(name="plain", **now)]
    for name, way, changed in STEPS:
        if way in median:
            now = now | {p: median[way][p] for p in changed}
            rows.append(dict(name=name.format(WORLD), **now))
    P, model = len(prompt.ids), cost(policy, len(prompt.ids), args.group, args.new, dtype)
    shares = {
        "train_utilisation": model["ours"][0] / matrix / median["ours"]["train"],
        "decode_floor_share": model["ours"][1] / copy / median["ours"]["decode"],
    }
    faster = {
        p: median["plain"][p] / median["ours"][p]
        for p in ("training pass", "rollout", "train", "decode")
    }
    return dict(
        frames=frames,
        prompt_tokens=P,
        rows=rows,
        memory=memory,
        faster=faster,
        difference=max(float((log_probs["plain"] - x).abs().max()) for x in log_probs.values()),
        expected={
            "train": model["plain"][0] / model["ours"][0],
            "decode": model["plain"][1] / model["ours"][1],
        },
        **refuse(shares),
    )


def refuse(shares):
    """{name: share of a rate} -> the same with None for a share that is above 1, or not above 0, and its value under "refused":
    the machine was busy while the rate or the phase was measured."""
    possible = {name: x if 0 < x <= 1 else None for name, x in shares.items()}
    return possible | {"refused": {name: x for name, x in shares.items() if possible[name] is None}}


def table(figures, args):
    """The figures of one number of frames as text."""
    rows, f = figures["rows"], figures
    total = lambda row: sum(row[p] for p in PHASES)
    out = [
        f"\n{f['frames']} frames, {f['prompt_tokens']} prompt tokens, {args.group} responses of {args.new} tokens; seconds",
        f"{'':18}" + "".join(f"{p:>11}" for p in PHASES) + "       step    faster   tokens/s",
    ]
    for row in rows:
        out.append(
            f"{row['name']:18}"
            + "".join(f"{row[p]:11.3f}" for p in PHASES)
            + f"{total(row):11.3f}{total(rows[0]) / total(row):9.2f}x{args.group * args.new / total(row):10.0f}"
        )
    times = {p: f"{p} {x:.1f}x" for p, x in f["faster"].items()}
    model = {
        p: f"{times[p]} ({what}: {f['expected'][p]:.1f}x)"
        for p, what in (("train", "operations"), ("decode", "bytes"))
    }
    out.append(
        f"with the encoding that each does: {times['training pass']}, {times['rollout']}; without: {model['train']}, "
        f"{model['decode']}; log-probs differ by {f['difference']:.1e} at most"
    )
    shares = [
        f"ours {verb} at {f[name]:.0%} of the {rate}"
        for name, (verb, rate) in SHARES.items()
        if f[name] is not None
    ]
    refused = [
        f"{name} refused: {x:.0%} of the {SHARES[name][1]}, expected above 0 and at most 100%: a busy machine, run again"
        for name, x in f["refused"].items()
    ]
    out.append(
        "; ".join(
            [*shares, *refused, *(f"{name} {x:.1f} GB" for name, x in f["memory"].items() if x)]
        )
    )
    return "\n".join(out)


def benchmark(args, device):
    """Times every way at each number of frames, prints the tables and writes the figures."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = args.model in SHAPES
    policy = (
        random_policy(args.model, device, torch.float32)
        if random
        else Policy.load(args.model, device=device)
    )
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    policy.set_grad_checkpointing(args.grad_checkpointing)
    policy.freeze_vision()
    policy.eos_ids = []
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else threads
    matrix, copy = rates(device, dtype)
    head = dict(
        model=args.model,
        parameters=sum(p.numel() for p in policy.parameters()),
        machine=machine,
        ranks=WORLD,
        torch=torch.__version__,
        commit=commit(),
        matrix_flops=matrix,
        copy_bytes=copy,
        flags=vars(args),
    )
    say(
        f"{head['model']}: {head['parameters'] / 1e6:.1f} M parameters; {machine}, torch {torch.__version__}: matrix product "
        f"{matrix / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s"
    )
    results, tower, everybody = (
        [],
        Stopwatch(policy.net.model.visual, device),
        mrsp.sequence_parallel(WORLD),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        for frames in args.frames:
            results.append(
                measure(policy, frames, args, matrix, copy, dtype, Path(folder), everybody, tower)
            )
            say(table(results[-1], args))
    close_workers()
    if args.json and RANK == 0:
        Path(args.json).write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    say(
        f"\n{args.json} holds these figures; `cat {shlex.quote(args.json)}` shows them"
        if args.json
        else "\nThese figures are on the console only; --json FILE writes them to a file"
    )


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    with ranks(timedelta(minutes=30)) as device:
        benchmark(args, device)


if __name__ == "__main__":
    main()
