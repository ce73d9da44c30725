"""Video-R1: images help video questions; a cold start before RL helps; a length reward changes
length.

python -m experiments.claims video_r1
"""

import random
from functools import partial

import toy
from experiments.lab import curve, last, locked
from experiments.shared import (
    SHARE,
    STEP,
    Claim,
    Panel,
    cold_start,
    format_only,
    more_sft,
    rl,
    videos,
)
from infra.summary import mean


def run(lab):
    """The three claims, one after the other."""
    return {**images(lab), **starts(lab), **lengths(lab)}


def images(lab):
    """RL on video questions, all or 60 of them, with and without still images. A still is the
    frame of a clip in which a lamp flashes, with that clip's question. Accuracy is that on
    videos."""
    cold, world = cold_start(lab), lab.world()
    train, stills = world / "train.json", write_stills(lab)
    test = lab.records("test-videos", videos, world / "test.json")
    some, some_and_stills = partial(few, lab.seed), partial(few_and_stills, lab.seed)
    mixes = {
        "all videos": lab.records("videos", videos, train),
        "all videos, images": lab.records("videos-stills", videos_and_stills, train, stills),
        "60 questions": lab.records("few", some, train),
        "60 questions, images": lab.records("few-stills", some_and_stills, train, stills),
    }
    curves, ends = {}, {}
    for name, data in mixes.items():
        flags = ["--eval_data", test]
        run = rl(lab, f"rl-{data.stem}", cold, data, flags, steps=60, points=6)
        curves[name], ends[name] = curve(run), last(run)
    minus = {name: ends[f"{name}, images"] - ends[name] for name in ("all videos", "60 questions")}
    return {"images": curves, "images minus none": minus}


def starts(lab):
    """RL from random weights, from a start that has learned the format only, and from the cold
    start."""
    runs = {
        "random weights": rl(lab, "rl-random", lab.world() / "model"),
        "format only": rl(lab, "rl-format", format_only(lab)),
        "cold start": rl(lab, "grpo", cold_start(lab)),
    }
    return {"starts": {name: curve(run) for name, run in runs.items()}}


def lengths(lab):
    """RL with and without a bonus for short or long right answers. The start has also seen its
    reasoning said twice; the last arm starts from the usual cold start, which never says it
    twice."""
    cot = lab.records("cot-wordy", say_twice, lab.world() / "cot.json")
    wordy = more_sft(lab, "wordy", cot, points=1)
    short = ["--len_bonus", 0.2, "--len_lo", 1, "--len_hi", 17]
    long = ["--len_bonus", 0.2, "--len_lo", 18, "--len_hi", 32]
    arms = {
        "no bonus": ("length-none", wordy, []),
        "up to 17 tokens": ("length-short", wordy, short),
        "18 to 32 tokens": ("length-long", wordy, long),
        "18 to 32, never seen": ("length-unseen", cold_start(lab), long),
    }
    tokens, accuracy, bonus = {}, {}, {}
    for name, (folder, start, flags) in arms.items():
        run = rl(lab, folder, start, None, flags, steps=60, points=1)
        tokens[name] = curve(run, "response_length", 6)
        accuracy[name] = last(run)
        if flags:
            bonus[name] = mean(curve(run, "length_bonus").values())
    end = {name: list(points.values())[-1] for name, points in tokens.items()}
    minus = {}
    for name in ("up to 17 tokens", "18 to 32 tokens"):
        minus[name] = {
            "tokens": end[name] - end["no bonus"],
            "accuracy": accuracy[name] - accuracy["no bonus"],
        }
    return {
        "lengths": tokens,
        "lengths, accuracy": accuracy,
        "lengths minus no bonus": minus,
        "bonus given": bonus,
    }


# ---- records


def write_stills(lab):
    """Writes stills.json, as many still images as the world has training clips, unless it is there
    -> its path."""
    path, rng = lab.world() / "stills.json", random.Random(f"stills {lab.seed}")
    with locked(path):
        if not path.exists():
            toy.write_split(lab.world(), "stills", lit_stills(lab.clips["train"], rng), rng)
    return path


def lit_stills(n, rng):
    """Yields n (frames, questions): the lit frame of a clip in which a lamp flashes, with the
    clip's question."""
    for _ in range(n):
        frames, questions = toy.clip("flash", rng)
        lit = frames[:, 20:27].sum((1, 2, 3)).argmax()
        yield frames[lit : lit + 1], {"flash": questions["flash"]}


def few(seed, records):
    """60 records about a video."""
    of_videos = videos(records)
    return random.Random(seed).sample(of_videos, min(60, len(of_videos)))


def few_and_stills(seed, records, stills):
    """60 records about a video, and the stills."""
    return few(seed, records) + stills


def videos_and_stills(records, stills):
    """All records about a video, and the stills."""
    return videos(records) + stills


def say_twice(records):
    """The teacher's examples; every second one says its reasoning twice."""
    out = []
    for i, r in enumerate(records):
        if i % 2:
            reasoning = r["process"].removeprefix("<think>")
            r = r | {"process": r["process"].replace("</think>", f", {reasoning}")}
        out.append(r)
    return out


CLAIM = Claim(
    paper="Video-R1",
    line="images help video questions; a cold start before RL helps; "
    "a length reward changes length",
    minutes=21,
    run=run,
    panels=[
        Panel(
            "lines",
            "images",
            "Images beside the videos",
            STEP,
            "accuracy on held-out video questions",
        ),
        Panel(
            "bars",
            "images minus none",
            "With images, minus without, at the end",
            "",
            "difference in accuracy",
        ),
        Panel("lines", "starts", "RL from three starts", STEP, SHARE),
        Panel("lines", "lengths", "Length reward of 0.2", STEP, "tokens of a response"),
    ],
)
