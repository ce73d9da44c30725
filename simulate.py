"""Will it fit, and where does it go? A training step at its true size, without a GPU or weights.

    python simulate.py @configs/video_r1_7b.txt --config DIR --gpus 8 --memory 80
    python simulate.py @configs/longvila_r1_7b.txt --config DIR --frames 512 --size 252x392 --sp 4

The flags are a recipe's, as for train.py, and those of `parse_args` here. DIR (--config, or the
recipe's --model) holds a model's config.json and tokenizer; its weights are not read. A run takes
one to three minutes and prints, for each phase: peak memory and the lines of code that hold it,
host syncs, operations, and a roofline for an A100 and an H100. If the step does not fit, it runs
what may help, and says what each would take.

How: train.train_step runs on a fake "cuda" device, whose tensors have shapes, dtypes and devices,
but no numbers (infra/fake_gpu.py). One process is rank 0 of --gpus; the other ranks are taken to
hold the same. Two steps run, because the first has no moments of Adam, and the second is shown. The
step itself is unchanged. Around it:

    weights      have no numbers; only config.json is read           blank_weights
    prompts      are alike: one video of --frames and --size         Videos
    responses    all have --max_new tokens. The first and the last decode steps run, and stand for
                 all of them                                         skip_decode_steps
    rewards      every second response is right, so that there is a gradient
    other ranks  what they would send is this rank's own             of_rank, Sharing
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as hf_logging

import model
import mrsp
import rollout
import train
from data import Media, PromptBuilder, Sample, supervised_response
from infra import fake_cuda, fsdp
from infra.errors import DataError, ModelError
from infra.fake_gpu import EFFICIENCY, FakeGPU
from infra.families import read_family
from infra.frames import MERGE, smart_resize
from infra.model_folder import newest_checkpoint, read_object
from infra.optimizer import make_optimizer, update
from infra.progress import LoadErrors
from infra.ranks import WORLD

ROOT = Path(__file__).resolve().parent
PHASES = "load gather encode prefill decode reference forward backward optimizer".split()
# of train.timed, by the name of the phase here; what else they do is part of it
TIMED = {"rollout": "decode", "shuffled": "decode", "train": "backward", "optimizer": "optimizer"}
DECODE_STEPS = 2  # that run at each end of a response
FITS = 0.9  # of --memory; the rest is for what is not simulated
UNKNOWN = (
    "Not in these figures: numbers (no result is checked), NCCL's time and buffers, the CUDA "
    "context and cuBLAS (some 2 to 4 GB), fragmentation, most kernels' own memory, launch times, "
    "CUDA graphs, the embedding cache (taken as empty). Nothing here was measured on a GPU."
)
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)


def parse_args(argv):
    """The simulation's own flags -> (Namespace, the other words, which are train.py's)."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--config", help="folder with config.json and tokenizer (default: --model)")
    p.add_argument("--gpus", type=int, default=8, help="ranks, one a GPU (default: %(default)s)")
    p.add_argument("--memory", type=float, default=80.0, help="GB of a GPU (default: %(default)s)")
    p.add_argument("--frames", type=int, help="of each video (default: the recipe's --max_frames)")
    p.add_argument("--size", help="pixels, HEIGHTxWIDTH (default: 16:9 within --max_pixels)")
    p.add_argument("--write", help="file for all figures, as JSON")
    own, flags = p.parse_known_args(argv)
    if own.gpus < 1 or not 0 < own.memory < math.inf:
        p.error(f"--gpus {own.gpus} --memory {own.memory}: expected at least one GPU with memory")
    if own.write and (os.path.isdir(own.write) or not Path(own.write).absolute().parent.is_dir()):
        p.error(f"--write {own.write}: expected a file, in a folder that exists")
    return own, flags


# ---- one step on fake GPUs, in a process of its own


class Policy(model.Policy):
    """A policy whose parameters are made on the fake device; its calls are phases.

    A call without gradient is the reference's (or, with --temporal contrast, a rescoring).
    """

    gpu = None  # the FakeGPU

    def __call__(self, *args, **kwargs):
        with self.gpu.phase("forward" if torch.is_grad_enabled() else "reference"):
            return super().__call__(*args, **kwargs)

    def encode(self, prompts):
        with self.gpu.phase("encode"):
            return super().encode(prompts)


def no_weights(folder, net):
    """find_weights of a folder that has none."""
    return {}


def blank_weights(folder, net, found, device, merged):
    """read_weights without files: parameters on the device, each rank's own part."""
    made = {}  # a weight that two modules share is made once
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is None or p.device.type != "meta":
                continue
            if isinstance(p, DTensor):
                fsdp.fill(p, torch.empty(p.to_local().shape, dtype=p.dtype, device=device))
                continue
            if p not in made:  # fake tensors cannot be swapped, as in `fill`
                x = torch.empty(p.shape, dtype=p.dtype, device=device)
                made[p] = nn.Parameter(x, p.requires_grad)
            module._parameters[name] = made[p]


