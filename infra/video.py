"""Frames of videos, images and folders of frames, decoded in a worker process that can be killed.

A decoder can hang or crash inside native code and hold the interpreter's lock: no signal and no
timeout inside the process helps. So read_clip and read_image send requests to a worker, and kill it
if it does not answer. A bad file costs one sample, never the run. This file is also the worker's
program (`python -m infra.video`): it answers requests on its standard input.

reader.py reads the pictures of a file. frames.py chooses frames and sizes, by the rules of Video-R1
(arXiv 2503.21776, released code). The worker resizes each frame at once, so an hour of video is
never in memory at full size.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.errors import VideoError
from infra.frames import MERGE, PATCH, choose_frames, choose_times, resize
from infra.reader import READERS, load_image

CLIPS_PER_WORKER = 500  # then a new worker: decord leaks memory
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # the frames of a folder


class Clip(NamedTuple):
    """Frames of a video. frames: uint8 (T, H, W, 3), T even, H and W multiples of `factor`.
    seconds: the duration of the clip, divided by T.  available: frames that it would show without
    max_frames.  indices: of the T frames, in order of display.  keys: their identity in the file.
    times: when each of them appears in the file, in seconds; not from the start of a segment.
    """

    frames: np.ndarray
    seconds: float
    available: int
    indices: list[int]
    keys: list[int]
    times: list[float]


def read_video(path, **how):
    """A video file -> (frames uint8 [T, H, W, 3], seconds per frame). See read_clip."""
    return read_clip(path, **how)[:2]


def read_clip(
    path,
    *,
    target_fps=2.0,
    min_frames=4,
    max_frames=16,
    min_pixels=4 * 28 * 28,
    max_pixels=128 * 28 * 28,
    factor=PATCH * MERGE,
    segment=None,
    timeout=60.0,
    decoded=None,
    reader="av",
):
    """A video file, or its `segment` (start, end) in seconds -> Clip. Rotated videos come upright.

    factor: sides are multiples of it.  decoded: {key of a frame: frame} of earlier calls for this
    file and size. These are not decoded again; new ones are added.  reader: one of reader.READERS.
    Raises VideoError, naming the file: missing, unreadable, fewer than 2 frames, or not decoded
    after `timeout` seconds (the worker is then killed, and the next call starts another).
    """
    decoded = {} if decoded is None else decoded
    request = dict(target_fps=target_fps, min_frames=min_frames, max_frames=max_frames)
    request |= dict(min_pixels=min_pixels, max_pixels=max_pixels, factor=factor, segment=segment)
    request |= dict(op="video", path=str(path), reader=reader, skip=list(decoded))
    reply, new = _ask(timeout, request)
    decoded.update(zip(reply["new"], new))
    frames = _stack([decoded[key] for key in reply["keys"]], path)
    told = (reply[name] for name in ("seconds", "available", "indices", "keys", "times"))
    return Clip(frames, *told)


def read_image(path, *, min_pixels, max_pixels, factor=PATCH * MERGE, timeout=60.0):
    """An image file -> uint8 (H, W, 3). Raises VideoError, as read_clip."""
    size = dict(min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    _, frames = _ask(timeout, dict(op="image", path=str(path), **size))
    return frames[0]


def read_folder(
    path,
    fps,
    *,
    segment=None,
    min_pixels,
    max_pixels,
    factor=PATCH * MERGE,
    timeout=60.0,
    **counts,
):
    """A folder of frames, `fps` a second, in the order of the numbers in their names -> Clip.
    counts: as choose_frames. Raises VideoError: as read_clip, anything in the folder that is no
    picture (hidden files are ignored), or an ambiguous order."""
    path = Path(path)
    if not path.is_dir():
        raise VideoError(f"{path}: no such folder of frames")
    files = [f for f in path.iterdir() if f.name[0] != "."]
    others = sorted(f.name for f in files if f.suffix.lower() not in PICTURES or f.is_dir())
    if others:
        raise VideoError(
            f"{path}: {len(others)} of its {len(files)} entries are not pictures, such as "
            f"{others[0]!r}; expected a folder of {', '.join(PICTURES)} only"
        )
    files = _by_number(files, path)
    indices, seconds, available = choose_frames(len(files), fps, segment, **counts)
    size = dict(min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    frames = [read_image(files[i], **size, timeout=timeout) for i in indices]
    times = [i / fps for i in indices]
    return Clip(_stack(frames, path), seconds, available, indices, indices, times)


def _by_number(files, folder):
    """Files in the order of the numbers in their names: 9 before 10. Raises VideoError if it
    matters whether 1.5 is one number or two, or if two have the same numbers."""
    whole = sorted(files, key=lambda file: _numbers("([0-9]+)", file.stem))
    decimal = sorted(files, key=lambda file: _numbers(r"([0-9]+(?:\.[0-9]+)?)", file.stem))
    for a, b in itertools.pairwise(whole):
        if _numbers("([0-9]+)", a.stem) == _numbers("([0-9]+)", b.stem):
            raise VideoError(f"{folder}: {a.name} or {b.name} first? They have the same number")
    for a, b in zip(whole, decimal):
        if a != b:
            raise VideoError(
                f"{folder}: {a.name} or {b.name} first? Number its frames with as many digits each"
            )
    return whole


def _numbers(pattern, name):
    """The parts of a name, its numbers as such: "frame9" -> ["frame", Decimal(9), ""]."""
    parts = re.split(pattern, name)
    return [Decimal(part) if i % 2 else part for i, part in enumerate(parts)]


def _stack(frames, path):
    """(H, W, 3) each -> (T, H, W, 3). Raises VideoError: frames of different sizes."""
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise VideoError(f"{path}: frames of {len(sizes)} different sizes")
    return np.stack(frames)


# ---- the trainer's side: one worker process per thread that reads

_worker = threading.local()  # this thread's: process, clips that it has read
_running = set()  # the processes of all threads


def _ask(timeout, request):
    """Sends a request about the file request["path"] to this thread's worker -> (reply, frames)."""
    path = request["path"]
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"{path}: a folder, expected a file")
    absolute = os.path.abspath(path)  # FFmpeg takes "a:b" for an address
    request = request | dict(path=absolute, alarm=math.ceil(timeout) + 5)
    process = _open_worker()
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        if "error" not in reply:
            data = process.stdout.read(math.prod(reply["shape"]))
            return reply, np.frombuffer(data, np.uint8).reshape(reply["shape"])
    except (ValueError, OSError) as e:  # the worker is gone: no answer, or half of one
        late = not timer.is_alive()
        close_worker()
        reason = f"not decoded after {timeout:g} s" if late else f"the decoder crashed ({e})"
        raise VideoError(f"{path}: {reason}") from e
    except BaseException:  # e.g. ctrl-C: the next request must not get the answer to this one
        close_worker()
        raise
    finally:
        timer.cancel()
    raise VideoError(f"{path}: {reply['error']}")


