"""A run: its flags, its ranks, its clock, and its folder, which survives a kill at any moment.

config.txt      the flags, as a flag file: `python train.py @RUN/config.txt --out NEW` is the same run again
log.jsonl       one object a step; what a killed run wrote after its last checkpoint is dropped when it resumes
samples.jsonl   all responses of two groups a step, with their rewards
checkpoint-N/   a model folder (weights, config, tokenizer) with optimizer.pt and state.json beside. Its weights have the
                dtype that they came in; optimizer.pt then also holds the trained ones in fp32, to resume from
lock            held by the processes that write to the folder
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from infra.checkpoints import newest_whole
from infra.files import digest, lock, write_whole
from infra.flags import flag_lines, refuse_changes
from infra.model_folder import checkpoints, fingerprint, local_folder
from infra.ranks import RANK, WORLD, gather, say

# what a resumed run may change: where things are, how long it runs, what it shows and keeps, and what it costs
MAY_CHANGE = (
    "out",
    "resume",
    "data",
    "media_root",
    "eval_data",
    "steps",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "workers",
    "decode_timeout",
    "row_tokens",
    "cuda_graph",
    "grad_checkpointing",
    "fsdp",
    "sp",
    "embedding_cache",
    "cache_gb",
)


@contextlib.contextmanager
def claimed(out):
    """The folder `out` is made, and is this run's inside. Ends the program where other processes are writing to it: ranks of a
    run whose torchrun was killed can live on. Every rank must enter."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
    except OSError as e:
        raise SystemExit(f"error: the run folder {out} cannot be written: {e}") from e
    with file:
        if RANK == 0 and not lock(file):
            raise SystemExit(
                f"error: other processes are writing to {out}: wait for them, or end them"
            )
        gather(None)
        lock(file, shared=True, wait=True)
        yield


def _rewind(path, step):
    """Drops the entries after `step`, and a half-written last line. Lines that cannot be read are dropped, too, and counted on
    the console; so is a file that should be there, as the step is not the first."""
    if not path.exists():
        if step >= 0:
            say(
                f"{path}: no such file, so what was logged up to step {step} is lost; the log begins again"
            )
        return
    kept, unreadable = [], 0
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            text = line.decode()
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    if unreadable:
        say(f"{path}: {unreadable} of {len(lines)} lines hold no entry of a step; they are dropped")
    write_whole(path, "".join(kept))


def open_run(args, defaults):
    """Opens the claimed folder args.out -> the checkpoint to resume from, or None. Ends the program rather than write over a
    run or resume another one. A folder without a checkpoint holds nothing to resume: it is written over.
    defaults: the flags of a run that sets none."""
    checkpoint = None
    if RANK == 0:
        out = Path(args.out)
        if not args.resume and checkpoints(out):
            raise SystemExit(
                f"error: {out} holds a run: --resume goes on with it, another --out starts a new one"
            )
        checkpoint, torn_ones = newest_whole(out)
        lines = [f"# commit {commit()}", f"# records {digest(args.data)}", *flag_lines(args)]
        if args.beta and args.algo != "sft":
            lines.insert(2, f"# reference {fingerprint(local_folder(args.model))}")
        if checkpoint:
            same = {*vars(args), "# records", "# reference"} - {*MAY_CHANGE}
            same |= (
                {"steps"} if args.schedule == "cosine" else set()
            )  # the learning rate depends on it
            refuse_changes(out / "config.txt", lines, same, flag_lines(defaults))
        elif args.resume or (out / "log.jsonl").exists():
            say(f"{out}: no checkpoint to resume from, so the run starts anew")
        for bad, reason in torn_ones:
            aside = bad.with_name(f"{bad.name}.torn")
            say(
                f"{bad}: {reason}. It is moved to {aside.name}; the run resumes from {checkpoint.name}"
            )
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        for partial in out.glob("checkpoint-*.partial"):  # what a kill in mid-write leaves
            shutil.rmtree(partial)
        write_whole(out / "config.txt", "\n".join(lines) + "\n")
        for name in ("log.jsonl", "samples.jsonl"):
            _rewind(out / name, int(checkpoint.name.split("-")[1]) if checkpoint else -1)
    return gather(checkpoint)[0]


@contextlib.contextmanager
def stop_signals():
    """Inside, the first SIGTERM or ctrl-C is only noted: its number, in the list that is yielded. A second one ends the process
    at once. Signals that are ignored (a shell's background jobs) stay so, and all do in another thread than the main one."""
    noted, in_main = [], threading.current_thread() is threading.main_thread()
    signals = [
        s
        for s in (signal.SIGINT, signal.SIGTERM)
        if in_main and signal.getsignal(s) is not signal.SIG_IGN
    ]

    def note(number, _):
        noted.append(number)
        for s in signals:
            signal.signal(s, signal.SIG_DFL)
        if RANK == 0:
            os.write(
                2,
                b"\nstopping after this step and its checkpoint; the same signal again stops at once\n",
            )

    before = [signal.signal(s, note) for s in signals]
    try:
        yield noted
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def resume_command():
    """The command of this process, with --resume."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    nodes = f"--nnodes {WORLD // local} " if WORLD > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node {local} --" if WORLD > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}" + ("" if "--resume" in sys.argv else " --resume")


@contextlib.contextmanager
def resumable():
    """Inside, an OSError ends the program with one line: the error, and the command that resumes."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f"error: {e}; to resume: {resume_command()}") from e


def commit():
    """The version of the code, with -dirty where files differ from it."""
    describe = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=10",
    ]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"
