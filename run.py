"""A run: its flags, its ranks, its clock, and its folder, which survives a kill at any moment.

    config.txt      the flags, as a flag file: `python train.py @RUN/config.txt --out NEW` is the same run again
    log.jsonl       one object a step; what a killed run wrote after its last checkpoint is dropped when it resumes
    samples.jsonl   all responses of two groups a step, with their rewards
    checkpoint-N/   a model folder (weights, config, tokenizer) with optimizer.pt and state.json beside
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import fsdp
from model import newest_checkpoint

RANK, WORLD, LOCAL = (int(os.environ.get(k, default)) for k, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
# flags that load_media takes
MEDIA = ("fps", "min_frames", "min_pixels", "max_pixels", "image_max_pixels", "reader", "decode_timeout")


# ---- flags

HOLDS = {"above": operator.gt, "at least": operator.ge, "at most": operator.le, "below": operator.lt}


def number(parser, name, default, within, text):
    """The value of a numeric flag from its text: of the default's kind, finite unless the default is not, and within bounds
    such as "above 0, at most 1". Anything else is the parser's error, which names the flag, the value and the bounds."""
    try:
        x = type(default)(text)
    except ValueError:
        x = math.nan
    if x != x or (abs(x) == math.inf and math.isfinite(default)):
        kind = "whole" if isinstance(default, int) else "finite"
        parser.error(f"--{name} {text}: expected a {kind} number, {within}")
    for words, limit in (bound.rsplit(" ", 1) for bound in within.split(", ")):
        if not HOLDS[words](x, float(limit)):
            parser.error(f"--{name} {x}: expected {within}")
    return x


def flag_parser(doc, **kw):
    """A parser for @FILE flag files, one flag a line, # begins a comment; no flag may be abbreviated
    -> (parser, add(group, name, default, help), flag(group, name, help)).

    The default tells the type. within: the bounds of a number (see number), or of each number of a list.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                fromfile_prefix_chars="@", allow_abbrev=False, **kw)
    p._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")  # -1e-3 is a value too, which argparse takes for a flag
    p.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)

    def add(group, name, default, help, within="at least 0", **kw):
        one = default[0] if isinstance(default, list) else default
        if isinstance(one, (int, float)):
            kw["type"] = functools.partial(number, p, name, one, within)
        if default not in (None, ""):
            help += " (default: %(default)s)"
        group.add_argument(f"--{name}", default=default, help=help, **kw)

    def flag(group, name, help):
        group.add_argument(f"--{name}", action="store_true", help=help)

    return p, add, flag


def media_flags(p, add, *, fps, max_pixels, max_prompt):
    """The flags of media and prompts, with a script's own defaults -> their group."""
    g = p.add_argument_group("media and prompts")
    add(g, "fps", fps, "frames shown for each second of video, at most", "above 0")
    add(g, "min_frames", 4, "at least this many frames, whatever --fps says", "at least 2")
    add(g, "min_pixels", 4 * 28 * 28, "a smaller frame is scaled up", "at least 1")
    add(g, "max_pixels", max_pixels, "of a video frame; a larger one is scaled down", "at least 1")
    add(g, "image_max_pixels", 256 * 28 * 28, "of an image", "at least 1")
    add(g, "max_prompt", max_prompt, "tokens; a sample with a longer prompt is refused and counted, never cut", "at least 1")
    add(g, "reader", "av", "of videos: av shows the right frames or refuses a file; decord can show wrong ones (README)",
        choices=("av", "decord"))
    add(g, "decode_timeout", 60.0, "seconds for one video, after which its decoder is killed and the sample refused",
        "above 0, at most 86400")
    add(g, "workers", 2, "threads that load media ahead, each with a decoder process", "at least 1")
    return g


def ordered(p, args, *pairs):
    """Ends the program unless, of each pair of flags, the second is at least the first."""
    for low, high in pairs:
        if getattr(args, high) < getattr(args, low):
            p.error(f"--{high} {getattr(args, high)}: expected at least {getattr(args, low)}, the value of --{low}")


def peek(argv, **defaults):
    """A few flags of a command line, whatever its others are -> namespace."""
    p, add, _ = flag_parser("", add_help=False)
    for name, default in defaults.items():
        add(p, name, default, "")
    return p.parse_known_args(argv)[0]


