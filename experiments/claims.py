"""The papers' claims in miniature: each an experiment in the toy world that a laptop reruns, with intervals over seeds.

    python -m experiments.claims                         the claims
    python -m experiments.claims grpo                    one of them, seeds 0 to 4 -> experiments/results/grpo.json and grpo.svg
    python -m experiments.claims grpo --quick            two seeds, a 20th of the steps, a smaller world -> out/claims-quick/

An experiment is a function of a Lab, i.e. of one seed: runs of train.py, eval.py and bench.py, and the numbers that they come to
(lab.py). Worlds, cold starts and whatever else several claims need are shared, in out/claims/seedN/.
What has run is not run again, and what was killed goes on: the same command until it is done.

A number is given as its mean over seeds and the 95 % interval of that mean (Student's t). A seed is another world, other initial
weights, another order of the data and other dice. All arms of a seed share its world and its test questions, so a difference of
arms is taken seed by seed, and its own interval says whether they differ.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import bench
import toy
from data import load_samples
from experiments import figure
from experiments.lab import (
    Lab,
    combine,
    curve,
    last,
    locked,
    log,
    table,
    timing,
    training_on_two,
    training_plainly,
    workers,
)
from infra.files import write_whole
from infra.run_folder import commit
from infra.summary import mean
from rewards import accuracy_reward, extract_answer

# ---- what several claims start from


def cold_start(lab):
    """The default run's: format, watching, and the teacher's habit of writing down the wrong answer."""
    return lab.train("cold", "sft", lab.world() / "model", lab.world() / "cot.json", 600, points=1)


def format_only(lab):
    """A start that has learned what is said, but not when: reasoning and answers of other questions of the kind."""
    cot = lab.records("cot-shuffled", shuffle, lab.world() / "cot.json")
    return lab.train("format", "sft", lab.world() / "model", cot, 200, points=1)


def rl(lab, name, start, data=None, flags=(), *, steps=100, **kw):
    """GRPO from a start, on the default world's questions unless told: no reasoning in the records, only answers."""
    return lab.train(name, "grpo", start, data or lab.world() / "train.json", steps, flags, **kw)


def more_sft(lab, name, data=None, **kw):
    """100 more steps of SFT from the cold start, on the teacher's examples unless told."""
    return lab.train(
        name, "sft", cold_start(lab), data or lab.world() / "cot.json", 100, ["--lr", 2e-4], **kw
    )


def stills(lab):
    """Images beside the default world's, as many as it has clips to train on (lit_stills)."""
    path, rng = lab.world() / "stills.json", random.Random(f"stills {lab.seed}")
    with locked(path):
        if not path.exists():
            toy.write_split(lab.world(), "stills", lit_stills(lab.clips["train"], rng), rng)
    return path


def videos(records):
    """Those that are about a video."""
    return [r for r in records if r["data_type"] == "video"]


# ---- 1. GRPO


def grpo(lab):
    """From the cold start: GRPO, and two controls of as many steps. In one, each answer is that of another question of its kind:
    the same rewards, that say nothing of the video. In the other, the teacher's examples go on."""
    cold, world = cold_start(lab), lab.world()
    arms = {
        "GRPO": rl(lab, "grpo", cold),
        "GRPO, answers shuffled": rl(
            lab, "grpo-shuffled", cold, lab.records("train-shuffled", shuffle, world / "train.json")
        ),
        "more SFT": more_sft(lab, "sft-more"),
    }
    truth = load_samples(world / "test.json")
    parts = {
        "sentence": lambda sentence, answer: sentence,
        "answer": lambda sentence, answer: answer,
        "only the sentence": lambda sentence, answer: sentence and not answer,
        "only the answer": lambda sentence, answer: answer and not sentence,
    }

    def graded(run):
        """The run's greedy answers -> [(kind of question, whether its sentence is right, whether its answer is)]."""
        _, lines = lab.answers(f"{run.name}-greedy", run, world / "test.json")["greedy-16"]
        seen = lambda r: (
            f"<think>{truth[r['record']].reasoning}</think>" in r["rounds"][0]["responses"][0]
        )
        return [(r["about"]["data_source"], seen(r), r["score"] > 0.5) for r in lines]

    stages = {"cold start": graded(cold), "GRPO": graded(arms["GRPO"])}
    kinds = sorted({kind for kind, *_ in stages["GRPO"]})
    share = lambda stage, part, kinds: mean(
        parts[part](*right) for kind, *right in stages[stage] if kind in kinds
    )
    ends = {name: last(run) for name, run in arms.items()}
    return {
        "accuracy": {name: curve(run) for name, run in arms.items()},
        "kinds": {
            kind: {stage: share(stage, "answer", [kind]) for stage in stages} for kind in kinds
        },
        "kinds, sentence": {
            kind: {stage: share(stage, "sentence", [kind]) for stage in stages} for kind in kinds
        },
        "right": {stage: {part: share(stage, part, kinds) for part in parts} for stage in stages},
        "right, counting": {
            stage: {part: share(stage, part, ["count"]) for part in parts} for stage in stages
        },
        "GRPO minus": {
            "cold start": ends["GRPO"] - share("cold start", "answer", kinds),
            **{name: ends["GRPO"] - end for name, end in ends.items() if name != "GRPO"},
        },
    }


