"""A model folder on disk: its files, its dtype, and what tells it from others."""

import hashlib
import json
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import AutoTokenizer

from infra.errors import DataError, ModelError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}  # safetensors' names
# the text files of a model folder that change answers, besides its weights
TEXTS = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def checkpoints(run):
    """The folders checkpoint-N of a run folder, the newest last."""
    numbered = [
        c
        for c in Path(run).glob("checkpoint-*")
        if c.name.removeprefix("checkpoint-").isdecimal() and c.is_dir()
    ]
    return sorted(numbered, key=lambda c: int(c.name.removeprefix("checkpoint-")))


def newest_checkpoint(run):
    """The newest checkpoint-N of a run folder, or None."""
    return next(reversed(checkpoints(run)), None)


def local_folder(name):
    """A model folder for a folder, a run folder (its newest checkpoint) or a hub name. A folder with config.json and weights
    is the model itself, also where checkpoints of its training lie inside.

    Raises ModelError when it is none of them or holds no weights.
    """
    folder = Path(name)
    if not ((folder / "config.json").exists() and weight_files(folder)):
        folder = newest_checkpoint(name) or folder
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
            raise ModelError(f"{name}: no such model folder")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name)))
        except HFValidationError:
            raise ModelError(
                f"{name}: no such folder, and not a name that the hub could have"
            ) from None
        except OSError as e:
            reason = " ".join(str(e).split())
            raise ModelError(
                f"{name}: neither a folder nor a model that the hub could deliver ({reason})"
            ) from e
    if not (folder / "config.json").exists() and (folder / "config.txt").exists():
        raise ModelError(f"{folder}: a run folder that holds no checkpoint yet")
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json, so not a model folder")
    if not weight_files(folder):
        raise ModelError(f"{folder}: no weights (*.safetensors) beside config.json")
    return folder


def weight_files(folder):
    """The safetensors files of a model folder: those that its index names, or, without an index, those that are there.
    Raises ModelError: an index that cannot be read."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return sorted(Path(folder).glob("*.safetensors"))
    try:
        return sorted(
            {
                index.with_name(name)
                for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(
            f"{index}: expected an object with a 'weight_map' from weights to files ({e})"
        ) from e


def weights_dtype(folder):
    """The dtype of the weights in a model folder's files; of several dtypes, the one that holds all of them exactly."""
    found = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            found |= {f.get_slice(name).get_dtype() for name in f.keys()}
    if not found & DTYPES.keys():
        raise ModelError(
            f"{folder}: weights of type {', '.join(sorted(found))}, expected {', '.join(DTYPES)}"
        )
    return reduce(torch.promote_types, {DTYPES[name] for name in found & DTYPES.keys()})


def fingerprint(folder):
    """Hex digits that tell a checkpoint's weights from others: of 64 blocks of 64 KB, evenly spaced, of every file."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for i in range(64):
                f.seek(i * max(0, size - 2**16) // 63)
                digest.update(f.read(2**16))
    return digest.hexdigest()


def text_fingerprint(folder):
    """Hex digits that tell the text files of a model folder that change answers (TEXTS) from others, by their whole content."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(
        {file for pattern in TEXTS for file in Path(folder).glob(pattern) if file.is_file()}
    ):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def load_tokenizer(folder):
    """The tokenizer of a model folder. Raises DataError, naming the folder: none, or one that cannot be read."""
    if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise DataError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (
        Exception
    ) as e:  # whatever a broken file makes a native library raise is this file's error
        reason = " ".join(str(e).split())[:300]
        raise DataError(
            f"{folder}: the tokenizer cannot be read: {type(e).__name__}: {reason}"
        ) from e
