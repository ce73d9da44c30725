"""eval.py from files to files: every question once, failures are wrong answers, scores by hand."""

import dataclasses
import fcntl
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import model
import report
import rewards
from conftest import SHARED, Script, needs_shared, run
from data import Sample
from infra.answers import open_answers, read_answers
from infra.summary import by_group, interval, natural, table

TTS = ["--tts", "--compare", "--start", 8, "--cap", 16, "--m", 3]


def flags(world, cold_start, out, *more, records="train.json"):
    small = ["--min_pixels", 784, "--max_new", 16, "--temperature", 1.5, "--workers", 1]
    return ["--model", cold_start, "--data", world / records, "--out", out, *small, *more]


@pytest.fixture()
def evaluate(capsys):
    """evaluate(*flags) -> what `python eval.py` prints, run in this process, which saves a start.
    fails: it must end with an error, which is one line and is returned too."""

    def call(*words, fails=False):
        error = None
        try:
            evaluation.main([str(word) for word in words])
        except SystemExit as e:
            error = str(e)
        printed = "".join(capsys.readouterr())
        assert fails == (error is not None), error
        return f"{printed}{error}"

    return call


def lines(out, method):
    files = sorted(out.glob(f"{method}.rank*.jsonl"))
    return [json.loads(x) for f in files for x in f.read_text().splitlines()]


def summary(out):
    """Without what differs from run to run: times, and the model's name."""
    text = json.loads((out / "summary.json").read_text())
    return [{k: v for k, v in m.items() if k != "seconds"} for m in text["methods"]]


@pytest.fixture(scope="session")
def whole(made_once, world, cold_start):
    """All methods on some records, uninterrupted, on one process -> the folder, what is printed."""

    def make(folder):
        printed = run("eval.py", *flags(world, cold_start, folder / "out", *TTS))
        (folder / "printed.txt").write_text(printed)

    folder = made_once("whole", make)
    return folder / "out", (folder / "printed.txt").read_text()