def shuffle(records):
    """The same questions, each with the answer (and the reasoning, if there is any) of another one of its kind."""
    rng, said = random.Random(0), {}
    for r in records:
        said.setdefault(r["data_source"], []).append(
            {key: r[key] for key in ("solution", "process") if key in r}
        )
    for some in said.values():
        rng.shuffle(some)
    return [r | said[r["data_source"]].pop() for r in records]


# ---- 2. T-GRPO and the order of frames

SKILLS, CUES = (0.5, 0.75, 1.0), (0.75, 0.9)
LAMPS = dict(zip(toy.MOTIONS, toy.COLOURS))  # the colour that goes with a direction
METHODS = {
    "GRPO": ["--algo", "grpo"],
    "T-GRPO": ["--algo", "tgrpo"],
    "T-GRPO, advantage": ["--algo", "tgrpo", "--temporal", "advantage"],
    "GRPO, norm none": ["--algo", "grpo", "--norm", "none"],
    "T-GRPO, norm none": ["--algo", "tgrpo", "--norm", "none"],
    "contrast (ours)": ["--algo", "tgrpo", "--temporal", "contrast"],
}
MEASURES = (
    "reasons from motion",
    "reasons from motion, rightly",
    "accuracy",
    "accuracy lost in shuffled frames",
)


def frame_order(lab):
    """Which way does the square move? The order of the frames says it. So does the colour of a lamp, in a share of the training
    questions (the cue); in the test it says nothing. The cold start shows both ways of reasoning, one as often as the other: from
    the lamp, and from motion, with the right direction in a share of the examples (the skill). From there, RL by each method."""
    world, (skills, cues) = (
        lab.world("order", write_order),
        (SKILLS, CUES) if lab.shrink == 1 else (SKILLS[:1], CUES[:1]),
    )
    out = {
        f"{measure}, cue {cue}": {} for measure in (*MEASURES, "groups that passed") for cue in cues
    }
    test = world / "test.json"
    truth = load_samples(test)

    def measured(run):
        """On the test, in which every clip is followed by itself with its frames shuffled -> MEASURES: accuracies of greedy
        answers, by the run's own last evaluation, and shares of four responses to each question, sampled as RL samples them."""
        right, mixed = log(run)[-1]["eval_by_source"], lab.root / f"{run.name}-mixed.json"
        _, lines = lab.answers(f"{run.name}-sampled", run, test, "--m", 4, "--filter", mixed)[
            "vote-16"
        ]
        said = [
            (truth[r["record"]].reasoning, x)
            for r in lines[::2]
            for x in r["rounds"][0]["responses"]
        ]
        moves = [
            f"<think>{reasoning}</think>" in x for reasoning, x in said if "the square moves" in x
        ]
        shares = len(moves) / len(said), sum(moves) / len(said)
        return dict(zip(MEASURES, (*shares, right["motion"], right["motion"] - right["shuffled"])))

    for skill in skills:
        ways = lab.records(f"ways-{skill}", partial(misread, skill), world / "ways.json")
        cold = lab.train(f"order-{skill}", "sft", world / "model", ways, 400, points=1)
        for cue in cues:
            data = lab.records(
                f"cue-{cue}", partial(mix, cue), world / "agree.json", world / "differ.json"
            )
            runs = {"cold start": cold}
            for method, flags in METHODS.items():
                name = re.sub(r"[^\w.]+", "-", f"order {skill} {cue} {method}").strip("-").lower()
                runs[method] = rl(
                    lab,
                    name,
                    cold,
                    data,
                    ["--max_new", 20, *flags],
                    points=1,
                    without=("--train_vision",),
                )
            for method, run in runs.items():
                for measure, value in measured(run).items():
                    out[f"{measure}, cue {cue}"].setdefault(f"skill {skill}", {})[method] = value
            out[f"groups that passed, cue {cue}"][f"skill {skill}"] = mean(
                curve(runs["T-GRPO"], "temporal_passed").values()
            )
    minus = {
        f"accuracy minus GRPO's, cue {cue}": {
            skill: {
                method: x - by["GRPO"]
                for method, x in by.items()
                if method not in ("GRPO", "cold start")
            }
            for skill, by in out[f"accuracy, cue {cue}"].items()
        }
        for cue in cues
    }
    return out | minus


