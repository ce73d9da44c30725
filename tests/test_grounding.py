"""Grounding in time: two times are read, graded by their temporal IoU, evaluated and voted on."""

import json
import random

import pytest

import data
import eval as evaluation
import report
import rewards
import toy
import tts
from conftest import run
from experiments import grounding
from infra.answer_text import parse_times
from infra.errors import DataError
from infra.summary import table

RECORD = {
    "problem": "When does the door open?",
    "problem_type": "grounding",
    "data_type": "video",
    "path": "door.mp4",
    "solution": "<answer>12.3 to 18.9</answer>",
}


def sample(answer):
    return data.Sample("0", "When?", [], "grounding", "video", "x.mp4", answer)


# ---- the form of an answer


@pytest.mark.parametrize(
    "text",
    [
        "12.3 to 18.9",
        "12.3 - 18.9",
        "12.3-18.9",
        "12.3 – 18.9",  # an en dash
        "12.3—18.9",  # an em dash
        "12.3, 18.9",
        "[12.3,18.9]",
        "(12.3, 18.9)",
        "12.3s to 18.9s",
        "12.3 s - 18.9 s",
        "12.3 to 18.9 seconds",
        "12.30 sec to 18.900 secs.",
        "From 12.3 to 18.9 seconds.",
        "between 12.3 and 18.9",
        "<12.3 seconds> to <18.9 seconds>",  # as the times in a Qwen3-VL's prompt
        "00:12.3 to 00:18.9",
        "0:00:12.3 - 0:00:18.9",
        r"\boxed{12.3 to 18.9}",
        "**12.3** until **18.9**",
        "１２.３ to １８.９",  # full width
        "12.3\n to \u200b18.9",
        "12.2999 to 18.90004",  # rounded to milliseconds: 12.3 and 18.9
    ],
)
def test_two_times_in_the_usual_forms(text):
    assert parse_times(text) == (12.3, 18.9)
    assert rewards.normalize_times(text) == "12.3 to 18.9"


@pytest.mark.parametrize(
    "text, span",
    [
        ("00:12 to 00:18.5", (12, 18.5)),
        ("1:02 to 1:03:04", (62, 3784)),
        ("0 to .5", (0, 0.5)),
        ("3 to 5", (3, 5)),
        ("3,5", (3, 5)),  # a comma is never a decimal comma
        ("59 to 1:00", (59, 60)),
        ("75 to 80", (75, 80)),
        ("999999998.5 to 1000000000", (999999998.5, 1e9)),
    ],
)
def test_times_by_hand(text, span):
    assert parse_times(text) == parse_times(rewards.normalize_times(text)) == span


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12.3",  # one time
        "18.9 to 12.3",  # reversed
        "12.3 to 12.3",  # no time between
        "12.3001 to 12.3004",  # less than a millisecond
        "-1 to 5",
        "3 to -5",
        "3 to 5 to 9",
        "3 to 5, 7 to 9",  # two spans
        "12,3 to 18,9",  # decimal commas
        "00:75 to 01:30",  # 75 seconds beside minutes
        "1:00:99 to 2:00:00",
        "1 min to 2 min",
        "10² to 200",
        "1e1 to 2e1",
        "3 5",
        "3 to",
        "to 5",
        "It lasts from 3 to 5",
        "three to five",
        "3 to 9" + "9" * 400,  # no float holds it
        "3 to 1000000001",
    ],
)
def test_what_is_not_two_times(text):
    assert parse_times(text) is None
    assert rewards.accuracy_reward(f"<answer>{text}</answer>", sample("3 to 5")) == 0


# ---- the reward


@pytest.mark.parametrize(
    "said, iou",
    [
        ("10 to 20", 1),
        ("10.0 - 20.0 s", 1),
        ("15 to 25", 5 / 15),
        ("0 to 40", 10 / 40),
        ("12 to 14", 2 / 10),
        ("10 to 13", 0.3),
        ("20 to 30", 0),  # they touch
        ("30 to 40", 0),
        ("20 to 10", 0),
        ("15", 0),
    ],
)
def test_the_reward_is_the_temporal_iou(said, iou):
    response = f"<think>so</think><answer>{said}</answer>"
    assert rewards.accuracy_reward(response, sample("10 to 20")) == iou
    assert rewards.accuracy_reward(said, sample("10 to 20")) == 0  # no tags, no answer


