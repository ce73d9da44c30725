"""The checkpoints of a run, which survive a kill, a full disk or a power cut at any moment.

`save` writes checkpoint-N: a model folder (with --lora, an adapter's), with the optimizer's state
and state.json beside it.
`newest_whole` finds the one to resume from, and `torn` says what is wrong with a damaged one.
"""

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from infra import fsdp
from infra.errors import ModelError
from infra.model_folder import checkpoints, config_file, weight_files
from infra.ranks import RANK

# ---- which one to resume from


def torn(checkpoint):
    """Why a checkpoint cannot be resumed from ("FILE: reason"), or None if it can.

    Finds files that are missing or cut off, as a full disk or a power cut leaves them: headers and
    sizes are checked, not every byte. Raises OSError for a file that exists and cannot be read.
    """
    file = checkpoint / "state.json"  # `file`: the one that is being checked
    try:
        step = json.loads(file.read_bytes())["step"]
        if checkpoint.name != f"checkpoint-{step:06d}":
            return "state.json: of another step"
        file = config_file(checkpoint)
        json.loads(file.read_bytes())
        file = checkpoint / "optimizer.pt"
        zipfile.ZipFile(file).close()
        file = checkpoint / "model.safetensors.index.json"
        weights = weight_files(checkpoint)
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except FileNotFoundError:
        return f"{file.name}: no such file"
    except (ValueError, TypeError, KeyError, zipfile.BadZipFile, SafetensorError) as e:
        return f"{file.name}: {e}"
    return None if weights else "no weights (*.safetensors)"


def newest_whole(out):
    """The newest checkpoint of a run that is not torn, or None if the run has no checkpoint.

    Returns it and the newer ones that are torn: (checkpoint, [(torn checkpoint, reason), ...]).
    Ends the program if all are torn.
    """
    damaged = []
    for checkpoint in reversed(checkpoints(out)):
        reason = torn(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged.append((checkpoint, reason))
    if damaged:
        reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged)
        raise SystemExit(
            f"error: {out}: no checkpoint is whole ({reasons}). Delete them to start over"
        )
    return None, []


# ---- saving


def save(policy, optimizer, step, args, moments):
    """Saves args.out/checkpoint-STEP and deletes all but the newest args.keep.

    moments: of rewards, {problem type: two numbers}, which state.json keeps.

    Rank 0 writes, but every rank must call it: what is sharded is gathered. Raises ModelError if
    the policy's logits are not finite. Ends the program if the checkpoint cannot be written.
    """
    if not policy.is_sound():
        raise ModelError(
            f"step {step}: the policy's logits are not finite, so no checkpoint is saved; "
            "try a lower --lr"
        )
    weights, adam = fsdp.full_state(policy, optimizer)
    if RANK:
        return
    folder = Path(args.out) / f"checkpoint-{step:06d}"
    # Every random choice is a function of (seed, step, position): no generator has a state to save.
    state = {"step": step, "seed": args.seed, "data_position": step * args.prompts}
    if moments:
        state["moments"] = moments
    try:
        _write(folder, policy, weights, adam, state)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch: RuntimeError on a full disk
        full = _disk_is_full(folder.parent)  # before the partial checkpoint is deleted
        shutil.rmtree(_partial(folder), ignore_errors=True)
        rest = "The run has no checkpoint before it"
        if checkpoints(folder.parent):
            rest = "The checkpoint before it is whole; --resume resumes from there"
        raise SystemExit(f"error: {folder} could not be written: {e}{full}. {rest}") from e
    for old in checkpoints(folder.parent)[: -args.keep]:
        shutil.rmtree(old, ignore_errors=True)


def _partial(folder):
    """The temporary name of a checkpoint. Only a complete one is renamed to checkpoint-N."""
    return folder.with_suffix(".partial")


def _write(folder, policy, weights, moments, state):
    """Writes a checkpoint under its temporary name, syncs it to the disk, and renames it."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial, weights)
    torch.save(moments, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state))
    for path in (*partial.iterdir(), partial):  # after a power cut: no name without the content
        _sync(path)
    partial.rename(folder)
    _sync(folder.parent)


def _sync(path):
    """Flushes a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a network file system that does not sync folders
            raise
    finally:
        os.close(handle)


def _disk_is_full(folder):
    """A remark if less than 1 MB is free, else "": the errors of torch may not say so."""
    free = shutil.disk_usage(folder).free
    return f" (no space left: {free} bytes are free)" if free < 1e6 else ""