def no_dtype(folder):
    """weights_dtype of a folder without weights."""
    return torch.bfloat16


class Builder(PromptBuilder):
    """Reads every second response as a right one: fake tokens say nothing."""

    responses = 0

    def decode(self, ids):
        self.responses += 1
        return supervised_response("-", "AB"[self.responses % 2])


class Videos:
    """Stands for the Loader: all prompts of a step, the same in each."""

    def __init__(self, args, frames, size):
        self.builder = Builder(args.model, max_prompt=sys.maxsize)
        question, options = "What happens first in the video?", ["A. the left one", "B. the right"]
        self.prompts = []
        for i in range(args.prompts):
            sample = Sample(str(i), question, options, "multiple choice", "video", "-", "A", "-")
            black = torch.zeros(1, 3, *size, dtype=torch.uint8).expand(frames, -1, -1, -1)
            about = dict(patch=self.builder.family.patch, times=[i / 2 for i in range(frames)])
            media = Media(black, "video", 1.0, frames, **about)
            prompt = self.builder.build(sample, [media])
            if args.algo == "sft":
                prompt.target = torch.zeros(args.max_new, dtype=torch.long)
            self.prompts.append((i, prompt))

    def load(self, step):
        return self.prompts


class Sharing(mrsp.RowSharing):
    """RowSharing that knows the prompts of all ranks, and keeps its estimate."""

    def choose(self, prompts):
        memory = mrsp.memory

        def kept(*args, **kwargs):
            self.estimate = memory(*args, **kwargs)
            return self.estimate

        lengths = [len(p.ids) for _, p in prompts]
        answers = self.answers(prompts[0][1])
        about = (self.policy, self.reference, lengths, answers, self.memory, self.args, WORLD)
        mrsp.memory = kept
        size, _ = mrsp.smallest_team(*about)
        mrsp.memory = memory
        self.sp = mrsp.sequence_parallel(size, self.patience)

    def share_prompts(self, prompts):
        return prompts[: math.ceil(len(prompts) * self.sp.size / WORLD)]  # of this rank's group


def of_rank(x, r, prompts):
    """What rank r holds where this rank holds x: the same, but groups of other prompts."""
    if isinstance(x, list) and x and isinstance(x[0], train.ScoredGroup):
        return [replace(group, position=group.position + r * prompts) for group in x]
    return x


def skip_decode_steps(gpu):
    """From here on, only the first and last steps of a response run, and count for all."""
    step = rollout.Decoding.step

    def first_and_last(decoding):
        t, tokens = gpu.value(decoding.cache.t), gpu.value(decoding.tokens)
        steps = tokens.shape[1] - 1
        if DECODE_STEPS <= int(t) < steps - DECODE_STEPS:
            t += 1
            tokens[:, t] = 0
        else:
            with gpu.repeated(max(1.0, steps / (2 * DECODE_STEPS))):
                step(decoding)

    rollout.Decoding.step = first_and_last


def name_phases(gpu):
    """From here on, the parts of a step are phases of the fake GPU; `Policy` names the others."""
    prefill = rollout.prefill

    def named_prefill(*args):
        with gpu.phase("prefill"):
            return prefill(*args)

    def timed(name):
        return gpu.phase(TIMED[name]) if name in TIMED else contextlib.nullcontext()

    rollout.prefill, train.timed = named_prefill, timed


def open_run(args, frames, size, device):
    """What train.open_training makes, without files -> Run."""
    policy, reference = train.load_policies(args, None, device, Policy)
    optimizer = make_optimizer(policy, args)
    wrapped = policy
    if WORLD > 1 and not args.fsdp:
        how = dict(forward_sync_buffers=False, gradient_as_bucket_view=True)
        wrapped = DistributedDataParallel(policy, **how)
        fake_cuda.finish_ddp(wrapped)
    videos = Videos(args, frames, size)

    def refill(step, k):
        return []  # every group teaches

    def optimize(step):
        return update(policy, optimizer, step, args)

    parts = dict(loader=videos, optimizer=optimizer, errors=LoadErrors(args.prompts, args.steps))
    second = None if reference is policy else reference
    parts["sharing"] = Sharing(policy, second, train.patience(args), args)
    return train.Run(args, wrapped, reference, videos.builder, refill, optimize, **parts)


