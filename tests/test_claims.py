"""The claims end to end in the smallest form: what they write, and that they write it once. No
outcome is asserted: with so few steps all of them are noise."""

import json
import random
import re
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest

import rewards
import toy
from experiments import (
    claims,
    figure,
    frame_order,
    lab,
    longvila_r1,
    shared,
    stats,
    video_r1,
    video_rts,
)

TINY = dict(
    shrink=600,
    clips={"cot": 20, "train": 12, "test": 3},
    flags=("--prompts", 2, "--group", 2, "--max_new", 4, "--workers", 1),
    eval_flags=("--max_new", 4, "--workers", 1),
)


@pytest.fixture(scope="module")
def pool(forked_python):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON_EXEC", str(forked_python))  # for the runs of torchrun
        with lab.workers(1) as pool:  # pytest has a worker for each core already
            yield pool


@pytest.fixture(scope="module")
def folder(made_once):
    """Of all claims, whichever process tests them: they share runs."""
    return made_once("claims", Path.mkdir)


def all_stats(tree):
    """The stats in nested dicts."""
    if "mean" in tree:
        return [tree]
    return [s for branch in tree.values() for s in all_stats(branch)]


def test_an_interval_by_hand():
    # standard deviation sqrt(2.5), over sqrt(5), times 2.776
    found = stats.stat([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3 and found["seeds"] == [1, 2, 3, 4, 5]
    assert found["interval"] == pytest.approx([3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5])
    assert stats.stat([0.0, 2.0])["interval"] == pytest.approx([1 - 12.706, 1 + 12.706])
    combined = stats.combine([{"a": 1, "b": {"2": 0.5}}, {"a": 3, "b": {"2": 0.5}}])
    assert combined["b"] == {"2": {"mean": 0.5, "interval": [0.5, 0.5], "seeds": [0.5, 0.5]}}
    assert combined["a"]["mean"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_claim_from_nothing_to_a_figure(folder, pool, name):
    results = folder / "results"
    study = partial(claims.study, name, range(2), folder / "scratch", results, pool, **TINY)
    done, now = study()
    written = json.loads((results / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(done))
    assert written["claim"] == name and written["seeds"] == [0, 1]
    assert {"paper", "line", "process_minutes", "commit", "machine", "torch"} <= set(written)
    values = written["values"]
    for s in all_stats(values):
        assert len(s["seeds"]) == 2 and s["interval"][0] <= s["mean"] <= s["interval"][1]
    # the one outcome that is not noise: the same run, another way
    for way, apart in values.get("largest difference of a step's mean reward", {}).items():
        assert apart["mean"] == pytest.approx(0, abs=1e-9), way
    for run in written["runs"]:
        assert set(run) == {"seed", "name", "command", "inputs", "seconds", "commit"}
        assert str(lab.HERE) not in run["command"]
    assert {run["seed"] for run in written["runs"]} == {0, 1} and now > 0
    check_figure(name, results, values)

    again, now = study()
    assert now == 0 and again["values"] == done["values"]


# ---- figures


def texts(file):
    """The texts of an SVG file."""
    return [e.text for e in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def check_figure(name, results, values):
    """The file says titles, axes and the numbers of bars; the figure names every series, and draws
    every mean, interval and seed."""
    chart = claims.draw(name, results)
    said = texts(results / f"{name}.svg")
    panels = [panel for panel in claims.CLAIMS[name].panels if panel.key in values]
    assert panels and len(chart.axes) == len(panels)
    for panel, axes in zip(panels, chart.axes):
        data = values[panel.key]
        assert panel.title in said and panel.y in said and (panel.x in said or not panel.x)
        check_drawn(axes, data)
        if panel.kind == "bars":
            assert {stats.number(s["mean"]) for s in all_stats(data)} <= set(said)


def check_drawn(axes, data):
    """Axes show some data: {series: ...} by name, and of every stat the mean, the interval and the
    seeds."""
    named = {label.get_text().replace("\n", " ") for label in axes.get_xticklabels()}
    if axes.get_legend():
        named |= {label.get_text() for label in axes.get_legend().get_texts()}
    assert set(data) <= named
    heights = [bar.get_height() for bar in axes.patches]
    points = [y for line in axes.lines for y in line.get_ydata()]
    intervals = [segment[:, 1] for c in axes.collections for segment in c.get_segments()]
    low, high = axes.get_ylim()
    for s in all_stats(data):
        assert any(y == pytest.approx(s["mean"]) for y in heights + points)
        assert any(list(ys) == pytest.approx(s["interval"]) for ys in intervals)
        assert low <= s["interval"][0] and s["interval"][1] <= high
        for seed in s["seeds"]:
            assert any(y == pytest.approx(seed) for y in points)


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_the_published_figures_are_those_of_the_published_numbers(tmp_path, name):
    published = lab.HERE / "experiments" / "results"
    numbers = (published / f"{name}.json").read_text()
    (tmp_path / f"{name}.json").write_text(numbers)
    check_figure(name, tmp_path, json.loads(numbers)["values"])
    assert set(texts(published / f"{name}.svg")) == set(texts(tmp_path / f"{name}.svg"))


def test_a_chart_says_its_numbers(tmp_path):
    cell = stats.stat([0.25, 0.75])
    bars = {"weak": {"GRPO": cell}, "strong": {"GRPO": cell}}
    lines = {"GRPO": {"1": cell, "10": cell}}
    for kind, data, marks in (("bars", bars, ("weak", "strong")), ("lines", lines, ("1", "10"))):
        panel = shared.Panel(kind, "data", "a title", "an axis", "another")
        chart = figure.draw("A & B", [panel], {"data": data})
        check_drawn(chart.axes[0], data)
        file = tmp_path / f"{kind}.svg"
        file.write_text(figure.svg(chart))
        assert {"A & B", "a title", "an axis", "another", "GRPO", "0.5", *marks} <= set(texts(file))
        again = figure.draw("A & B", [panel], {"data": data})
        assert figure.svg(again) == file.read_text()


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_a_chart_reads_on_a_light_and_on_a_dark_page(page):
    """Contrast by WCAG 2: text at least 4.3, colours at least 3."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour):
        dark, light = sorted((luminance(colour), luminance(page)))
        return (light + 0.05) / (dark + 0.05)

    assert contrast(figure.TEXT) > 4.3
    assert min(contrast(colour) for colour in figure.COLOURS) > 3


# ---- commands


def test_what_other_flags_ask_for_is_run_anew(tmp_path):
    calls = []

    def command(argv):
        """a command"""
        calls.append(argv)
        (tmp_path / "made").mkdir()

    def once(steps, *inputs):
        return lab.once(
            tmp_path / "made",
            command,
            ["--steps", steps],
            {"command": f"--steps {steps}", "inputs": list(inputs)},
        )

    assert once("1")["ran"] and not once("1")["ran"]
    assert once("2")["ran"]  # in an empty folder
    assert once("2", "other weights")["ran"] and not once("2", "other weights")["ran"]
    assert len(calls) == 3


def test_what_was_killed_resumes(tmp_path):
    """A command that dies keeps its folder, and finds it when it is called again."""

    def command(argv):
        """a command"""
        (tmp_path / "half").mkdir(exist_ok=True)
        if not (tmp_path / "half" / "begun").exists():
            (tmp_path / "half" / "begun").touch()
            raise KeyboardInterrupt
        (tmp_path / "half" / "ended").touch()

    with pytest.raises(RuntimeError, match="half: KeyboardInterrupt.*; its output is in"):
        lab.once(tmp_path / "half", command, [], {"command": "half"})
    assert lab.once(tmp_path / "half", command, [], {"command": "half"})["ran"]
    assert (tmp_path / "half" / "ended").exists()


def answer(record):
    return rewards.extract_answer(record["solution"])


def test_records_made_from_others(world):
    train, cot = (json.loads((world / f"{name}.json").read_text()) for name in ("train", "cot"))

    def lessons(records, kind):
        of_kind = [r for r in records if r["data_source"] == kind]
        return sorted((r["solution"], r["process"]) for r in of_kind)

    shuffled = shared.shuffle(cot)
    for kind in {r["data_source"] for r in cot}:
        assert lessons(shuffled, kind) == lessons(cot, kind)
    assert [r["path"] for r in shuffled] == [r["path"] for r in cot] and shuffled != cot
    # the last word of the reasoning is what the right answer says
    for r in video_rts.explain(train, cot):
        word = re.search(r"(\w+)</think>", r["process"])[1]
        if r["data_source"] == "count":
            assert word == answer(r)
        else:
            assert f"{answer(r)}. {word}" in r["options"]
    counted = longvila_r1.count_aloud([{"process": "<think>it lights up 3</think>"}])
    assert counted == [{"process": "<think>it lights up 1 2 3</think>"}]
    said = {"process": "<think>it is so</think>"}
    twice = {"process": "<think>it is so, it is so</think>"}
    assert video_r1.say_twice([said, said]) == [said, twice]
    some = shared.first_of(5, 0, train)
    assert shared.first_of(9, 0, train)[:5] == some and len(some) == 5
    for frames, questions in video_r1.lit_stills(4, random.Random(0)):
        _, _, colour, _ = questions["flash"]
        assert frames.shape == (1, 28, 28, 3) and tuple(frames[0, 23, 14]) == toy.COLOURS[colour]


def lit_scenes(split, n=8):
    """Scenes of the world of the cue -> (kind, direction of the lamp, answer, reasoning) each."""
    direction = {toy.COLOURS[colour]: way for way, colour in frame_order.LAMPS.items()}
    for frames, questions in frame_order.order_scenes(split, n, random.Random(0)):
        ((kind, (_, _, way, reasoning)),) = questions.items()
        yield kind, direction[tuple(frames[3, 23, 14])], way, reasoning.format(way)


def test_the_world_of_the_cue():
    assert all(lamp == way for _, lamp, way, _ in lit_scenes("agree"))
    assert all(lamp != way for _, lamp, way, _ in lit_scenes("differ"))
    for kind, lamp, way, reasoning in lit_scenes("ways"):
        if kind == "lamp":
            assert reasoning == f"the lamp is {frame_order.LAMPS[lamp]}" and way == lamp
        else:
            assert reasoning == f"the square moves {way}" and kind == "motion"
    assert [kind for kind, *_ in lit_scenes("test", 2)] == ["motion", "shuffled"] * 2
    (ordered, _), (shuffled, _) = frame_order.order_scenes("test", 1, random.Random(0))
    assert (ordered != shuffled).any()
    assert sorted(f.tobytes() for f in ordered) == sorted(f.tobytes() for f in shuffled)


def test_a_share_of_the_lessons_in_motion_is_misread():
    read = {
        "data_source": "motion",
        "process": "<think>the square moves down</think>",
        "solution": "<answer>D</answer>",
    }
    lamp = {
        "data_source": "lamp",
        "process": "<think>the lamp is yellow</think>",
        "solution": "<answer>D</answer>",
    }
    found = frame_order.misread(0.75, [read, lamp] * 200)
    assert found[1::2] == [lamp] * 200 and 0.65 < sum(r == read for r in found[::2]) / 200 < 0.85
    assert frame_order.misread(1.0, [read, lamp]) == [read, lamp]
    ways = dict(zip("ABCD", frame_order.LAMPS))
    for r in found[::2]:
        assert r["process"] == f"<think>the square moves {ways[answer(r)]}</think>"
    assert frame_order.mix(0.75, ["a"] * 4, ["d"] * 4) == ["a", "a", "a", "d"]
