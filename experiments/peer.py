"""A peer beside us: the same GRPO steps through TRL's GRPOTrainer and through train.py.

    pip install trl==1.16.0 -r experiments/requirements.txt
    python -m experiments.peer            20 minutes on two cores -> results/peer.json and peer.svg
    python -m experiments.peer --quick    checks that it runs -> out/peer-quick
    python -m experiments.peer --draw     draws the figure again from the JSON file

Both train from one checkpoint on the same prompts (token ids, pixels and positions), with the same
G, lengths, rewards, loss and optimizer. Each is a process of one thread. They take a step in turn,
while the other waits. Seconds are CPU seconds, so that other work on the machine hardly counts. A
comparison that is done is not run again: repeat a killed command.

    learning      the toy's recipe with its rules as rewards: curves, and the accuracy at both ends
    toy           the same with equal work: every response has all its tokens, and rewards are
                  drawn, so that every group is trained on
    long video    equal work on 128 frames: one prompt of some thousand tokens, the tower frozen
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import infra.clock
import toy
import train
from experiments.shared import STEP, Panel
from experiments.stats import combine, stat, table
from infra.clock import new_step, seconds, timed
from infra.files import write_whole
from infra.model_folder import load_tokenizer
from infra.ranks import ranks
from infra.run_folder import commit
from model import Policy

VERSION = "1.16.0"  # of TRL: another may differ in what it does, and in how it is measured
RESULTS = Path(__file__).parent / "results"
LONG = dict(hidden=384, layers=8, heads=6, kv_heads=2, vision_hidden=192, vision_layers=4)
CPU_CLOCK = SimpleNamespace(perf_counter=time.process_time)  # in place of the module `time`
PANELS = [
    Panel("bars", "seconds", "A step at equal work", "", "CPU seconds"),
    Panel("bars", "memory", "Peak memory of the process", "", "GB"),
    Panel("lines", "reward", "The same learning (toy)", STEP, "mean reward of a step (0 to 2)"),
    Panel("bars", "accuracy", "Held-out accuracy (toy)", "", "share of questions"),
]


# ---- what is compared


def comparisons(root, quick):
    """{name: (flags of train.py, rows of TRL's micro-batch, whether the work is made equal)}."""
    toys = write_toy(root / "toy", quick)
    long = write_long(root / "long", toys)
    recipe = ["@configs/toy_grpo.txt", "--schedule", "constant", "--warmup", 0]
    recipe += ["--model", toys / "sft", "--data", toys / "world/train.json"]
    recipe += ["--eval_data", toys / "world/test.json"]
    found = {"toy": ([*recipe, "--w_format", 0, "--steps", 3 if quick else 10], 32, True)}
    flags = ["--algo", "grpo", "--prompts", 1, "--group", 8, "--max_new", 32, "--beta2", 0.95]
    flags += ["--max_frames", 128, "--max_pixels", 112 * 112, "--grad_checkpointing", 0]
    flags += ["--model", long / "model", "--data", long / "train.json", "--w_format", 0]
    found["long video"] = [*flags, "--steps", 2 if quick else 5], 8, True
    for seed in range(2 if quick else 3):
        flags = ["--steps", 2 if quick else 24, "--seed", seed]
        found[f"learning {seed}"] = [*recipe, *flags], 32, False
    return found


def write_toy(folder, quick):
    """The embedded default's world and cold start -> their folder."""
    if not (folder / "sft" / "config.txt").exists() or not list(folder.glob("sft/checkpoint-*")):
        steps = ["--steps", 20] if quick else []
        argv = [*train.toy_recipe("sft"), *steps, "--out", folder]
        train.main([str(x) for x in argv])
    return folder


def write_long(folder, toys):
    """A model of 17 M parameters with random weights, and eight clips of 128 frames of noise -> the
    folder."""
    if folder.exists():
        return folder
    partial_folder = Path(f"{folder}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    source, model = toys / "world" / "model", partial_folder / "model"
    model.mkdir(parents=True)
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, model / file)
    tokenizer = load_tokenizer(source)
    toy.write_model(model, toy.tiny_config(tokenizer, **LONG), tokenizer)
    records = []
    for i in range(8):
        shape = (128, 112, 112, 3)
        pixels = np.random.default_rng(i).integers(256, size=shape, dtype=np.uint8)
        toy.write_y4m(partial_folder / f"{i}.y4m", pixels, 2)
        record = dict(problem_id=i, problem="What is seen?", problem_type="free-form")
        record |= dict(data_type="video", path=f"{i}.y4m", solution="<answer>noise</answer>")
        records.append(record)
    write_whole(partial_folder / "train.json", json.dumps(records))
    partial_folder.rename(folder)
    return folder


# ---- the two ways, each a process


def ours(pipe, argv, rows, equal, out):
    """train.py's steps, one for each message; then the accuracy of each folder that it is sent."""
    args = train.parse_args([*argv, "--out", str(out)])
    infra.clock.time = CPU_CLOCK
    with ranks(timedelta(minutes=30)) as device, ExitStack() as at_end:
        samples, held_out = train.read_data(args)
        run, _ = train.open_training(args, samples, device, at_end, Policy)
        if equal:
            run.policy.eos_ids = []
            train.accuracy_reward = drawn_reward()
        for step in range(args.steps):
            pipe.recv()
            new_step()
            with timed("step"):
                entry, _, _ = train.train_step(run, step)
            rollout = seconds["encode"] + seconds["rollout"]
            trained = seconds["train"] + seconds["optimizer"]
            pipe.send(figures(seconds["step"], rollout, trained, entry["reward"]))
        run.policy.save(out / "end")
        while folder := pipe.recv():
            answering = replace(run, policy=Policy.load(folder))
            pipe.send(train.evaluate(answering, held_out)["eval_accuracy"])


def trl(pipe, argv, rows, equal, out):
    """GRPOTrainer's steps, one for each message."""
    from experiments import peer_trl  # TRL, which nothing else here needs

    args = train.parse_args([*argv, "--out", str(out)])
    samples, _ = train.read_data(args)
    drawn = drawn_reward() if equal else None
    peer_trl.run(args, samples, rows, drawn, out, pipe, figures, CPU_CLOCK)
    pipe.send("saved")


def drawn_reward():
    """A reward that is drawn, whatever the response: every group has an advantage."""
    rng = random.Random(0)

    def reward(response, sample):
        return rng.random()

    return reward


def figures(step, rollout, trained, reward):
    """What a way says about a step, and the process's peak memory so far in GB. step, rollout,
    trained: CPU seconds."""
    status = Path("/proc/self/status").read_text().split()
    return {
        "step": step,
        "rollout": rollout,
        "training": trained,
        "other": step - rollout - trained,
        "memory": int(status[status.index("VmHWM:") + 1]) * 1024 / 1e9,
        "reward": reward,
    }


WAYS = {"ours": ours, "TRL": trl}


# ---- a comparison


def compare(name, argv, rows, equal, root):
    """Runs both ways, a step of each in turn -> what root/NAME.json holds."""
    file = root / f"{name.replace(' ', '-')}.json"
    if file.exists():
        return json.loads(file.read_text())
    argv = [str(x) for x in argv]
    print(f"{name}: {' '.join(argv)}", flush=True)
    outs = {way: root / "runs" / f"{file.stem}-{way}" for way in WAYS}
    found = {"flags": argv, "commit": commit(), "steps": {way: [] for way in WAYS}}
    with started(argv, rows, equal, outs) as pipes:
        for i in range(train.parse_args(argv).steps):
            for way in sorted(WAYS, reverse=i % 2 == 1):  # each is first in every other step
                pipes[way].send("step")
                found["steps"][way].append(pipes[way].recv())
        pipes["TRL"].recv()  # "saved"
        if not equal:
            models = {"start": argv[argv.index("--model") + 1]}
            models |= {way: str(out / "end") for way, out in outs.items()}
            found["accuracy"] = {}
            for which, folder in models.items():
                pipes["ours"].send(folder)
                found["accuracy"][which] = pipes["ours"].recv()
        pipes["ours"].send("")
    write_whole(file, json.dumps(found))
    return found


@contextmanager
def started(argv, rows, equal, outs):
    """Starts a process for each way -> {way: the pipe to it}. A process ends with its pipe."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for way, main in WAYS.items():
        shutil.rmtree(outs[way], ignore_errors=True)
        pipes[way], end = spawn.Pipe()
        processes.append(spawn.Process(target=main, args=(end, argv, rows, equal, outs[way])))
        processes[-1].start()
        end.close()
    try:
        yield pipes
    finally:
        for pipe, process in zip(pipes.values(), processes):
            pipe.close()
            process.join()


# ---- figures


def summary(found):
    """{comparison: what `compare` gave} -> nested dicts of stats, for the table and the figure."""
    values = {"seconds": {}, "memory": {}, "times as long": {}}
    for name in ("toy", "long video"):
        timed_steps = {way: steps[1:] for way, steps in found[name]["steps"].items()}
        for way, steps in timed_steps.items():
            for part in ("rollout", "training", "step"):
                key = f"{name}: {part}"
                values["seconds"].setdefault(key, {})[way] = stat([s[part] for s in steps])
            values["memory"].setdefault(name, {})[way] = exactly(steps[-1]["memory"])
        for part in ("rollout", "training", "step"):
            pairs = zip(timed_steps["TRL"], timed_steps["ours"])
            ratios = [theirs[part] / mine[part] for theirs, mine in pairs]
            values["times as long"].setdefault(name, {})[part] = stat(ratios)
    learned = [x for name, x in found.items() if name.startswith("learning")]
    curves = [{way: curve(x["steps"][way]) for way in WAYS} for x in learned]
    values["reward"] = combine(curves)
    values["accuracy"] = combine([x["accuracy"] for x in learned])
    apart = [mean_reward(x["steps"]["ours"]) - mean_reward(x["steps"]["TRL"]) for x in learned]
    ends = [x["accuracy"]["ours"] - x["accuracy"]["TRL"] for x in learned]
    steps = [median_ratio(x["steps"]) for x in learned]
    values["ours minus TRL"] = {"mean reward": stat(apart), "accuracy at the end": stat(ends)}
    values["times as long"]["learning"] = {"step": stat(steps)}
    return values


def exactly(value):
    """A single measurement in the form of a stat."""
    return {"mean": value, "interval": [value, value], "seeds": [value]}


def curve(steps, points=6):
    """Mean rewards of `points` equal stretches -> {last step of the stretch: mean reward}."""
    size = -(-len(steps) // points)
    stretches = {min(i + size, len(steps)): steps[i : i + size] for i in range(0, len(steps), size)}
    return {str(last): mean_reward(part) for last, part in stretches.items()}


def mean_reward(steps):
    """Over all steps."""
    return statistics.fmean(s["reward"] for s in steps)


def median_ratio(steps):
    """How many times as long TRL's step takes, in the middle of all pairs but the first."""
    pairs = list(zip(steps["TRL"], steps["ours"]))[1:]
    return statistics.median(theirs["step"] / mine["step"] for theirs, mine in pairs)


def draw(results):
    """Draws results/peer.svg from results/peer.json."""
    from experiments import figure  # matplotlib, which nothing else here needs

    values = json.loads((results / "peer.json").read_text())["values"]
    chart = figure.draw("The same steps through TRL and through this code", PANELS, values)
    write_whole(results / "peer.svg", figure.svg(chart))


def study(root, results, quick):
    """Runs every comparison and writes results/peer.json and peer.svg -> the values."""
    root.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (argv, rows, equal) in comparisons(root, quick).items():
        found[name] = compare(name, argv, rows, equal, root)
    done = {
        "trl": VERSION,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "values": summary(found),
        "comparisons": found,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / "peer.json", json.dumps(done, indent=1))
    draw(results)
    return done["values"]


def main(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--quick", action="store_true", help="a small run that checks that it runs")
    p.add_argument("--draw", action="store_true", help="draw the figure again, run nothing")
    args = p.parse_args(argv)
    if args.draw:
        draw(RESULTS)
        return
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        p.error(f"TRL {VERSION} is compared, found {found}: pip install trl=={VERSION}")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes' torch
    out = Path("out/peer-quick" if args.quick else "out/peer")
    print(f"TRL {found}, torch {torch.__version__}, one thread a process")
    print(table(study(out, out if args.quick else RESULTS, args.quick)))


if __name__ == "__main__":
    main()