def start(args, own):
    """Prepares this process -> the FakeGPU. From here on, torch has fake GPUs, models have no
    weights, and decoding skips steps."""
    fake_cuda.pretend(own.memory * 1e9, WORLD)
    if WORLD > 1:
        fake_cuda.fake_ranks(WORLD, partial(of_rank, prompts=args.prompts))
    args.cuda_graph, args.embedding_cache = False, None
    gpu = FakeGPU(ROOT, hidden=[Path(__file__).resolve()])
    skip_decode_steps(gpu)
    take_the_place_of_files(gpu)
    return gpu


def take_the_place_of_files(gpu):
    """From here on, models have no weights, and the parts of a step are phases of `gpu`."""
    model.local_folder = train.local_folder = Path
    model.find_weights, model.read_weights = no_weights, blank_weights
    model.weights_dtype = no_dtype
    Policy.gpu = gpu
    name_phases(gpu)


def simulate(args, own):
    """Two steps of a run on fake GPUs -> the figures of the second, for JSON."""
    frames, size = video_shape(args, own)
    gpu = start(args, own)
    with gpu:
        with gpu.phase("load"):
            run = open_run(args, frames, size, torch.device("cuda", 0))
        load = gpu.phases["load"]
        for step in range(2):
            gpu.reset("gather")  # of the weights for a rollout (--fsdp), before its first phase
            train.train_step(run, step)
        gpu.keep_sites()
    return {
        "flags": vars(args),
        "gpus": WORLD,
        "memory": own.memory * 1e9,
        "frames": frames,
        "size": size,
        "prompt_tokens": len(run.loader.prompts[0][1].ids),
        "sp": run.sharing.sp.size,
        "estimate": run.sharing.estimate,
        "phases": figures({"load": load} | gpu.phases),
    }


