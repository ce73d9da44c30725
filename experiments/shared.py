"""What the claims share: the form of a claim, the starts and runs of several of them, records made
from others."""

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from experiments.lab import curve, last, log

SHARE, STEP = "accuracy on held-out questions", "step"  # names of axes


class Panel(NamedTuple):
    """One chart of a claim. kind: "bars" or "lines"; key: which of the claim's numbers; x, y:
    names of the axes; log: the x axis is logarithmic."""

    kind: str
    key: str
    title: str
    x: str
    y: str
    log: bool = False


class Claim(NamedTuple):
    """line: the claim in words. minutes: of five seeds on two cores, after the claims listed
    before it, whose runs it reuses. run: a function of a Lab (one seed) that returns nested dicts
    of numbers."""

    paper: str
    line: str
    minutes: int
    run: Callable
    panels: list[Panel]


# ---- starts and runs


def cold_start(lab):
    """SFT as in the default run. It teaches the format, watching, and the teacher's habit of
    writing a wrong answer."""
    world = lab.world()
    return lab.train("cold", "sft", world / "model", world / "cot.json", 600, points=1)


def format_only(lab):
    """SFT on the reasoning and answers of other questions: it teaches which words are used, but
    not when."""
    world = lab.world()
    cot = lab.records("cot-shuffled", shuffle, world / "cot.json")
    return lab.train("format", "sft", world / "model", cot, 200, points=1)


def rl(lab, name, start, data=None, flags=(), *, steps=100, **kw):
    """GRPO from a start -> its folder. data: records, by default the world's training questions,
    which have answers but no reasoning; kw: of Lab.train."""
    return lab.train(name, "grpo", start, data or lab.world() / "train.json", steps, flags, **kw)


def more_sft(lab, name, data=None, **kw):
    """100 more steps of SFT from the cold start -> its folder. data: by default the teacher's
    examples again."""
    data = data or lab.world() / "cot.json"
    return lab.train(name, "sft", cold_start(lab), data, 100, ["--lr", 2e-4], **kw)


# ---- records made from others


def shuffle(records):
    """The same questions, each with the answer, and the reasoning if it has one, of another
    question of its kind."""
    rng, lessons = random.Random(0), {}
    for r in records:
        lesson = {key: r[key] for key in ("solution", "process") if key in r}
        lessons.setdefault(r["data_source"], []).append(lesson)
    for of_kind in lessons.values():
        rng.shuffle(of_kind)
    return [r | lessons[r["data_source"]].pop() for r in records]


def videos(records):
    """The records about a video."""
    return [r for r in records if r["data_type"] == "video"]


def first_of(n, seed, records):
    """n of the records, shuffled by the seed. A smaller n gives the first of a larger n's."""
    return random.Random(seed).sample(records, len(records))[:n]


# ---- the same run in several ways


def same_curve(ways, base):
    """Compares runs that should be the same. ways: {name: folder} -> their rewards, ends and
    times, and how far the rewards are from those of ways[base]."""
    rewards = {name: curve(run, "reward") for name, run in ways.items()}
    largest, before = {}, {}
    for name in ways:
        if name != base:
            apart = [abs(reward - rewards[base][step]) for step, reward in rewards[name].items()]
            largest[name] = max(apart)
            before[name] = next((i for i, x in enumerate(apart) if x > 1e-9), len(apart))
    seconds = {}
    for name, run in ways.items():
        seconds[name] = statistics.median(entry["seconds"]["step"] for entry in log(run)[1:])
    return {
        "reward": {name: curve(run, "reward", 6) for name, run in ways.items()},
        "end": {name: last(run) for name, run in ways.items()},
        "largest difference of a step's mean reward": largest,
        "steps before the first difference": before,
        "seconds": seconds,
    }
