"""Experiments over seeds: runs of train.py, eval.py and bench.py, each done once, and what their numbers come to.

A Lab is one seed: its worlds and runs, in a folder of its own. What has run is not run again unless its command, the weights that
it starts from or its records have changed (code, configs/ and media are not looked at), and what was killed goes on. Processes
of one thread each do the work side by side: the toy's operations are too small for more threads to help.
"""

import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import bench
import eval
import toy
import train
from experiments import figure, plain
from infra.files import digest, lock, write_whole
from infra.model_folder import fingerprint, local_folder
from infra.run_folder import commit
from infra.summary import mean

HERE = Path(__file__).parent.parent
T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t, 97.5 %, for 2 to 10 seeds


# ---- numbers over seeds


def stat(values):
    """A value for each seed -> {"mean", "interval": the 95 % interval of the mean, "seeds"}."""
    n, middle = len(values), statistics.fmean(values)
    half = T[n - 2] * statistics.stdev(values) / n**0.5
    return {"mean": middle, "interval": [middle - half, middle + half], "seeds": list(values)}


def combine(trees):
    """Nested dicts of numbers, one for each seed -> the same dict of stats."""
    first = trees[0]
    return (
        {key: combine([tree[key] for tree in trees]) for key in first}
        if isinstance(first, dict)
        else stat(trees)
    )


def table(tree, indent=0):
    """Nested dicts of stats as text."""
    out = []
    for key, x in tree.items():
        head = f"{'  ' * indent}{key}"
        if "mean" in x:
            low, high = x["interval"]
            out.append(
                f"{head:40} {figure.number(x['mean']):>8}   [{figure.number(low)}, {figure.number(high)}]"
            )
        else:
            out += [head, table(x, indent + 1)]
    return "\n".join(out)


# ---- running


def done_before(folder, command):
    """The record of a command that has ended, or None. command: {"command": as typed, "inputs": digests of what it reads}."""
    record = Path(f"{folder}.json")
    before = json.loads(record.read_text()) if record.exists() else {}
    same = all(before.get(key) == value for key, value in command.items())
    return before | {"ran": False} if same and "seconds" in before else None


def once(folder, main, argv, command):
    """Calls main(argv) unless that was done -> {"command", "inputs", "seconds", "commit", "ran"}. For a worker process.

    Its output goes to FOLDER.log, the record of it to FOLDER.json. A folder of another command or other inputs is deleted first.
    """
    record = Path(f"{folder}.json")
    with locked(folder):
        if before := done_before(folder, command):
            return before
        if not record.exists() or json.loads(record.read_text()) != command:
            shutil.rmtree(folder, ignore_errors=True)
            write_whole(record, json.dumps(command))
        began = time.perf_counter()
        with (
            open(f"{folder}.log", "a", encoding="utf-8") as console,
            redirect_stdout(console),
            redirect_stderr(console),
        ):
            try:
                main(argv)
            except BaseException as e:  # SystemExit too, which is how train.py ends on an error
                raise RuntimeError(f"{folder.name}: {e!r}; its output is in {folder}.log") from e
        done = command | {"seconds": round(time.perf_counter() - began, 1), "commit": commit()}
        write_whole(record, json.dumps(done))
        return done | {"ran": True}


@contextmanager
def locked(folder):
    """Nobody else works on the folder meanwhile: another claim may want the same run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "a+") as file:
        os.set_inheritable(file.fileno(), True)  # what this process starts holds on to it
        lock(file, wait=True)
        yield


def write_world(folder, write, seed, clips):
    """Writes a world unless it is there. For a worker process: the weights come from torch's one generator."""
    with locked(folder):
        if not folder.exists():
            write(folder, seed, clips)


# their docstrings are the commands as typed, and part of a run's record


def training(argv):
    """python train.py"""
    train.main(argv)


def answering(argv):
    """python eval.py"""
    eval.main(argv)


def timing(argv):
    """python bench.py"""
    bench.main(argv)


def training_plainly(argv):
    """python -m experiments.plain"""
    plain.main(argv)


def training_on_two(argv):
    """torchrun --nproc_per_node 2 train.py"""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
        str(HERE / "train.py"),
    ]
    subprocess.run(
        [sys.executable, *launch, *argv],
        stdout=sys.stdout,
        stderr=sys.stderr,
        check=True,
        close_fds=False,
    )