def write_order(folder, seed, clips):
    """A world with this question only, and a smaller model. agree.json, differ.json: to train on, by what the lamp says."""
    splits = {
        "ways": clips["cot"],
        "agree": clips["train"],
        "differ": clips["train"],
        "test": clips["test"],
    }
    toy.write(folder, seed, splits, order_scenes, hidden=64, layers=3)


def order_scenes(split, clips, rng):
    """Clips of 8 frames, a square that moves above a lamp that is lit throughout -> (frames, questions) each, as toy.scenes.
    Without their order, the frames tell its axis only. In ways.json every second clip is answered by the lamp."""
    for i in range(clips):
        motion, frames = rng.choice(list(LAMPS)), toy.floor(8, rng)
        cue = rng.choice(
            [
                m
                for m in LAMPS
                if split not in ("agree", "differ") or (m == motion) == (split == "agree")
            ]
        )
        toy.drift(frames, (220, 220, 220), motion, rng)
        frames[:, 20:27, 1:27] = toy.COLOURS[LAMPS[cue]]
        ask = lambda kind, answer, reasoning: {
            kind: ("Which way does the square move?", toy.MOTIONS, answer, reasoning)
        }
        by_lamp = split == "ways" and i % 2
        yield (
            frames,
            ask("lamp", cue, f"the lamp is {LAMPS[cue]}")
            if by_lamp
            else ask("motion", motion, "the square moves {}"),
        )
        if split == "test":
            yield frames[rng.sample(range(8), 8)], ask("shuffled", motion, "the square moves {}")


def misread(skill, records):
    """The records, with another direction wherever one is read from motion, but for a share of `skill`."""
    rng, words, out = random.Random(0), list(toy.MOTIONS), []
    for r in records:
        right, off, wrong = (
            "ABCD".index(extract_answer(r["solution"])),
            rng.randrange(1, 4),
            rng.random() >= skill,
        )
        said = (right + off) % 4
        read = {
            "process": r["process"].replace(words[right], words[said]),
            "solution": f"<answer>{'ABCD'[said]}</answer>",
        }
        out.append(r | read if wrong and r["data_source"] == "motion" else r)
    return out


def mix(cue, agree, differ):
    """So many records that the lamp agrees with the answer in a share of `cue`."""
    n = round(cue * len(agree))
    return agree[:n] + differ[n:]


# ---- 3. Video-R1