def video_shape(args, own):
    """(frames, (height, width)) of the videos: as given, or as the recipe would show them."""
    frames = own.frames or args.max_frames
    if frames < 2 or frames % 2:
        raise SystemExit(f"error: --frames {frames}: expected an even number")
    config = read_object(Path(args.model) / "config.json")
    factor = read_family(args.model, config).patch * MERGE
    if not own.size:
        limits = dict(min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        return frames, smart_resize(1080, 1920, factor=factor, **limits)
    size = tuple(int(side) for side in own.size.split("x") if side.isdecimal())
    limits = dict(min_pixels=1, max_pixels=math.inf, factor=factor)
    if len(size) != 2 or size != smart_resize(*size, **limits):
        raise SystemExit(
            f"error: --size {own.size}: expected HEIGHTxWIDTH in multiples of {factor}, "
            f"such as {9 * factor}x{14 * factor}"
        )
    return frames, size


def figures(phases):
    """{name: Phase} -> the same for JSON, in the order of PHASES."""
    out = {}
    for name in PHASES:
        if name in phases:
            phase = dict(vars(phases[name]))
            phase["sites"] = phase["sites"].most_common(12)
            phase["syncs"] = [[*where, n] for where, n in phase["syncs"].most_common()]
            out[name] = phase
    return out


def one_rank(own, flags):
    """The process of rank 0: simulates, writes --write, and ends without torch's own clean-up."""
    code = 0
    try:
        hf_logging.set_verbosity_error()
        args = train.parse_args(["--model", "-", "--data", "-", *flags])
        args.model = model_folder(own.config or args.model)
        found = simulate(args, own)
        Path(own.write).write_text(json.dumps(found, indent=1) + "\n")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if code and e.code != code:
            print(e.code, file=sys.stderr)
    except (DataError, ModelError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # fake_cuda


def model_folder(name):
    """The folder of a model's small files. Ends the program with what to do if there is none."""
    folder = newest_checkpoint(name) or Path(name)
    if (folder / "config.json").exists():
        return str(folder)
    hub = name if name.count("/") == 1 and not name.startswith(("out/", "/", ".")) else "NAME"
    raise SystemExit(
        f"error: {name}: no folder with config.json. A simulation needs the small files of a "
        f"model, not its weights: {', '.join(SMALL_FILES)}, as far as the model has them. From the "
        f'hub: hf download {hub} --include "*.json" --include "*.txt" --local-dir DIR; then add '
        "--config DIR"
    )


# ---- all runs, and what they print


def run_rank(own, flags, extra=()):
    """Simulates with extra flags in a process of its own -> its figures; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        words = [*flags, "--gpus", own.gpus, "--memory", own.memory]
        for name in ("config", "frames", "size"):
            if getattr(own, name):
                words += [f"--{name}", getattr(own, name)]
        words = [str(word) for word in (*words, *extra, "--write", file)]
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(own.gpus)}
        done = subprocess.run([sys.executable, __file__, *words], env={**os.environ, **ranks})
        return json.loads(file.read_text()) if done.returncode == 0 else None


def peak_of(found):
    """(bytes, phase) of the largest peak of a step."""
    return max((x["peak"], name) for name, x in found["phases"].items() if name != "load")


def fits(found):
    """Whether loading and the step leave room for what is not simulated."""
    largest = max(phase["peak"] for phase in found["phases"].values())
    return largest < FITS * found["memory"]


def remedies(found):
    """What may make a step fit -> lists of flags, each to be tried alone."""
    flags, gpus, out = found["flags"], found["gpus"], []
    if gpus > 1 and not flags["fsdp"]:
        out.append(["--fsdp"])
    if flags["grad_checkpointing"] != 1:
        out.append(["--grad_checkpointing", "1"])
    if not (flags["lora"] or flags["train_vision"]):
        out.append(["--lora", "16"])
    larger = [n for n in range(found["sp"] + 1, gpus + 1) if gpus % n == 0]
    out += [["--sp", str(n)] for n in larger[:1]]
    if found["frames"] >= 8:
        out.append(["--frames", str(found["frames"] // 4 * 2)])
    return out


def table(found):
    """The figures of a run as text."""
    phases, flags = found["phases"], found["flags"]
    height, width = found["size"]
    responses = 1 if flags["algo"] == "sft" else flags["group"]
    lines = [
        f"{flags['algo']}, {found['frames']} frames of {height} x {width}, a prompt of "
        f"{found['prompt_tokens']} tokens, {responses} x {flags['max_new']} response tokens; "
        f"one of {found['gpus']} GPUs, {found['sp']} to a row",
        f"{'phase':10}{'peak GB':>9}{'syncs':>8}{'kernels':>10}{'TFLOP':>9}{'GB moved':>10}"
        f"{'A100 s':>9}{'H100 s':>9}",
    ]
    for name, phase in phases.items():
        syncs = sum(n for _, _, n in phase["syncs"])
        seconds = [phase["seconds"].get(gpu, 0.0) for gpu in ("A100", "H100")]
        lines.append(
            f"{name:10}{phase['peak'] / 1e9:9.2f}{syncs:8.0f}{phase['kernels']:10.0f}"
            f"{phase['flops'] / 1e12:9.1f}{phase['bytes'] / 1e9:10.1f}"
            f"{seconds[0]:9.3f}{seconds[1]:9.3f}"
        )
    shares = ", ".join(f"{x:.0%} {name}" for name, x in EFFICIENCY.items())
    lines.append(f"seconds: a roofline, assumed to reach {shares}; without communication")
    phase, terms = mrsp.largest(found["estimate"])
    estimate, (peak, _) = sum(terms.values()), peak_of(found)
    lines.append(
        f"{verdict(found)}; train.py's own estimate {estimate / 1e9:.2f} GB (in {phase}), "
        f"{estimate / peak:.2f} times the step's peak"
    )
    return "\n".join([*lines, *largest(phases), UNKNOWN])


def verdict(found):
    """Whether a run fits, in words."""
    peak, name = peak_of(found)
    load, limit = found["phases"]["load"]["peak"], FITS * found["memory"]
    loading = f", {load / 1e9:.2f} GB while loading" if load > peak else ""
    word = "fits" if fits(found) else "does not fit"
    return f"peak {peak / 1e9:.2f} GB ({name}){loading}: {word} in {limit / 1e9:.0f} GB"


def largest(phases):
    """Where most memory is at the peak of each phase, and most syncs, as lines."""
    lines = []
    for name, phase in phases.items():
        held = [f"{n / 1e9:.2f} {site}" for site, n in phase["sites"][:3]]
        lines.append(f"{name:10} GB at the peak: {'; '.join(held)}")
        waits = [f"{n:.0f} {kind} {site}" for kind, site, n in phase["syncs"][:3]]
        if waits:
            lines.append(f"{'':10} syncs: {'; '.join(waits)}")
    return lines


def main(argv=None):
    """The command line."""
    own, flags = parse_args(argv)
    if "RANK" in os.environ:  # as `run_rank` starts it
        one_rank(own, flags)
    if reason := fake_cuda.unsupported():
        raise SystemExit(f"error: {reason}")
    found = run_rank(own, flags)
    if found is None:
        raise SystemExit(1)
    print(table(found))
    tried = []
    for extra in [] if fits(found) else remedies(found):
        other = run_rank(own, flags, extra)
        said = verdict(other) if other else "cannot be simulated"
        print(f"with {' '.join(extra)}: {said}", flush=True)
        tried += [{"with": extra, **other}] if other else []
    if tried:
        print(UNKNOWN)
    if own.write:
        Path(own.write).write_text(json.dumps(found | {"tried": tried}, indent=1) + "\n")


if __name__ == "__main__":
    main()