def workers(jobs):
    """So many processes of one thread, that end with this one, however it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers' torch
    return ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=end_with, initargs=(os.getpid(),)
    )


def end_with(parent):
    """Ends this process as soon as its parent has ended: a killed one tells nobody."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Lab:
    """One seed: its worlds, runs and answers, in `root`. shrink: divides all steps; clips: of the worlds; flags: of every
    training run, whatever the experiment says."""

    seed: int
    root: Path
    pool: ProcessPoolExecutor
    shrink: int = 1
    clips: dict = field(default_factory=lambda: toy.CLIPS)
    flags: tuple = ()
    runs: list = field(default_factory=list)

    def world(self, name="world", write=toy.write):
        """The folder of a world, written by write(folder, seed, clips)."""
        if not (self.root / name).exists():
            self.pool.submit(write_world, self.root / name, write, self.seed, self.clips).result()
        return self.root / name

    def records(self, name, make, *sources):
        """A records file beside its first source: what make(records of each source ...) gives."""
        path = sources[0].with_name(f"{name}.json")
        with locked(path):
            write_whole(
                path,
                json.dumps(make(*(json.loads(source.read_text()) for source in sources)), indent=1),
            )
        return path

    def call(self, name, main, argv, *inputs):
        """main(argv) in a worker, once (see `once`) -> the folder that it may write, root/name."""
        folder = self.root / name
        digests = [fingerprint(local_folder(x)) if x.is_dir() else digest(x) for x in inputs]
        argv = [str(x) for x in argv]
        words = shlex.join([*main.__doc__.split(), *argv]).replace(f"{HERE}/", "")
        command = {"command": words, "inputs": digests}
        done = (
            done_before(folder, command)
            or self.pool.submit(once, folder, main, argv, command).result()
        )
        self.runs.append({"seed": self.seed, "name": name} | done)
        if done["ran"]:
            tqdm.write(f"seed {self.seed}  {name:32} {done['seconds']:6.1f} s")
        return folder

    def train(
        self, name, algo, start, data, steps, flags=(), *, points=5, without=(), main=training
    ):
        """A run of train.py with the toy's flags -> its folder. start: model or run; data: records, with test.json beside;
        points: evaluations on it, besides the one before the first step; without: flags of the toy that are left out."""
        steps, config = max(2, steps // self.shrink), HERE / "configs" / f"toy_{algo}.txt"
        config = (
            [x for x in shlex.split(config.read_text(), comments=True) if x not in without]
            if without
            else [f"@{config}"]
        )
        argv = [
            *config,
            "--model",
            start,
            "--data",
            data,
            "--eval_data",
            data.with_name("test.json"),
            "--seed",
            self.seed,
            "--steps",
            steps,
            "--eval_every",
            max(1, steps // points),
            "--keep",
            1,
            *flags,
            *self.flags,
            "--resume",
            "--out",
            self.root / name,
        ]
        return self.call(name, main, argv, start, data)

    def answers(self, name, model, data, *flags):
        """A run of eval.py with the toy's flags -> {method: (its summary, its lines in the order of the records)}."""
        argv = [
            f"@{HERE}/configs/toy_eval.txt",
            "--model",
            model,
            "--data",
            data,
            *flags,
            "--out",
            self.root / name,
        ]
        folder, out = self.call(name, answering, argv, model, data), {}
        for summary in json.loads((folder / "summary.json").read_text())["methods"]:
            lines = [
                json.loads(x)
                for f in folder.glob(f"{summary['method']}.rank*.jsonl")
                for x in f.read_text().splitlines()
            ]
            out[summary["method"]] = summary, sorted(lines, key=lambda r: r["record"])
        return out


def log(folder):
    """The entries of a training log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder, key="eval_accuracy", points=None):
    """{step: value} of a training log, where it has the value; points: means of so many equal stretches of it."""
    seen = [(entry["step"], entry[key]) for entry in log(folder) if key in entry]
    size = -(-len(seen) // (points or len(seen)))
    return {
        str(some[-1][0]): mean(v for _, v in some)
        for some in (seen[i : i + size] for i in range(0, len(seen), size))
    }


def last(folder, key="eval_accuracy"):
    """The value of a training log at its end."""
    return [*curve(folder, key).values()][-1]