def test_every_method_answers_every_question_once_and_writes_everything(whole, world):
    out, printed = whole
    samples = data.load_samples(world / "train.json")
    names = ["greedy-8", "greedy-16", "vote-8", "vote-16", "s2d-8-16"]
    assert [m["method"] for m in summary(out)] == names and all(name in printed for name in names)
    assert "on " in printed and "x 784" in printed and f"{len(samples)} questions" in printed
    assert (
        f"{out} holds the answers and summary.json; `python report.py {out} --open` shows them\n"
        in printed
    )
    for method in summary(out):
        answered = lines(out, method["method"])
        assert sorted(r["record"] for r in answered) == list(range(len(samples)))
        assert method["accuracy"] == pytest.approx(sum(r["score"] for r in answered) / len(samples))
        for r in answered:
            sample = samples[r["record"]]
            assert (r["id"], r["question"], r["answer"], r["pixels"]) == (
                sample.id,
                sample.question,
                sample.answer,
                784,
            )
            assert r["score"] == rewards.grade(r["given"], sample) and r["seconds"] > 0
            assert r["gold"] == rewards.normalize_answer(sample.answer, sample) is not None
            assert (r["failure"] is None) == (r["given"] is not None)
            assert r["visual_tokens"] == sum(x["visual_tokens"] for x in r["rounds"])
            for shown in r["rounds"]:
                m = 1 if method["method"].startswith("greedy") else 3
                texts = shown["responses"]
                assert (
                    len(texts)
                    == len(shown["tokens"])
                    == len(shown["logps"])
                    == len(shown["truncated"])
                    == m
                )
                votes = [rewards.normalize_answer(rewards.extract_answer(t), sample) for t in texts]
                assert shown["votes"] == votes
                assert shown["visual_tokens"] == max(1, shown["frames"] // 2)
    by = summary(out)[0]["by"]["data_source"]
    assert {k: n for k, (_, n) in by.items()} == Counter(s.source for s in samples)


def test_sparse_to_dense_asks_as_the_rounds_say_and_draws_what_a_vote_at_that_density_draws(whole):
    out, _ = whole
    votes = {n: {r["record"]: r["rounds"][0] for r in lines(out, f"vote-{n}")} for n in (8, 16)}
    seen = Counter()
    for r in lines(out, "s2d-8-16"):
        frames = [x["frames"] for x in r["rounds"]]
        assert frames == ([1] if r["data_type"] == "image" else [8, 16][: len(frames)])
        for x in r["rounds"][:-1]:
            assert (
                None in x["votes"] or len(set(x["votes"])) > 1
            )  # it went on, so they did not agree
        last = r["rounds"][-1]["votes"]
        if frames[-1] < 16 and r["data_type"] == "video":
            assert last == [r["given"]] * 3
        for n, x in zip((8, 16), r["rounds"]):
            assert (
                x["votes"] == votes[n][r["record"]]["votes"]
                and x["responses"] == votes[n][r["record"]]["responses"]
            )
        seen[len(frames)] += 1
    assert seen[1] and seen[2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_gives_the_same_table(tmp_path, whole, world, cold_start, ranks):
    out = tmp_path / "cut"
    command = ["eval.py", *flags(world, cold_start, out, *TTS)]
    script = Script(*command, ranks=ranks)

    def written():
        return sum(f.read_text().count("\n") for f in out.glob("*.jsonl"))

    n = len(lines(whole[0], "greedy-8"))
    script.wait_until(lambda: written() >= 2 * n + n // 2)  # in the middle of the third method
    script.process.kill()
    before = written()
    assert n <= before < 5 * n
    unfinished = sorted(out.glob("*.jsonl"), key=lambda f: f.stat().st_mtime)[-1]
    with open(unfinished, "a") as f:
        f.write('{"record": 3, "id"')  # half a line, as a kill in mid-write leaves it
    run(*command, ranks=ranks)
    assert summary(out) == summary(whole[0])
    for method in summary(out):
        assert sorted(r["record"] for r in lines(out, method["method"])) == list(range(n))
    run(*command, ranks=3 - ranks)  # nothing is left to do, on any number of ranks
    assert written() == 5 * n and summary(out) == summary(whole[0])


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_other_questions_of_its_batch(world, cold_start, builder):
    samples = data.load_samples(world / "train.json")
    policy = model.Policy.load(cold_start, dtype=torch.float64)
    method = evaluation.Method("s2d", 4, 16, 3, 1.5)
    with ThreadPoolExecutor(2) as pool:

        def ask(batch, order):
            questions = [evaluation.Question(i, samples[i], method) for i in order]
            how = {"pool": pool, "max_new": 16, "batch": batch}
            answered = evaluation.answer(policy, builder, questions, method, **how)
            return {
                q.index: (q.search.answer, [r["responses"] for r in q.rounds]) for q in answered
            }

        assert ask(32, range(6)) == ask(1, range(6)) == ask(4, reversed(range(6)))


@pytest.fixture()
def broken(tmp_path, world):
    """Eight records: a good one, a broken video, a missing one, one option, a number, a folder of
    frames, no options, and a text that is no record."""
    good = next(
        r for r in json.loads((world / "test.json").read_text()) if r["data_source"] == "flash"
    )
    good["path"] = str(world / good["path"])
    (tmp_path / "broken.y4m").write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    (tmp_path / "frames").mkdir()
    for i in range(6):
        Image.fromarray(np.full((28, 28, 3), 40 * i, np.uint8)).save(
            tmp_path / "frames" / f"{i}.png"
        )
    records = [
        good,
        good | {"path": "broken.y4m"},
        good | {"path": "nowhere.y4m"},
        good | {"options": ["A. red"], "solution": "<answer>A</answer>"},
        good | {"options": None, "problem_type": "numerical", "solution": "<answer>3</answer>"},
        good | {"path": "frames", "data_type": "frame"},
        good | {"options": None},
        "what is this",
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


@pytest.mark.slow
def test_what_cannot_be_answered_is_a_line_with_its_reason_and_a_wrong_answer(broken, cold_start):
    out = broken / "out"
    rounds = ("--tts", "--start", 4, "--cap", 16)
    command = flags(broken, cold_start, out, *rounds, records="records.json")
    printed = run("eval.py", *command, ranks=2)
    answered = {r["record"]: r for r in lines(out, "s2d-4-16")}
    assert sorted(answered) == list(range(8)) and len(lines(out, "s2d-4-16")) == 8
    assert "broken.y4m: cannot be decoded" in answered[1]["failure"] and answered[1]["rounds"] == []
    assert "nowhere.y4m: no such file" in answered[2]["failure"]
    assert (
        "multiple choice without options" in answered[6]["failure"]
        and "record 7: found" in answered[7]["failure"]
    )
    for i in (0, 3, 4, 5):
        assert answered[i]["rounds"] and answered[i]["failure"] in (None, "no valid answer")
    assert max(x["frames"] for x in answered[5]["rounds"]) == 6 and answered[5]["fps"] == 3.0
    assert all(answered[i]["score"] == 0 for i in (1, 2, 6, 7))
    (method,) = summary(out)
    assert method["questions"] == 8 and method["unreadable"] == 4
    assert method["failures"] == sum(r["failure"] is not None for r in answered.values())
    assert method["accuracy"] == sum(r["score"] for r in answered.values()) / 8
    assert printed.count("failed: ") >= 4


def test_records_of_any_problem_type_end_in_a_table(tmp_path, world, cold_start, evaluate):
    good = json.loads((world / "test.json").read_text())[0]
    kinds = [3, False, ["OCR"], {}, "essay", "multiple choice"]
    (tmp_path / "r.json").write_text(
        json.dumps([good, *(good | {"problem_type": k, "solution": "Z"} for k in kinds)])
    )
    where = {"records": "r.json"}
    command = flags(tmp_path, cold_start, tmp_path / "out", "--media_root", world, **where)
    for _ in range(2):  # the second time nothing is left to do
        evaluate(*command)
        (method,) = summary(tmp_path / "out")
        assert (method["questions"], method["unreadable"]) == (7, 6)
    of_a_kind = [r.get("problem_type") for r in lines(tmp_path / "out", "greedy-16")]
    assert sorted(of_a_kind, key=str) == [None] * 5 + ["multiple choice"] * 2


def test_most_media_missing_or_all_unreadable_is_an_error(tmp_path, world, cold_start):
    """Missing media before a model is loaded; the same folder then takes the corrected command."""
    records = json.loads((world / "test.json").read_text())[:3]
    (tmp_path / "r.json").write_text(json.dumps(records))
    command = list(map(str, flags(tmp_path, cold_start, tmp_path / "out", records="r.json")))
    with pytest.raises(
        SystemExit,
        match=f"error: .*r.json: the media of 3 of 3 records are missing: 3 in {tmp_path}/media; ",
    ):
        evaluation.main(command)
    evaluation.main([*command, "--media_root", str(world)])
    assert summary(tmp_path / "out")[0]["unreadable"] == 0
    (tmp_path / "media").mkdir()
    for r in records:
        (tmp_path / r["path"]).write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    command[command.index("--out") + 1] = str(tmp_path / "broken")
    for _ in range(2):
        with pytest.raises(
            SystemExit,
            match="error: .*r.json: none of the 3 questions could be asked; the first: record ",
        ):
            evaluation.main(command)
    assert summary(tmp_path / "broken")[0]["unreadable"] == 3


def test_text_beside_videos_and_images(tmp_path, world, cold_start, evaluate):
    """A text takes one round, as an image does: more frames could not help. It has no part in the
    means over frames, pixels and visual tokens."""
    records = json.loads((world / "test.json").read_text())
    video = next(r for r in records if r["data_type"] == "video")
    image = next(r for r in records if r["data_type"] == "image")
    text = {k: v for k, v in image.items() if k != "path"} | {"data_type": "text"}
    gsm8k = {"question": "3 and 4?", "answer": "3+4 = 7\n#### 7"}
    of_text = [text, gsm8k, gsm8k | {"answer": "7\n#### seven"}]
    (tmp_path / "r.json").write_text(json.dumps([video, image, *of_text]))
    out = tmp_path / "out"
    where = ["--media_root", world]
    evaluate(*flags(tmp_path, cold_start, out, *TTS, *where, records="r.json"))
    answered = {r["record"]: r for r in lines(out, "s2d-8-16")}
    rounds = [len(answered[i]["rounds"]) for i in range(5)]
    assert rounds == [rounds[0], 1, 1, 1, 0] and rounds[0] > 0
    for i in (2, 3):
        r = answered[i]
        assert (r["frames"], r["pixels"], r["visual_tokens"], r["path"]) == (0, 0, 0, "")
        assert r["failure"] in (None, "no valid answer") and len(r["rounds"][0]["votes"]) == 3
    assert "'seven' of a numerical question" in answered[4]["failure"]
    assert answered[4]["problem_type"] == "numerical" and answered[4]["score"] == 0
    for method in summary(out):
        shown = [r for r in lines(out, method["method"]) if r["record"] in (0, 1)]
        assert method["mean_frames"] == (shown[0]["frames"] + shown[1]["frames"]) / 2
        assert method["pixels"] == 784 and (method["questions"], method["unreadable"]) == (5, 1)
        assert method["by"]["data_type"].keys() == {"video", "image", "text", "none"}
    sheets = report.page(out).count('"sheet":null')
    assert sheets == 2 * len(summary(out))  # the rounds of the two texts have no picture

    (tmp_path / "text.jsonl").write_text(json.dumps(gsm8k))
    printed = evaluate(*flags(tmp_path, cold_start, tmp_path / "text", records="text.jsonl"))
    (method,) = summary(tmp_path / "text")
    assert method["mean_frames"] is method["mean_visual_tokens"] is None
    assert method["mean_rounds"] == 1 and " - x - " in printed


def test_frames_of_an_earlier_round_are_not_decoded_again(world, builder):
    sample = next(s for s in data.load_samples(world / "train.json") if s.source == "flash")
    seen = {}
    few = builder(sample, max_frames=8, fps=float("inf"), decoded=seen).media[0]
    assert (
        sorted(seen) == data.frame_indices(16, 2, target_fps=8, max_frames=8)
        and few.available == 16
    )
    marked = next(iter(seen))
    seen[marked] = np.full_like(seen[marked], 7)
    every = builder(sample, max_frames=16, decoded=seen).media[0]
    fresh = builder(sample, max_frames=16).media[0]
    assert sorted(seen) == list(range(16)) and (every.frames[marked] == 7).all()
    others = [i for i in range(16) if i != marked]
    assert torch.equal(every.frames[others], fresh.frames[others])
    again = builder(sample, max_frames=16, decoded=seen).media[0]  # nothing is left to decode
    assert torch.equal(again.frames, every.frames)


@needs_shared
def test_frames_of_a_real_video_do_not_depend_on_what_was_decoded_before():
    sample = Sample(
        "0", "?", [], "numerical", "video", str(SHARED / "media" / "video_r1_example.mp4"), "1"
    )
    seen, how = {}, dict(fps=float("inf"), max_pixels=56 * 84)
    for n in (8, 16, 32):
        media = data.load_media(sample, max_frames=n, decoded=seen, **how)
        assert (
            torch.equal(media.frames, data.load_media(sample, max_frames=n, **how).frames)
            and media.available == 490
        )


# ---- scores


@needs_shared
@pytest.mark.parametrize(
    "file", sorted((SHARED / "benchmarks").glob("*.json*")), ids=lambda f: f.stem
)
def test_gold_answers_of_the_real_benchmarks_score_1_and_the_most_frequent_is_the_best_constant(
    file,
):
    samples = data.load_samples(file)
    golds = [rewards.normalize_answer(s.answer, s) for s in samples]
    assert all(evaluation.score(gold, s) == 1 for gold, s in zip(golds, samples))
    assert all(evaluation.score(None, s) == 0 for s in samples)
    expected = 0
    for kind in {s.problem_type for s in samples}:
        group = [(g, s) for g, s in zip(golds, samples) if s.problem_type == kind]
        if kind == "regression":
            mra = rewards.mean_relative_accuracy
            expected += max(sum(mra(pred, g) for g, _ in group) for pred, _ in group)
        else:
            expected += Counter(g for g, _ in group).most_common(1)[0][1]
    assert evaluation.constant_answer(samples) == pytest.approx(expected / len(samples))


@needs_shared
def test_both_vsi_bench_aggregates_on_its_records(tmp_path):
    samples = data.load_samples(SHARED / "benchmarks" / "eval_vsibench.json")
    kinds = [s.about["original_question_type"] for s in samples]
    assert len({k for k in kinds}) == 10

    def right(s):
        kind = s.about["original_question_type"]
        return kind in ("object_rel_direction_easy", "room_size_estimation")

    asked = [
        dict(
            about=s.about,
            problem_type=s.problem_type,
            answer=s.answer,
            score=float(right(s)),
            given=rewards.normalize_answer(s.answer if right(s) else "1e9", s),
        )
        for s in samples
    ]
    both = evaluation.vsi_bench(asked)
    assert both["vsi_bench_official"] == pytest.approx(
        (1 + 1 / 3) / 8
    )  # one sub-task, a third of another, of eight

    def share(kind):
        return np.mean([right(s) for s in samples if s.problem_type == kind])

    assert both["vsi_bench_video_r1"] == pytest.approx(
        (share("regression") + share("multiple choice")) / 2
    )
    assert (
        "vsi_bench_unknown" not in both
        and evaluation.vsi_bench([r | {"about": {}} for r in asked]) == {}
    )
    bad = dict(
        failure="no options",
        score=0.0,
        rounds=[],
        problem_type="multiple choice",
        about=samples[-1].about,
    )
    assert (
        evaluation.vsi_bench([*asked, bad])["vsi_bench_video_r1"] < both["vsi_bench_video_r1"]
    )  # it counts, as 0
    assert evaluation.vsi_bench(
        [*asked, dict(failure="not JSON", score=0.0, rounds=[])]
    ) == both | {"vsi_bench_unknown": 1}


def test_the_interval_the_groups_and_the_inclusive_mra_by_hand():
    assert interval(0.5, 10) == pytest.approx([0.23659, 0.76341], abs=1e-5)
    assert interval(1.0, 100) == pytest.approx([0.96301, 1.0], abs=1e-5)
    rows = [
        dict(score=s, about={"duration": d, "copy": d * 2, "url": str(i)})
        for i, (s, d) in enumerate(((1, "a"), (0, "a"), (1, "b")))
    ]
    assert by_group(rows) == {
        "duration": {"a": [0.5, 2], "b": [1.0, 1]}
    }  # not its copy, nor a url for each question
    assert (
        rewards.mean_relative_accuracy(1.5, 1.0) == 0.0
        and rewards.mean_relative_accuracy(1.5, 1.0, inclusive=True) == 0.1
    )
    sample = Sample("0", "?", [], "regression", "video", "x", "2")
    assert evaluation.score(2.5, sample) == 0.5  # evaluation and reward differ here
    assert rewards.grade(2.5, sample) == pytest.approx(0.75)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 4000])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_an_interval_stays_within_0_and_1(accuracy, n):
    low, high = interval(accuracy, n)
    assert 0 <= low < high <= 1 and (low == 0 if accuracy == 0 else high == pytest.approx(1))


@pytest.mark.parametrize(
    "values, expected",
    [
        (["a", "a", "b"], {"a": [1, 2], "b": [1, 1]}),
        (["a", "b", "c"], None),  # as many as questions: a name, no category
        (["a", "a", "a"], None),
        ([*map(str, range(30))] * 2, {str(i): [1, 2] for i in range(30)}),
        ([*map(str, range(31))] * 2, None),
        (["a", "a", None, 7, True, ["a"], {"a": 1}], {"a": [1, 2], "none": [1, 5]}),
    ],
)
def test_a_category_has_2_to_30_values_and_fewer_than_questions(values, expected):
    rows = [dict(score=1.0, failure=None, rounds=[], problem_type=v) for v in values]
    assert by_group(rows) == ({"problem_type": expected} if expected else {})


def test_a_method_that_has_shown_nothing_has_no_means():
    rows = [
        dict(
            score=0.0,
            failure="x.mp4: no such file",
            rounds=[],
            frames=0,
            pixels=0,
            visual_tokens=0,
            seconds=0.0,
        )
    ] * 2
    nothing = evaluation.summarize(rows, "greedy-4")
    names = ("mean_frames", "pixels", "mean_visual_tokens", "mean_rounds")
    assert (
        all(nothing[name] is None for name in names)
        and nothing["accuracy"] == 0
        and nothing["unreadable"] == 2
    )
    text = table({"model": "m", "data": "d", "constant_answer": 0.25, "methods": [nothing]})
    row = (
        "greedy-4         0.000  0.000 - 0.658        - x -                   -       -"
        "         2      0.0"
    )
    assert row in text
    assert (
        "Accuracy of the best constant answer to each problem type, if the right answers were "
        "known: 0.250." in text
    )


def test_methods_sort_as_a_reader_counts():
    names = ["vote-16", "greedy-16", "s2d-4-16", "greedy-8", "²", "7"]
    assert sorted(names, key=natural) == [
        "7",
        "greedy-8",
        "greedy-16",
        "s2d-4-16",
        "vote-16",
        "²",
    ]


# ---- the command


def test_a_folder_keeps_its_model_its_records_and_its_flags(tmp_path, world, cold_start, evaluate):
    """Another number of frames is another method, and other workers change no answer."""
    out = tmp_path / "out"
    evaluate(*flags(world, cold_start, out, "--frames", 4))
    (out / "vote-4.rank0.jsonl").write_text('{"record": 0}\n')
    printed = evaluate(*flags(world, cold_start, out, "--frames", 8, "--workers", 2))
    assert [m["method"] for m in summary(out)] == ["greedy-8", "greedy-4"]
    assert "greedy-4 " in printed
    assert "vote-4: has answers to 1 of 39 questions, so it is not in summary.json" in printed
    larger = flags(world, cold_start, out, "--frames", 4, "--max_pixels", 5000)
    assert "--max_pixels 5000" in evaluate(*larger, fails=True)
    assert "# weights" in evaluate(*flags(world, world / "model", out, "--frames", 4), fails=True)
    records = tmp_path / "records.json"
    records.write_text((world / "test.json").read_text())
    more = ("--frames", 4, "--media_root", world)
    command = flags(tmp_path, cold_start, tmp_path / "b", *more, records="records.json")
    evaluate(*command)
    records.write_text(json.dumps(json.loads(records.read_text())[::-1]))  # under the same name
    assert "cannot be resumed" in evaluate(*command, fails=True)


@pytest.mark.parametrize("config", [None, "", "--seed 0\n--\n"])
def test_answers_without_what_they_were_made_with_are_refused(tmp_path, world, config):
    """config.txt deleted, emptied or edited; the same weights with another chat template."""
    shutil.copytree(world / "model", tmp_path / "m")
    args = evaluation.parse_args([str(x) for x in flags(world, tmp_path / "m", tmp_path / "out")])
    with open_answers(args, tmp_path / "m"):
        pass
    (tmp_path / "out" / "greedy-16.rank0.jsonl").write_text('{"record": 0}\n')
    with open_answers(args, tmp_path / "m"):
        pass
    kept = (tmp_path / "out" / "config.txt").read_text()
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with (
        pytest.raises(SystemExit, match="cannot be resumed.* # weights"),
        open_answers(args, tmp_path / "m"),
    ):
        pass
    (tmp_path / "out" / "config.txt").unlink() if config is None else (
        tmp_path / "out" / "config.txt"
    ).write_text(config)
    with (
        pytest.raises(data.DataError, match="out/config.txt: missing, or without its line"),
        open_answers(args, tmp_path / "m"),
    ):
        pass
    (tmp_path / "out" / "config.txt").write_text(kept + "--\n\n")  # a line that is no flag
    template.write_text(template.read_text()[:-1])
    with open_answers(args, tmp_path / "m"):
        pass


def test_the_filter_overwrites_neither_the_records_nor_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.json").write_text("[]")
    (tmp_path / "link.json").symlink_to(tmp_path / "r.json")
    monkeypatch.chdir(tmp_path)
    for target, message in (
        ("r.json", "would overwrite the file of --data"),
        ("./link.json", "would overwrite the file of --data"),
        (".", "is a folder"),
    ):
        with pytest.raises(SystemExit):
            evaluation.parse_args(
                ["--model", "m", "--data", str(tmp_path / "r.json"), "--filter", target]
            )
        assert f"error: --filter {target}: {message}" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder_and_a_broken_line_is_named(
    tmp_path, world, cold_start, evaluate
):
    out = tmp_path / "out"
    command = flags(world, cold_start, out, "--frames", 4)
    evaluate(*command)
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert "other processes are writing to" in evaluate(*command, fails=True)
    (file,) = out.glob("greedy-4.*")
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text(first[:30] + "\n" + "".join(rest))
    assert "greedy-4.rank0.jsonl, line 1: not JSON" in evaluate(*command, fails=True)


@pytest.mark.parametrize("text", ['{"record": 3, "id"', "null", "[]", "{}", '{"record": [1]}', "7"])
def test_a_line_that_is_no_answer_is_named(tmp_path, text):
    (tmp_path / "greedy-4.rank0.jsonl").write_text('{"record": 0}\n' + text + "\n")
    with pytest.raises(
        data.DataError, match="greedy-4.rank0.jsonl, line 2: not JSON with the number of a 'record'"
    ):
        read_answers(tmp_path, "greedy-4")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(score=None), "'score' is null, expected a whole number or a number"),
        (dict(score="1.0"), "'score' is \"1.0\", expected a whole number or a number"),
        (dict(score=5.0), "'score' is 5.0, expected a number from 0 to 1"),
        (dict(score=float("nan")), "'score' is nan, expected a number from 0 to 1"),
        (dict(record="0"), "not JSON with the number of a 'record'"),
        (dict(rounds=None), "'rounds' is null, expected a list of an object"),
        (dict(rounds=[3]), r"'rounds' is \[3\], expected a list of an object"),
        (dict(rounds=[{}]), "'path' is null, expected text"),
        (dict(failure=7), "'failure' is 7, expected text or null"),
        (dict(about=None), "'about' is null, expected an object"),
    ],
)
def test_an_answer_that_was_edited_is_named_by_eval_and_report(tmp_path, change, message):
    whole = dict(record=0, score=0.0, failure="a.mp4: no such file", rounds=[], about={})
    (tmp_path / "greedy-4.rank0.jsonl").write_text(
        json.dumps(whole) + "\n" + json.dumps(whole | {"record": 1} | change) + "\n"
    )
    with pytest.raises(data.DataError, match=f"greedy-4.rank0.jsonl, line 2: {message}"):
        read_answers(tmp_path, "greedy-4")
    with pytest.raises(data.DataError, match="greedy-4.rank0.jsonl, line 2: '"):
        report.page(tmp_path)