def video_r1(lab):
    """Images: RL on videos only, and on the same videos and still images; with all video questions, and with 60. A still is a
    frame of a clip in which a lamp flashes, with that clip's question; the accuracy is that on videos.
    Cold start: RL from random weights, from a start that has learned the format only (reasoning and answers of other questions of
    the kind), and from the cold start.
    Length: from a cold start that has also seen its reasoning said twice, RL with and without a bonus for short or long right
    answers; and from the usual cold start, that never says it twice, with the bonus for long ones."""
    cold, world = cold_start(lab), lab.world()
    few = lambda records: random.Random(lab.seed).sample(
        videos(records), min(60, len(videos(records)))
    )
    on_videos = ["--eval_data", lab.records("test-videos", videos, world / "test.json")]
    sources = [world / "train.json", stills(lab)]
    mixes = {
        "all videos": lab.records("videos", videos, world / "train.json"),
        "all videos, images": lab.records("videos-stills", lambda v, s: videos(v) + s, *sources),
        "60 questions": lab.records("few", few, world / "train.json"),
        "60 questions, images": lab.records("few-stills", lambda v, s: few(v) + s, *sources),
    }
    images = {
        name: curve(rl(lab, f"rl-{path.stem}", cold, path, on_videos, steps=60, points=6))
        for name, path in mixes.items()
    }
    end = {name: [*points.values()][-1] for name, points in images.items()}

    starts = {
        "random weights": rl(lab, "rl-random", world / "model"),
        "format only": rl(lab, "rl-format", format_only(lab)),
        "cold start": rl(lab, "grpo", cold),
    }

    cot = lab.records("cot-wordy", say_twice, world / "cot.json")
    wordy = more_sft(lab, "wordy", cot, points=1)
    short, long = (
        ["--len_bonus", 0.2, "--len_lo", lo, "--len_hi", hi] for lo, hi in ((1, 17), (18, 32))
    )
    lengths = {
        "no bonus": rl(lab, "length-none", wordy, None, steps=60, points=1),
        "up to 17 tokens": rl(lab, "length-short", wordy, None, short, steps=60, points=1),
        "18 to 32 tokens": rl(lab, "length-long", wordy, None, long, steps=60, points=1),
        "18 to 32, never seen": rl(lab, "length-unseen", cold, None, long, steps=60, points=1),
    }
    tokens = {name: curve(run, "response_length", 6) for name, run in lengths.items()}
    ends = {
        name: {"tokens": [*tokens[name].values()][-1], "accuracy": last(run)}
        for name, run in lengths.items()
    }
    return {
        "images": images,
        "images minus none": {
            name: end[f"{name}, images"] - end[name] for name in ("all videos", "60 questions")
        },
        "starts": {name: curve(run) for name, run in starts.items()},
        "lengths": tokens,
        "lengths, accuracy": {name: end["accuracy"] for name, end in ends.items()},
        "lengths minus no bonus": {
            name: {key: ends[name][key] - ends["no bonus"][key] for key in ("tokens", "accuracy")}
            for name in ("up to 17 tokens", "18 to 32 tokens")
        },
        "bonus given": {
            name: mean(curve(run, "length_bonus").values())
            for name, run in lengths.items()
            if name != "no bonus"
        },
    }


def lit_stills(n, rng):
    """So many frames of clips in which a lamp flashes, each that of the flash, with the clip's question."""
    for _ in range(n):
        frames, questions = toy.clip("flash", rng)
        lit = frames[:, 20:27].sum((1, 2, 3)).argmax()
        yield frames[lit : lit + 1], {"flash": questions["flash"]}


def say_twice(records):
    """The teacher's examples, in every second of which the reasoning is said twice."""
    twice = lambda r: (
        r
        | {"process": r["process"].replace("</think>", f", {r['process'].removeprefix('<think>')}")}
    )
    return [twice(r) if i % 2 else r for i, r in enumerate(records)]


# ---- 4. Video-RTS


