"""The folder that a run leaves behind, and how a run resumes from it.

    config.txt      the flags: `python train.py @RUN/config.txt --out NEW` repeats the run
    log.jsonl       one object a step
    samples.jsonl   all responses of two groups a step, with their rewards
    judge-0.jsonl   with --judge: what it said, by rank
    track.txt       with --track: the id of the run there
    checkpoint-N/   a model folder (weights, config, tokenizer) with optimizer.pt and state.json.
                    The weights keep the dtype of the model that the run started from; unless that
                    is fp32, optimizer.pt also holds the trained ones in fp32, to resume from.
                    With --lora: an adapter folder in PEFT's form (lora.py)
    lock            locked by the processes that write to the folder

A training run enters `claimed`, then calls `open_run`. Inside `stop_signals` it stops after a step
and its checkpoint; inside `resumable`, a disk error prints the command that resumes.
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
from infra.errors import ModelError
from infra.files import digest, lock, write_whole
from infra.flags import flag_lines, refuse_changes
from infra.model_folder import (
    base_folder,
    checkpoints,
    fingerprint,
    local_folder,
    text_fingerprint,
)
from infra.ranks import RANK, WORLD, gather, say
from infra.reward_file import split_spec

# what a resumed run may change: paths, the number of steps, what it logs and keeps, what it costs
MAY_CHANGE = (
    "out",
    "resume",
    "judge",
    "track",
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


# ---- opening


@contextlib.contextmanager
def claimed(out):
    """Makes the folder `out`, and keeps other runs from writing to it inside the body.

    Every rank must enter. Ends the program if other processes are writing to it already: ranks can
    outlive their torchrun.
    """
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
        gather(None)  # rank 0 has made sure that no other run holds it: now all ranks share it
        lock(file, shared=True, wait=True)
        yield


def open_run(args, defaults):
    """Opens the folder args.out, once it is claimed. Every rank must call it.

    Returns the checkpoint to resume from, or None for a new run. Ends the program rather than
    overwrite a run, or resume it with other settings. defaults: the flags of a run that sets none.
    """
    checkpoint = _open_run(args, defaults) if RANK == 0 else None
    return gather(checkpoint)[0]


def _open_run(args, defaults):
    out = Path(args.out)
    if not args.resume and checkpoints(out):
        raise SystemExit(
            f"error: {out} holds a run: add --resume to resume it, or give this run its own --out"
        )
    checkpoint, damaged = newest_whole(out)
    config = _config(args)
    if checkpoint:
        refuse_changes(out / "config.txt", config, _fixed(args), flag_lines(defaults))
        _refuse_other_base(args, checkpoint)
    elif args.resume or (out / "log.jsonl").exists():
        say(f"{out}: no checkpoint to resume from, so the run starts from the beginning")
    for folder, reason in damaged:
        aside = folder.with_name(f"{folder.name}.torn")
        say(
            f"{folder}: {reason}. "
            f"It is moved to {aside.name}; the run resumes from {checkpoint.name}"
        )
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    for partial in out.glob("checkpoint-*.partial"):  # a run was killed while it wrote them
        shutil.rmtree(partial)
    write_whole(out / "config.txt", "\n".join(config) + "\n")
    step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else -1
    for name in ("log.jsonl", "samples.jsonl"):
        _rewind(out / name, step)
    return checkpoint


def _config(args):
    """The lines of config.txt: commit, records, files of --reward and reference model as comments,
    then the flags."""
    lines = [f"# commit {commit()}", f"# records {digest(args.data)}"]
    if args.reward:
        files = dict.fromkeys(split_spec(spec)[0] for spec in args.reward)
        lines.append(f"# rewards {' '.join(map(digest, files))}")
    if args.lora:  # it is also what the adapters in checkpoints stand beside
        model = local_folder(args.model)
        lines.append(f"# reference {fingerprint(model)}, texts {text_fingerprint(model)}")
    elif args.beta and args.algo != "sft":
        lines.append(f"# reference {fingerprint(local_folder(args.model))}")
    return lines + flag_lines(args)


def _fixed(args):
    """The names of the flags and comments that a resumed run must not change."""
    fixed = {*vars(args), "# records", "# rewards", "# reference"} - {*MAY_CHANGE}
    if args.lora:  # the base may move: "# reference" tells whether it is the same
        fixed.remove("model")
    if args.schedule == "cosine":  # the learning rate depends on the number of steps
        fixed.add("steps")
    return fixed


def _refuse_other_base(args, checkpoint):
    """Raises ModelError if a checkpoint's adapter stands beside other weights than --model's."""
    if not args.lora:
        return
    named, given = base_folder(checkpoint), base_folder(local_folder(args.model))
    if named.samefile(given):
        return
    if (fingerprint(named), text_fingerprint(named)) != (
        fingerprint(given),
        text_fingerprint(given),
    ):
        raise ModelError(
            f"{checkpoint}: its adapter names the base {named}, which is another model than "
            f"--model {args.model}"
        )


def _rewind(path, step):
    """Drops from a log the entries after `step`, which the resumed run writes again.

    A half-written last line is dropped, too. Other lines that cannot be read are dropped, and their
    number is printed. A missing log is reported, unless step is -1: the run starts.
    """
    if not path.exists():
        if step >= 0:
            say(f"{path}: no such file, so the log up to step {step} is lost; a new one begins")
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
        say(f"{path}: dropped {unreadable} of {len(lines)} lines, which are not entries of a step")
    write_whole(path, "".join(kept))


# ---- ending


@contextlib.contextmanager
def stop_signals():
    """Records the first SIGTERM or ctrl-C instead of ending the process; the second one ends it.

    Yields a list, to which the number of that signal is added: the training loop looks at it after
    each step. Signals that are ignored stay ignored (ctrl-C in a shell's background jobs). Only the
    main thread can handle signals; in any other, this does nothing.
    """
    noted, handlers = [], {}

    def note(number, _):
        noted.append(number)
        for s in handlers:
            signal.signal(s, signal.SIG_DFL)
        if RANK == 0:  # os.write: print is not safe in a signal handler
            os.write(
                2, b"\nstopping after this step and its checkpoint; a second signal stops at once\n"
            )

    if threading.current_thread() is threading.main_thread():
        for s in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(s) is not signal.SIG_IGN:
                handlers[s] = signal.getsignal(s)
    for s in handlers:
        signal.signal(s, note)
    try:
        yield noted
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def resume_command():
    """The command line of this process, with --resume."""
    launcher = "python"
    if WORLD > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
        nodes = f"--nnodes {WORLD // local} " if WORLD > local else ""
        launcher = f"torchrun {nodes}--nproc_per_node {local} --"
    resume = "" if "--resume" in sys.argv else " --resume"
    return f"{launcher} {shlex.join(sys.argv)}{resume}"


@contextlib.contextmanager
def resumable():
    """Ends the program on an OSError, with one line: the error, and the command that resumes."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f"error: {e}; to resume: {resume_command()}") from e


def commit():
    """The git commit of this code, with -dirty if files have changed; "unknown" without git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    folder = Path(__file__).parent
    with contextlib.suppress(OSError):  # git is not installed
        done = subprocess.run(describe, cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"
