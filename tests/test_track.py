"""The log in another library: --track. Each library is tested where it is installed."""

import json
import sys

import pytest

import train
from conftest import flags, run
from infra import track
from infra.errors import DataError
from infra.track import Tracker, numbers_of


def line(step, reward=0.5):
    inner = {"seconds": {"step": 2.0}, "eval_by_source": {"lamp": 0.25}}
    return {"step": step, "reward": reward, "loss": None, "skipped_update": False, **inner}


def sample(step, response):
    keys = dict(question="Which?", answer="A", reward=1.5, advantage=-0.5, path="x.mp4")
    return dict(step=step, response=response, **keys)


def test_the_numbers_of_a_line():
    expected = {"reward": 0.5, "skipped_update": 0.0, "seconds/step": 2.0}
    assert numbers_of(line(3)) == expected | {"eval_by_source/lamp": 0.25}
    assert numbers_of({"step": 1, "loss": float("nan"), "lr": float("inf"), "kl": "x"}) == {}


def test_no_library_is_no_work(tmp_path):
    tracker = Tracker(None, tmp_path, {}, 0)
    tracker.log(line(1))
    tracker.samples([sample(1, "a")])
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_installed_ends_the_command_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", "--track", "trackio"])
    assert capsys.readouterr().err == (
        "error: --track trackio: not installed: pip install trackio\n"
    )


LIBRARY = """
calls = []
class Run:
    def log(self, values, step):
        if step == 2:
            raise ConnectionError("no network")
        calls.append((step, values))
    def finish(self):
        calls.append("finish")
def init(**how):
    if how["config"] is None:
        raise PermissionError("no key")
    calls.append(how)
    return Run()
def Table(columns, data):
    return columns, data
"""


@pytest.fixture()
def library(tmp_path, monkeypatch):
    """A library that notes its calls, in the place of wandb. It fails at step 2."""
    (tmp_path / "wandb.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    yield __import__("wandb")
    sys.modules.pop("wandb")


def test_a_failure_is_said_once_and_the_run_goes_on(tmp_path, library, capsys):
    out = tmp_path / "run"
    out.mkdir()
    tracker = Tracker("wandb", out, {"lr": 1}, 0)
    tracker.log(line(1))
    tracker.samples([sample(1, "a")])
    for step in (2, 3):
        tracker.log(line(step))
    tracker.close()
    how, log, table = library.calls
    assert (how["project"], how["config"], how["resume"]) == ("mine", {"lr": 1}, "allow")
    assert log == (1, numbers_of(line(1)))
    assert table == (1, {"samples": (track.COLUMNS, [[1, "Which?", "A", "a", 1.5, -0.5]])})
    assert capsys.readouterr().out == (
        "--track wandb: ConnectionError: no network; the run goes on without it\n"
    )


def test_a_resumed_run_continues_the_same_run_and_a_new_one_does_not(tmp_path, library):
    out = tmp_path / "run"
    out.mkdir()
    for start in (0, 10, 0):
        Tracker("wandb", out, {}, start).close()
    first, resumed, again = (x["id"] for x in library.calls if x != "finish")
    assert first == resumed != again
    with pytest.raises(DataError, match="--track wandb: cannot start: PermissionError: no key"):
        Tracker("wandb", out, None, 0)


def events(out):
    """What a tensorboard shows of a run -> ({name: [(step, value)]}, {name: [(step, text)]})."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    tags = read.Tags()
    scalars = {name: [(e.step, e.value) for e in read.Scalars(name)] for name in tags["scalars"]}
    texts = {}
    for name in tags["tensors"]:
        texts[name] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(name)]
    return scalars, texts


def test_tensorboard_has_the_numbers_of_the_log(tmp_path, world, cold_start):
    """Also after a resume; steps that are logged again are there once."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    command = flags(world, out, steps=2, prompts=2, group=2, model=cold_start, save_every=2)
    run(*command, "--track", "tensorboard", ranks=2)
    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    scalars, texts = events(out)
    assert set(scalars) == {*numbers_of(log[0]), *numbers_of(log[1])}
    for x in log:
        for name, number in numbers_of(x).items():
            assert (x["step"], pytest.approx(number)) in scalars[name]
    assert [step for step, _ in texts["samples/0/text_summary"]] == [1, 2]
    assert "**response** " in texts["samples/3/text_summary"][0][1]
    later = Tracker("tensorboard", out, {}, 1)  # the run was killed: step 2 comes again
    later.log(line(2, reward=0.125))
    later.close()
    assert events(out)[0]["reward"] == [scalars["reward"][0], (2, 0.125)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_library_itself(tmp_path, monkeypatch, name):
    """Offline, in a folder: the calls are those that the library has."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the import
    pytest.importorskip(name)
    for start in (0, 2):
        tracker = Tracker(name, tmp_path, {"lr": 1}, start)
        for step in (start + 1, start + 2):
            tracker.log(line(step))
            tracker.samples([sample(step, "a")])
        assert tracker._log  # nothing has failed
        tracker.close()
    files = [x for x in tmp_path.rglob("*") if x.suffix in (".wandb", ".db")]
    assert len(files) == (2 if name == "wandb" else 1)