def test_a_record_of_a_segment_is_shown_that_segment(tmp_path, world):
    """MVBench: `start` and `end` in seconds, of a video and of a folder of frames."""
    sample = next(
        s for s in data.load_samples(world / "train.json") if s.data_type == "video"
    )  # 16 frames, 8 seconds
    whole = data.load_media(sample, min_pixels=784)
    part = data.load_media(dataclasses.replace(sample, segment=(2.0, 6.0)), min_pixels=784)
    assert (
        torch.equal(part.frames, whole.frames[4:12])
        and part.seconds_per_grid == 1.0
        and part.available == 8
    )
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(whole.frames):
        Image.fromarray(frame.numpy().transpose(1, 2, 0)).save(tmp_path / "clip" / f"{i}.png")
    record = json.loads((world / "train.json").read_text())[0]
    (tmp_path / "r.json").write_text(
        json.dumps([record | dict(path="clip", data_type="frame", fps=2, start=2, end=6.0)])
    )
    (folder,) = data.load_samples(tmp_path / "r.json")
    assert torch.equal(data.load_media(folder, min_pixels=784).frames, whole.frames[4:12])
    (tmp_path / "r.json").write_text(json.dumps([record | dict(start=5, end=5)]))
    with pytest.raises(data.DataError, match="a segment from 5 to 5 seconds"):
        data.load_samples(tmp_path / "r.json")


