"""The papers' claims in miniature: each an experiment in the toy world that a laptop reruns, with intervals over seeds.

    python claims.py                         the claims
    python claims.py grpo                    one of them, seeds 0 to 4 -> results/claims/grpo.json and grpo.svg
    python claims.py grpo --quick            two seeds, a 20th of the steps, a smaller world -> out/claims-quick/

An experiment is a function of a Lab, i.e. of one seed: runs of train.py, eval.py and bench.py, in processes of their own, and
the numbers that they come to. Worlds, cold starts and whatever else several claims need are shared, in out/claims/seedN/. What
has run is not run again unless its flags, weights or records have changed, and what was killed goes on: the same command until it
is done. `--jobs` processes of one thread each work side by side: the toy's operations are too small for more threads to help.

A number is given as its mean over seeds and the 95 % interval of that mean (Student's t). A seed is another world, other initial
weights, another order of the data and other dice. All arms of a seed share its world and its test questions, so a difference of
arms is taken seed by seed, and its own interval says whether they differ.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import bench
import eval
import figure
import rollout
import step
import toy
import train
from data import load_samples
from model import Policy, fingerprint, local_folder
from rewards import extract_answer
from run import commit, write_whole
from scores import mean

HERE = Path(__file__).parent
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, for 2 to 10 seeds


# ---- numbers over seeds

def stat(values):
    """A value for each seed -> {"mean", "interval": the 95 % interval of the mean, "seeds"}."""
    n, middle = len(values), statistics.fmean(values)
    half = T[n - 2] * statistics.stdev(values) / n**0.5
    return {"mean": middle, "interval": [middle - half, middle + half], "seeds": list(values)}


def combine(trees):
    """Nested dicts of numbers, one for each seed -> the same dict of stats."""
    first = trees[0]
    return {key: combine([tree[key] for tree in trees]) for key in first} if isinstance(first, dict) else stat(trees)


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
        with open(f"{folder}.log", "a", encoding="utf-8") as console, redirect_stdout(console), redirect_stderr(console):
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
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_world(folder, write, seed, clips):
    """Writes a world unless it is there. For a worker process: the weights come from torch's one generator."""
    with locked(folder):
        if not folder.exists():
            write(folder, seed, clips)


def training(argv):
    """python train.py"""
    train.main(argv)


def answering(argv):
    """python eval.py"""
    eval.main(argv)


def timing(argv):
    """python bench.py"""
    bench.main(argv)


