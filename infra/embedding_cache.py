"""Visual embeddings on disk, for a frozen vision tower: one safetensors file per medium."""

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

ABANDONED = 3600  # seconds after which a half-written file is what a killed process left


class EmbeddingCache:
    """Embeddings of media by file; the least recently used are deleted first.

    folder: may be shared by processes and runs.  gigabytes: its size, at most.
    tower: what the embeddings depend on besides the media (Policy.tower_fingerprint).

    The name of an entry is a hash of everything that changes the result: file (path, size, time),
    frame indices, frame size, tower. A torn entry, or one that says it is of something else, does
    not count.
    """

    def __init__(self, folder, gigabytes, tower):
        self.folder, self.bytes, self.tower = Path(folder), gigabytes * 1e9, tower
        self.writable = True
        self.folder.mkdir(parents=True, exist_ok=True)

    def _entry(self, media):
        key = json.dumps([media.key, self.tower])
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors", key

    def get(self, media):
        """The embedding (V, D) of a Media, or None."""
        if media.key is None:
            return None
        path, key = self._entry(media)
        try:
            with safe_open(path, "pt") as f:
                x, about = f.get_tensor("embedding"), f.metadata() or {}
            os.utime(path)
        except (OSError, SafetensorError, RuntimeError):  # Runtime: deleted while it is opened
            return None
        if about.get("key") != key or about.get("digest") != tensor_digest(x):
            return None
        return x if len(x) == media.tokens else None

    def put(self, media, embedding):
        """Writes an entry and moves it into place, then deletes the oldest until all fit.

        A folder that cannot be written is reported once and then left alone: it is only a cache.
        """
        if media.key is None or not self.writable:
            return
        path, key = self._entry(media)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        x = embedding.detach().cpu().contiguous()
        try:
            save_file({"embedding": x}, partial, {"key": key, "digest": tensor_digest(x)})
            partial.replace(path)
        except (OSError, SafetensorError) as e:
            self.writable = False
            partial.unlink(missing_ok=True)
            print(
                f"the embedding cache {self.folder} cannot be written, so nothing is added: {e}",
                flush=True,
            )
        self._evict()

    def _evict(self):
        files = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # other processes delete as well
                stat = file.stat()
                if file.suffix == ".safetensors" or stat.st_mtime < time.time() - ABANDONED:
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
