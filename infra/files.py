"""Files that are whole or not there, locks, and digests."""

import contextlib
import errno
import hashlib
import json
import math
from pathlib import Path

from infra.errors import DataError
from infra.ranks import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def digest(path):
    """Hex digits that tell a file's content from others. Raises DataError."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=12).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}") from e


@contextlib.contextmanager
def naming(path):
    """Around the writing of a file: an OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def write_whole(path, text, errors="strict"):
    """Writes a file under another name and moves it into place: a file that has its name is whole. errors: as in open, for
    what UTF-8 does not have. Raises OSError, which names the file; nothing is left under the other name."""
    partial = Path(f"{path}.partial")
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8", errors=errors)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def append(path, objects):
    """Appends objects to a .jsonl file. Raises OSError, which names the file."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(_finite(o)) + "\n" for o in objects)


def _finite(o):
    """NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in o.items()}


def lock(file, *, shared=False, wait=False):
    """Locks an open file until it is closed -> whether other processes allow it. shared: with others that share it; on Windows,
    whose locks are one process's, nothing is done for a shared one. wait: until they allow it."""
    try:
        if fcntl:
            fcntl.flock(
                file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            )
        elif not shared:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        if not shared:
            say(
                f"{file.name}: this file system has no locks, so nothing keeps other processes from writing there too"
            )
    return True
