"""Ours: a shared prefix changes cost, not results; what it saves grows with frames and G.

python -m experiments.claims shared_prefix
"""

import json

import bench
from experiments.lab import timing, training, training_plainly
from experiments.shared import STEP, Claim, Panel, cold_start, rl, same_curve, videos

PARTS = ("step", "rollout", "training pass")


def run(lab):
    """The same GRPO run two ways, and the times of bench.py by the number of frames and by G."""
    return {**same_run(lab), **times(lab)}


def same_run(lab):
    """GRPO on the video questions, with this code's attention, rollout and packed rows, and with
    transformers' own (SDPA attention and cache, G copies of the prompt, the video encoded again
    for every row of every pass)."""
    world = lab.world()
    data = lab.records("train-videos", videos, world / "train.json")
    test = lab.records("test-videos", videos, world / "test.json")
    ways = {}
    for way, main in (("ours", training), ("plain", training_plainly)):
        flags = ["--eval_data", test]
        ways[way] = rl(
            lab, f"prefix-{way}", cold_start(lab), data, flags, steps=40, points=2, main=main
        )
    return same_curve(ways, "ours")


def times(lab):
    """How many times as long the plain way takes on a model of 16.8 M parameters, by the number of
    frames and by G."""
    frames = sorted({max(4, n // lab.shrink // 2 * 2) for n in (16, 32, 64, 128)})
    by_frames = {n: ratios(lab, n, 8) for n in frames}
    groups = (2, 4, 8, 16) if lab.shrink == 1 else (2, 8)
    by_group = {G: ratios(lab, frames[len(frames) // 2], G) for G in groups}
    return {"by frames": by_part(by_frames), "by G": by_part(by_group)}


def ratios(lab, frames, group):
    """The times of bench.py -> {part of a step: plain time / ours}, both with the encoding that
    they do. A shrunk claim times the toy's model, on small frames."""
    out = lab.root / f"bench-{frames}-{group}.figures"
    new = max(4, 32 // lab.shrink)  # tokens of a response
    flags = ["--frames", frames, "--group", group, "--new", new, "--repeat", 1, "--json", out]
    if lab.shrink > 1:
        flags += ["--model", lab.world() / "model", "--height", 28, "--width", 28, "--text", 4]
    lab.call(out.stem, timing, flags)
    found = json.loads(out.read_text())["results"][0]
    step = {row["name"]: sum(row[phase] for phase in bench.PHASES) for row in found["rows"]}
    return {
        "step": step["plain"] / step["+ packed rows"],
        "rollout": found["faster"]["rollout"],
        "training pass": found["faster"]["training pass"],
    }


def by_part(ratios):
    """{x: {part: ratio}} -> {part: {x: ratio}}."""
    return {part: {str(x): found[part] for x, found in ratios.items()} for part in PARTS}


CLAIM = Claim(
    paper="this code",
    line="a shared prefix changes cost, not results; what it saves grows with frames and G",
    minutes=15,
    run=run,
    panels=[
        Panel("lines", "reward", "The same run, both ways", STEP, "mean reward of a step (0 to 2)"),
        Panel("bars", "seconds", "Its cost in the toy", "", "seconds a step"),
        Panel("lines", "by frames", "By frames, G = 8", "frames", "plain time / ours", log=True),
        Panel("lines", "by G", "By G, at 64 frames", "G", "plain time / ours", log=True),
    ],
)
