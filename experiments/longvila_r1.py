"""LongVILA-R1: more frames help, more so with reasoning; SFT + RL beats either; MR-SP changes cost
only.

python -m experiments.claims longvila_r1
"""

import re
from functools import partial

from experiments.lab import last, training_on_two
from experiments.shared import (
    SHARE,
    STEP,
    Claim,
    Panel,
    cold_start,
    first_of,
    format_only,
    more_sft,
    rl,
    same_curve,
)


def run(lab):
    """The three claims, one after the other."""
    by_frames = frames(lab)
    both = by_frames["frames"]["a sentence"]["16"]
    return {**by_frames, **stages(lab, both), **cost(lab)}


def frames(lab):
    """Cold starts on the same examples, whose reasoning is none, a sentence, or a sentence that
    counts aloud; RL from each; greedy accuracy at 2, 4, 8 and 16 frames."""
    runs = {
        "no reasoning": rl(lab, "rl-silent", taught(lab, "silent", silence)),
        "a sentence": rl(lab, "grpo", cold_start(lab)),
        "counting aloud": rl(lab, "rl-aloud", taught(lab, "aloud", count_aloud)),
    }
    shown = (2, 4, 8, 16) if lab.shrink == 1 else (4, 16)
    accuracy, counting = {}, {}
    for name, run in runs.items():
        accuracy[name], counting[name] = {}, {}
        for n in shown:
            summary = greedy(lab, run, n)
            accuracy[name][str(n)] = summary["accuracy"]
            counting[name][str(n)] = summary["by"]["data_source"]["count"][0]
    gain = {
        "all": {name: by["16"] - by["4"] for name, by in accuracy.items()},
        "counting": {name: by["16"] - by["4"] for name, by in counting.items()},
    }
    at = {}  # {frames: {reasoning: accuracy}}
    for n in map(str, shown):
        at[n] = {name: by[n] for name, by in accuracy.items()}
    return {
        "frames": accuracy,
        "frames, counting": counting,
        "from 4 to 16 frames": gain,
        "from 4 to 16 frames, minus no reasoning's": {
            kind: beyond_silence(by) for kind, by in gain.items()
        },
        "frames, minus no reasoning": {n: beyond_silence(by) for n, by in at.items()},
    }


def taught(lab, name, make):
    """A cold start on the teacher's examples as `make` rewrites them -> its folder."""
    world = lab.world()
    cot = lab.records(f"cot-{name}", make, world / "cot.json")
    return lab.train(name, "sft", world / "model", cot, 600, points=1)


def greedy(lab, run, n):
    """The run's greedy answers to the test questions at n frames -> eval.py's summary."""
    flags = ["--frames", n, "--min_frames", 2]
    found = lab.answers(f"{run.name}-{n}-frames", run, lab.world() / "test.json", *flags)
    return found[f"greedy-{n}"][0]


def beyond_silence(by):
    """{reasoning: number} -> how far each number is above that without reasoning."""
    return {name: x - by["no reasoning"] for name, x in by.items() if name != "no reasoning"}


def stages(lab, both):
    """SFT only (the cold start and as many more steps of SFT as RL has), RL only (from a start
    that has learned the format), and both, whose accuracy is given."""
    found = {
        "SFT": last(more_sft(lab, "sft-more")),
        "RL": last(rl(lab, "rl-format", format_only(lab))),
        "SFT + RL": both,
    }
    minus = {name: both - found[name] for name in ("SFT", "RL")}
    return {"stages": found, "SFT + RL minus": minus}


def cost(lab):
    """The same RL with a frozen vision tower: as is, with the embeddings kept on disk, and with
    each row sharded across two ranks."""
    some = partial(first_of, 100, lab.seed)  # each question is seen five times
    data = lab.records("train-100", some, lab.world() / "train.json")
    frozen = partial(
        rl, lab, start=cold_start(lab), data=data, steps=30, points=1, without=("--train_vision",)
    )
    on_disk = ["--embedding_cache", lab.root / "frozen-cache" / "embeddings"]
    ways = {
        "as is": frozen("frozen"),
        "embeddings on disk": frozen("frozen-cache", flags=on_disk),
        "two ranks share a row": frozen("frozen-sp", flags=["--sp", 2], main=training_on_two),
    }
    return same_curve(ways, "as is")


# ---- records


def silence(records):
    """The records with a dash in place of the reasoning."""
    return [r | {"process": "<think>-</think>"} for r in records]


def count_aloud(records):
    """The records with every number in the reasoning counted up to: it lights up 1 2 3."""
    return [r | {"process": re.sub(r"\d+", counted, r["process"])} for r in records]


def counted(match):
    """The numbers from 1 up to the one that was matched, as text."""
    return " ".join(str(n) for n in range(1, int(match[0]) + 1))


CLAIM = Claim(
    paper="LongVILA-R1",
    line="more frames help, more so with reasoning; SFT + RL beats either; MR-SP changes cost only",
    minutes=30,
    run=run,
    panels=[
        Panel("lines", "frames", "Frames, after RL", "frames", SHARE, log=True),
        Panel(
            "lines",
            "frames, counting",
            "Frames, after RL: counting",
            "frames",
            "accuracy on counting questions",
            log=True,
        ),
        Panel("bars", "stages", "Stages", "", SHARE),
        Panel(
            "lines", "reward", "The same run, three ways", STEP, "mean reward of a step (0 to 2)"
        ),
    ],
)
