"""Video-R1, section 3.1: T-GRPO makes the policy use the order of frames.

python -m experiments.claims frame_order
"""

import random
import re
from functools import partial

import toy
from data import load_samples
from experiments.lab import curve, log
from experiments.shared import SHARE, Claim, Panel, rl
from infra.summary import mean
from rewards import extract_answer

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


def run(lab):
    """Which way does the square move? Only the order of the frames says it. The colour of a lamp
    says it too, in a share of the training questions (the cue); in the test it says nothing.

    The cold start reasons as often from the lamp as from motion, and its examples read motion
    rightly in a share of the cases (the skill). From there, RL by each method."""
    skills, cues = (SKILLS, CUES) if lab.shrink == 1 else (SKILLS[:1], CUES[:1])
    world = lab.world("order", write_order)
    out = {}
    for measure in (*MEASURES, "groups that passed"):
        for cue in cues:
            out[f"{measure}, cue {cue}"] = {}
    for skill in skills:
        row = f"skill {skill}"
        ways = lab.records(f"ways-{skill}", partial(misread, skill), world / "ways.json")
        cold = lab.train(f"order-{skill}", "sft", world / "model", ways, 400, points=1)
        for cue in cues:
            runs = {"cold start": cold, **train_all(lab, world, cold, skill, cue)}
            found = {method: measured(lab, run, world) for method, run in runs.items()}
            for measure in MEASURES:
                by_method = {method: numbers[measure] for method, numbers in found.items()}
                out[f"{measure}, cue {cue}"][row] = by_method
            passed = curve(runs["T-GRPO"], "temporal_passed")
            out[f"groups that passed, cue {cue}"][row] = mean(passed.values())
    for cue in cues:
        differences = {}
        for row, accuracy in out[f"accuracy, cue {cue}"].items():
            others = [method for method in METHODS if method != "GRPO"]
            differences[row] = {method: accuracy[method] - accuracy["GRPO"] for method in others}
        out[f"accuracy minus GRPO's, cue {cue}"] = differences
    return out


def train_all(lab, world, cold, skill, cue):
    """RL from the cold start by each method, with a frozen vision tower -> {method: folder}."""
    sources = world / "agree.json", world / "differ.json"
    data = lab.records(f"cue-{cue}", partial(mix, cue), *sources)
    runs = {}
    for method, flags in METHODS.items():
        name = re.sub(r"[^\w.]+", "-", f"order {skill} {cue} {method}").strip("-").lower()
        flags = ["--max_new", 20, *flags]
        runs[method] = rl(lab, name, cold, data, flags, points=1, without=("--train_vision",))
    return runs


def measured(lab, run, world):
    """A run on the test, where every clip is followed by itself with its frames shuffled ->
    {measure: number}.

    Accuracies are those of greedy answers, in the run's own last evaluation. Shares are of four
    responses to each ordered clip, sampled as in RL."""
    test = world / "test.json"
    truth = load_samples(test)
    kept = lab.root / f"{run.name}-mixed.json"
    found = lab.answers(f"{run.name}-sampled", run, test, "--m", 4, "--filter", kept)
    _, lines = found["vote-16"]
    responses = from_motion = rightly = 0
    for line in lines[::2]:
        sentence = f"<think>{truth[line['record']].reasoning}</think>"
        for response in line["rounds"][0]["responses"]:
            responses += 1
            if "the square moves" in response:
                from_motion += 1
                rightly += sentence in response
    accuracy = log(run)[-1]["eval_by_source"]
    return {
        "reasons from motion": from_motion / responses,
        "reasons from motion, rightly": rightly / responses,
        "accuracy": accuracy["motion"],
        "accuracy lost in shuffled frames": accuracy["motion"] - accuracy["shuffled"],
    }


# ---- the world and its records


def write_order(folder, seed, clips):
    """Writes a world with this question only, and a smaller model. Training clips are in
    agree.json and differ.json, by whether the lamp agrees with the motion."""
    splits = {
        "ways": clips["cot"],
        "agree": clips["train"],
        "differ": clips["train"],
        "test": clips["test"],
    }
    toy.write(folder, seed, splits, order_scenes, hidden=64, layers=3)


def order_scenes(split, clips, rng):
    """Yields (frames, questions), as toy.scenes: clips of 8 frames, in which a square moves above
    a lit lamp. Without their order, the frames show only the axis of the motion. In ways.json,
    every second clip is answered from the lamp."""
    for i in range(clips):
        motion = rng.choice(list(LAMPS))
        frames = toy.floor(8, rng)
        cues = list(LAMPS)
        if split == "agree":
            cues = [motion]
        elif split == "differ":
            cues.remove(motion)
        cue = rng.choice(cues)
        toy.drift(frames, (220, 220, 220), motion, rng)
        frames[:, 20:27, 1:27] = toy.COLOURS[LAMPS[cue]]
        if split == "ways" and i % 2:
            yield frames, direction("lamp", cue, f"the lamp is {LAMPS[cue]}")
        else:
            yield frames, direction("motion", motion, "the square moves {}")
        if split == "test":
            shuffled = frames[rng.sample(range(8), 8)]
            yield shuffled, direction("shuffled", motion, "the square moves {}")


def direction(kind, answer, reasoning):
    """The question of this world, in the form of toy.clip."""
    return {kind: ("Which way does the square move?", toy.MOTIONS, answer, reasoning)}


def misread(skill, records):
    """The records, but where a direction is read from motion, it is read wrong, except in a share
    of `skill`."""
    rng, words, out = random.Random(0), list(toy.MOTIONS), []
    for r in records:
        right = "ABCD".index(extract_answer(r["solution"]))
        said = (right + rng.randrange(1, 4)) % 4
        wrong = rng.random() >= skill
        if wrong and r["data_source"] == "motion":
            process = r["process"].replace(words[right], words[said])
            r = r | {"process": process, "solution": f"<answer>{'ABCD'[said]}</answer>"}
        out.append(r)
    return out


def mix(cue, agree, differ):
    """As many records as `agree` has, in a share of `cue` of which the lamp agrees with the
    answer."""
    n = round(cue * len(agree))
    return agree[:n] + differ[n:]


PANELS = []
for measure, axis in (
    ("reasons from motion", "share that reasons from motion"),
    ("accuracy", SHARE),
):
    for cue in CUES:
        title = f"A cue that is right in {cue} of the training questions"
        PANELS.append(Panel("bars", f"{measure}, cue {cue}", title, "", axis))
CLAIM = Claim(
    paper="Video-R1",
    line="T-GRPO makes the policy use the order of frames",
    minutes=60,
    run=run,
    panels=PANELS,
)
