"""Visual embeddings on disk."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class EmbeddingCache:
    """Embeddings of a frozen vision tower on disk, a safetensors file for each medium, least recently used out first.

    folder: may be shared by processes and runs.  gigabytes: its bound.  tower: what tells the weights and their dtype.
    The name of an entry is a hash of all that changes the result: file (path, size, time), frame indices, frame size, tower.
    An entry that is torn, or says that it is of something else, is no entry.
    """

    def __init__(self, folder, gigabytes, tower):
        self.folder, self.bytes, self.tower, self.writable = (
            Path(folder),
            gigabytes * 1e9,
            tower,
            True,
        )
        self.folder.mkdir(parents=True, exist_ok=True)

    def _entry(self, media):
        key = json.dumps([media.key, self.tower])
        return (
            self.folder
            / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors",
            key,
        )

    def get(self, media):
        """The embedding (V, D) of a Media, or None."""
        if media.key is None:
            return None
        path, key = self._entry(media)
        try:
            with safe_open(path, "pt") as f:
                x, about = f.get_tensor("embedding"), f.metadata() or {}
            os.utime(path)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ):  # the last of a file that goes while it is being opened
            return None
        whole = (
            about.get("key") == key
            and about.get("digest") == tensor_digest(x)
            and len(x) == media.tokens
        )
        return x if whole else None

    def put(self, media, embedding):
        """Writes an entry under another name and moves it into place; then deletes the oldest files until all fit the bound.
        A folder that cannot be written is said, once, and left alone: it is only a cache."""
        if media.key is None or not self.writable:
            return
        path, key = self._entry(media)
        partial_path, x = (
            path.with_suffix(f".{uuid.uuid4().hex}.partial"),
            embedding.detach().cpu().contiguous(),
        )
        try:
            save_file({"embedding": x}, partial_path, {"key": key, "digest": tensor_digest(x)})
            partial_path.replace(path)
        except (OSError, SafetensorError) as e:
            self.writable = False
            partial_path.unlink(missing_ok=True)
            print(
                f"the embedding cache {self.folder} cannot be written, so nothing is added to it: {e}",
                flush=True,
            )
        files = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process deletes as well
                stat = file.stat()
                if (
                    file.suffix == ".safetensors" or stat.st_mtime < time.time() - 3600
                ):  # what a killed process left half-written
                    files.append((stat.st_mtime_ns, stat.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.bytes:
                break
            file.unlink(missing_ok=True)
            total -= size


def tensor_digest(*tensors):
    """Hex digits of the tensors' bytes."""
    h = hashlib.blake2b(digest_size=16)
    for x in tensors:
        h.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