def video_rts(lab):
    """From the cold start, on n of the training questions: RL, which sees their answers, and SFT on the reasoning and the answers
    of a teacher who makes no mistake, on the same n. Then sparse-to-dense, and greedy answers and votes of five at a fixed number
    of frames, by the policies before and after RL on all questions."""
    cold, world = cold_start(lab), lab.world()
    total = len(json.loads((world / "train.json").read_text()))
    explained = lab.records("explained", explain, world / "train.json", world / "cot.json")
    by_rl, by_sft = {}, {}
    for n in sorted({min(n, total) for n in (30, 100, 300, total)}):
        some = lab.records(f"train-{n}", first_of(n, lab.seed), world / "train.json")
        by_rl[str(n)] = last(rl(lab, f"rl-{n}", cold, some) if n < total else rl(lab, "grpo", cold))
        some = lab.records(f"explained-{n}", first_of(n, lab.seed), explained)
        by_sft[str(n)] = last(more_sft(lab, f"sft-{n}", some, points=1))
    methods = {
        "before RL": lab.answers("cold-tts", cold, world / "test.json", "--tts", "--compare"),
        "after RL": lab.answers(
            "grpo-tts", rl(lab, "grpo", cold), world / "test.json", "--tts", "--compare"
        ),
    }
    of = lambda key: {
        method: {when: found[method][0][key] for when, found in methods.items()}
        for method in methods["after RL"]
    }
    accuracy, tokens = (
        of("accuracy"),
        {method: x["after RL"] for method, x in of("mean_visual_tokens").items()},
    )
    greedy, vote, search = accuracy["greedy-16"], accuracy["vote-16"], accuracy["s2d-4-16"]
    truth = load_samples(world / "test.json")
    one = {
        when: mean(
            accuracy_reward(x, truth[r["record"]])
            for r in found["vote-16"][1]
            for x in r["rounds"][0]["responses"]
        )
        for when, found in methods.items()
    }
    said = lambda lines: mean(sum(n for part in r["rounds"] for n in part["tokens"]) for r in lines)
    return {
        "questions": {"RL, answers only": by_rl, "SFT, perfect teacher": by_sft},
        "RL minus SFT": {n: by_rl[n] - by_sft[n] for n in by_rl},
        "RL minus SFT on all": {n: by_rl[n] - by_sft[str(total)] for n in by_rl},
        "RL on all minus SFT": {n: by_rl[str(total)] - by_sft[n] for n in by_rl},
        "accuracy": accuracy,
        "tokens": tokens,
        "response tokens": {
            method: said(lines) for method, (_, lines) in methods["after RL"].items()
        },
        "rounds": {when: found["s2d-4-16"][0]["mean_rounds"] for when, found in methods.items()},
        "one response at 16 frames": one,
        "dense vote minus one response": {when: vote[when] - one[when] for when in one},
        "gains": {
            "RL": greedy["after RL"] - greedy["before RL"],
            "sparse-to-dense before RL": search["before RL"] - greedy["before RL"],
            "sparse-to-dense after RL": search["after RL"] - greedy["after RL"],
        },
        "dense vote minus a greedy answer": {when: vote[when] - greedy[when] for when in vote},
        "sparse-to-dense minus dense vote": {when: search[when] - vote[when] for when in search},
        "wrong after RL": {
            method: missed(methods["after RL"][method][1]) for method in ("vote-16", "s2d-4-16")
        },
    }


def missed(lines):
    """Answers of one method -> shares of its questions that are wrong: all, by kind, and those on which the responses agreed."""
    wrong = [r for r in lines if r["score"] <= 0.5]
    of = lambda kind: [r for r in wrong if r["about"]["data_source"] == kind]
    ends = [r["rounds"][-1] for r in wrong]
    agreed = [
        end["frames"] for end in ends if len(set(end["votes"])) == 1 and None not in end["votes"]
    ]
    found = {
        "all": wrong,
        "counting": of("count"),
        "motion": of("motion"),
        "agreed on": agreed,
        "agreed on at 4 or 8 frames": [n for n in agreed if n in (4, 8)],
    }
    return {name: len(some) / len(lines) for name, some in found.items()}


def first_of(n, seed):
    """A function of records that gives n of them, in an order of their own: of a larger n, the first."""
    return lambda records: random.Random(seed).sample(records, len(records))[:n]


def explain(records, cot):
    """The records with the reasoning of a teacher who watches well and writes down what he saw, in the words of cot.json."""
    start = {r["data_source"]: r["process"].rsplit(" ", 1)[0] for r in cot}
    seen = lambda r, said: next(
        (o.split(". ")[1] for o in r["options"] if o.startswith(f"{said}.")), said
    )
    return [
        r
        | {"process": f"{start[r['data_source']]} {seen(r, extract_answer(r['solution']))}</think>"}
        for r in records
    ]


# ---- 5. LongVILA-R1


