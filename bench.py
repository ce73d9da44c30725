"""Speed, side by side: a GRPO step the plain way, and with each idea of this code added in turn.

    python bench.py                                    a 17 M model on this machine's CPU, 2 minutes
    python bench.py --model 3b --frames 16 64 256 --grad_checkpointing 1     a real shape, for a GPU
    python bench.py --model DIR --json results/x.json  any checkpoint; the figures also as JSON
    torchrun --nproc_per_node 2 -- bench.py            also with each row sharded across all ranks

The plain way calls transformers, as most trainers do (ways.Plain). Ours (ways.Ours) adds, one after
the other:
    encode once      the vision tower runs once a step              (model.Policy.encode)
    shared prefill   the prompt is prefilled once, not G times      (rollout.prefill)
    shared decode    G rows read one copy of the prompt's K and V   (attention.DecodeCache)
    packed rows      [prompt | o_1 ... o_G] in log-prob passes      (attention.PackedRow)
    CUDA graph       decode steps are replayed, on a GPU            (rollout.Decoding.record)
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

import platform
import shlex
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

import gpu_check
from infra.flags import Parser
from infra.model_folder import head_size
from infra.ranks import WORLD, ranks, say
from infra.run_folder import commit
from infra.video import close_workers
from model import Policy
from ways import (
    SHAPES,
    all_ways,
    random_policy,
    switch,
    timed,
    video_prompt,
    wait,
    write_figures,
    write_video,
)

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
    "decode_products_share": ("decodes", "rate of its matrix products alone"),
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
    g.value(
        "gpu_check",
        None,
        "first what only a GPU can confirm (gpu_check.py), with a 3b: all checks, or those named",
        nargs="*",
        choices=list(gpu_check.CHECKS),
    )
    return p.parse_args(argv)


# ---- measuring


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
    torch.clear_autocast_cache()  # of weights that were cast without a gradient
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
        _, total[name] = timed(part, way.policy.device)
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
    largest difference of a log-prob from the plain way's. A way that runs out of a GPU's memory is
    left out; without the plain way the difference is None."""
    device, file = policy.device, folder / f"{frames}.y4m"
    write_video(file, frames, args)
    vocabulary = policy.config.text_config.vocab_size
    responses = [torch.randint(8, vocabulary, (args.new,)) for _ in range(args.group)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    runs, memory, log_probs = {name: [] for name in ways}, {}, {}
    too_large = set()
    for i in range(args.repeat + 1):  # the first is a warm-up
        prompt, video = video_prompt(policy, file, args)
        for name in [name for name in ways if name not in too_large]:
            kind = switch(policy, **ways[name])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                way = kind(policy, prompt, responses)
                runs[name].append({"video": video, **phases(way, args.new, optimizer, tower)})
            except torch.OutOfMemoryError:
                too_large.add(name)
                way = None
                policy.zero_grad()
                gpu_check.free()
                continue
            memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            if i == 0:
                with torch.no_grad():
                    log_probs[name] = way.log_probs().float()
    times = {}
    for name, measured in runs.items():
        if name not in too_large:
            by_phase = {phase: [t[phase] for t in measured[1:]] for phase in measured[0]}
            times[name] = {phase: statistics.median(x) for phase, x in by_phase.items()}
    if too_large:
        say(f"{frames} frames: not enough memory for: {', '.join(sorted(too_large))}")
    plain = None if "plain" in too_large else log_probs["plain"]
    apart = [float((plain - x).abs().max()) for x in log_probs.values() if plain is not None]
    return len(prompt.ids), times, memory, max(apart, default=None)


# ---- figures


def limits(policy, G, dtype):
    """The machine's limits, the best of ten: FLOP/s of a large matrix product, bytes/s of a copy,
    seconds of the matrix products of one decode step for G responses."""
    device, cuda = policy.device, policy.device.type == "cuda"
    n = 8192 if cuda else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    x = torch.ones(2**30 if cuda else 2**26, device=device, dtype=torch.uint8)
    y = torch.zeros_like(x)  # into memory that is there: a new page costs more than its copy
    linears = [m for m in policy.language_model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [m.weight.detach().to(dtype) for m in linears] + [policy.lm_head_weight().detach()]
    rows = [torch.randn(G, w.shape[1], device=device, dtype=w.dtype) for w in weights]
    measured = {
        "matrix": partial(torch.matmul, a, b),
        "copy": partial(y.copy_, x),
        "products": partial(matrix_products, rows, weights),
    }
    best = {name: min(timed(f, device)[1] for _ in range(10)) for name, f in measured.items()}
    return {
        "matrix_flops": 2 * n**3 / best["matrix"],
        "copy_bytes": 2 * x.numel() / best["copy"],
        "products_seconds": best["products"],
    }


def matrix_products(rows, weights):
    """Each of the rows (G, inputs) times its matrix (outputs, inputs) -> [(G, outputs), ...]."""
    return [torch.nn.functional.linear(x, weight) for x, weight in zip(rows, weights)]


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


def figures(policy, args, frames, measured, limit, dtype):
    """All numbers of one number of frames. measured: by `measure`; limit: by `limits`."""
    P, times, memory, apart = measured
    first = "plain" if "plain" in times else "ours"
    now = {phase: times[first][phase] for phase in PHASES}
    rows = [{"name": first, **now}]
    for name, way, changed in STEPS:
        if way in times and way != first:
            now = now | {phase: times[way][phase] for phase in changed}
            rows.append({"name": name.format(WORLD), **now})
    plain, ours = times.get("plain"), times["ours"]
    model = cost(policy, P, args.group, args.new, dtype)
    decode = times.get("graph", ours)["decode"]
    shares = {
        "train_utilisation": model["ours"][0] / limit["matrix_flops"] / ours["train"],
        "decode_floor_share": model["ours"][1] / limit["copy_bytes"] / decode,
        "decode_products_share": (args.new - 1) * limit["products_seconds"] / decode,
    }
    parts = ("training pass", "rollout", "train", "decode")
    return {
        "frames": frames,
        "prompt_tokens": P,
        "rows": rows,
        "memory": memory,
        "faster": {part: plain[part] / ours[part] for part in parts} if plain else None,
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
    if f["faster"]:
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


def benchmark(args, device, checks):
    """Times every way at each number of frames, prints the tables and writes the figures, beside
    those of gpu_check.py."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if args.model in SHAPES:
        policy = random_policy(args.model, device, torch.float32)
    else:
        policy = Policy.load(args.model, device=device, merged=True)
    policy.set_grad_checkpointing(args.grad_checkpointing)
    policy.freeze_vision()
    policy.eos_ids = []
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    limit = limits(policy, args.group, dtype)
    head = {
        "model": args.model,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "machine": torch.cuda.get_device_name() if cuda else threads,
        "ranks": WORLD,
        "torch": torch.__version__,
        "commit": commit(),
        **limit,
        "flags": vars(args),
    }
    say(
        f"{head['model']}: {head['parameters'] / 1e6:.1f} M parameters; {head['machine']}, "
        f"torch {torch.__version__}: matrix product {limit['matrix_flops'] / 1e9:.0f} GFLOP/s, "
        f"copy {limit['copy_bytes'] / 1e9:.1f} GB/s, "
        f"a decode step's matrix products {limit['products_seconds'] * 1e3:.1f} ms"
    )
    results, tower = [], Stopwatch(policy.net.model.visual, device)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.autocast(device.type, torch.bfloat16, enabled=cuda),
    ):
        ways = all_ways(cuda, Path(folder))
        for frames in args.frames:
            measured = measure(policy, ways, frames, args, Path(folder), tower)
            results.append(figures(policy, args, frames, measured, limit, dtype))
            say(table(results[-1], args))
            write_figures(args.json, head | {"results": results, **checks})
    close_workers()
    if args.json:
        say(f"\n{args.json} holds these figures; `cat {shlex.quote(args.json)}` shows them")
    else:
        say("\nThese figures are on the console only; --json FILE writes them to a file")


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with ranks(timedelta(minutes=30)) as device:
        checks = {}
        if args.gpu_check is not None:
            args = parse_args([*gpu_check.FLAGS[device.type].split(), *argv])
            checks = gpu_check.run(args, device)
        benchmark(args, device, checks)


if __name__ == "__main__":
    main()