def _open_worker():
    """This thread's worker process, a new one where it has none."""
    process = getattr(_worker, "process", None)
    if process is None or process.poll() is not None or _worker.clips >= CLIPS_PER_WORKER:
        close_worker()
        # A session of its own: ctrl-C and torchrun signal the whole process group, but a run that
        # is asked to stop still finishes its step.
        _worker.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "infra.video"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        _worker.clips = 0
        _running.add(_worker.process)
    _worker.clips += 1
    return _worker.process


def close_worker():
    """Ends this thread's worker, if there is one."""
    if getattr(_worker, "process", None) is not None:
        _end(_worker.process)
        _worker.process = None


def close_workers():
    """Ends the workers of all threads. Call it when none is reading: the workers of a thread pool
    outlive its threads."""
    for process in list(_running):
        _end(process)


def _end(process):
    process.kill()
    process.communicate()
    _running.discard(process)


def _forget():
    """In a forked process: the workers are its parent's."""
    _worker.__dict__.clear()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- the worker's side


def decode(
    path,
    *,
    reader="av",
    segment=None,
    skip=(),
    min_pixels,
    max_pixels,
    factor=PATCH * MERGE,
    **counts,
):
    """The answer to read_clip -> (reply, the new frames: those whose keys are not in `skip`)."""
    clip = READERS[reader](path)
    if clip.rate:
        num_frames, start = len(clip.keys), clip.times[0]
        chosen = choose_frames(num_frames, clip.rate, segment, start=start, **counts)
    else:
        chosen = choose_times(clip.times, clip.end, segment, **counts)
    indices, seconds, available = chosen
    new = [i for i in sorted(set(indices)) if clip.keys[i] not in skip]
    size = min_pixels, max_pixels, factor
    frames = [resize(p.image, *size, shape=p.shape) for p in clip.pictures(new)]
    reply = dict(indices=indices, seconds=seconds, available=available)
    reply["keys"] = [clip.keys[i] for i in indices]
    reply["times"] = [float(clip.times[i]) for i in indices]
    if clip.rate:  # not rounded to the file's ticks
        reply["times"] = [float(clip.times[0]) + i / clip.rate for i in indices]
    reply["new"] = [clip.keys[i] for i in new]
    return reply, frames


def decode_image(path, **size):
    """The answer to read_image -> ({}, [frame])."""
    return {}, [resize(load_image(path), **size)]


OPERATIONS = {"video": decode, "image": decode_image}


def answer(request):
    """Does what a request asks -> (reply, frames). Raises VideoError: e.g. the file changed."""
    path, operation = request["path"], OPERATIONS[request.pop("op")]
    before = _version(path)
    try:
        reply, frames = operation(**request)
        sizes = {frame.shape for frame in frames}
        if len(sizes) > 1:  # their bytes would not fit one shape
            raise VideoError(f"frames of {len(sizes)} different sizes")
        reply["shape"] = (len(frames), *frames[0].shape) if frames else (0,)
    finally:
        if _version(path) != before:
            raise VideoError("changed while it was read")
    return reply, frames


def _version(path):
    """Changes if a file changes."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def work(requests, replies):
    """Answers each request, a line of JSON, with a line of JSON, followed by the bytes of the
    frames.

    If a request takes longer than its "alarm", in seconds, an alarm ends this process (not on
    Windows): the trainer may be gone, and a native library that hangs reacts to nothing else.
    """
    for line in requests:
        request = json.loads(line)
        path = request["path"]
        _set_alarm(request.pop("alarm"))
        try:
            reply, frames = answer(request)
        except Exception as e:  # whatever a native library raises about a broken file
            reply, frames = dict(error=_reason(e, path)), []
        _set_alarm(0)
        replies.write(json.dumps(reply).encode() + b"\n")
        for frame in frames:
            replies.write(frame.tobytes())
        replies.flush()


def _set_alarm(seconds):
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


def _reason(e, path):
    """An exception in one line, without the path."""
    reason = str(e)
    if type(e) not in (VideoError, ValueError):
        reason = f"cannot be decoded: {type(e).__name__}: {e}"
    reason = reason.replace(f" {path!r}", "").replace(path, "")
    return " ".join(reason.split())[:300]


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native libraries print goes to standard error, not between the replies
    work(sys.stdin.buffer, replies)
