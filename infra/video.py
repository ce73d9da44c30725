"""Frames of video and image files, read in a process of its own that can be killed.

A decoder can hang or crash inside native code, holding the interpreter's lock: no signal and no
in-process timeout helps. So this file is also a program (`python -m infra.video`, a worker that answers
requests on its standard input), and read_clip and read_image ask it, and kill it when it does not
answer. A bad file then costs one sample, never the run.

What is read from a file: reader.py. Which frames are shown and at what size: here, by the rules of
Video-R1 (arXiv 2503.21776, released code). The worker resizes frame by frame, so that an hour of
video never stands in memory at full size.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.errors import VideoError
from infra.frames import choose_frames, choose_times, resize
from infra.reader import READERS, load_image

CLIPS_PER_WORKER = 500  # decord leaks memory: a worker is replaced after this many


# ---- which frames, which size


# ---- the side of the trainer

_worker = threading.local()  # one worker process per reading thread
_running = set()  # all of them


def _forget():
    """For a forked process: the workers are its parent's."""
    _worker.__dict__.clear()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Clip(NamedTuple):
    """Frames of a video. frames: uint8 (T, H, W, 3), T even, H and W multiples of 28.
    seconds: of the clip, divided by T.  available: frames that it would show without max_frames.
    indices: of the T frames, counted in order of display.  keys: what identifies each in its file.
    """

    frames: np.ndarray
    seconds: float
    available: int
    indices: list[int]
    keys: list[int]


def read_video(path, **how):
    """Decodes a video file -> (frames uint8 [T, H, W, 3], seconds per frame); read_clip says how and what is raised."""
    return read_clip(path, **how)[:2]


def read_clip(
    path,
    *,
    target_fps=2.0,
    min_frames=4,
    max_frames=16,
    min_pixels=4 * 28 * 28,
    max_pixels=128 * 28 * 28,
    segment=None,
    timeout=60.0,
    decoded=None,
    reader="av",
):
    """Decodes a video file, or its `segment` (start, end) in seconds -> Clip; rotated videos come upright.

    decoded: {key of a frame: frame} of earlier calls for this file at this size; these are not decoded again, new ones are
    added.  reader: one of reader.READERS.
    Raises VideoError, naming the file: missing, unreadable, fewer than 2 frames, or not decoded after `timeout` seconds (the
    worker is then killed, and the next call starts another).
    """
    decoded = {} if decoded is None else decoded
    reply, frames = _ask(
        timeout,
        op="video",
        path=str(path),
        target_fps=target_fps,
        min_frames=min_frames,
        max_frames=max_frames,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        segment=segment,
        skip=list(decoded),
        reader=reader,
    )
    decoded.update(zip(reply["new"], frames))
    frames = [decoded[key] for key in reply["keys"]]
    if len(shapes := {frame.shape for frame in frames}) > 1:
        raise VideoError(f"{path}: frames of {len(shapes)} different sizes")
    return Clip(
        np.stack(frames), reply["seconds"], reply["available"], reply["indices"], reply["keys"]
    )


def read_image(path, *, min_pixels, max_pixels, timeout=60.0):
    """An image file -> uint8 (H, W, 3). Raises VideoError as read_clip."""
    return _ask(timeout, op="image", path=str(path), min_pixels=min_pixels, max_pixels=max_pixels)[
        1
    ][0]


def _ask(timeout, **request):
    """Sends a request about the file request["path"] to this thread's worker -> (reply, frames)."""
    path, request["path"] = (
        request["path"],
        os.path.abspath(request["path"]),
    )  # FFmpeg takes "a:b" for an address
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if os.path.isdir(path):
        raise VideoError(f"{path}: a folder, expected a file")
    request["alarm"] = math.ceil(timeout) + 5
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
    except BaseException:  # ctrl-C, say: the next request must not get this one's answer
        close_worker()
        raise
    finally:
        timer.cancel()
    raise VideoError(f"{path}: {reply['error']}")


def _open_worker():
    process = getattr(_worker, "process", None)
    if process is None or process.poll() is not None or _worker.clips >= CLIPS_PER_WORKER:
        close_worker()
        # in a session of its own: ctrl-C and torchrun signal all of a process's group, and a run that stops ends its step first
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
    """Ends the workers of all threads, which are done reading: those of a thread pool outlive its threads."""
    for process in list(_running):
        _end(process)


def _end(process):
    process.kill()
    process.communicate()
    _running.discard(process)


# ---- the side of the worker


def decode(path, *, reader="av", segment=None, skip=(), min_pixels, max_pixels, **counts):
    """What read_clip promises -> (reply, the new frames: those whose keys are not in `skip`)."""
    clip = READERS[reader](path)
    if clip.rate:
        indices, seconds, available = choose_frames(
            len(clip.keys), clip.rate, segment, start=clip.times[0], **counts
        )
    else:
        indices, seconds, available = choose_times(clip.times, clip.end, segment, **counts)
    new = [i for i in sorted(set(indices)) if clip.keys[i] not in skip]
    frames = [
        resize(picture.image, min_pixels, max_pixels, picture.shape)
        for picture in clip.pictures(new)
    ]
    reply = dict(
        indices=indices,
        seconds=seconds,
        available=available,
        keys=[clip.keys[i] for i in indices],
        new=[clip.keys[i] for i in new],
    )
    return reply, frames


def decode_image(path, *, min_pixels, max_pixels):
    """What read_image promises -> ({}, [frame])."""
    return {}, [resize(load_image(path), min_pixels, max_pixels)]


def answer(request):
    """Does what a request asks for -> (reply, frames)."""
    ops = {"video": decode, "image": decode_image}
    before = os.stat(request["path"])
    try:
        reply, frames = ops[request.pop("op")](**request)
        if (
            len(shapes := {frame.shape for frame in frames}) > 1
        ):  # their bytes would not fit one shape
            raise VideoError(f"frames of {len(shapes)} different sizes")
        reply["shape"] = (len(frames), *frames[0].shape) if frames else (0,)
    finally:
        now = os.stat(request["path"])
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (
            before.st_ino,
            before.st_size,
            before.st_mtime_ns,
        ):
            raise VideoError("changed while it was read")
    return reply, frames


def work(requests, replies):
    """Answers one JSON request a line with one JSON line, and on success the frames' bytes behind it.

    Where there are alarms, one ends this process if a request takes longer than its "alarm", in seconds: the process that
    asked may have gone, and a native library that hangs hears nothing else.
    """
    set_alarm = getattr(signal, "alarm", lambda seconds: None)
    for line in requests:
        request = json.loads(line)
        path = request["path"]
        set_alarm(request.pop("alarm"))
        try:
            reply, frames = answer(request)
        except Exception as e:  # whatever a broken file makes a native library raise is this file's error, not the run's
            reason = (
                str(e)
                if type(e) in (VideoError, ValueError)
                else f"cannot be decoded: {type(e).__name__}: {e}"
            )
            reason = reason.replace(f" {path!r}", "").replace(path, "")
            reply, frames = dict(error=" ".join(reason.split())[:300]), []
        set_alarm(0)
        replies.write(json.dumps(reply).encode() + b"\n")
        for frame in frames:
            replies.write(frame.tobytes())
        replies.flush()


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(
        2, 1
    )  # whatever a native library prints goes to standard error, not between the replies
    work(sys.stdin.buffer, replies)
