"""All three papers: GRPO with rule rewards raises accuracy without reasoning labels.

python -m experiments.claims grpo
"""

from typing import NamedTuple

from data import load_samples
from experiments.lab import curve, last
from experiments.shared import SHARE, STEP, Claim, Panel, cold_start, more_sft, rl, shuffle
from infra.summary import mean


def run(lab):
    """GRPO from the cold start, and two controls with as many steps: GRPO on answers of other
    questions of the same kind (the same rewards, without information about the video), and more
    SFT on the teacher's examples."""
    cold, world = cold_start(lab), lab.world()
    shuffled = lab.records("train-shuffled", shuffle, world / "train.json")
    arms = {
        "GRPO": rl(lab, "grpo", cold),
        "GRPO, answers shuffled": rl(lab, "grpo-shuffled", cold, shuffled),
        "more SFT": more_sft(lab, "sft-more"),
    }
    before, after = graded(lab, cold), graded(lab, arms["GRPO"])
    answers, sentences = {}, {}
    for kind in sorted({answer.kind for answer in after}):
        was, now = shares(before, kind), shares(after, kind)
        answers[kind] = {"cold start": was["answer"], "GRPO": now["answer"]}
        sentences[kind] = {"cold start": was["sentence"], "GRPO": now["sentence"]}
    right = {"cold start": shares(before), "GRPO": shares(after)}
    counting = {"cold start": shares(before, "count"), "GRPO": shares(after, "count")}
    end = last(arms["GRPO"])
    minus = {"cold start": end - right["cold start"]["answer"]}
    for name in ("GRPO, answers shuffled", "more SFT"):
        minus[name] = end - last(arms[name])
    return {
        "accuracy": {name: curve(arm) for name, arm in arms.items()},
        "kinds": answers,
        "kinds, sentence": sentences,
        "right": right,
        "right, counting": counting,
        "GRPO minus": minus,
    }


class Graded(NamedTuple):
    """An answer to a question of a kind: whether its sentence of reasoning is right, word for
    word, and its answer."""

    kind: str
    sentence: bool
    answer: bool


def graded(lab, run):
    """The run's greedy answers to the test questions -> [Graded, ...]."""
    test = lab.world() / "test.json"
    truth = load_samples(test)
    _, lines = lab.answers(f"{run.name}-greedy", run, test)["greedy-16"]
    out = []
    for line in lines:
        sentence = f"<think>{truth[line['record']].reasoning}</think>"
        seen = sentence in line["rounds"][0]["responses"][0]
        out.append(Graded(line["about"]["data_source"], seen, line["score"] > 0.5))
    return out


def shares(graded, kind=None):
    """The shares of answers (of one kind, if given) in which the sentence is right, the answer is,
    and only one of them."""
    some = [x for x in graded if kind in (None, x.kind)]
    return {
        "sentence": mean(x.sentence for x in some),
        "answer": mean(x.answer for x in some),
        "only the sentence": mean(x.sentence and not x.answer for x in some),
        "only the answer": mean(x.answer and not x.sentence for x in some),
    }


CLAIM = Claim(
    paper="Video-R1, Video-RTS, LongVILA-R1",
    line="GRPO with rule rewards raises accuracy without reasoning labels",
    minutes=33,
    run=run,
    panels=[
        Panel("lines", "accuracy", "Learning curves", STEP, SHARE),
        Panel("bars", "kinds", "By kind of question", "", SHARE),
        Panel("bars", "right", "What is right", "", "share of held-out questions"),
        Panel(
            "bars",
            "right, counting",
            "What is right in counting",
            "",
            "share of held-out counting questions",
        ),
        Panel(
            "bars",
            "kinds, sentence",
            "Sentences by kind of question",
            "",
            "share that is right, word for word",
        ),
        Panel("bars", "GRPO minus", "GRPO's end, minus", "", "difference in accuracy"),
    ],
)