def test_the_iou_is_symmetric_and_no_rounding_decides():
    rng = random.Random(0)
    for _ in range(500):
        a, b, c, d = (rng.randrange(600) for _ in range(4))
        if a == b or c == d:
            continue
        (a, b), (c, d) = sorted((a, b)), sorted((c, d))
        one, two = f"{a / 10:g} to {b / 10:g}", f"{c / 10:g} to {d / 10:g}"
        tenths = {*range(a, b)}, {*range(c, d)}
        expected = len(tenths[0] & tenths[1]) / len(tenths[0] | tenths[1])
        assert rewards.temporal_iou(one, two) == rewards.temporal_iou(two, one) == expected
    assert rewards.temporal_iou("0.1 to 0.4", "0.1 to 1.1") == 0.3  # 0.4 - 0.1 < 0.3 in floats


# ---- records and prompts


def test_a_record_of_two_times(tmp_path, builder):
    file = tmp_path / "r.json"
    file.write_text(json.dumps([RECORD, RECORD | {"solution": "[1, 2.50]"}]))
    one, two = data.load_samples(file)
    assert (one.problem_type, one.answer, two.answer) == ("grounding", "12.3 to 18.9", "[1, 2.50]")
    assert rewards.normalize_answer(two.answer, two) == "1 to 2.5"
    assert builder.text(one).endswith("the start and the end in seconds, such as 12.3 to 18.9.")


@pytest.mark.parametrize("gold", ["12.3", "18.9 to 12.3", "5 to 5", "soon"])
def test_a_malformed_gold_span_is_a_bad_record(tmp_path, gold):
    file = tmp_path / "r.json"
    file.write_text(json.dumps([RECORD, RECORD | {"problem_id": 7, "solution": gold}]))
    with pytest.raises(
        DataError, match=rf"r.json, record 1 \(id 7\): the answer '{gold}' of a gro"
    ):
        data.load_samples(file)
    skipped = {}
    assert len(data.load_samples(file, skipped=skipped)) == 1 and list(skipped) == [1]


# ---- evaluation


def line(score, kind="grounding"):
    return dict(score=score, failure=None, rounds=[], problem_type=kind)


def test_recall_and_mean_iou_by_hand():
    lines = [line(x) for x in (1.0, 0.7, 0.5, 0.3, 0.29, 0.0)]
    found = evaluation.grounding([*lines, line(1.0, "OCR")])
    assert found == {
        "grounding_mIoU": pytest.approx(2.79 / 6),
        "grounding_R1@0.3": 4 / 6,  # an IoU that is reached counts
        "grounding_R1@0.5": 3 / 6,
        "grounding_R1@0.7": 2 / 6,
    }
    assert evaluation.grounding([line(1.0, "OCR")]) == {}
    method = evaluation.summarize(lines, "greedy-4")
    assert method.items() >= found.items() and method["accuracy"] == found["grounding_mIoU"]
    printed = table({"model": "m", "data": "d", "constant_answer": 0.25, "methods": [method]})
    assert "grounding_mIoU 0.465" in printed and "grounding_R1@0.7 0.333" in printed


def test_the_best_constant_span_by_hand():
    """0 to 4 has IoUs of 1, 1/2 and 1/3 with these; 0 to 2: 1/2, 1 and 0; 2 to 8: 1/4, 0 and 1."""
    samples = [sample("0 to 4"), sample("0 to 2"), sample("2 to 8")]
    best = max(1 + 1 / 2 + 1 / 4, 1 / 2 + 1 + 0, 1 / 4 + 0 + 1)
    assert evaluation.constant_answer(samples) == pytest.approx(best / 3)


def test_evaluation_of_grounding_questions_end_to_end(tmp_path, world):
    """A random model says nothing valid: every score is 0, and the table and the report say so."""
    rng = random.Random(0)
    toy.write_split(tmp_path, "when", [toy.when_clip(rng) for _ in range(2)], rng)
    out = tmp_path / "out"
    how = "--frames 4 --max_new 4 --min_pixels 784 --workers 1 --out".split()
    printed = run(
        "eval.py", "--model", world / "model", "--data", tmp_path / "when.json", *how, out
    )
    assert "grounding_mIoU 0.000" in printed
    (method,) = json.loads((out / "summary.json").read_text())["methods"]
    assert method["grounding_R1@0.3"] == 0 and method["failures"] == 2
    assert "grounding_mIoU" in report.page(out)


# ---- votes


def search(*rounds, similarity=rewards.temporal_iou):
    """Sparse-to-dense on scripted votes, from 4 frames on."""
    scripted = iter(rounds)
    how = dict(start=4, cap=4 * 2 ** (len(rounds) - 1), m=len(rounds[0]), similarity=similarity)
    return tts.sparse_to_dense(lambda frames, m: next(scripted), **how)


