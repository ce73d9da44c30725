"""Rewards of one's own: --reward my_file.py:score."""

import json
import math
import re
import sys

import pytest

import data
import train
from conftest import flags, run
from infra import run_folder
from infra.errors import DataError
from infra.files import digest
from infra.reward_file import TAKEN, load_rewards, own_rewards, split_spec

FILE = '''
"""Rewards of a user."""
from dataclasses import dataclass

import numpy as np

@dataclass
class Count:  # dataclasses look for their module
    n: int

def score(response, sample):
    return 0.5 if sample.answer in response else np.float32(0)

def short(responses, samples):
    return np.array([1 / (1 + len(r)) for r in responses])

def odd(response, sample):
    pair = np.array([0.5, 0.5])
    values = {"nan": float("nan"), "high": 1.5, "none": None, "text": "1", "yes": True}
    return (values | {"pair": pair})[response]

def broken(response, sample):
    return 1 / len(response)

def few(responses, samples):
    return [1.0]

def fails(responses, samples):
    raise ValueError("no model")

def alone(response):
    return 1

def three(response, sample, weights):
    return 1

def of_trl(completions, samples):
    return [0.0 for _ in completions]

def turned(sample, response):
    return 1

from math import hypot

five = 5
'''


def sample(i, answer="red"):
    about = dict(options=[], problem_type="free-form", data_type="text", path="", answer=answer)
    return data.Sample(str(i), "Which colour?", **about)


@pytest.fixture()
def file(tmp_path):
    path = tmp_path / "my_file.py"
    path.write_text(FILE)
    return path


def rewards(file, name, texts, samples):
    return own_rewards(load_rewards([f"{file}:{name}"]), texts, samples)


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("a.py:score", ("a.py", "score", 1.0)),
        ("a.py:score=0.5", ("a.py", "score", 0.5)),
        (r"C:\my=x\a.py:score=-2", (r"C:\my=x\a.py", "score", -2.0)),
    ],
)
def test_a_file_a_function_and_a_weight(spec, parts):
    assert split_spec(spec) == parts


@pytest.mark.parametrize(
    "spec", ["score", "a.py", "a.py:", ":f", "a.py:f=", "a.py:f=nan", "a.py:f=1e38", "a:f g"]
)
def test_anything_else_is_refused(spec):
    with pytest.raises(DataError, match=f"--reward {re.escape(spec)}: expected FILE.py:FUNCTION"):
        split_spec(spec)


def test_one_by_one_and_all_at_once(file):
    """Groups of unequal size keep their responses; a batch is a list, an array or a tensor."""
    functions = load_rewards([f"{file}:score", f"{file}:short=2"])
    texts, samples = [["red", "blue"], ["xred"]], [sample(0), sample(1, "x")]
    assert own_rewards(functions, texts, samples) == [
        {"score": [0.5, 0.0], "short": [1 / 4, 1 / 5]},
        {"score": [0.5], "short": [1 / 5]},
    ]
    assert own_rewards(functions, [], []) == [] and own_rewards((), texts, samples) == [{}, {}]
    assert rewards(file, "odd", [["yes"]], samples[:1]) == [{"odd": [1.0]}]


@pytest.mark.parametrize(
    "name, responses, message",
    [
        ("odd", ["nan"], "record 0: F:odd returned nan, expected a number from 0 to 1"),
        ("odd", ["yes", "high"], "record 0: F:odd returned 1.5, expected a number from 0 to 1"),
        ("odd", ["none"], "record 0: F:odd returned None, expected"),
        ("odd", ["text"], "record 0: F:odd returned '1', expected"),
        ("odd", ["pair"], "record 0: F:odd returned array([0.5, 0.5]), expected"),
        ("broken", [""], "record 0: F:broken, line 23: ZeroDivisionError: division by zero"),
        (
            "few",
            ["a", "b"],
            "F:few returned 1, expected a list of 2 numbers, one for each response",
        ),
        ("fails", ["a", "b"], "record 0: F:fails, line 29: ValueError: no model"),
    ],
)
def test_what_is_no_reward_names_record_file_and_function(file, name, responses, message):
    with pytest.raises(DataError) as error:
        rewards(file, name, [responses], [sample(0)])
    assert message.replace("F:", f"{file}:") in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "has no function nothing"),
        ("five", "has no function five"),
        ("alone", "alone(response): expected the parameters response, sample"),
        ("three", "three(response, sample, weights): expected the parameters response, sample"),
        ("of_trl", "of_trl(completions, samples): expected the parameters response, sample"),
        ("turned", "turned(sample, response): expected the parameters response, sample"),
        ("hypot", "my_file.py:hypot: hypot: its parameters are not known (no signature found for"),
        ("reward", "the logs have a reward already; rename the function"),
        ("reward_std", "the logs have a reward_std already; rename the function"),
        ("score", "there are two functions called score; rename one"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_the_run(file, name, message):
    with pytest.raises(DataError) as error:
        load_rewards([f"{file}:score", f"{file}:{name}"])
    assert message in str(error.value)


def test_a_file_that_cannot_be_loaded_is_named_with_its_line(tmp_path):
    bad = tmp_path / "bad.py"
    with pytest.raises(DataError, match="bad.py: no such file"):
        load_rewards([f"{bad}:f"])
    bad.write_text("x = 1\nimport no_such_module\n")
    with pytest.raises(DataError, match="bad.py cannot be loaded, line 2: ModuleNotFoundError"):
        load_rewards([f"{bad}:f"])
    bad.write_text("import sys\nsys.exit()\n")  # not the end of the run, as if it were done
    with pytest.raises(DataError, match="bad.py cannot be loaded, line 2: SystemExit"):
        load_rewards([f"{bad}:f"])
    bad.write_text("x = (\n")
    with pytest.raises(DataError, match="bad.py cannot be loaded, line 1: SyntaxError"):
        load_rewards([f"{bad}:f"])


def test_a_file_may_import_modules_that_lie_beside_it(tmp_path, monkeypatch):
    """Also while it rewards. A module of this project is not replaced by one of its name."""
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_1.py").write_text("half = 0.5\n")
    (tmp_path / "beside_2.py").write_text("quarter = 0.25\n")
    (tmp_path / "data.py").write_text("half = 1\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from data import Sample\nfrom beside_1 import half\n"
        "def score(response, sample):\n"
        "    from beside_2 import quarter\n"
        "    return half + quarter * isinstance(sample, Sample)\n"
    )
    for _ in range(2):
        assert rewards(mine, "score", [["red"]], [sample(0)]) == [{"score": [0.75]}]
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)  # so this project's modules come first


