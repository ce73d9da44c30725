"""claims.py end to end in the smallest form: what it writes, and that it writes it once. No outcome is asserted: with so few
steps all of them are noise."""

import json
import random
import re
import xml.etree.ElementTree as ET

import pytest

import rewards
import toy
from experiments import claims, figure, lab

TINY = dict(
    shrink=600,
    clips={"cot": 24, "train": 16, "test": 4},
    flags=("--prompts", 4, "--group", 2, "--max_new", 8),
)


@pytest.fixture(scope="module")
def pool():
    with lab.workers(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("claims")


def stats(tree):
    return [tree] if "mean" in tree else [s for x in tree.values() for s in stats(x)]


def test_an_interval_by_hand():
    found = lab.stat(
        [1.0, 2.0, 3.0, 4.0, 5.0]
    )  # standard deviation sqrt(2.5), over sqrt(5), times 2.776
    assert found["mean"] == 3 and found["seeds"] == [1, 2, 3, 4, 5]
    assert found["interval"] == pytest.approx([3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5])
    assert lab.stat([0.0, 2.0])["interval"] == pytest.approx([1 - 12.706, 1 + 12.706])
    trees = [{"a": 1, "b": {"2": 0.5}}, {"a": 3, "b": {"2": 0.5}}]
    assert lab.combine(trees)["b"] == {
        "2": {"mean": 0.5, "interval": [0.5, 0.5], "seeds": [0.5, 0.5]}
    }
    assert lab.combine(trees)["a"]["mean"] == 2


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_claim_from_nothing_to_a_figure(folder, pool, name):
    study = lambda: claims.study(
        name, range(2), folder / "scratch", folder / "results", pool, **TINY
    )
    done, now = study()
    written = json.loads((folder / "results" / f"{name}.json").read_text())
    assert (
        written == json.loads(json.dumps(done))
        and written["claim"] == name
        and written["seeds"] == [0, 1]
    )
    assert {"paper", "line", "process_minutes", "commit", "machine", "torch"} <= set(written)
    for s in stats(written["values"]):
        assert len(s["seeds"]) == 2 and s["interval"][0] <= s["mean"] <= s["interval"][1]
    for way, apart in (
        written["values"].get("largest difference of a step's mean reward", {}).items()
    ):
        assert apart["mean"] == pytest.approx(0, abs=1e-9), (
            way
        )  # the one outcome that is no noise: the same run, another way
    for run in written["runs"]:
        assert (
            set(run) == {"seed", "name", "command", "inputs", "seconds", "commit"}
            and str(lab.HERE) not in run["command"]
        )
    assert {run["seed"] for run in written["runs"]} == {0, 1} and now > 0

    svg = (folder / "results" / f"{name}.svg").read_text()
    root = ET.fromstring(svg)
    texts = lambda tag: [e.text for e in root.iter("{http://www.w3.org/2000/svg}" + tag)]
    says = " ".join(texts("title"))
    assert "prefers-color-scheme: dark" in svg
    panels = [panel for panel in claims.CLAIMS[name].panels if panel[1] in written["values"]]
    assert panels
    for _, key, title, *_ in panels:
        assert title in texts("text") and all(
            figure.number(s["mean"]) in says for s in stats(written["values"][key])
        )

    again, now = study()
    assert now == 0 and again["values"] == done["values"]


def test_what_other_flags_ask_for_is_run_anew(folder):
    calls = []

    def command(argv):
        """a command"""
        calls.append(argv)
        (folder / "made").mkdir()

    def once(steps, *inputs):
        return lab.once(
            folder / "made",
            command,
            ["--steps", steps],
            {"command": f"--steps {steps}", "inputs": list(inputs)},
        )

    assert once("1")["ran"] and not once("1")["ran"]
    assert once("2")["ran"]  # in an empty folder
    assert once("2", "other weights")["ran"] and not once("2", "other weights")["ran"]
    assert len(calls) == 3


def test_what_was_killed_goes_on(folder):
    """A command that dies keeps its folder, and finds it when it is called again."""

    def command(argv):
        """a command"""
        (folder / "half").mkdir(exist_ok=True)
        if not (folder / "half" / "begun").exists():
            (folder / "half" / "begun").touch()
            raise KeyboardInterrupt
        (folder / "half" / "ended").touch()

    with pytest.raises(RuntimeError, match="half: KeyboardInterrupt.*; its output is in"):
        lab.once(folder / "half", command, [], {"command": "half"})
    assert (
        lab.once(folder / "half", command, [], {"command": "half"})["ran"]
        and (folder / "half" / "ended").exists()
    )


def test_records_made_from_others(world):
    train, cot = (json.loads((world / f"{name}.json").read_text()) for name in ("train", "cot"))
    answer = lambda r: rewards.extract_answer(r["solution"])
    shuffled = claims.shuffle(cot)
    for kind in {r["data_source"] for r in cot}:
        of = lambda rs: sorted(
            (r["solution"], r["process"]) for r in rs if r["data_source"] == kind
        )
        assert of(shuffled) == of(cot)
    assert [r["path"] for r in shuffled] == [r["path"] for r in cot] and shuffled != cot
    for r in claims.explain(
        train, cot
    ):  # the last word of the reasoning is what the right answer says
        word = re.search(r"(\w+)</think>", r["process"])[1]
        assert (
            word == answer(r)
            if r["data_source"] == "count"
            else f"{answer(r)}. {word}" in r["options"]
        )
    counted = claims.count_aloud([{"process": "<think>it lights up 3</think>"}])
    assert counted == [{"process": "<think>it lights up 1 2 3</think>"}]
    said = {"process": "<think>it is so</think>"}
    assert claims.say_twice([said, said]) == [
        said,
        {"process": "<think>it is so, it is so</think>"},
    ]
    some = claims.first_of(5, 0)(train)
    assert claims.first_of(9, 0)(train)[:5] == some and len(some) == 5
    for frames, questions in claims.lit_stills(4, random.Random(0)):
        _, _, colour, _ = questions["flash"]
        assert frames.shape == (1, 28, 28, 3) and tuple(frames[0, 23, 14]) == toy.COLOURS[colour]


def test_the_world_of_the_cue():
    def lamp_and_way(split, n=8):
        for frames, questions in claims.order_scenes(split, n, random.Random(0)):
            ((kind, (_, _, answer, reasoning)),) = questions.items()
            lit = next(
                colour for colour, rgb in toy.COLOURS.items() if tuple(frames[3, 23, 14]) == rgb
            )
            yield (
                kind,
                next(way for way, colour in claims.LAMPS.items() if colour == lit),
                answer,
                reasoning.format(answer),
            )

    assert all(lamp == way for _, lamp, way, _ in lamp_and_way("agree"))
    assert all(lamp != way for _, lamp, way, _ in lamp_and_way("differ"))
    for kind, lamp, way, reasoning in lamp_and_way("ways"):
        said = f"the lamp is {claims.LAMPS[lamp]}" if kind == "lamp" else f"the square moves {way}"
        assert reasoning == said and (way == lamp or kind == "motion")
    assert [kind for kind, *_ in lamp_and_way("test", 2)] == ["motion", "shuffled"] * 2
    shown = [frames for frames, _ in claims.order_scenes("test", 1, random.Random(0))]
    assert (shown[0] != shown[1]).any() and sorted(f.tobytes() for f in shown[0]) == sorted(
        f.tobytes() for f in shown[1]
    )

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
    found = claims.misread(0.75, [read, lamp] * 200)
    assert found[1::2] == [lamp] * 200 and 0.65 < sum(r == read for r in found[::2]) / 200 < 0.85
    assert claims.misread(1.0, [read, lamp]) == [read, lamp]
    ways = dict(zip("ABCD", claims.LAMPS))
    answer = lambda r: rewards.extract_answer(r["solution"])
    assert all(
        r["process"] == f"<think>the square moves {ways[answer(r)]}</think>" for r in found[::2]
    )
    assert claims.mix(0.75, ["a"] * 4, ["d"] * 4) == ["a", "a", "a", "d"]


def test_a_chart_says_its_numbers():
    cell = lab.stat([0.25, 0.75])
    bars, lines = (
        {"weak": {"GRPO": cell}, "strong": {"GRPO": cell}},
        {"GRPO": {"1": cell, "10": cell}},
    )
    for kind, data, marks in (("bars", bars, ("weak", "strong")), ("lines", lines, ("1", "10"))):
        root = ET.fromstring(
            figure.draw("A & B", [figure.Panel(kind, data, "a title", "an axis", "another")])
        )
        words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"A & B", "a title", "an axis", "another", "GRPO", "0.5", *marks} <= set(words)