def longvila_r1(lab):
    """Frames: cold starts with the same examples, whose reasoning is none, a sentence, or a sentence that counts aloud; RL from
    each; greedy accuracy at 2, 4, 8 and 16 frames. Stages: the cold start and as many more steps of SFT as RL has, RL from a
    start that has learned the format only, and RL from the cold start. Cost: RL with a frozen vision tower; with its embeddings
    kept on disk; with every row shared by two ranks."""
    cold, world = cold_start(lab), lab.world()
    cot, test = world / "cot.json", world / "test.json"
    taught = lambda name, make: lab.train(
        name, "sft", world / "model", lab.records(f"cot-{name}", make, cot), 600, points=1
    )
    after = {
        "no reasoning": rl(lab, "rl-silent", taught("silent", silence)),
        "a sentence": rl(lab, "grpo", cold),
        "counting aloud": rl(lab, "rl-aloud", taught("aloud", count_aloud)),
    }
    greedy = lambda run, n: lab.answers(
        f"{run.name}-{n}-frames", run, test, "--frames", n, "--min_frames", 2
    )[f"greedy-{n}"]
    found = {name: {str(n): greedy(run, n) for n in (2, 4, 8, 16)} for name, run in after.items()}
    frames = {
        name: {n: summary["accuracy"] for n, (summary, _) in by.items()}
        for name, by in found.items()
    }
    count = {
        name: {n: summary["by"]["data_source"]["count"][0] for n, (summary, _) in by.items()}
        for name, by in found.items()
    }
    gain = {
        kind: {name: accuracy["16"] - accuracy["4"] for name, accuracy in by.items()}
        for kind, by in (("all", frames), ("counting", count))
    }
    beyond = lambda by: {
        name: x - by["no reasoning"] for name, x in by.items() if name != "no reasoning"
    }

    stages = {
        "SFT": last(more_sft(lab, "sft-more")),
        "RL": last(rl(lab, "rl-format", format_only(lab))),
        "SFT + RL": frames["a sentence"]["16"],
    }

    some = lab.records(
        "train-100", first_of(100, lab.seed), world / "train.json"
    )  # each is seen five times
    frozen = partial(
        rl, lab, start=cold, data=some, steps=30, points=1, without=("--train_vision",)
    )
    ways = {
        "as is": frozen("frozen"),
        "embeddings on disk": frozen(
            "frozen-cache", flags=["--embedding_cache", lab.root / "frozen-cache" / "embeddings"]
        ),
        "two ranks share a row": frozen("frozen-sp", flags=["--sp", 2], main=training_on_two),
    }
    return {
        "frames": frames,
        "frames, counting": count,
        "from 4 to 16 frames": gain,
        "from 4 to 16 frames, minus no reasoning's": {
            kind: beyond(by) for kind, by in gain.items()
        },
        "frames, minus no reasoning": {
            n: beyond({name: by[n] for name, by in frames.items()}) for n in frames["no reasoning"]
        },
        "stages": stages,
        "SFT + RL minus": {name: stages["SFT + RL"] - stages[name] for name in ("SFT", "RL")},
        **same_curve(ways, "as is"),
    }


def silence(records):
    """The records with a stroke in the place of the reasoning."""
    return [r | {"process": "<think>-</think>"} for r in records]


def count_aloud(records):
    """The records with every number in the reasoning counted up to: it lights up 1 2 3."""
    return [
        r
        | {
            "process": re.sub(
                r"\d+", lambda m: " ".join(map(str, range(1, int(m[0]) + 1))), r["process"]
            )
        }
        for r in records
    ]


def same_curve(ways, base):
    """Runs that ought to be the same -> their rewards and times, and how far their rewards are from those of ways[base]."""
    rewards = {name: curve(run, "reward") for name, run in ways.items()}
    apart = {
        name: [abs(r - rewards[base][n]) for n, r in steps.items()]
        for name, steps in rewards.items()
        if name != base
    }
    return {
        "reward": {name: curve(run, "reward", 6) for name, run in ways.items()},
        "end": {name: last(run) for name, run in ways.items()},
        "largest difference of a step's mean reward": {name: max(xs) for name, xs in apart.items()},
        "steps before the first difference": {
            name: next((i for i, x in enumerate(xs) if x > 1e-9), len(xs))
            for name, xs in apart.items()
        },
        "seconds": {
            name: statistics.median(e["seconds"]["step"] for e in log(run)[1:])
            for name, run in ways.items()
        },
    }


# ---- 6. the shared prefix


