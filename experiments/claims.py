"""The papers' claims in miniature: experiments in the toy world that a laptop reruns, with
intervals over seeds.

    python -m experiments.claims                  lists the claims
    python -m experiments.claims grpo             runs one, seeds 0 to 4 -> results/grpo.json, .svg
    python -m experiments.claims grpo --quick     checks that it runs, in one to three minutes
    python -m experiments.claims grpo --draw      draws grpo.svg again from grpo.json

Each claim is a file here. Its `run` is a function of a Lab, one seed: it trains, evaluates or
times, and returns numbers. Runs are kept in out/claims/seedN/ and shared between claims. A command
that has finished is not run again, and one that was killed resumes: repeat the same command until
it is done.

A number is the mean over seeds with its 95 % interval (Student's t). A seed sets the world, the
initial weights, the order of the data and the sampling. All arms of a seed share its world and its
test questions, so arms are subtracted seed by seed, and the interval of the difference says
whether they differ.
"""

import argparse
import importlib.util
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experiments import (
    frame_order,
    grounding,
    grpo,
    longvila_r1,
    shared_prefix,
    video_r1,
    video_rts,
)
from experiments.lab import Lab, workers
from experiments.stats import combine, table
from infra.files import write_whole
from infra.run_folder import commit

RESULTS = Path(__file__).parent / "results"
CLAIMS = {
    "grpo": grpo.CLAIM,
    "frame_order": frame_order.CLAIM,
    "video_r1": video_r1.CLAIM,
    "video_rts": video_rts.CLAIM,
    "longvila_r1": longvila_r1.CLAIM,
    "grounding": grounding.CLAIM,
    "shared_prefix": shared_prefix.CLAIM,
}
QUICK = {"shrink": 20, "clips": {"cot": 240, "train": 120, "test": 16}}  # of a Lab


def study(name, seeds, root, results, pool, **size):
    """Runs a claim and writes results/NAME.json and NAME.svg -> what the JSON holds, and how many
    commands ran now. size: shrink, clips, flags and eval_flags of the Labs."""
    claim, labs = CLAIMS[name], []
    for seed in seeds:
        labs.append(Lab(seed, Path(root) / f"seed{seed}", pool, **size))
    with ThreadPoolExecutor(len(labs)) as threads:
        values = combine(list(threads.map(claim.run, labs)))
    runs, now = [], 0
    for lab in labs:
        runs += {run["name"]: run for run in lab.runs}.values()  # each once
        now += sum(run.pop("ran") for run in lab.runs)
    done = {
        "claim": name,
        "paper": claim.paper,
        "line": claim.line,
        "seeds": list(seeds),
        "values": values,
        "process_minutes": round(sum(run["seconds"] for run in runs) / 60, 1),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "torch": torch.__version__,
        "runs": runs,
    }
    Path(results).mkdir(parents=True, exist_ok=True)
    write_whole(Path(results) / f"{name}.json", json.dumps(done, indent=1))
    draw(name, results)
    return done, now


def draw(name, results):
    """Draws results/NAME.svg from results/NAME.json -> the matplotlib Figure."""
    from experiments import figure  # matplotlib, which nothing else here needs

    claim = CLAIMS[name]
    values = json.loads((Path(results) / f"{name}.json").read_text())["values"]
    panels = [panel for panel in claim.panels if panel.key in values]
    chart = figure.draw(f"{claim.paper}: the claim that {claim.line}", panels, values)
    write_whole(Path(results) / f"{name}.svg", figure.svg(chart))
    return chart


def main(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("claim", nargs="?", choices=CLAIMS, help="its name (default: list them)")
    p.add_argument("--seeds", type=int, default=5, help="number of seeds, 2 to 10 (default: 5)")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread (default: 2)")
    p.add_argument("--quick", action="store_true", help="a small run that checks that it runs")
    p.add_argument("--draw", action="store_true", help="draw the figure again, run nothing")
    args = p.parse_args(argv)
    if not 2 <= args.seeds <= 10:
        p.error(f"--seeds {args.seeds}: expected 2 to 10")
    if args.jobs < 1:
        p.error(f"--jobs {args.jobs}: expected at least 1")
    if not args.claim:
        for name, claim in CLAIMS.items():
            print(f"{name:14} {claim.line} ({claim.paper}); about {claim.minutes} minutes")
        return
    if not importlib.util.find_spec("matplotlib"):
        p.error("no matplotlib: pip install -r experiments/requirements.txt")
    if args.draw:
        draw(args.claim, RESULTS)
        return
    with workers(args.jobs) as pool:
        if args.quick:
            out = "out/claims-quick"
            done, now = study(args.claim, range(2), out, out, pool, **QUICK)
        else:
            seeds = range(args.seeds)
            done, now = study(args.claim, seeds, "out/claims", RESULTS, pool)
    print(table(done["values"]))
    minutes = done["process_minutes"]
    print(f"{now} of {len(done['runs'])} commands ran now; {minutes} process minutes in all")


if __name__ == "__main__":
    main()
