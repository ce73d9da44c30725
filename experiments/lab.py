"""Experiments over seeds: runs of train.py, eval.py and bench.py, each done once.

A Lab is one seed, with its worlds and runs in a folder of its own. A command that has finished is
not run again, unless the command, its starting weights or its records have changed (code, configs/
and media are not compared). A command that was killed resumes. Worker processes of one thread run
side by side: the toy's operations are too small for more threads.
"""

import json
import multiprocessing
import os
import shlex
import shutil
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
from experiments import plain
from infra.files import digest, lock, write_whole
from infra.flags import flag_words
from infra.model_folder import fingerprint, local_folder
from infra.run_folder import commit
from infra.summary import mean

HERE = Path(__file__).parent.parent


# ---- commands, each run once


def done_before(folder, command):
    """The record of a command that has finished, or None. command: {"command": as typed, "inputs":
    digests of what it reads}."""
    record = Path(f"{folder}.json")
    if not record.exists():
        return None
    before = json.loads(record.read_text())
    same = all(before.get(key) == value for key, value in command.items())
    return before | {"ran": False} if same and "seconds" in before else None


def once(folder, main, argv, command):
    """Calls main(argv), unless that was done -> {"command", "inputs", "seconds", "commit", "ran"}.
    For a worker process.

    Its output goes to FOLDER.log, its record to FOLDER.json. A folder of another command or other
    inputs is deleted first. Raises RuntimeError, which names the log, if the command fails."""
    record = Path(f"{folder}.json")
    with locked(folder):
        if before := done_before(folder, command):
            return before
        if not record.exists() or json.loads(record.read_text()) != command:
            shutil.rmtree(folder, ignore_errors=True)
            write_whole(record, json.dumps(command))
        began = time.perf_counter()
        with open(f"{folder}.log", "a", encoding="utf-8") as console:
            with redirect_stdout(console), redirect_stderr(console):
                try:
                    main(argv)
                except BaseException as e:  # also SystemExit, which ends train.py on an error
                    message = f"{folder.name}: {e!r}; its output is in {folder}.log"
                    raise RuntimeError(message) from e
        done = command | {"seconds": round(time.perf_counter() - began, 1), "commit": commit()}
        write_whole(record, json.dumps(done))
        return done | {"ran": True}


@contextmanager
def locked(folder):
    """Keeps other processes off the folder: another claim may want the same run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "a+") as file:
        os.set_inheritable(file.fileno(), True)  # processes that this one starts hold it too
        lock(file, wait=True)
        yield


def write_world(folder, write, seed, clips):
    """Writes a world unless it is there. For a worker process: the weights come from torch's
    global generator."""
    with locked(folder):
        if not folder.exists():
            write(folder, seed, clips)


# the docstrings of these functions are the commands as typed, and part of a run's record


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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    subprocess.run(
        [sys.executable, *torchrun, str(HERE / "train.py"), *argv],
        stdout=sys.stdout,
        stderr=sys.stderr,
        check=True,
        close_fds=False,
    )


# ---- worker processes


def workers(jobs):
    """A pool of processes of one thread each, which end with this process, however it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers' torch
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=end_with, initargs=(os.getpid(),))


def end_with(parent):
    """Ends this process as soon as its parent has ended, even if the parent was killed."""
    threading.Thread(target=watch, args=(parent,), daemon=True).start()


def watch(parent):
    """Waits until the parent has ended, and then ends this process."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# ---- one seed


@dataclass
class Lab:
    """One seed: its worlds, runs and answers, in `root`. shrink: divides all steps; clips: of the
    worlds; flags: added to every training run; eval_flags: to every run of eval.py."""

    seed: int
    root: Path
    pool: ProcessPoolExecutor
    shrink: int = 1
    clips: dict = field(default_factory=lambda: toy.CLIPS)
    flags: tuple = ()
    eval_flags: tuple = ()
    runs: list = field(default_factory=list)

    def world(self, name="world", write=toy.write):
        """The folder of a world, written by write(folder, seed, clips)."""
        folder = self.root / name
        if not folder.exists():
            self.pool.submit(write_world, folder, write, self.seed, self.clips).result()
        return folder

    def records(self, name, make, *sources):
        """Writes a file of records beside its first source: make(records of each source ...) ->
        its path."""
        path = sources[0].with_name(f"{name}.json")
        with locked(path):
            read = [json.loads(source.read_text()) for source in sources]
            write_whole(path, json.dumps(make(*read), indent=1))
        return path

    def call(self, name, main, argv, *inputs):
        """Runs main(argv) in a worker, once (see `once`) -> the folder that it may write,
        root/name."""
        folder = self.root / name
        digests = [fingerprint(local_folder(x)) if x.is_dir() else digest(x) for x in inputs]
        argv = [str(x) for x in argv]
        typed = shlex.join([*main.__doc__.split(), *argv]).replace(f"{HERE}/", "")
        command = {"command": typed, "inputs": digests}
        done = done_before(folder, command)
        if not done:
            done = self.pool.submit(once, folder, main, argv, command).result()
        self.runs.append({"seed": self.seed, "name": name} | done)
        if done["ran"]:
            tqdm.write(f"seed {self.seed}  {name:32} {done['seconds']:6.1f} s")
        return folder

    def train(
        self, name, algo, start, data, steps, flags=(), *, points=5, without=(), main=training
    ):
        """A run of train.py with the toy's flags -> its folder. start: a model or run; data:
        records, with test.json beside them; points: evaluations, besides the one before the first
        step; without: flags of the toy to leave out."""
        steps, config = max(2, steps // self.shrink), HERE / "configs" / f"toy_{algo}.txt"
        toys = [f"@{config}"]
        if without:
            words = [word for line in flag_words(config).values() for word in line]
            toys = [word for word in words if word not in without]
        argv = [*toys, "--model", start, "--data", data]
        argv += ["--eval_data", data.with_name("test.json"), "--seed", self.seed]
        argv += ["--steps", steps, "--eval_every", max(1, steps // points), "--keep", 1]
        argv += [*flags, *self.flags, "--resume", "--out", self.root / name]
        return self.call(name, main, argv, start, data)

    def answers(self, name, model, data, *flags):
        """A run of eval.py with the toy's flags -> {method: (its summary, its lines in the order
        of the records)}."""
        argv = [f"@{HERE}/configs/toy_eval.txt", "--model", model, "--data", data]
        argv += [*flags, *self.eval_flags, "--out", self.root / name]
        folder, out = self.call(name, answering, argv, model, data), {}
        for summary in json.loads((folder / "summary.json").read_text())["methods"]:
            lines = []
            for file in folder.glob(f"{summary['method']}.rank*.jsonl"):
                lines += [json.loads(line) for line in file.read_text().splitlines()]
            lines.sort(key=lambda line: line["record"])
            out[summary["method"]] = summary, lines
        return out


# ---- training logs


def log(folder):
    """The entries of a training log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder, key="eval_accuracy", points=None):
    """{step: value} of a training log, where it has the value. points: average over this many
    equal stretches."""
    seen = [(entry["step"], entry[key]) for entry in log(folder) if key in entry]
    if points is None:
        return {str(step): value for step, value in seen}
    size, found = -(-len(seen) // points), {}  # steps of a stretch, rounded up
    for i in range(0, len(seen), size):
        stretch = seen[i : i + size]
        found[str(stretch[-1][0])] = mean(value for _, value in stretch)
    return found


def last(folder, key="eval_accuracy"):
    """The value of a training log at its end."""
    return list(curve(folder, key).values())[-1]
