"""The page of a run: what it shows, what it survives, its size, and what a browser draws."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
import report
import rewards
import toy
from browser import Browser
from conftest import SHARED, needs_shared, run

HOSTILE = (
    """</script><img src=x onerror="document.title='owned'"> & <b>'bold'</b> <!-- \u2028 \ud800"""
)


def write_lines(path, lines, end=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def blob(text):
    """The data that a page holds."""
    return json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


def pixels(sheet):
    """The frames of a contact sheet, uint8 (n, H, W, 3)."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet["jpeg"]))))
    return image.reshape(sheet["height"], len(sheet["at"]), sheet["width"], 3).swapaxes(0, 1)


# ---- an evaluation


def draw(frames, *votes, **more):
    """A round; a vote of None has no valid answer."""
    n = len(votes)
    responses = [f"<think>so &amp; so</think>\n<answer>{v}</answer>" for v in votes]
    numbers = dict(
        frames=frames,
        visual_tokens=frames // 2,
        seconds=0.5,
        tokens=[15] * n,
        truncated=[v is None for v in votes],
    )
    return (
        dict(votes=list(votes), logps=[-0.25 - k for k in range(n)], responses=responses, **numbers)
        | more
    )


def line(record, sample, given, *rounds, failure=None, **more):
    return {
        "record": record,
        "id": sample.id,
        "path": sample.path,
        "data_type": sample.data_type,
        "fps": sample.fps,
        "problem_type": sample.problem_type,
        "question": sample.question,
        "options": sample.options,
        "about": sample.about,
        "answer": sample.answer,
        "gold": rewards.normalize_answer(sample.answer, sample),
        "given": given,
        "score": float(given == sample.answer),
        "failure": failure,
        "frames": rounds[-1]["frames"] if rounds else 0,
        "pixels": 784,
        "visual_tokens": sum(r["visual_tokens"] for r in rounds),
        "seconds": sum(r["seconds"] for r in rounds),
        "rounds": list(rounds),
    } | more


@pytest.fixture(scope="module")
def samples(world):
    return [
        s for s in data.load_samples(world / "train.json") if s.data_type == "video" and s.options
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, samples):
    """An evaluation by two methods, s2d on two ranks: right at once, wrong after two rounds, no
    valid answer, a video that is gone, a hostile record, one that could not be read."""
    out = tmp_path_factory.mktemp("answers")
    wrong = next(x for x in "ABCD" if x != samples[1].answer)
    lines = [
        line(0, samples[0], samples[0].answer, draw(4, *[samples[0].answer] * 3)),
        line(
            1,
            samples[1],
            wrong,
            draw(4, wrong, None, samples[1].answer),
            draw(8, wrong, wrong, samples[1].answer),
        ),
        line(
            2,
            samples[2],
            None,
            draw(4, None, None),
            draw(16, None, None),
            failure="no valid answer",
        ),
        line(3, samples[3], samples[3].answer, draw(4, samples[3].answer), path="/nowhere/x.mp4"),
        line(
            4,
            samples[4],
            None,
            failure=f"record 4: {HOSTILE}",
            question=HOSTILE,
            options=[f"A. {HOSTILE}", "B. <hr>"],
            answer="A",
        ),
        dict(record=5, score=0.0, failure="f.json, record 5: no 'solution'", rounds=[]),
    ]
    write_lines(out / "s2d-4-16.rank0.jsonl", lines[::2])
    write_lines(out / "s2d-4-16.rank1.jsonl", lines[1::2], end='{"record": 7, "id": "7", "sco')
    write_lines(
        out / "greedy-4.rank0.jsonl",
        [line(i, s, s.answer, draw(4, s.answer)) for i, s in enumerate(samples[:4])],
    )
    methods = [{"method": "s2d-4-16"}, {"method": "greedy-4"}]
    summary = {"model": "m", "data": "d.json", "constant_answer": 0.25, "methods": methods}
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "config.txt").write_text("--model m\n--tts\n--data 'd & <i>.json'\n")
    return out


@pytest.fixture(scope="module")
def answers_page(answers):
    printed = run("report.py", answers)
    assert f"{answers}/report.html: 0.1 MB" in printed
    return answers / "report.html"


def test_an_evaluations_page_holds_its_methods_questions_and_rounds(answers_page, samples):
    shown = blob(answers_page.read_text())["evaluation"]
    s2d, greedy = shown["methods"]
    assert (s2d["method"], s2d["questions"], s2d["failures"], greedy["method"]) == (
        "s2d-4-16",
        6,
        3,
        "greedy-4",
    )
    assert s2d["accuracy"] == pytest.approx(2 / 6) and greedy["accuracy"] == 1.0
    assert [r["record"] for r in s2d["results"]] == [0, 1, 2, 3, 4, 5]
    assert (
        shown["questions"]["1"]["question"] == samples[1].question
        and shown["constant_answer"] == 0.25
    )
    assert [part["frames"] for part in s2d["results"][1]["rounds"]] == [4, 8]
    assert s2d["results"][5]["rounds"] == [] and "no 'solution'" in s2d["results"][5]["failure"]


def test_frames_are_those_that_were_shown_once_for_all_methods(answers_page, samples):
    page = blob(answers_page.read_text())
    s2d, greedy = (m["results"] for m in page["evaluation"]["methods"])
    numbers = [part["sheet"] for part in s2d[1]["rounds"]]
    assert greedy[1]["rounds"][0]["sheet"] == numbers[0] != numbers[1]
    for number, n in zip(numbers, (4, 8)):
        sheet = page["sheets"][number]
        assert (sheet["of"], sheet["at"], sheet["seconds"]) == (n, list(range(n)), 8.0)
        truth = data.load_media(
            samples[1], fps=float("inf"), min_frames=n, max_frames=n, min_pixels=784
        ).frames
        assert (
            np.abs(pixels(sheet).astype(int) - truth.permute(0, 2, 3, 1).numpy()).mean() < 3
        )  # JPEG
    assert page["sheets"][s2d[3]["rounds"][0]["sheet"]]["error"] == "/nowhere/x.mp4: no such file"


