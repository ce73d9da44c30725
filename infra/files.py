"""Files that are complete or absent, logs of JSON lines, locks, and digests.

`write_whole` replaces a file, `append` adds to a .jsonl log, `lock` locks an open file, `digest`
hashes a file. A failed write raises an OSError that names its file.
"""

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
    """A hash of a file's content, in hex digits. Raises DataError."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=12).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}") from e


@contextlib.contextmanager
def naming(path):
    """Names the file in an OSError of the body that names none, such as that of a full disk."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def write_whole(path, text, errors="strict"):
    """Writes a text file under a temporary name, then renames it: readers never see half a file.

    errors: as in open(), for characters that UTF-8 cannot encode. Raises OSError, which names the
    file; the temporary file is removed.
    """
    partial = Path(f"{path}.partial")
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8", errors=errors)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def append(path, objects):
    """Appends dicts to a .jsonl file, one a line. Raises OSError, which names the file."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(_finite(o)) + "\n" for o in objects)


def _finite(o):
    """The dict with NaN and infinity as None: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in o.items()}


def lock(file, *, shared=False, wait=False):
    """Locks an open file until it is closed. Returns False if another process holds a lock on it.

    shared: processes can share the lock (on Windows, which has no such locks, nothing is locked).
    wait: wait until the lock is free. On a file system without locks, warns and returns True.
    """
    try:
        if fcntl:
            mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
        elif not shared:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # another process has it
            return False
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        if not shared:
            say(f"{file.name}: this file system has no locks; run only one process here")
    return True