def training_on_two(argv):
    """torchrun --nproc_per_node 2 train.py"""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", str(HERE / "train.py")]
    subprocess.run([sys.executable, *launch, *argv], stdout=sys.stdout, stderr=sys.stderr, check=True)


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
        write_whole(path, json.dumps(make(*(json.loads(source.read_text()) for source in sources)), indent=1))
        return path

    def call(self, name, main, argv, *inputs):
        """main(argv) in a worker, once (see `once`) -> the folder that it may write, root/name."""
        folder, of_file = self.root / name, lambda x: hashlib.blake2b(x.read_bytes(), digest_size=12).hexdigest()
        digests = [fingerprint(local_folder(x)) if x.is_dir() else of_file(x) for x in inputs]
        argv = [str(x) for x in argv]
        words = shlex.join([*main.__doc__.split(), *argv]).replace(f"{HERE}/", "")
        command = {"command": words, "inputs": digests}
        done = done_before(folder, command) or self.pool.submit(once, folder, main, argv, command).result()
        self.runs.append({"seed": self.seed, "name": name} | done)
        if done["ran"]:
            tqdm.write(f"seed {self.seed}  {name:32} {done['seconds']:6.1f} s")
        return folder

    def train(self, name, algo, start, data, steps, flags=(), *, points=5, without=(), main=training):
        """A run of train.py with the toy's flags -> its folder. start: model or run; data: records, with test.json beside;
        points: evaluations on it, besides the one before the first step; without: flags of the toy that are left out."""
        steps, config = max(2, steps // self.shrink), HERE / "configs" / f"toy_{algo}.txt"
        config = [x for x in shlex.split(config.read_text(), comments=True) if x not in without] if without else [f"@{config}"]
        argv = [*config, "--model", start, "--data", data, "--eval_data", data.with_name("test.json"), "--seed", self.seed,
                "--steps", steps, "--eval_every", max(1, steps // points), "--keep", 1, *flags, *self.flags,
                "--resume", "--out", self.root / name]
        return self.call(name, main, argv, start, data)

    def answers(self, name, model, data, *flags):
        """A run of eval.py with the toy's flags -> {method: (its summary, its lines in the order of the records)}."""
        argv = [f"@{HERE}/configs/toy_eval.txt", "--model", model, "--data", data, *flags, "--out", self.root / name]
        folder, out = self.call(name, answering, argv, model, data), {}
        for summary in json.loads((folder / "summary.json").read_text())["methods"]:
            lines = [json.loads(x) for f in folder.glob(f"{summary['method']}.rank*.jsonl") for x in f.read_text().splitlines()]
            out[summary["method"]] = summary, sorted(lines, key=lambda r: r["record"])
        return out

    # what several claims start from

    def cold_start(self):
        """The default run's: format, watching, and the teacher's habit of writing down the wrong answer."""
        return self.train("cold", "sft", self.world() / "model", self.world() / "cot.json", 600, points=1)

    def format_only(self):
        """A start that has learned what is said, but not when: reasoning and answers of other questions of the kind."""
        cot = self.records("cot-shuffled", shuffle, self.world() / "cot.json")
        return self.train("format", "sft", self.world() / "model", cot, 200, points=1)

    def rl(self, name, start, data=None, flags=(), *, algo="grpo", steps=100, **kw):
        """GRPO from a start, on the default world's questions unless told: no reasoning in the records, only answers."""
        return self.train(name, algo, start, data or self.world() / "train.json", steps, flags, **kw)

    def stills(self):
        """Images beside the default world's, as many as it has clips to train on (lit_stills)."""
        if not (self.world() / "stills.json").exists():
            rng = random.Random(f"stills {self.seed}")
            toy.write_split(self.world(), "stills", lit_stills(self.clips["train"], rng), rng)
        return self.world() / "stills.json"


def log(folder):
    """The entries of a training log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder, key="eval_accuracy", points=None):
    """{step: value} of a training log, where it has the value; points: means of so many equal stretches of it."""
    seen = [(entry["step"], entry[key]) for entry in log(folder) if key in entry]
    size = -(-len(seen) // (points or len(seen)))
    return {str(some[-1][0]): mean(v for _, v in some) for some in (seen[i : i + size] for i in range(0, len(seen), size))}


def last(folder, key="eval_accuracy"):
    """The value of a training log at its end."""
    return [*curve(folder, key).values()][-1]


# ---- 1. GRPO

def grpo(lab):
    """From the cold start: GRPO, and two controls of as many steps. In one, each answer is that of another question of its kind:
    the same rewards, that say nothing of the video. In the other, the teacher's examples go on."""
    cold, world = lab.cold_start(), lab.world()
    arms = {
        "GRPO": lab.rl("grpo", cold),
        "GRPO, answers shuffled": lab.rl("grpo-shuffled", cold, lab.records("train-shuffled", shuffle, world / "train.json")),
        "more SFT": lab.train("sft-more", "sft", cold, world / "cot.json", 100, ["--lr", 2e-4])}
    before, after = (lab.answers(f"{name}-greedy", run, world / "test.json")["greedy-16"]
                     for name, run in (("cold", cold), ("grpo", arms["GRPO"])))
    truth = load_samples(world / "test.json")
    seen = lambda r: f"<think>{truth[r['record']].reasoning}</think>" in r["rounds"][0]["responses"][0]
    kinds = lambda summary: {kind: accuracy for kind, (accuracy, _) in summary["by"]["data_source"].items()}
    ends = {name: last(run) for name, run in arms.items()}
    return {
        "accuracy": {name: curve(run) for name, run in arms.items()},
        "kinds": {kind: {"cold start": a, "GRPO": kinds(after[0])[kind]} for kind, a in kinds(before[0]).items()},
        "right": {"cold start": {"reasoning": mean(map(seen, before[1])), "answer": before[0]["accuracy"]},
                  "GRPO": {"reasoning": mean(map(seen, after[1])), "answer": after[0]["accuracy"]}},
        "GRPO minus": {"cold start": ends["GRPO"] - before[0]["accuracy"],
                       **{name: ends["GRPO"] - end for name, end in ends.items() if name != "GRPO"}}}


def shuffle(records):
    """The same questions, each with the answer (and the reasoning, if there is any) of another one of its kind."""
    rng, said = random.Random(0), {}
    for r in records:
        said.setdefault(r["data_source"], []).append({key: r[key] for key in ("solution", "process") if key in r})
    for some in said.values():
        rng.shuffle(some)
    return [r | said[r["data_source"]].pop() for r in records]


# ---- 2. T-GRPO and the order of frames

SKILLS, CUES = (0.5, 0.75, 1.0), (0.6, 0.75, 0.9)
LAMPS = dict(zip(toy.MOTIONS, toy.COLOURS))  # the colour that goes with a direction
METHODS = {
    "GRPO": ["--algo", "grpo"], "T-GRPO": ["--algo", "tgrpo"],
    "T-GRPO, advantage": ["--algo", "tgrpo", "--temporal", "advantage"],
    "GRPO, norm none": ["--algo", "grpo", "--norm", "none"], "T-GRPO, norm none": ["--algo", "tgrpo", "--norm", "none"],
    "contrast (ours)": ["--algo", "tgrpo", "--temporal", "contrast"]}
MEASURES = ("reasons from motion", "reads it right then", "accuracy", "accuracy lost in shuffled frames")


def frame_order(lab):
    """Which way does the square move? The order of the frames says it. So does the colour of a lamp, in a share of the training
    questions (the cue); in the test it says nothing. The cold start shows both ways of reasoning, one as often as the other: from
    the lamp, and from motion, with the right direction in a share of the examples (the skill). From there, RL by each method."""
    world, (skills, cues) = lab.world("order", write_order), (SKILLS, CUES) if lab.shrink == 1 else (SKILLS[:1], CUES[:1])
    out = {f"{method}: {measure}": {} for method in METHODS for measure in MEASURES}
    test, start = world / "test.json", {}
    truth = load_samples(test)

    def measured(run):
        """On the test, in which every clip is followed by itself with its frames shuffled -> MEASURES: accuracies of greedy
        answers, by the run's own last evaluation, and shares of four responses to each question, sampled as RL samples them
        (of those that reason from motion, 0 where none does)."""
        right, mixed = log(run)[-1]["eval_by_source"], lab.root / f"{run.name}-mixed.json"
        _, lines = lab.answers(f"{run.name}-sampled", run, test, "--m", 4, "--filter", mixed)["vote-16"]
        said = [(truth[r["record"]].reasoning, x) for r in lines[::2] for x in r["rounds"][0]["responses"]]
        moves = [f"<think>{reasoning}</think>" in x for reasoning, x in said if "the square moves" in x]
        return dict(zip(MEASURES, (len(moves) / len(said), mean(moves), right["motion"], right["motion"] - right["shuffled"])))

    for skill in map(str, skills):
        ways = lab.records(f"ways-{skill}", partial(misread, float(skill)), world / "ways.json")
        cold = lab.train(f"order-{skill}", "sft", world / "model", ways, 400, points=1)
        start[skill] = measured(cold)
        for cue in map(str, cues):
            data = lab.records(f"cue-{cue}", partial(mix, float(cue)), world / "agree.json", world / "differ.json")
            for method, flags in METHODS.items():
                name = re.sub(r"[^\w.]+", "-", f"order {skill} {cue} {method}").strip("-").lower()
                run = lab.rl(name, cold, data, ["--max_new", 20, *flags], points=1, without=("--train_vision",))
                for measure, value in measured(run).items():
                    out[f"{method}: {measure}"].setdefault(skill, {})[cue] = value
    minus = {method: {skill: {cue: x - out["GRPO: accuracy"][skill][cue] for cue, x in row.items()}
                      for skill, row in out[f"{method}: accuracy"].items()} for method in METHODS if method != "GRPO"}
    return {"cold start": start, **out, "accuracy minus GRPO's": minus}


def write_order(folder, seed, clips):
    """A world with this question only, and a smaller model. agree.json, differ.json: to train on, by what the lamp says."""
    splits = {"ways": clips["cot"], "agree": clips["train"], "differ": clips["train"], "test": clips["test"]}
    toy.write(folder, seed, splits, order_scenes, hidden=64, layers=3)


def order_scenes(split, clips, rng):
    """Clips of 8 frames, a square that moves above a lamp that is lit throughout -> (frames, questions) each, as toy.scenes.
    Without their order, the frames tell its axis only. In ways.json every second clip is answered by the lamp."""
    for i in range(clips):
        motion, frames = rng.choice(list(LAMPS)), toy.floor(8, rng)
        cue = rng.choice([m for m in LAMPS if split not in ("agree", "differ") or (m == motion) == (split == "agree")])
        toy.drift(frames, (220, 220, 220), motion, rng)
        frames[:, 20:27, 1:27] = toy.COLOURS[LAMPS[cue]]
        ask = lambda kind, answer, reasoning: {kind: ("Which way does the square move?", toy.MOTIONS, answer, reasoning)}
        by_lamp = split == "ways" and i % 2
        yield frames, ask("lamp", cue, f"the lamp is {LAMPS[cue]}") if by_lamp else ask("motion", motion, "the square moves {}")
        if split == "test":
            yield frames[rng.sample(range(8), 8)], ask("shuffled", motion, "the square moves {}")


def misread(skill, records):
    """The records, with another direction wherever one is read from motion, but for a share of `skill`."""
    rng, words, out = random.Random(0), list(toy.MOTIONS), []
    for r in records:
        right, off, wrong = "ABCD".index(extract_answer(r["solution"])), rng.randrange(1, 4), rng.random() >= skill
        said = (right + off) % 4
        read = {"process": r["process"].replace(words[right], words[said]), "solution": f"<answer>{'ABCD'[said]}</answer>"}
        out.append(r | read if wrong and r["data_source"] == "motion" else r)
    return out


def mix(cue, agree, differ):
    """So many records that the lamp agrees with the answer in a share of `cue`."""
    n = round(cue * len(agree))
    return agree[:n] + differ[n:]


# ---- 3. Video-R1

def video_r1(lab):
    """Images: RL on videos only, and on the same videos and still images; with all video questions, and with 60. A still is a
    frame of a clip in which a lamp flashes, with that clip's question; the accuracy is that on videos.
    Cold start: RL from random weights, from a start that has learned the format only (reasoning and answers of other questions of
    the kind), and from the cold start.
    Length: from a cold start that has also seen its reasoning said twice, RL with and without a bonus for short or long right
    answers; and from the usual cold start, that never says it twice, with the bonus for long ones."""
    cold, world = lab.cold_start(), lab.world()
    videos, few = partial(filter_list, is_video), lambda rs: random.Random(lab.seed).sample(videos(rs), min(60, len(videos(rs))))
    on_videos = ["--eval_data", lab.records("test-videos", videos, world / "test.json")]
    sources = [world / "train.json", lab.stills()]
    mixes = {"all videos": lab.records("videos", lambda v, s: videos(v), *sources),
             "all videos, images": lab.records("videos-stills", lambda v, s: videos(v) + s, *sources),
             "60 questions": lab.records("few", lambda v, s: few(v), *sources),
             "60 questions, images": lab.records("few-stills", lambda v, s: few(v) + s, *sources)}
    images = {name: curve(lab.rl(f"rl-{path.stem}", cold, path, on_videos, steps=60, points=6)) for name, path in mixes.items()}
    end = {name: [*points.values()][-1] for name, points in images.items()}

    starts = {"random weights": lab.rl("rl-random", world / "model"), "format only": lab.rl("rl-format", lab.format_only()),
              "cold start": lab.rl("grpo", cold)}

    cot = lab.records("cot-wordy", say_twice, world / "cot.json")
    wordy = lab.train("wordy", "sft", cold, cot, 100, ["--lr", 2e-4], points=1)
    short, long = (["--len_bonus", 0.2, "--len_lo", lo, "--len_hi", hi] for lo, hi in ((1, 17), (18, 32)))
    lengths = {"no bonus": lab.rl("length-none", wordy, None, steps=60, points=1),
               "up to 17 tokens": lab.rl("length-short", wordy, None, short, steps=60, points=1),
               "18 to 32 tokens": lab.rl("length-long", wordy, None, long, steps=60, points=1),
               "18 to 32, never seen": lab.rl("length-unseen", cold, None, long, steps=60, points=1)}
    return {
        "images": images,
        "images minus none": {name: end[f"{name}, images"] - end[name] for name in ("all videos", "60 questions")},
        "starts": {name: curve(run) for name, run in starts.items()},
        "lengths": {name: curve(run, "response_length", 6) for name, run in lengths.items()},
        "lengths, accuracy": {name: last(run) for name, run in lengths.items()}}


def is_video(r):
    """Whether a record is about a video."""
    return r["data_type"] == "video"


def filter_list(keep, records):
    """Those to keep, as a list."""
    return list(filter(keep, records))


def lit_stills(n, rng):
    """So many frames of clips in which a lamp flashes, each that of the flash, with the clip's question."""
    for _ in range(n):
        frames, questions = toy.clip("flash", rng)
        lit = frames[:, 20:27].sum((1, 2, 3)).argmax()
        yield frames[lit : lit + 1], {"flash": questions["flash"]}


def say_twice(records):
    """The teacher's examples, in every second of which the reasoning is said twice."""
    twice = lambda r: r | {"process": r["process"].replace("</think>", f", {r['process'].removeprefix('<think>')}")}
    return [twice(r) if i % 2 else r for i, r in enumerate(records)]


# ---- 4. Video-RTS

def video_rts(lab):
    """From the cold start, on n of the training questions: RL, which sees their answers, and SFT on the reasoning and the answers
    of a teacher who makes no mistake, on the same n. Then sparse-to-dense, and greedy answers and votes of five at a fixed number
    of frames, by the policies before and after RL on all questions."""
    cold, world = lab.cold_start(), lab.world()
    total = len(json.loads((world / "train.json").read_text()))
    explained = lab.records("explained", explain, world / "train.json", world / "cot.json")
    rl, sft = {}, {}
    for n in sorted({min(n, total) for n in (30, 100, 300, total)}):
        some = lab.records(f"train-{n}", first_of(n, lab.seed), world / "train.json")
        rl[str(n)] = last(lab.rl(f"rl-{n}", cold, some) if n < total else lab.rl("grpo", cold))
        some = lab.records(f"explained-{n}", first_of(n, lab.seed), explained)
        sft[str(n)] = last(lab.train(f"sft-{n}", "sft", cold, some, 100, ["--lr", 2e-4], points=1))
    methods = {"before RL": lab.answers("cold-tts", cold, world / "test.json", "--tts"),
               "after RL": lab.answers("grpo-tts", lab.rl("grpo", cold), world / "test.json", "--tts")}
    of = lambda key: {method: {when: found[method][0][key] for when, found in methods.items()} for method in methods["after RL"]}
    accuracy, tokens = of("accuracy"), {method: x["after RL"] for method, x in of("mean_visual_tokens").items()}
    greedy, vote, search = accuracy["greedy-16"], accuracy["vote-16"], accuracy["s2d-4-16"]
    return {
        "questions": {"RL, answers only": rl, "SFT, perfect teacher": sft},
        "RL minus SFT on all": {n: rl[n] - sft[str(total)] for n in rl},
        "accuracy": accuracy, "tokens": tokens,
        "gains": {"RL": greedy["after RL"] - greedy["before RL"],
                  "sparse-to-dense before RL": search["before RL"] - greedy["before RL"],
                  "sparse-to-dense after RL": search["after RL"] - greedy["after RL"]},
        "sparse-to-dense minus dense vote": {when: search[when] - vote[when] for when in search}}


def first_of(n, seed):
    """A function of records that gives n of them, in an order of their own: of a larger n, the first."""
    return lambda records: random.Random(seed).sample(records, len(records))[:n]


def explain(records, cot):
    """The records with the reasoning of a teacher who watches well and writes down what he saw, in the words of cot.json."""
    start = {r["data_source"]: r["process"].rsplit(" ", 1)[0] for r in cot}
    seen = lambda r, said: next((o.split(". ")[1] for o in r["options"] if o.startswith(f"{said}.")), said)
    return [r | {"process": f"{start[r['data_source']]} {seen(r, extract_answer(r['solution']))}</think>"} for r in records]


# ---- 5. LongVILA-R1

def longvila_r1(lab):
    """Frames: cold starts with the same examples, whose reasoning is none, a sentence, or a sentence that counts aloud; RL from
    each; greedy accuracy at 2, 4, 8 and 16 frames. Stages: the cold start and as many more steps of SFT as RL has, RL from a
    start that has learned the format only, and RL from the cold start. Cost: RL with a frozen vision tower; with its embeddings
    kept on disk; with every row shared by two ranks."""
    cold, world = lab.cold_start(), lab.world()
    cot, test = world / "cot.json", world / "test.json"
    taught = lambda name, make: lab.train(name, "sft", world / "model", lab.records(f"cot-{name}", make, cot), 600, points=1)
    after = {"no reasoning": lab.rl("rl-silent", taught("silent", silence)), "a sentence": lab.rl("grpo", cold),
             "counting aloud": lab.rl("rl-aloud", taught("aloud", count_aloud))}
    greedy = lambda run, n: lab.answers(f"{run.name}-{n}-frames", run, test, "--frames", n, "--min_frames", 2)[f"greedy-{n}"]
    found = {name: {str(n): greedy(run, n) for n in (2, 4, 8, 16)} for name, run in after.items()}
    frames = {name: {n: summary["accuracy"] for n, (summary, _) in by.items()} for name, by in found.items()}
    count = {name: {n: summary["by"]["data_source"]["count"][0] for n, (summary, _) in by.items()} for name, by in found.items()}
    gain = {name: accuracy["16"] - accuracy["4"] for name, accuracy in frames.items()}

    stages = {"SFT": last(lab.train("sft-more", "sft", cold, cot, 100, ["--lr", 2e-4])),
              "RL": last(lab.rl("rl-format", lab.format_only())), "SFT + RL": frames["a sentence"]["16"]}

    some = lab.records("train-100", first_of(100, lab.seed), world / "train.json")  # each is seen five times
    frozen = partial(lab.rl, start=cold, data=some, steps=30, points=1, without=("--train_vision",))
    ways = {"as is": frozen("frozen"),
            "embeddings on disk": frozen("frozen-cache", flags=["--embedding_cache", lab.root / "frozen-cache" / "embeddings"]),
            "two ranks share a row": frozen("frozen-sp", flags=["--sp", 2], main=training_on_two)}
    return {
        "frames": frames, "frames, counting": count, "from 4 to 16 frames": gain,
        "reasoning's share of it": {name: gain[name] - gain["no reasoning"] for name in gain if name != "no reasoning"},
        "stages": stages, "SFT + RL minus": {name: stages["SFT + RL"] - stages[name] for name in ("SFT", "RL")},
        **same_curve(ways, "as is")}


def silence(records):
    """The records with a stroke in the place of the reasoning."""
    return [r | {"process": "<think>-</think>"} for r in records]


def count_aloud(records):
    """The records with every number in the reasoning counted up to: it lights up 1 2 3."""
    return [r | {"process": re.sub(r"\d+", lambda m: " ".join(map(str, range(1, int(m[0]) + 1))), r["process"])} for r in records]


def same_curve(ways, base):
    """Runs that ought to be the same -> their rewards and times, and how far their rewards are from those of ways[base]."""
    rewards = {name: curve(run, "reward") for name, run in ways.items()}
    apart = {name: [abs(r - rewards[base][n]) for n, r in steps.items()] for name, steps in rewards.items() if name != base}
    return {
        "reward": {name: curve(run, "reward", 6) for name, run in ways.items()},
        "end": {name: last(run) for name, run in ways.items()},
        "largest difference of a step's mean reward": {name: max(xs) for name, xs in apart.items()},
        "steps before the first difference": {
            name: next((i for i, x in enumerate(xs) if x > 1e-9), len(xs)) for name, xs in apart.items()},
        "seconds": {name: statistics.median(e["seconds"]["step"] for e in log(run)[1:]) for name, run in ways.items()}}


# ---- 6. the shared prefix

def shared_prefix(lab):
    """The same GRPO run on the video questions, with this code's attention, rollout and packed rows, and with transformers' own
    (its SDPA attention and cache, G copies of the prompt, the video encoded again for every row of every pass). And bench.py's
    times of a step of a 16.8 M-parameter model, by the number of frames and by G: the plain way over ours."""
    cold, world = lab.cold_start(), lab.world()
    videos = partial(filter_list, is_video)
    train_json, test_json = (lab.records(f"{split}-videos", videos, world / f"{split}.json") for split in ("train", "test"))
    once_more = partial(lab.rl, start=cold, data=train_json, flags=["--eval_data", test_json], steps=40, points=2)
    ways = {"ours": once_more("prefix-ours"), "plain": once_more("prefix-plain", main=training_plainly)}

    def times(frames, group):
        """{phase: how many times as long the plain way takes}"""
        out = lab.root / f"bench-{frames}-{group}.figures"
        lab.call(out.stem, timing, ["--frames", frames, "--group", group, "--new", new, "--repeat", 1, "--json", out])
        rows = {row["name"]: row for row in json.loads(out.read_text())["results"][0]["rows"]}
        plain, ours = rows["plain"], rows["+ packed rows"]
        total = lambda row, phases: sum(row[p] for p in phases)
        parts = {"step": bench.PHASES, "rollout": ("prefill", "decode"), "training pass": ("train",)}
        return {part: total(plain, phases) / total(ours, phases) for part, phases in parts.items()}

    new = max(4, 32 // lab.shrink)  # tokens of a response
    frames = sorted({max(4, n // lab.shrink // 2 * 2) for n in (16, 32, 64, 128)})
    by_frames = {n: times(n, 8) for n in frames}
    by_group = {G: times(frames[len(frames) // 2], G) for G in (2, 4, 8, 16)}
    turn = lambda by: {part: {str(x): found[part] for x, found in by.items()} for part in ("step", "rollout", "training pass")}
    return {**same_curve(ways, "ours"), "by frames": turn(by_frames), "by G": turn(by_group)}


class PlainPolicy(Policy):
    """The policy as transformers has it: its attention, and for every response a row of its own with the video encoded again."""

    def __init__(self, net, folder):
        super().__init__(net, folder)
        net.set_attn_implementation("sdpa")

    def encode(self, prompts):
        """Nothing is encoded ahead."""
        return [torch.zeros(0, self.config.text_config.hidden_size) for _ in prompts]

    def _score(self, prompts, responses, features, temperature):
        out = []
        for prompt, group in zip(prompts, responses):
            plain = bench.Plain(self, prompt, [*pad_sequence(group, batch_first=True)])
            logp = (plain.distribution() / temperature).log_softmax(-1)  # (G, R, vocabulary)
            entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
            chosen = logp.gather(-1, plain.responses[..., None])[..., 0]
            out += [(x[: len(r)], h[: len(r)]) for x, h, r in zip(chosen, entropy, group)]
        return tuple(torch.cat(column) for column in zip(*out))


@torch.no_grad()
def generate_plainly(policy, prompts, G, *, max_new, temperature=1.0, top_p=1.0, seeds, features=None):
    """rollout.generate in transformers' forward and cache, with the same dice: G copies of a prompt, prompt after prompt."""
    groups, training = [], policy.training
    policy.eval()
    eos = torch.tensor(policy.eos_ids)
    for prompt, seed in zip(prompts, seeds):
        plain = bench.Plain(policy, prompt, [torch.zeros(max_new, dtype=torch.long)] * G)
        uniform = torch.rand(G, max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        P, ids, video, cache, tokens, logps = len(prompt.ids), plain.ids.expand(G, -1), plain.copies, None, [], []
        done, start = torch.zeros(G, dtype=torch.bool), 0
        while len(tokens) < max_new and not done.all():
            out = policy.net(ids, **video, position_ids=plain.positions[..., start : start + ids.shape[1]], past_key_values=cache,
                             use_cache=True, logits_to_keep=1, mm_token_type_ids=plain.kinds(ids))
            logits = out.logits[:, -1].float().index_fill(-1, policy.banned, -1e30)
            token, logp = rollout.sample(logits, uniform[:, len(tokens)], temperature, top_p)
            tokens.append(torch.where(done, -1, token))
            logps.append(logp)
            done = done | torch.isin(token, eos)
            start, ids, video, cache = P + len(tokens) - 1, token[:, None], {}, out.past_key_values
        tokens, logps = torch.stack(tokens, 1), torch.stack(logps, 1)
        lengths = (tokens >= 0).sum(1).tolist()
        groups.append(rollout.Group(prompt, [t[:n] for t, n in zip(tokens, lengths)], [x[:n] for x, n in zip(logps, lengths)],
                                    [int(t[n - 1]) not in policy.eos_ids for t, n in zip(tokens, lengths)]))
    policy.train(training)
    return groups


def training_plainly(argv):  # train.py, with PlainPolicy and generate_plainly in the places of Policy and generate
    """claims.training_plainly"""
    with (patch.object(train, "Policy", PlainPolicy), patch.object(step, "generate", generate_plainly),
          patch.object(eval, "generate", generate_plainly)):
        train.main(argv)


# ---- the claims

class Claim(NamedTuple):
    """run: from a Lab to nested dicts of numbers.  panels: (kind, key of those, title, x axis, y axis) and, for a logarithmic
    x axis, True.  minutes: of five seeds on two cores, cold starts included; an estimate, where results/ has no such run."""
    paper: str
    line: str
    minutes: int
    run: Callable
    panels: list


SHARE, STEP = "accuracy on held-out questions", "step"
CLAIMS = {
    "grpo": Claim(
        "Video-R1, Video-RTS, LongVILA-R1", "GRPO with rule rewards raises accuracy without reasoning labels", 33, grpo, [
            ("lines", "accuracy", "Learning curves", STEP, SHARE),
            ("bars", "kinds", "By kind of question", "", SHARE),
            ("bars", "right", "What GRPO repairs", "", "share of held-out questions"),
            ("bars", "GRPO minus", "GRPO's end, minus", "", "difference in accuracy")]),
    "frame_order": Claim(
        "Video-R1", "T-GRPO makes the policy use the order of frames", 90, frame_order, [
            ("map", f"{method}: {measure}", f"{method}: {measure}", "cue: the lamp's share of right answers in training",
             "skill in the cold start") for method in METHODS for measure in (MEASURES[0], MEASURES[2])]),
    "video_r1": Claim(
        "Video-R1", "images help video questions; a cold start before RL helps; a length reward changes length", 40,
        video_r1, [
            ("lines", "images", "Images beside the videos", STEP, "accuracy on held-out video questions"),
            ("bars", "images minus none", "With images, minus without, at the end", "", "difference in accuracy"),
            ("lines", "starts", "RL from three starts", STEP, SHARE),
            ("lines", "lengths", "Length reward of 0.2", STEP, "tokens of a response")]),
    "video_rts": Claim(
        "Video-RTS", "RL on few questions matches SFT on many examples; sparse-to-dense saves tokens; both add up", 40,
        video_rts, [
            ("lines", "questions", "RL against SFT from the same start", "questions trained on", SHARE, True),
            ("bars", "gains", "Gains over a greedy answer at 16 frames", "", "difference in accuracy"),
            ("bars", "accuracy", "Ways to answer", "", SHARE),
            ("bars", "tokens", "Their cost", "", "visual tokens a question, all rounds")]),
    "longvila_r1": Claim(
        "LongVILA-R1", "more frames help, more so with reasoning; SFT + RL beats either; MR-SP changes cost, not results", 40,
        longvila_r1, [
            ("lines", "frames", "Frames, after RL", "frames", SHARE, True),
            ("lines", "frames, counting", "Frames, after RL: counting", "frames", "accuracy on counting questions", True),
            ("bars", "stages", "Stages", "", SHARE),
            ("lines", "reward", "The same run, three ways", STEP, "mean reward of a step (0 to 2)")]),
    "shared_prefix": Claim(
        "this code", "a shared prefix changes cost, not results; what it saves grows with frames and G", 35, shared_prefix, [
            ("lines", "reward", "The same run, both ways", STEP, "mean reward of a step (0 to 2)"),
            ("bars", "seconds", "Its cost in the toy", "", "seconds a step"),
            ("lines", "by frames", "By frames, G = 8", "frames", "plain time / ours", True),
            ("lines", "by G", "By G, at 64 frames", "G", "plain time / ours", True)]),
}


def workers(jobs):
    """So many processes of one thread, that end with this one, however it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers' torch
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=end_with, initargs=(os.getpid(),))


def end_with(parent):
    """Ends this process as soon as its parent has ended: a killed one tells nobody."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def study(name, seeds, root, results, pool, **size):
    """Runs a claim, writes results/NAME.json and NAME.svg -> what the JSON holds, and how many commands were run for it now.
    size: shrink, clips and flags of the Labs."""
    claim, labs = CLAIMS[name], [Lab(seed, Path(root) / f"seed{seed}", pool, **size) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as threads:
        values = combine(list(threads.map(claim.run, labs)))
    runs = [run for lab in labs for run in {r["name"]: r for r in lab.runs}.values()]
    now = sum(run.pop("ran") for lab in labs for run in lab.runs)
    done = {"claim": name, "paper": claim.paper, "line": claim.line, "seeds": list(seeds), "values": values,
            "process_minutes": round(sum(run["seconds"] for run in runs) / 60, 1), "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process", "torch": torch.__version__,
            "runs": runs}
    panels = [figure.Panel(kind, values[key], *rest) for kind, key, *rest in claim.panels]
    Path(results).mkdir(parents=True, exist_ok=True)
    write_whole(Path(results) / f"{name}.json", json.dumps(done, indent=1))
    write_whole(Path(results) / f"{name}.svg", figure.draw(f"{claim.paper}: {claim.line}", panels))
    return done, now


def table(tree, indent=0):
    """Nested dicts of stats as text."""
    out = []
    for key, x in tree.items():
        head = f"{'  ' * indent}{key}"
        if "mean" in x:
            low, high = x["interval"]
            out.append(f"{head:40} {figure.number(x['mean']):>8}   [{figure.number(low)}, {figure.number(high)}]")
        else:
            out += [head, table(x, indent + 1)]
    return "\n".join(out)


def main(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("claim", nargs="?", choices=CLAIMS, help="its name; without one, they are listed")
    p.add_argument("--seeds", type=int, default=5, help="worlds and weights: 2 to 10 (default: 5)")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread, side by side (default: 2)")
    p.add_argument("--quick", action="store_true", help="two seeds, a 20th of the steps, a smaller world: does it run?")
    args = p.parse_args(argv)
    if not 2 <= args.seeds <= 10:
        p.error(f"--seeds {args.seeds}: expected 2 to 10")
    if not args.claim:
        for name, claim in CLAIMS.items():
            print(f"{name:14} {claim.line} ({claim.paper}); about {claim.minutes} minutes")
        return
    with workers(args.jobs) as pool:
        if args.quick:
            small = {"cot": 240, "train": 120, "test": 16}
            done, now = study(args.claim, range(2), "out/claims-quick", "out/claims-quick", pool, shrink=20, clips=small)
        else:
            done, now = study(args.claim, range(args.seeds), "out/claims", "results/claims", pool)
    print(table(done["values"]))
    print(f"{now} of {len(done['runs'])} commands were run now; {done['process_minutes']} process minutes in all")


if __name__ == "__main__":
    main()