def test_two_modules_of_one_name_beside_reward_files_are_refused(tmp_path, monkeypatch):
    """Python would give the second file the first one's module."""
    monkeypatch.setattr("sys.path", [*sys.path])
    files = []
    for folder, value in (("a", 0.25), ("b", 0.75)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "namesake.py").write_text(f"VALUE = {value}\n")
        files.append(tmp_path / folder / f"of_{folder}.py")
        files[-1].write_text("from namesake import VALUE\ndef " + folder + "(x, y): return VALUE\n")
    assert rewards(files[0], "a", [["red"]], [sample(0)]) == [{"a": [0.25]}]
    with pytest.raises(DataError, match="a/namesake.py and .*b/namesake.py: .* rename one"):
        load_rewards([f"{files[0]}:a", f"{files[1]}:b"])


def test_config_txt_has_a_digest_of_every_file(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("def brief(response, sample): return 1\n")
    (tmp_path / "r.json").write_text("[]")
    flags = ["--model", "m", "--data", str(tmp_path / "r.json"), "--reward"]
    args = train.parse_args([*flags, f"{file}:score", f"{file}:short", f"{other}:brief"])
    assert f"# rewards {digest(file)} {digest(other)}" in run_folder._config(args)


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--algo", "sft"], "--reward: expected with --algo grpo or tgrpo"),
        (["--reward", "nowhere.py:f"], "--reward nowhere.py:f: nowhere.py: no such file"),
        (["--reward", "f"], "--reward f: expected FILE.py:FUNCTION"),
    ],
)
def test_flags_that_are_refused(file, changed, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", "--reward", f"{file}:score", *changed])
    assert message in capsys.readouterr().err


def test_a_run_logs_rewards_by_name_and_resumes_with_the_same_ones_only(
    tmp_path, world, cold_start, file
):
    """Two ranks load the file. The reward is the weighted sum of its parts, in every line. A run
    with other functions, or with other lines in the file, is another run."""
    out = tmp_path / "run"
    command = [*flags(world, out, "tgrpo", steps=1, prompts=2, group=2, model=cold_start)]
    own = ["--reward", f"{file}:score=0.5", f"{file}:short"]
    run(*command, *own, ranks=2)
    (entry,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for x in [entry, *lines]:
        parts = x["accuracy"] + x["format"] + x["length_bonus"]
        assert x["reward"] == pytest.approx(parts + 0.5 * x["score"] + x["short"])
    for x in lines:
        assert x["short"] == 1 / (1 + len(x["response"]))
        assert x["score"] == 0.5 * (x["answer"] in x["response"])
    assert {*entry, *lines[0]} - {"score", "short"} <= set(TAKEN)  # no reward can hide a key
    assert math.isfinite(entry["loss"])
    assert f"--reward {file}:score=0.5 {file}:short\n" in (out / "config.txt").read_text()
    with pytest.raises(SystemExit) as refused:
        train.main([*map(str, command[1:]), *own[:2], "--resume"])
    assert f"--reward {file}:score=0.5 now, --reward {file}:score=0.5 {file}:short when" in str(
        refused.value
    )
    file.write_text(file.read_text() + "\n")
    with pytest.raises(SystemExit, match="with other settings: # rewards"):
        train.main([*map(str, command[1:]), *own, "--resume"])