def test_spans_agree_if_every_two_overlap_by_more_than_half():
    """0 to 10 and 1 to 11 have 9/11, 2 to 12 and 0 to 10 have 8/12. The middle one is the answer:
    1 + 2 * 9/11 for it, 1 + 9/11 + 8/12 for the others."""
    found = search(["0 to 10", "1 to 11", "2 to 12"], [None] * 3)
    assert found.answer == "1 to 11" and len(found.rounds) == 1
    half = search(["0 to 10", "0 to 5"], ["0 to 5", "0 to 5"])  # exactly half is not enough
    assert [r.frames for r in half.rounds] == [4, 8] and half.answer == "0 to 5"
    failed = search(["0 to 10", None], ["0 to 10", "0 to 10"])  # an invalid answer does not vote
    assert len(failed.rounds) == 2


def test_at_the_cap_the_span_that_overlaps_most_wins():
    """20 to 30 was said twice: 2. But 0 to 10 has 1 + 0.9 + 0.9 from its neighbours."""
    votes = ["20 to 30", "0 to 10", "20 to 30", "0 to 9", "1 to 10"]
    assert search(votes).answer == "0 to 10"
    assert search(votes, similarity=tts.same).answer == "20 to 30"


def test_votes_that_have_to_be_the_same_are_counted():
    """The similarity of equality gives the plurality: a plain count, ties by all rounds and the
    log-prob."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randrange(1, 4)
        answers = [[rng.choice(["A", "B", "C", None]) for _ in range(5)] for _ in range(n)]
        logps = [[rng.random() for _ in range(5)] for _ in range(n)]
        rounds = [tts.Round(4, a, x) for a, x in zip(answers, logps)]
        valid = {a for votes in answers for a in votes} - {None}

        def rank(a, answers=answers, logps=logps):
            said = [x for votes, row in zip(answers, logps) for v, x in zip(votes, row) if v == a]
            return answers[-1].count(a), len(said), max(said)

        assert tts.plurality(rounds) == max(valid, key=rank, default=None)


# ---- the toy


def test_a_toy_clip_shows_the_time_span_that_its_answer_says():
    rng = random.Random(0)
    for _ in range(50):
        frames, questions = toy.when_clip(rng)
        ((_, _, answer, _),) = questions.values()
        floor = frames[0, 27, 27]
        lit = [t for t in range(16) if (frames[t, 23, 1] != floor).any()]
        assert lit == list(range(lit[0], lit[-1] + 1))  # frames of half a second
        assert parse_times(answer) == (lit[0] / 2, (lit[-1] + 1) / 2)


def test_the_careless_teacher_writes_times_that_are_a_second_late(tmp_path):
    rng = random.Random(0)
    toy.write_split(tmp_path, "watched", [toy.when_clip(rng) for _ in range(200)], rng)
    watched = json.loads((tmp_path / "watched.json").read_text())
    written = grounding.late(watched)
    assert watched == json.loads((tmp_path / "watched.json").read_text())
    slips = 0
    for r in written:
        said = parse_times(rewards.extract_answer(r["solution"]))
        seen = parse_times(r["process"].removesuffix("</think>").split("from ")[1])
        assert said in (seen, (seen[0] + 1, seen[1] + 1))
        slips += said != seen
    assert 110 < slips < 150  # 65 % of 200


def test_the_world_of_the_claim():
    """In the test every clip is followed by itself with its frames shuffled."""
    scenes = list(grounding.when_scenes("test", 3, random.Random(0)))
    for (clip, questions), (mixed, same) in zip(scenes[::2], scenes[1::2]):
        assert list(questions) == ["when"] and list(same) == ["when, shuffled"]
        assert questions["when"] == same["when, shuffled"] and (clip != mixed).any()
        assert sorted(f.tobytes() for f in clip) == sorted(f.tobytes() for f in mixed)
    assert len(list(grounding.when_scenes("train", 3, random.Random(0)))) == 3


def test_the_best_guesses_by_hand(tmp_path):
    """0 to 1, 2 to 3 and 0 to 2: 0 to 1 has IoUs of 1, 0, 1/2, 0 to 2 has 1/2, 0, 1; both are the
    best. With the length known, 0 to 1 for two of them has 1, 0 and 0 to 2 has 1."""
    solutions = ("0 to 1", "2 to 3", "0 to 2")
    file = tmp_path / "test.json"
    file.write_text(json.dumps([RECORD | {"solution": text} for text in solutions]))
    found = grounding.best_guesses(file)
    assert found == {"best constant": 1.5 / 3, "best for each length": 2 / 3}