def shared_prefix(lab):
    """The same GRPO run on the video questions, with this code's attention, rollout and packed rows, and with transformers' own
    (its SDPA attention and cache, G copies of the prompt, the video encoded again for every row of every pass). And bench.py's
    times of a step of a 16.8 M-parameter model, by the number of frames and by G: the plain way over ours."""
    cold, world = cold_start(lab), lab.world()
    train_json, test_json = (
        lab.records(f"{split}-videos", videos, world / f"{split}.json")
        for split in ("train", "test")
    )
    once_more = partial(
        rl, lab, start=cold, data=train_json, flags=["--eval_data", test_json], steps=40, points=2
    )
    ways = {
        "ours": once_more("prefix-ours"),
        "plain": once_more("prefix-plain", main=training_plainly),
    }

    def times(frames, group):
        """{part: how many times as long the plain way takes}, the encoding that each way does counted in."""
        out = lab.root / f"bench-{frames}-{group}.figures"
        lab.call(
            out.stem,
            timing,
            ["--frames", frames, "--group", group, "--new", new, "--repeat", 1, "--json", out],
        )
        found = json.loads(out.read_text())["results"][0]
        step = {row["name"]: sum(row[phase] for phase in bench.PHASES) for row in found["rows"]}
        parts = {part: found["faster"][part] for part in ("rollout", "training pass")}
        return {"step": step["plain"] / step["+ packed rows"], **parts}

    new = max(4, 32 // lab.shrink)  # tokens of a response
    frames = sorted({max(4, n // lab.shrink // 2 * 2) for n in (16, 32, 64, 128)})
    by_frames = {n: times(n, 8) for n in frames}
    by_group = {G: times(frames[len(frames) // 2], G) for G in (2, 4, 8, 16)}
    turn = lambda by: {
        part: {str(x): found[part] for x, found in by.items()}
        for part in ("step", "rollout", "training pass")
    }
    return {**same_curve(ways, "ours"), "by frames": turn(by_frames), "by G": turn(by_group)}


# ---- the claims


class Claim(NamedTuple):
    """run: from a Lab to nested dicts of numbers.  panels: (kind, key of those, title, x axis, y axis) and, for a logarithmic
    x axis, True.  minutes: of five seeds on two cores, after the claims before it, whose runs it shares."""

    paper: str
    line: str
    minutes: int
    run: Callable
    panels: list


SHARE, STEP = "accuracy on held-out questions", "step"
CLAIMS = {
    "grpo": Claim(
        "Video-R1, Video-RTS, LongVILA-R1",
        "GRPO with rule rewards raises accuracy without reasoning labels",
        33,
        grpo,
        [
            ("lines", "accuracy", "Learning curves", STEP, SHARE),
            ("bars", "kinds", "By kind of question", "", SHARE),
            ("bars", "right", "What is right", "", "share of held-out questions"),
            (
                "bars",
                "right, counting",
                "What is right in counting",
                "",
                "share of held-out counting questions",
            ),
            (
                "bars",
                "kinds, sentence",
                "Sentences by kind of question",
                "",
                "share that is right, word for word",
            ),
            ("bars", "GRPO minus", "GRPO's end, minus", "", "difference in accuracy"),
        ],
    ),
    "frame_order": Claim(
        "Video-R1",
        "T-GRPO makes the policy use the order of frames",
        60,
        frame_order,
        [
            (
                "bars",
                f"{measure}, cue {cue}",
                f"A cue that is right in {cue} of the training questions",
                "",
                about,
            )
            for measure, about in (
                (MEASURES[0], "share that reasons from motion"),
                (MEASURES[2], SHARE),
            )
            for cue in CUES
        ],
    ),
    "video_r1": Claim(
        "Video-R1",
        "images help video questions; a cold start before RL helps; a length reward changes length",
        21,
        video_r1,
        [
            (
                "lines",
                "images",
                "Images beside the videos",
                STEP,
                "accuracy on held-out video questions",
            ),
            (
                "bars",
                "images minus none",
                "With images, minus without, at the end",
                "",
                "difference in accuracy",
            ),
            ("lines", "starts", "RL from three starts", STEP, SHARE),
            ("lines", "lengths", "Length reward of 0.2", STEP, "tokens of a response"),
        ],
    ),
    "video_rts": Claim(
        "Video-RTS",
        "RL on few questions matches SFT on many; sparse-to-dense saves tokens; the two add up",
        15,
        video_rts,
        [
            (
                "lines",
                "questions",
                "RL against SFT from the same start",
                "questions trained on",
                SHARE,
                True,
            ),
            (
                "bars",
                "gains",
                "Gains over a greedy answer at 16 frames",
                "",
                "difference in accuracy",
            ),
            ("bars", "accuracy", "Ways to answer", "", SHARE),
            (
                "bars",
                "tokens",
                "Their visual tokens, after RL",
                "",
                "visual tokens a question, all rounds",
            ),
        ],
    ),
    "longvila_r1": Claim(
        "LongVILA-R1",
        "more frames help, more so with reasoning; SFT + RL beats either; MR-SP changes cost only",
        30,
        longvila_r1,
        [
            ("lines", "frames", "Frames, after RL", "frames", SHARE, True),
            (
                "lines",
                "frames, counting",
                "Frames, after RL: counting",
                "frames",
                "accuracy on counting questions",
                True,
            ),
            ("bars", "stages", "Stages", "", SHARE),
            ("lines", "reward", "The same run, three ways", STEP, "mean reward of a step (0 to 2)"),
        ],
    ),
    "shared_prefix": Claim(
        "this code",
        "a shared prefix changes cost, not results; what it saves grows with frames and G",
        15,
        shared_prefix,
        [
            ("lines", "reward", "The same run, both ways", STEP, "mean reward of a step (0 to 2)"),
            ("bars", "seconds", "Its cost in the toy", "", "seconds a step"),
            ("lines", "by frames", "By frames, G = 8", "frames", "plain time / ours", True),
            ("lines", "by G", "By G, at 64 frames", "G", "plain time / ours", True),
        ],
    ),
}


def study(name, seeds, root, results, pool, **size):
    """Runs a claim, writes results/NAME.json and NAME.svg -> what the JSON holds, and how many commands were run for it now.
    size: shrink, clips and flags of the Labs."""
    claim, labs = (
        CLAIMS[name],
        [Lab(seed, Path(root) / f"seed{seed}", pool, **size) for seed in seeds],
    )
    with ThreadPoolExecutor(len(seeds)) as threads:
        values = combine(list(threads.map(claim.run, labs)))
    runs = [run for lab in labs for run in {r["name"]: r for r in lab.runs}.values()]
    now = sum(run.pop("ran") for lab in labs for run in lab.runs)
    done = {
        "claim": name,
        "paper": claim.paper,
        "line": claim.line,
        "seeds": list(seeds),
        "values": values,
        "process_minutes": round(sum(run["seconds"] for run in runs) / 60, 1),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "torch": torch.__version__,
        "runs": runs,
    }
    panels = [
        figure.Panel(kind, values[key], *rest) for kind, key, *rest in claim.panels if key in values
    ]
    Path(results).mkdir(parents=True, exist_ok=True)
    write_whole(Path(results) / f"{name}.json", json.dumps(done, indent=1))
    write_whole(
        Path(results) / f"{name}.svg",
        figure.draw(f"{claim.paper}: the claim that {claim.line}", panels),
    )
    return done, now


def main(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "claim", nargs="?", choices=CLAIMS, help="its name; without one, they are listed"
    )
    p.add_argument("--seeds", type=int, default=5, help="worlds and weights: 2 to 10 (default: 5)")
    p.add_argument(
        "--jobs", type=int, default=2, help="processes of one thread, side by side (default: 2)"
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="two seeds, a 20th of the steps, a smaller world: does it run?",
    )
    args = p.parse_args(argv)
    if not 2 <= args.seeds <= 10:
        p.error(f"--seeds {args.seeds}: expected 2 to 10")
    if args.jobs < 1:
        p.error(f"--jobs {args.jobs}: expected at least 1")
    if not args.claim:
        for name, claim in CLAIMS.items():
            print(f"{name:14} {claim.line} ({claim.paper}); about {claim.minutes} minutes")
        return
    with workers(args.jobs) as pool:
        if args.quick:
            small = {"cot": 240, "train": 120, "test": 16}
            done, now = study(
                args.claim,
                range(2),
                "out/claims-quick",
                "out/claims-quick",
                pool,
                shrink=20,
                clips=small,
            )
        else:
            done, now = study(
                args.claim, range(args.seeds), "out/claims", "experiments/results", pool
            )
    print(table(done["values"]))
    print(
        f"{now} of {len(done['runs'])} commands were run now; {done['process_minutes']} process minutes in all"
    )


if __name__ == "__main__":
    main()