def test_the_page_holds_nothing_from_elsewhere_and_hostile_text_stays_text(answers_page):
    text = answers_page.read_text()
    assert text.count("</script>") == 2 and "<img" not in text and "</script><img" not in text
    assert not re.search(r'(src|href)="?https?:|@import|url\((?!data:image/jpeg|\$)', text)
    assert blob(text)["evaluation"]["questions"]["4"]["question"] == HOSTILE.replace("\ud800", "?")


def test_an_unfinished_evaluation_has_a_page(tmp_path, samples):
    """No summary yet, the empty file of a rank that has just begun, NaN, a line cut by a kill."""
    cut = json.dumps(line(9, samples[0], "A"))[:40]
    write_lines(
        tmp_path / "vote-4.rank0.jsonl",
        [line(0, samples[0], samples[0].answer, draw(4, "A", logps=[float("nan")]))],
        end=cut,
    )
    (tmp_path / "vote-4.rank1.jsonl").write_text("")
    (tmp_path / "vote-8.rank0.jsonl").write_text(cut + "\n" + cut)
    page = blob(report.page(tmp_path))
    (method,) = page["evaluation"]["methods"]
    assert (method["method"], method["questions"], method["accuracy"]) == ("vote-4", 1, 1.0)
    assert method["results"][0]["rounds"][0]["logps"] == [None]
    assert any("No summary.json yet" in note for note in page["notes"])
    assert [note for note in page["notes"] if "vote" in note] == [
        "vote-8.rank0.jsonl: 1 lines that cannot be read are left out"
    ]


@pytest.mark.slow
def test_500_questions_stay_within_the_budget(tmp_path):
    """Noise, the worst case for JPEG; responses of 3,000 characters; three rounds each."""
    rng = np.random.default_rng(0)
    for k in range(30):
        toy.write_y4m(
            tmp_path / f"{k}.y4m", rng.integers(0, 256, (16, 112, 112, 3), np.uint8), fps=4
        )
    for k in range(60):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)).save(
            tmp_path / f"{k}.png", compress_level=0
        )
    long = "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 3000)))  # three bytes a character
    lines = []
    for i in range(500):
        name, kind = (f"{i // 2 % 60}.png", "image") if i % 2 else (f"{i // 2 % 30}.y4m", "video")
        sample = data.Sample(
            str(i),
            "What?",
            ["A. x", "B. y"],
            "multiple choice",
            kind,
            str(tmp_path / name),
            "B",
            about={"k": "v"},
        )
        rounds = [
            draw(n if kind == "video" else 1, *"AAAAB", responses=[long] * 5) for n in (8, 12, 16)
        ]
        lines.append(line(i, sample, "A", *rounds))
    write_lines(tmp_path / "s2d-8-16.rank0.jsonl", lines)
    began = time.monotonic()
    text = report.page(tmp_path)
    page = blob(text)
    images = sum(len(sheet["jpeg"]) for sheet in page["sheets"])
    responses = [
        x
        for r in page["evaluation"]["methods"][0]["results"]
        for part in r["rounds"]
        for x in part["responses"]
    ]
    total = sum(len(x.encode()) for x in responses)
    assert len(page["sheets"]) == 150 and all(sheet["jpeg"] for sheet in page["sheets"])
    assert 0.6 * report.IMAGES < images <= report.IMAGES and len(text.encode()) < 10e6
    assert len(responses) == 7500 and 0.8 * report.TEXT < total < 1.1 * report.TEXT
    assert any("without their middle" in note for note in page["notes"])
    assert responses[0][0] == long[0] and responses[0][-1] == long[-1] and "[...]" in responses[0]
    assert time.monotonic() - began < 60