def test_the_toy_has_its_own_defaults(tmp_path, monkeypatch, evaluate):
    root = tmp_path / "out" / "toy"
    (root / "grpo").mkdir(parents=True)
    (root / "world").mkdir()
    record = {"problem": "How many?", "problem_type": "numerical", "solution": "1"}
    record["image"] = "test.json"  # any file that is there
    (root / "world" / "test.json").write_text(json.dumps([record]))
    monkeypatch.chdir(tmp_path)
    assert "--cap" not in evaluate("--tts", "--cap", 8, fails=True)
    assert "--cap 2: expected at least 4, even" in evaluate("--tts", "--cap", 2, fails=True)
    assert "out/toy/grpo: no config.json" in evaluate("--tts", "--m", 3, fails=True)  # not --model
    names = [method.name for method in evaluation.methods_of(evaluation.toy_args(["--tts"], 0))]
    frames = (4, 8, 16)
    expected = [*(f"greedy-{n}" for n in frames), *(f"vote-{n}" for n in frames), "s2d-4-16"]
    assert names == expected
    (method,) = evaluation.methods_of(evaluation.toy_args([], 0))
    assert method.name == "greedy-16"


@pytest.mark.parametrize("m, temperature", [(1, 0.0), (2, 0.7)])
def test_a_single_response_is_greedy(m, temperature):
    args = f"--model m --data d --tts --compare --m {m} --temperature 0.7".split()
    found = {
        method.name: method.temperature
        for method in evaluation.methods_of(evaluation.parse_args(args))
    }
    assert found["s2d-32-128"] == found["vote-64"] == temperature and found["greedy-64"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "./nowhere"], "no such model folder"),
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--frames", "5"], "--frames 5: expected at least 2, even"),
        (["--tts", "--start", "64", "--cap", "32"], "--cap 32: expected at least 64, even"),
        (["--temperature", "0"], "--temperature 0.0: expected at least 1e-6"),
        (["--tts", "--comp"], "unrecognized arguments: --comp"),
        (["--compare"], "--compare: expected with --tts"),
        (["--tts", "--frames", "8"], "--frames 8: expected without --tts, which has --start and"),
    ],
)
def test_bad_flags_end_with_one_clear_line(tmp_path, world, cold_start, evaluate, change, message):
    assert message in evaluate(*flags(world, cold_start, tmp_path / "a"), *change, fails=True)