def flag_lines(args):
    """The flags as the lines of a flag file."""
    flags = {k: v for k, v in vars(args).items() if v is not None and v is not False and k != "resume"}
    return [f"--{k}" if v is True else f"--{k} {shlex.quote(str(v))}" for k, v in flags.items()]


def refuse_changes(config, lines, names):
    """Ends the program if one of the named flags differs between the file of an earlier run and `lines`."""
    before = config.read_text(encoding="utf-8").splitlines()
    was, now = ([line for line in a if line not in b and line.split()[0].removeprefix("--") in names]
                for a, b in ((before, lines), (lines, before)))
    if was or now:
        raise SystemExit(f"error: {config.parent} was run otherwise, so it cannot be resumed: it had {', '.join(was) or 'not'}; "
                         f"now {', '.join(now) or 'not'}. Another --out starts anew, and so does deleting that folder")


def write_whole(path, text):
    """Writes a file under another name and moves it into place: a file that has its name is whole."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# ---- ranks, clock, log

def start_ranks(patience):
    """Joins the other processes of torchrun, if there are any -> this rank's device. patience: a timedelta, for each wait."""
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def stop_ranks():
    """Leaves the other processes. The group's threads end with the last reference to it, which a cycle may hold; a thread that
    outlives the interpreter aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def seed(*parts):
    """A seed from the run's seed, the step, and whatever else tells this random choice from all others."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


def gather(x, every=1):
    """The objects of all ranks, as a list; every: of the first rank of every so many, which all have the same."""
    if WORLD == 1:
        return [x]
    out = [None] * WORLD
    dist.all_gather_object(out, x)
    return out[::every]


def commit():
    """The version of the code, with -dirty where files differ from it."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def say(text):
    """Prints a line, on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


SAME = ("algo", "model", "data", "prompts", "seed", "train_vision", "weight_decay", "beta2")  # what a resumed run must keep
seconds = {}  # of the phases of the step


@contextlib.contextmanager
def timed(phase):
    """Adds the seconds of its body to the phase, the GPU's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def append(path, objects):
    """Appends objects to a .jsonl file, on rank 0."""
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(_finite(o)) + "\n" for o in objects)


def _finite(o):
    """NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in o.items()}


def _rewind(path, step):
    """Drops the entries after `step`, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


def open_run(args):
    """Opens the run folder args.out -> (folder, the checkpoint to go on from or None). Ends the program rather than write
    over a run, or when the folder cannot be written."""
    out = Path(args.out)
    checkpoint = newest_checkpoint(out) if args.resume else None
    gather(None)  # every rank has looked before rank 0 writes
    if RANK:
        return out, checkpoint
    if (out / "log.jsonl").exists() and not args.resume:
        raise SystemExit(f"error: {out} holds a run: --resume goes on with it, another --out starts a new one")
    step = int(checkpoint.name.split("-")[1]) if checkpoint else -1
    lines = flag_lines(args)
    if checkpoint:
        refuse_changes(out / "config.txt", lines, SAME)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.txt", "\n".join(lines) + "\n")
        for name in ("log.jsonl", "samples.jsonl"):
            _rewind(out / name, step)
    except OSError as e:
        raise SystemExit(f"error: the run folder {out} cannot be written: {e}") from e
    return out, checkpoint


def save(policy, optimizer, step, args):
    """Writes checkpoint-N under another name and moves it into place, on rank 0: a checkpoint that has its name is whole.
    Every rank must call it: what is sharded is gathered."""
    weights, moments = fsdp.full_state(policy, optimizer)
    if RANK:
        return
    folder = Path(args.out) / f"checkpoint-{step:06d}"
    partial = folder.with_suffix(".partial")
    # all randomness is a function of (seed, step, position in the step): these are the state of every generator
    state = {"step": step, "seed": args.seed, "data_position": step * args.prompts}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        policy.save(partial, weights)
        torch.save(moments, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state))
        partial.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk is a RuntimeError in torch, the third in safetensors
        shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(f"error: {folder} could not be written: {e}. "
                         "The checkpoint before it is whole; --resume goes on from there.") from e
    for old in sorted(folder.parent.glob("checkpoint-??????"))[: -args.keep]:
        shutil.rmtree(old, ignore_errors=True)