def test_beyond_500_questions_frames_are_for_what_went_wrong(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(report, "QUESTIONS", 2)
    right = [line(i, s, s.answer, draw(4, s.answer)) for i, s in enumerate(samples[:4])]
    write_lines(tmp_path / "greedy-4.rank0.jsonl", [*right, line(4, samples[4], "Z", draw(4, "Z"))])
    page = blob(report.page(tmp_path))
    results = page["evaluation"]["methods"][0]["results"]
    assert [r["record"] for r in results if "sheet" in r["rounds"][0]] == [0, 4]
    assert any("Frames of 2 of the 5 questions" in note for note in page["notes"])


@needs_shared
def test_real_videos(tmp_path):
    lines = []
    for i, (name, n) in enumerate(
        (
            ("video_r1_example.mp4", 64),
            ("video_90.mov", 8),
            ("corrupted.mp4", 8),
            ("coco_580957.jpg", 1),
        )
    ):
        kind = "image" if name.endswith("jpg") else "video"
        sample = data.Sample(str(i), "?", [], "free-form", kind, str(SHARED / "media" / name), "x")
        lines.append(line(i, sample, "y", draw(n, "y")))
    write_lines(tmp_path / "greedy-64.rank0.jsonl", lines)
    example, rotated, corrupted, image = blob(report.page(tmp_path))["sheets"]
    assert (
        example["of"] == 64
        and len(example["at"]) == 16
        and example["at"][-1] == 63
        and example["seconds"] > 10
    )
    assert rotated["height"] > rotated["width"] and rotated["of"] == 2
    assert (
        "corrupted.mp4: cannot be decoded" in corrupted["error"]
        and image["of"] == 1
        and image["jpeg"]
    )


# ---- a training run


def group(step, sample, accuracies, **more):
    """The lines of samples.jsonl of one prompt; advantages are the accuracies less 0.25."""
    about = {
        key: getattr(sample, key)
        for key in ("id", "path", "data_type", "fps", "segment", "question", "answer")
    }
    parts = [
        dict(
            reward=1 + a,
            accuracy=a,
            format=1.0,
            length_bonus=0.0,
            temporal_bonus=0.3,
            advantage=a - 0.25,
        )
        for a in accuracies
    ]
    return [
        dict(step=step, **about, response=f"{step}.{k} {HOSTILE}", **p) | more
        for k, p in enumerate(parts)
    ]


@pytest.fixture(scope="module")
def training(tmp_path_factory, world, samples):
    """A run of 30 steps: evaluated at 0 and 30, nothing loaded at 7, a half-written last line."""
    out = tmp_path_factory.mktemp("training")
    log = [
        dict(
            step=0, eval_accuracy=0.2, eval_questions=50, eval_failures=0, seconds={"evaluate": 2.0}
        )
    ]
    for i in range(1, 31):
        seconds = {"data": 0.1, "train": 1.0, "step": 2.0}
        log.append(
            dict(
                step=i,
                accuracy=i / 30,
                reward=1 + i / 30,
                kl=0.0,
                loss=None if i == 3 else 1 / i**3,
                grad_norm=1.0 + i % 3,
            )
        )
        log[-1] |= dict(skipped_samples=0, skipped_update=False, seconds=seconds)
    log[7] = dict(
        step=7, skipped_update=True, skipped_samples=4, seconds={"data": 0.1, "step": 0.1}
    )
    log[30] |= dict(eval_accuracy=0.9, eval_questions=50, eval_failures=1)
    for entry, by in (
        (log[0], {"flash": 0.1, "place": 0.3}),
        (log[30], {"flash": 0.85, "place": 0.95}),
    ):
        entry["eval_by_source"] = by
    write_lines(out / "log.jsonl", log, end='{"step": 31, "rew')
    sampled = []
    for i in range(1, 31):
        for position in (0, 3):
            about = dict(position=position, options=samples[i % len(samples)].options)
            accuracies = (
                (1.0, 1.0, 1.0, 1.0)
                if position == 0
                else (0.0, 1.0, 0.0, 0.0)
                if i % 10
                else (0.0, 0.0, 0.0, 0.0)
            )
            more = {}
            if (i, position) == (30, 0):
                more = dict(orders=[[1, 0, 3, 2]], shuffled_accuracies=[0.0, 1.0])
            if (i, position) == (30, 3):
                more = dict(orders=[[3, 2, 1, 0]], probability_drops=[0.5, -0.25])
            sampled += group(i, samples[i % len(samples)], accuracies, **about, **more)
    write_lines(out / "samples.jsonl", sampled)
    (out / "config.txt").write_text(
        "--algo tgrpo\n--steps 40\n--fps 2.0\n--min_frames 4\n--max_frames 8\n--train_vision\n"
    )
    return out


@pytest.fixture(scope="module")
def training_page(training):
    report.main([str(training), "--out", str(training / "page.html")])
    return training / "page.html"


def test_a_training_runs_figures_curves_and_samples(training_page, samples):
    page = blob(training_page.read_text())
    figures = {name: (value, what) for name, value, what in page["training"]["figures"]}
    assert figures["steps"] == ("30", "of 40")
    first, last = (sum(x for x in range(1, 12) if x != 7) / 300, sum(range(21, 31)) / 300)
    assert figures["training accuracy"] == (
        f"{first:.3f} → {last:.3f}",
        "means of the first and last 10 steps",
    )
    assert figures["held-out accuracy"] == (
        "0.200 → 0.900",
        "steps 0 and 30; 50 questions, 1 failed",
    )
    assert figures["skipped samples"] == ("4", "could not be loaded")
    assert figures["steps without an update"] == ("1", "of 30")
    assert figures["time"] == ("58.1 s", "and 2.0 s of evaluations")
    curves = page["training"]["curves"]
    assert (
        curves["eval_by_source.flash"] == [[0, 30], [0.1, 0.85]] and curves["kl"][1] == [0.0] * 29
    )
    assert (
        3 not in curves["loss"][0]
        and 7 not in curves["accuracy"][0]
        and 31 not in curves["reward"][0]
    )
    assert page["algo"] == "tgrpo"


def test_a_group_is_one_card_with_all_its_responses(training_page, samples):
    page = blob(training_page.read_text())
    shown, sample = page["training"]["groups"], samples[30 % len(samples)]
    assert [(g["step"], g["position"], g["kind"]) for g in shown[:3]] == [
        (30, 0, "right"),
        (30, 3, "wrong"),
        (29, 0, "right"),
    ]
    assert (
        len(shown) == 60
        and [g["kind"] for g in shown].count("mixed") == 27
        and page["training"]["left_out"] == 0
    )
    assert shown[0]["responses"] == [f"30.{k} " + HOSTILE.replace("\ud800", "?") for k in range(4)]
    assert (shown[0]["id"], shown[0]["options"], shown[0]["gold"]) == (
        sample.id,
        sample.options,
        sample.answer,
    )
    names = "reward", "accuracy", "format", "length_bonus", "temporal_bonus", "advantage"
    assert shown[0]["numbers"] == [dict(zip(names, (2.0, 1.0, 1.0, 0.0, 0.3, 0.75)))] * 4
    assert page["sheets"][shown[0]["sheet"]]["of"] == 8
    assert shown[0]["shuffled_accuracies"] == [0.0, 1.0]
    assert shown[1]["probability_drops"] == [0.5, -0.25] and "orders" not in shown[2]


def test_the_newest_groups_of_each_kind_are_shown(tmp_path, monkeypatch, samples):
    monkeypatch.setattr(report, "GROUPS", 2)
    (tmp_path / "log.jsonl").write_text("")
    mixed, right = (0.0, 1.0), (1.0, 1.0)
    kinds = [mixed, right, right, right, mixed]
    write_lines(
        tmp_path / "samples.jsonl",
        [x for i, a in enumerate(kinds) for x in group(i, samples[0], a, position=0)],
    )
    training = blob(report.page(tmp_path))["training"]
    assert [g["step"] for g in training["groups"]] == [4, 3, 2, 0] and training["left_out"] == 1


def test_samples_of_the_older_form(tmp_path, samples):
    """No position, no options, no advantage; two responses to each of two prompts a step."""
    (tmp_path / "log.jsonl").write_text("")
    lines = [x for i in (1, 2) for s in samples[:2] for x in group(i, s, (1.0, 0.0))]
    write_lines(
        tmp_path / "samples.jsonl",
        [{k: v for k, v in x.items() if k != "advantage"} for x in lines],
    )
    found = blob(report.page(tmp_path))["training"]["groups"]
    assert [(g["step"], g["id"], len(g["responses"])) for g in found] == [
        (i, s.id, 2) for i in (2, 1) for s in samples[:2]
    ]
    assert (
        found[0]["options"] == []
        and found[0]["gold"] is None
        and "advantage" not in found[0]["numbers"][0]
    )


def test_what_was_not_computed_is_no_0(tmp_path):
    """Step 2 had no gradient, step 3 one that was not finite. Skipped samples are not logged."""
    idle = dict(
        step=2, skipped_update=True, grad_norm=0.0, loss=0.0, kl=0.0, entropy=0.07, reward=0.0
    )
    taught, broken = (
        idle | dict(step=1, skipped_update=False, grad_norm=1.0),
        idle | dict(step=3, grad_norm=None, loss=0.25),
    )
    write_lines(tmp_path / "log.jsonl", [taught, idle, broken])
    training = blob(report.page(tmp_path))["training"]
    assert training["figures"][1:] == [
        ["training loss", "0.125 → 0.125", "means of the first and last 2 steps"],
        ["steps without an update", "2", "of 3"],
    ]
    steps = {key: steps for key, (steps, _) in training["curves"].items()}
    assert (steps["grad_norm"], steps["loss"], steps["kl"]) == ([1], [1, 3], [1, 3])
    assert steps["entropy"] == steps["reward"] == steps["skipped_update"] == [1, 2, 3]


def test_a_supervised_run_and_one_that_has_just_begun(tmp_path):
    write_lines(
        tmp_path / "log.jsonl", [dict(step=i, loss=2.0 / i, seconds={"step": 1.0}) for i in (1, 2)]
    )
    page = blob(report.page(tmp_path))
    assert page["training"]["figures"][1] == [
        "training loss",
        "1.500 → 1.500",
        "means of the first and last 2 steps",
    ]
    assert page["training"]["groups"] == [] and page["sheets"] == []
    (tmp_path / "log.jsonl").write_text("")
    assert blob(report.page(tmp_path))["training"]["figures"][0] == ["steps", "0", "of ?"]


def test_errors_are_one_line(tmp_path):
    with pytest.raises(SystemExit) as missing:
        report.main([str(tmp_path / "nowhere")])
    assert str(missing.value) == f"error: {tmp_path}/nowhere: no such folder"
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        SystemExit,
        match="error: .*: neither a training log .log.jsonl. nor answers of an evaluation",
    ):
        report.main([str(tmp_path)])
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(SystemExit, match="error: .*/no/such/page.html"):
        report.main([str(tmp_path), "--out", str(tmp_path / "no/such/page.html")])


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.txt", b'--model "x\n', "config.txt, line 1: cannot be read: No closing quotation"),
        ("config.txt", b"--fps abc\n", "config.txt: --fps abc: expected a number"),
        ("config.txt", "--fps 2\n".encode("utf-16"), "config.txt: not UTF-8 text"),
        (
            "log.jsonl",
            b'{"step": 1}\n{"step": 2, "loss": 1e999}\n',
            "log.jsonl, line 2: holds the number 1e999, expected",
        ),
        (
            "log.jsonl",
            b'{"step": "1"}\n',
            "log.jsonl, line 1: 'step' is \"1\", expected a whole number",
        ),
        (
            "samples.jsonl",
            b'{"step": null, "response": "a"}\n',
            "samples.jsonl, line 1: 'step' is null, expected a whole",
        ),
        (
            "samples.jsonl",
            b'{"step": 1, "response": 3}\n',
            "samples.jsonl, line 1: 'response' is 3, expected text",
        ),
    ],
)
def test_a_file_that_was_edited_is_named_with_its_line(tmp_path, file, content, message):
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/{message}"):
        report.main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_no_decoder_is_left_behind(answers):
    """The pool's threads own decoder processes; these end with the threads."""

    def decoders():
        ps = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,args="],
            capture_output=True,
            text=True,
        ).stdout
        return {
            row.split()[0] for row in ps.splitlines() if "infra.video" in row and " Z" not in row
        }

    before = decoders()
    report.page(answers)
    deadline = time.monotonic() + 10
    while (left := decoders() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


# ---- alarms, and a run that goes on


def steps(n, **figures):
    """Lines of log.jsonl, of steps that have nothing to complain of but these figures."""
    fine = dict(zero_std_groups=0.5, truncated=0.1, entropy=0.2, mismatch=1e-6)
    return [dict(step=i, **fine | figures) for i in range(1, n + 1)]


@pytest.mark.parametrize(
    "figures, expected",
    [
        ({}, []),
        (dict(zero_std_groups=1), ["no group teaches"]),
        (dict(zero_std_groups=0.99), []),
        (dict(truncated=0.51), ["truncated"]),
        (dict(truncated=0.5), []),
        (dict(entropy=0.004), ["entropy gone"]),
        (dict(entropy=0.006), []),
        (dict(mismatch=0.06), ["mismatch"]),
        (dict(mismatch=0.05), []),
        (dict(zero_std_groups=1, truncated=1), ["no group teaches", "truncated"]),
    ],
)
def test_alarms(figures, expected):
    """Means of the last 10 steps; of fewer than 3 steps there is none."""
    assert list(report.alarms(steps(12, **figures))) == expected
    assert report.alarms(steps(2, **figures)) == {}
    assert report.alarms(steps(2, **figures) + steps(10)) == {}  # it has recovered
    assert report.alarms([dict(step=0, eval_accuracy=0.5), dict(step=1, loss=None)]) == {}


def test_an_alarm_says_what_it_saw():
    found = report.alarms(steps(4, truncated=0.625, entropy=0.001))
    assert found == {
        "truncated": "62% of the responses were cut off at --max_new (last 4 steps)",
        "entropy gone": "0.0010 nats a token: all responses are alike (last 4 steps)",
    }


def test_a_run_is_watched_until_it_is_finished(tmp_path, capsys):
    """The first page reloads itself; the last one, of the finished run, does not."""
    log, out = tmp_path / "log.jsonl", tmp_path / "report.html"
    (tmp_path / "config.txt").write_text("--steps 13\n--reward a.py:score=0.5 b.py:short\n")
    write_lines(log, steps(3, zero_std_groups=1))
    pages = []

    def go_on():  # once there is a page
        pages.append(blob(out.read_text()))
        write_lines(log, steps(3, zero_std_groups=1) + steps(13)[3:])

    report.watch(tmp_path, out, 0.05, go_on)
    (first,), last = pages, blob(out.read_text())
    assert (first["every"], first["training"]["figures"][0][:2]) == (0.05, ["steps", "3"])
    assert list(first["training"]["alarms"]) == ["no group teaches"]
    assert (last["every"], last["training"]["figures"][0][:2]) == (None, ["steps", "13"])
    assert last["training"]["own"] == ["score", "short"] and last["training"]["alarms"] == {}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: redrawn every 0.05 s while the run goes on; ctrl-C ends"
    assert said[1].startswith("alarm: no group teaches: no group had") and said[2:] == [
        "over: no group teaches"
    ]


def test_ctrl_c_ends_the_watch_with_a_page_that_stands_still(tmp_path, monkeypatch):
    def ctrl_c(seconds):
        assert blob((tmp_path / "report.html").read_text())["every"] == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", ctrl_c)
    write_lines(tmp_path / "log.jsonl", steps(3))
    report.main([str(tmp_path), "--watch", "--every", "3"])
    assert blob((tmp_path / "report.html").read_text())["every"] is None


def test_frames_that_were_read_are_not_read_again(tmp_path, monkeypatch, samples):
    """The second page is the same, without its media; frames of what is gone are forgotten."""
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.txt").write_text("--fps 2.0\n--min_frames 4\n--max_frames 8\n")
    two = list({s.path: s for s in samples}.values())[:2]
    lines = [x for i, s in enumerate(two) for x in group(i, s, (1.0, 0.0), position=0)]
    write_lines(tmp_path / "samples.jsonl", lines)
    known = {}
    first = report.contents(tmp_path, known=known)["sheets"]
    assert len(known) == 2 and all(sheet["jpeg"] for sheet in first)
    monkeypatch.setattr(report, "load_media", None)
    assert report.contents(tmp_path, known=known)["sheets"] == first
    write_lines(tmp_path / "samples.jsonl", lines[:2])
    assert len(report.contents(tmp_path, known=known)["sheets"]) == len(known) == 1


# ---- in a browser

chromium = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(chromium is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(page, address, script) -> the DOM as text after the script, no console errors."""
    folder = tmp_path_factory.mktemp("browser")
    browser = Browser(chromium, folder / "profile")

    def dom(page, address="", script=""):
        copy = folder / "page.html"
        text = page.read_text() if hasattr(page, "read_text") else page
        copy.write_text(
            text + (f"<script>setTimeout(() => {{ {script} }}, 100)</script>" if script else "")
        )
        found, said = browser.dom(f"file://{copy}#{address}")
        if said:
            raise AssertionError("\n".join(said))
        return found.split('<script type="application/json">')[0]

    yield dom
    browser.close()


def click(condition):
    """A script that presses the first button whose text fulfils a condition."""
    buttons = "[...document.querySelectorAll('button')]"
    return f"{buttons}.find((b) => b.textContent.{condition}).click();"


def articles(dom):
    """The cards of a DOM -> [(verdict, text)]."""
    found = re.findall(r'<article class="card (\w+)".*?</article>', dom, re.DOTALL)
    texts = re.findall(r'<article class="card \w+".*?</article>', dom, re.DOTALL)
    return [(kind, html.unescape(re.sub(r"<[^>]+>", "", text))) for kind, text in zip(found, texts)]


@needs_chromium
def test_the_browser_test_sees_errors(browse):
    with pytest.raises(AssertionError, match="Uncaught"):
        browse("<!doctype html><title>x</title>", script="throw new Error('on purpose')")


@needs_chromium
def test_the_page_may_load_nothing(browse, answers_page):
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browse(answers_page, script="new Image().src = 'https://example.invalid/x.png'")


@needs_chromium
def test_an_evaluation_in_the_browser(browse, answers_page, samples):
    everything = articles(browse(answers_page))
    assert [kind for kind, _ in everything] == [
        "right",
        "wrong",
        "failed",
        "right",
        "failed",
        "failed",
    ]
    ((kind, text),) = articles(browse(answers_page, "show=wrong"))
    wrong, gold = next(x for x in "ABCD" if x != samples[1].answer), samples[1].answer
    assert kind == "wrong" and "✗ wrong" in text and samples[1].question in text
    assert (
        f"{wrong} × 1" in text
        and f"{wrong} × 2" in text
        and f"{gold} × 1 ✓" in text
        and "no valid answer × 1" in text
    )
    assert (
        "4 of 4 frames" in text
        and "8 of 8 frames" in text
        and "round 2: 8 frames, 4 visual tokens, 0.50 s" in text
    )
    assert (
        re.search(r"✓ right answer(?!.*✓ right answer).*round 1", text, re.DOTALL)
        and text.count("✗ given") == 1
    )
    assert (
        "3 responses" in text and "<think>so &amp; so</think>" in text
    )  # as the model wrote it, not as HTML
    failed = articles(browse(answers_page, "method=s2d-4-16&show=failed"))
    assert [re.search(r"record (\d)", text)[1] for _, text in failed] == ["2", "4", "5"]
    hostile = HOSTILE.replace("\ud800", "?")
    assert (
        failed[1][1].count(hostile) == 3 and f"! record 4: {hostile}" in failed[1][1]
    )  # question, option, failure
    assert (
        "could not be read" in failed[2][1] and "! f.json, record 5: no 'solution'" in failed[2][1]
    )
    assert "! no valid answer" in failed[0][1]


# options, the record's answer, its gold ("old": a line without one), given, score, right, wrong
GOLDS = [
    (["A. left", "B. right"], "B.", "B", "B", 1.0, "B. right", None),
    (["A. left", "B. right"], "(B)", "B", "A", 0.0, "B. right", "A. left"),
    (["A. left", "B. right"], "B. right", "B", None, 0.0, "B. right", None),
    (["A) left", "(B) right"], "b", "B", "B", 1.0, "(B) right", None),
    (["A. left", "B. right"], "B.", "old", "B", 1.0, "B. right", None),
    (["A. left", "B. right"], "(B)", "old", "A", 0.0, "B. right", "A. left"),
    ([], "3.0 ", 3.0, 3.0, 1.0, "3 × 1 ✓", None),
    ([], "1,000", 1000.0, 999.0, 0.0, None, None),
    ([], "5", "old", 5.0, 1.0, "5 × 1 ✓", None),
    ([], "a red car", "a red car", "a red van", 0.6, "a red van × 1 ✓", None),
    ([], "A Red Car", "A Red Car", "a red car", 0.3, None, None),
]


@needs_chromium
def test_right_is_what_scores_and_equals_the_normalised_gold(browse, tmp_path):
    rows = []
    for i, (options, answer, gold, given, score, *_) in enumerate(GOLDS):
        sample = data.Sample(str(i), "?", options, "free-form", "video", "/x.mp4", answer)
        failure = "no valid answer" if given is None else None
        rows.append(line(i, sample, given, draw(4, given), failure=failure, score=score, gold=gold))
        if gold == "old":
            del rows[-1]["gold"]
    write_lines(tmp_path / "greedy-4.rank0.jsonl", rows)
    text = browse(report.page(tmp_path))
    found = re.findall(r"<article.*?</article>", text, re.DOTALL)
    marked = [
        {
            kind: re.findall(rf'<li class="{kind}">(.*?) ?<small>', card)
            for kind in ("right", "wrong")
        }
        for card in found
    ]
    chips = [
        re.findall(r'<span class="chip right"[^>]*><b>(.*?)</b>(.*?)</span>', card)
        for card in found
    ]
    for (options, answer, gold, given, _, right, wrong), mark, chip in zip(GOLDS, marked, chips):
        assert mark["wrong"] == [wrong] * bool(wrong), (answer, given)
        if options:
            assert mark["right"] == [right] and bool(chip) == (given == "B"), (answer, given)
        else:
            assert ["".join(x) for x in chip] == [right] * bool(right), (answer, gold, given)


@needs_chromium
def test_the_card_of_a_text_has_no_picture(browse, tmp_path, samples):
    """In an evaluation as in a training run; that of a video beside it has one."""
    text = replace(samples[0], data_type="text", path="", question="3 and 4?")
    answered = [line(0, text, "A", draw(0, "A")), line(1, samples[1], "A", draw(4, "A"))]
    write_lines(tmp_path / "greedy-4.rank0.jsonl", answered)
    write_lines(tmp_path / "log.jsonl", [dict(step=1, accuracy=0.5)])
    write_lines(
        tmp_path / "samples.jsonl", group(1, text, (1.0, 0.0)) + group(1, samples[1], (1.0, 0.0))
    )
    (tmp_path / "config.txt").write_text("--fps 2.0\n--min_frames 4\n--max_frames 8\n")
    report.main([str(tmp_path)])
    assert len(blob((tmp_path / "report.html").read_text())["sheets"]) == 2
    dom = browse(tmp_path / "report.html")
    cards = re.findall(r"<article.*?</article>", dom, re.DOTALL)
    assert len(cards) == 4
    for card in cards:
        assert ("<figure>" in card) == ("3 and 4?" not in card)
        assert "frames not readable" not in card


@needs_chromium
def test_asked_questions_are_cards_without_a_verdict_where_nobody_knows_the_answer(browse, samples):
    """As ask.py asks them: a single response is open; the given option is marked, and called
    neither right nor wrong, unless the record has an answer."""
    known = samples[0]
    unknown = dict(score=None, gold=None, answer=None)
    lines = [
        line(0, known, "B", draw(4, "B", "A"), draw(8, "B", "B"), **unknown),
        line(1, known, "a bird", draw(4, "a bird"), **unknown | dict(options=[])),
        line(2, known, None, draw(4, None), failure="no valid answer", **unknown),
        line(3, known, known.answer, draw(4, known.answer)),
    ]
    page = report.asked_page(known.path, "a model", lines)
    sheets = [sheet["of"] for sheet in blob(page)["sheets"]]
    assert sheets == [4, 8]  # once for all questions
    dom = browse(page)
    assert "answers of a model, as of" in dom and known.path in dom and "accuracy" not in dom
    assert dom.count('<details open="">') == 3  # of one response
    first, second, third, fourth = articles(dom)
    assert [kind for kind, _ in (first, second, third, fourth)] == [
        "answered",
        "answered",
        "failed",
        "right",
    ]
    assert first[1].startswith("question 1") and f"{known.options[1]} given" in first[1]
    assert "round 2: 8 frames" in first[1] and "B × 2" in first[1]
    assert "given a bird" in second[1] and "no valid answer" in third[1]
    assert all("✓" not in text and "✗" not in text for _, text in (first, second, third))
    assert "✓ right answer, given" in fourth[1]


@needs_chromium
def test_what_a_bad_record_holds_becomes_no_attribute(browse, tmp_path, samples):
    """An object where text is expected, in every field and key of the page."""
    hostile = {
        "ONCLICK": "1",
        "style": "2",
        "title": "3",
        "constructor": "4",
        "__proto__": {"title": "5"},
    }
    bad = dict(
        record=0,
        score=0.0,
        failure="bad",
        rounds=[],
        problem_type=hostile,
        about={"category": hostile},
        id=hostile,
    )
    fields = dict(
        question=hostile, answer=hostile, given=None, path="/x.mp4", data_type="video", fps=1.0
    )
    write_lines(
        tmp_path / "greedy-4.rank0.jsonl", [bad, bad | dict(record=1, problem_type=["x"], **fields)]
    )
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=1, loss=hostile, title=3.0)) + "\n")
    write_lines(
        tmp_path / "samples.jsonl",
        [dict(step=1, response="x", id=hostile, question=hostile, accuracy=hostile)],
    )
    dom = browse(report.page(tmp_path), "show=constructor")
    assert [kind for kind, _ in articles(dom)] == ["wrong", "failed", "failed"]
    written = dom.split("<main>")[1]
    assert (
        not re.search(r'onclick=|constructor=|__proto__=|(style|title)="[235]"', written)
        and "[object" not in written
    )


@pytest.mark.slow
@needs_chromium
def test_the_address_chooses_what_is_shown(browse, answers_page, samples):
    dom = browse(answers_page, "method=greedy-4")
    assert len(articles(dom)) == 4 and {kind for kind, _ in articles(dom)} == {"right"}
    assert (
        "frames not readable: /nowhere/x.mp4: no such file"
        in articles(browse(answers_page, "record=3"))[0][1]
    )
    assert [kind for kind, _ in articles(browse(answers_page, "show=escalated"))] == [
        "wrong",
        "failed",
    ]
    assert len(articles(browse(answers_page, "q=NO+%27solution%27"))) == 1
    source = samples[0].about["data_source"]
    expected = sum(s.about["data_source"] == source for s in samples[:4])
    assert (
        0
        < len(articles(browse(answers_page, f"method=greedy-4&by.data_source={source}")))
        == expected
        < 4
    )
    assert (
        len(articles(browse(answers_page, "method=nobody&show=nothing&by.data_source=%3Cimg%3E")))
        == 0
    )
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert "owned" not in title and "<img" not in dom


@needs_chromium
def test_controls_change_the_page_and_its_address(browse, answers_page):
    press = click("includes('wrong')")
    tell = "document.querySelector('h1').textContent = location.hash;"
    dom = browse(answers_page, script=press + tell)
    assert [kind for kind, _ in articles(dom)] == ["wrong"] and "<h1>#show=wrong</h1>" in dom
    pick = (
        "const s = document.querySelector('select'); s.value = 'greedy-4'; "
        "s.onchange({ target: s });"
    )
    dom = browse(answers_page, "show=wrong", script=pick + tell)
    assert articles(dom) == [] and "<h1>#show=wrong&amp;method=greedy-4</h1>" in dom
    dom = browse(answers_page, "show=wrong", script="location.hash = 'show=right'")
    assert [kind for kind, _ in articles(dom)] == ["right", "right"]


@needs_chromium
def test_4000_questions_are_shown_20_at_a_time(browse, tmp_path, samples):
    write_lines(tmp_path / "greedy-4.rank0.jsonl", (line(i, samples[0], "A") for i in range(4000)))
    page = report.page(tmp_path)
    assert len(articles(browse(page))) == 20
    dom = browse(page, script=click("startsWith('more (')"))
    assert len(articles(dom)) == 40 and "more (3960 left)" in dom


@needs_chromium
def test_a_training_run_in_the_browser(browse, training_page):
    dom = browse(training_page)
    charts = re.findall(r'data-chart="(.*?)"', dom)
    assert (
        charts[:4] == ["accuracy", "held-out accuracy by source", "reward", "loss"]
        and "kl" not in charts
    )
    assert {"grad_norm", "skipped_samples", "seconds of a step, by phase"} <= set(
        charts
    ) and "shuffled" not in " ".join(charts)
    assert (
        "The same at every step: kl 0." in dom
        and dom.count("<circle") == 2 + 2 * 2
        and "0.200 → 0.900" in dom
    )
    assert "NaN" not in dom and "Infinity" not in dom and "undefined" not in dom
    assert len(articles(dom)) == 20 and "left out" not in dom
    kind, text = articles(dom)[0]
    assert (
        kind == "right"
        and "step 30" in text
        and "prompt 1" in text
        and "4 of 4 responses right" in text
    )
    assert (
        text.count("advantage +0.75") == text.count("temporal_bonus 0.3") == 4
        and text.count("8 of 8 frames") == 1
    )
    assert (
        all(f"30.{k} {HOSTILE[:20]}" in text for k in range(4))
        and text.count("✓ right answer") == 1
    )
    assert "in the order 2 1 4 3: accuracies 0 1" in text
    assert "in the order 4 3 2 1: probability drops 0.5 -0.25" in articles(dom)[1][1]
    mixed = articles(browse(training_page, "show=mixed"))
    assert {kind for kind, _ in mixed} == {"mixed"} and "1 of 4 responses right" in mixed[0][1]
    assert mixed[0][1].count("advantage -0.25") == 3 and mixed[0][1].count("advantage +0.75") == 1


@needs_chromium
def test_alarms_and_own_rewards_in_the_browser(browse, tmp_path):
    """Own rewards stand beside the other parts of the reward, not in charts of their own."""
    (tmp_path / "config.txt").write_text("--reward a.py:score\n")
    lines = [x | dict(score=i / 4, format=i % 2) for i, x in enumerate(steps(4, truncated=1))]
    write_lines(tmp_path / "log.jsonl", lines)
    dom = browse(report.page(tmp_path))
    assert '<div class="alarm" role="alert"><b>! truncated</b>: 100% of' in dom
    assert 'data-chart="parts of the reward"' in dom and 'data-chart="score"' not in dom
    assert "reloads" not in dom


@needs_chromium
@pytest.mark.parametrize("address, reloads", [("", True), ("watch=off", False)])
def test_a_watched_page_reloads_where_it_was_scrolled_to(
    browse, training, tmp_path, address, reloads
):
    """After a second it reloads, where it was scrolled to; then the test pauses it. The title
    counts the loads."""
    page = tmp_path / "page.html"
    page.write_text(report.html(report.contents(training, every=1)), errors="replace")
    script = """
        const n = +sessionStorage.n || 0;
        sessionStorage.n = n + 1;
        if (n) document.querySelector("button").click(); else scrollTo(0, 700);
        document.title = `${n} at ${scrollY}`;"""
    dom = browse(page, address, script)
    loads, top = re.search(r"<title>(\d) at (\d+)", dom).groups()
    assert (int(loads), int(top)) == (int(reloads), 700)
    assert dom.count('aria-pressed="true">pause<') == 1


ACCURACY = "document.querySelector('[data-chart=accuracy] > svg')"


@needs_chromium
def test_pointing_at_a_curve_reads_all_curves_at_that_step(browse, training_page):
    move = f"""
        const v = {ACCURACY}, box = v.getBoundingClientRect();
        const clientX = box.left + box.width * (40 + 268 * 15 / 30) / 320;
        v.dispatchEvent(new PointerEvent('pointermove', {{ clientX }}));"""
    dom = browse(training_page, script=move)

    def legend(chart):
        found = rf'data-chart="{chart}".*?class="legend">(.*?)</div>'
        return re.search(found, dom, re.DOTALL)[1]

    assert (
        "<b>0.5</b>" in legend("accuracy")
        and "<b>1.5</b>" in legend("reward")
        and ", step 15<" in dom
    )


@needs_chromium
def test_charts_are_read_by_keyboard(browse, training_page):
    keys = [
        "Home",
        "ArrowRight",
        "ArrowRight",
        "PageUp",
        "ArrowLeft",
        "x",
    ]  # steps 0, 1, 2, 13 (7 has none), 12
    press = "".join(
        f"v.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}' }}));" for key in keys
    )
    dom = browse(
        training_page,
        script=f"const v = {ACCURACY}; v.focus(); {press}",
    )
    svg = re.search(r'data-chart="accuracy".*?(<svg[^>]*role="slider"[^>]*>)', dom, re.DOTALL)[1]
    assert (
        'tabindex="0"' in svg
        and 'aria-valuenow="12"' in svg
        and 'aria-valuemin="0"' in svg
        and 'aria-valuemax="30"' in svg
    )
    assert 'aria-valuetext="step 12: accuracy 0.4, eval_accuracy 0.2"' in svg


@needs_chromium
@pytest.mark.parametrize(
    "values, ticks",
    [
        ([0, 0, 0], ["0", "0.5", "1"]),
        ([0.3, 0.3, 0.3], ["0", "0.2", "0.4", "0.6"]),
        ([-2, -2, -2], ["-4", "-3", "-2", "-1", "0"]),
    ],
)
def test_a_constant_curve_is_drawn_on_an_axis_with_0(browse, tmp_path, values, ticks):
    write_lines(
        tmp_path / "log.jsonl", [dict(step=10 * i, eval_accuracy=v) for i, v in enumerate(values)]
    )
    labels = re.findall(
        r'<text[^>]*text-anchor="end"[^>]*>(.*?)</text>', browse(report.page(tmp_path))
    )
    assert labels == ticks


@needs_chromium
def test_no_curve_hides_another_and_tables_and_fields_have_names(browse, tmp_path, answers_page):
    log = [dict(step=i, temporal_passed=i % 2, temporal_vacuous=i % 2) for i in range(9)]
    write_lines(tmp_path / "log.jsonl", log)
    passed, vacuous = re.findall(
        r'<path fill="none"[^>]*stroke-width="1.6"[^>]*>', browse(report.page(tmp_path))
    )
    assert 'stroke-dasharray="none"' in passed and 'stroke-dasharray="6 4"' in vacuous
    dom = browse(answers_page)
    heads = re.findall(r"<th[ >].*?</th>", dom)
    assert heads and all(
        re.match(r'<th scope="(col|row)">.', head) and "><" not in head.split("<a")[0]
        for head in heads
    )
    assert dom.count('scope="row"') == dom.count("<tr>") - dom.count(
        "<table>"
    )  # every row but the first has a head
    assert all("aria-label=" in tag for tag in re.findall(r"<(?:select|input)[^>]*>", dom))


def luminance(colour):
    """Relative luminance of "#rrggbb" or "#rgb", as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("every", ["nan", "0", "-1", "1e300", "inf"])
def test_seconds_between_two_pages_have_a_range(every, capsys):
    with pytest.raises(SystemExit):
        report.main(["run", "--watch", f"--every={every}"])
    assert "expected seconds, at least 0.1, at most 86400" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_colour_has_a_contrast_of_4_5_to_the_page_and_to_the_cards(mode):
    roots = re.findall(
        r":root \{(.*?)\}",
        (report.Path(report.__file__).parent / "report.html").read_text(),
        re.DOTALL,
    )
    colours = dict(re.findall(r"--(\w+): (#\w+)", roots[mode]))
    grounds = [luminance(colours.pop(name)) for name in ("paper", "card")]
    assert colours.pop("line") and {f"c{i}" for i in range(8)} < set(colours)
    for name, colour in colours.items():
        for ground in grounds:
            dark, light = sorted((luminance(colour), ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


@needs_chromium
def test_the_strong_line_is_a_running_mean(browse, tmp_path):
    """80 steps: the mean of two steps before and two behind, of 0 1 0 1 ...: 2/5, 3/5, 2/5 ..."""
    write_lines(tmp_path / "log.jsonl", [dict(step=i, reward=i % 2) for i in range(80)])
    faint, strong = re.findall(r'<path[^>]* d="(.*?)"', browse(report.page(tmp_path)))

    def ys(path):
        return [float(y) for y in re.findall(r" ([\d.]+)", path)]

    bottom, top = ys(faint)[:2]
    heights = [(bottom - y) / (bottom - top) for y in ys(strong)]
    assert len(heights) == 80 and heights[2:-2] == pytest.approx([0.4, 0.6] * 38, abs=0.002)