def test_the_flags_of_a_folder_are_a_flag_file(tmp_path, world):
    """--frames is not among those of a search, which refuses it."""
    flags_of_a_search = [
        "--model",
        str(world / "model"),
        "--data",
        str(world / "test.json"),
        "--tts",
    ]
    args = evaluation.parse_args([*flags_of_a_search, "--out", str(tmp_path / "out")])
    with open_answers(args, world / "model") as out:
        assert evaluation.parse_args([f"@{out}/config.txt"]) == args


def test_without_a_trained_toy_the_default_says_what_to_do(tmp_path, monkeypatch, evaluate):
    monkeypatch.chdir(tmp_path)
    assert "train the toy with `python train.py` first" in evaluate("--tts", fails=True)


def test_the_filter_keeps_what_is_neither_always_right_nor_always_wrong(
    tmp_path, world, cold_start, evaluate
):
    """The records as they were, with their rates; the same after a kill, and as .jsonl."""
    out, kept = tmp_path / "out", tmp_path / "kept.json"
    command = flags(world, cold_start, out, "--frames", 16, "--m", 4, records="train.json")
    printed = evaluate(*command, "--filter", kept)
    source = json.loads((world / "train.json").read_text())
    rates = {
        r["record"]: np.mean(
            [v == r["answer"] or str(v) == f"{r['answer']}.0" for v in r["rounds"][0]["votes"]]
        )
        for r in lines(out, "vote-16")
    }
    expected = [source[i] | {"pass_rate": rates[i]} for i in sorted(rates) if 0 < rates[i] < 1]
    assert json.loads(kept.read_text()) == expected and 0 < len(expected) < len(source)
    always = sum(rate == 1 for rate in rates.values())
    assert f"{len(expected)} of {len(source)} records kept; always right: {always}" in printed
    (file,) = out.glob("vote-16.*")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:20]))
    evaluate(*command, "--filter", tmp_path / "kept.jsonl")
    assert [json.loads(x) for x in (tmp_path / "kept.jsonl").read_text().splitlines()] == expected
    assert len(data.load_samples(kept, media_root=world)) == len(expected)
