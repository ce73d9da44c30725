"""Checkpoints that survive a kill at any moment."""

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
from infra.model_folder import checkpoints, weight_files
from infra.ranks import RANK


def torn(checkpoint):
    """Why a checkpoint cannot be resumed from, or None: a file that is missing or cut off, as a disk that was full or lost its
    power leaves it. Sizes are compared, not every byte. Raises OSError for a file that is there and cannot be read."""
    file = checkpoint / "state.json"
    try:
        if checkpoint.name != f"checkpoint-{json.loads(file.read_bytes())['step']:06d}":
            return "state.json: of another step"
        file = checkpoint / "config.json"
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
    """The newest checkpoint of a run that is whole, or None if it has none -> (checkpoint, [(newer one, why it is torn), ...]).
    Ends the program if all are torn."""
    found = []
    for checkpoint in reversed(checkpoints(out)):
        if (reason := torn(checkpoint)) is None:
            return checkpoint, found
        found.append((checkpoint, reason))
    if found:
        raise SystemExit(
            f"error: {out}: no checkpoint is whole ({'; '.join(f'{c.name}: {why}' for c, why in found)}). "
            "Delete them to start anew"
        )
    return None, []


def _disk_is_full(folder):
    """Words for an error if less than 1 MB is free, else "": torch and safetensors do not always say why a write failed."""
    free = shutil.disk_usage(folder).free
    return f" (no space left: {free} bytes are free)" if free < 1e6 else ""


def _sync(path):
    """Brings a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a network file system that does not sync folders
            raise
    finally:
        os.close(handle)


def save(policy, optimizer, step, args):
    """Writes checkpoint-N under another name and moves it into place, on rank 0: a checkpoint that has its name is whole.
    Every rank must call it: what is sharded is gathered. Raises ModelError for a policy whose logits are not finite."""
    if not policy.is_sound():
        raise ModelError(
            f"step {step}: the policy's logits are not finite (a lower --lr?), so no checkpoint of it is saved"
        )
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
        for path in (
            *partial.iterdir(),
            partial,
        ):  # a power cut must not leave the name without the content
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as e:  # a full disk is a RuntimeError in torch, the third in safetensors
        full = _disk_is_full(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
        before = "The checkpoint before it is whole; --resume resumes from there"
        rest = before if checkpoints(folder.parent) else "The run has no checkpoint before it"
        raise SystemExit(f"error: {folder} could not be written: {e}{full}. {rest}") from e
    for old in checkpoints(folder.parent)[: -args.keep]:
        shutil.rmtree(old, ignore_errors=True)
