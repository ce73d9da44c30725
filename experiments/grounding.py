"""Grounding in time (OneThinker, arXiv 2512.03043; VideoAuto-R1, arXiv 2601.05175): RL raises mIoU.

python -m experiments.claims grounding
"""

import random
from itertools import combinations

import toy
from data import load_samples
from eval import grounding
from experiments.lab import log
from experiments.shared import STEP, Claim, Panel, rl
from infra.answer_text import parse_times
from infra.summary import mean
from rewards import extract_answer, normalize_times, temporal_iou


def run(lab):
    """When is the lamp lit? GRPO from a cold start, with the temporal IoU as its reward. The
    teacher watches well, but mostly writes down times that are a second late. The test asks about
    every clip twice, the second time with its frames shuffled."""
    world = lab.world("when", write_when)
    cot = lab.records("cot", late, world / "watched.json")
    cold = lab.train("when-cold", "sft", world / "model", cot, 200, points=1)
    trained = rl(lab, "when-grpo", cold, world / "train.json", steps=40, points=4)
    before, after = scores(lab, cold), scores(lab, trained)
    guesses = best_guesses(world / "test.json")
    recall = {}
    for least in (0.3, 0.5, 0.7):
        name = f"grounding_R1@{least}"
        recall[f"R1@{least}"] = {
            "cold start": before["when"][name],
            "GRPO": after["when"][name],
            "GRPO, frames shuffled": after["when, shuffled"][name],
        }
    end, shuffled = after["when"]["grounding_mIoU"], after["when, shuffled"]["grounding_mIoU"]
    return {
        "mIoU": {
            "frames in order": curve_of(trained, "when"),
            "frames shuffled": curve_of(trained, "when, shuffled"),
        },
        "recall": recall,
        "shuffled": {"GRPO": end, "GRPO, frames shuffled": shuffled, **guesses},
        "GRPO minus": {"cold start": end - before["when"]["grounding_mIoU"]},
        "GRPO, frames shuffled, minus": {name: shuffled - x for name, x in guesses.items()},
    }


def curve_of(run, source):
    """{step: mIoU} of a training run on the test questions of a source."""
    entries = [entry for entry in log(run) if "eval_by_source" in entry]
    return {str(entry["step"]): entry["eval_by_source"][source] for entry in entries}


def scores(lab, run):
    """The run's greedy answers to the test questions -> {source: scores of eval.grounding}."""
    test = lab.root / "when" / "test.json"
    _, lines = lab.answers(f"{run.name}-greedy", run, test)["greedy-16"]
    of_source = {}
    for line in lines:
        of_source.setdefault(line["about"]["data_source"], []).append(line)
    return {source: grounding(some) for source, some in of_source.items()}


def best_guesses(test):
    """What answers without the order of frames can reach, chosen with the gold answers known ->
    {name: mIoU}: one answer to all questions, and one for each length, which shuffled frames
    still show."""
    golds = [normalize_times(sample.answer) for sample in load_samples(test)]
    by_length = {}
    for gold in golds:
        start, end = parse_times(gold)
        by_length.setdefault(end - start, []).append(gold)
    known = sum(len(some) * best_constant(some) for some in by_length.values())
    return {"best constant": best_constant(golds), "best for each length": known / len(golds)}


def best_constant(golds):
    """The largest mIoU of one answer in whole seconds to questions with these answers."""
    spans = [f"{start} to {end}" for start, end in combinations(range(9), 2)]
    return max(mean(temporal_iou(span, gold) for gold in golds) for span in spans)


# ---- the world


def write_when(folder, seed, clips):
    """Writes a world with this question only. watched.json: what the teacher sees."""
    splits = {"watched": clips["cot"], "train": clips["train"], "test": max(1, clips["test"] // 2)}
    toy.write(folder, seed, splits, when_scenes)


def when_scenes(split, clips, rng):
    """Yields (frames, questions), as toy.scenes. In the test every clip is followed by itself with
    its frames shuffled."""
    for _ in range(clips):
        frames, questions = toy.when_clip(rng)
        yield frames, questions
        if split == "test":
            mixed = frames[rng.sample(range(len(frames)), len(frames))]
            yield mixed, {"when, shuffled": questions["when"]}


def late(records):
    """The records of a careless teacher: in a share of toy.SLIP, the answer is a second late. The
    reasoning stays right."""
    rng, out = random.Random(0), []
    for r in records:
        if rng.random() < toy.SLIP:
            start, end = parse_times(extract_answer(r["solution"]))
            r = r | {"solution": f"<answer>{start + 1:g} to {end + 1:g}</answer>"}
        out.append(r)
    return out


MIOU = "mean IoU on held-out questions"
CLAIM = Claim(
    paper="OneThinker, VideoAuto-R1",
    line="RL teaches grounding in time",
    minutes=10,
    run=run,
    panels=[
        Panel("lines", "mIoU", "Learning curves", STEP, MIOU),
        Panel("bars", "recall", "Questions with at least this IoU", "", "share of questions"),
        Panel("bars", "shuffled", "Without the order of frames", "", MIOU),
        Panel("bars", "GRPO minus", "GRPO's end, minus", "", "difference in mIoU"),
    ],
)
