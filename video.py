"""Frames of a video file, decoded in a process of its own that can be killed.

decord can hang or crash inside native code, holding the interpreter's lock: no signal and no in-process timeout helps.
So this file is also a program (`python video.py`, a worker that answers requests on its standard input), and
`read_video` asks it and kills it when it does not answer. A bad file then costs one sample, never the run.
Sampling and resizing are those of Video-R1 (arXiv 2503.21776, released code): they run in the worker,
frame by frame, so that an hour of video never stands in memory at full size.
"""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

PATCH, MERGE = 14, 2  # a visual token is a 28 x 28 pixel square of a 2-frame grid
CLIPS_PER_WORKER = 500  # decord leaks memory: a worker is replaced after this many


class VideoError(ValueError):
    """A video or image that cannot be used, and why; names the file."""


def frame_indices(num_frames, fps, *, target_fps=2.0, min_frames=4, max_frames=16):
    """Which frames of a clip to show: an even number n, evenly spaced from the first to the last.

    n = the clip's seconds * target_fps, held within [min_frames, max_frames] and within the clip's own length, even;
    indices = round(linspace(0, num_frames - 1, n)). A fixed number of frames is target_fps = inf and max_frames.
    Raises ValueError for a clip with fewer than 2 frames: a visual token spans two.
    """
    n = frame_count(num_frames, fps, target_fps=target_fps, min_frames=min_frames, max_frames=max_frames)
    return np.linspace(0, num_frames - 1, n).round().astype(int).tolist()


def frame_count(num_frames, fps, *, target_fps, min_frames, max_frames=math.inf):
    """The n of frame_indices; without max_frames, the most frames that the clip has to show."""
    if num_frames < 2 or not 0 < fps < math.inf:
        raise ValueError(f"{num_frames} frames at {fps:g} frames per second, a video needs at least 2 frames")
    n = min(max(num_frames / fps * target_fps, min_frames), max_frames, num_frames)
    return max(2, int(n) // 2 * 2)


def choose_frames(num_frames, fps, segment, *, target_fps, min_frames, max_frames):
    """frame_indices of a clip, or of its `segment` (start, end) in seconds -> (indices in the clip, seconds per frame shown, the
    most frames that could be shown)."""
    first, end = (0, num_frames) if segment is None else (min(int(t * fps), num_frames) for t in segment)
    how = dict(target_fps=target_fps, min_frames=min_frames)
    indices = [first + i for i in frame_indices(end - first, fps, max_frames=max_frames, **how)]
    return indices, (end - first) / fps / len(indices), frame_count(end - first, fps, **how)


def smart_resize(height, width, *, min_pixels, max_pixels, factor=PATCH * MERGE):
    """(height, width) as multiples of `factor`, area within [min_pixels, max_pixels], aspect ratio nearly kept.

    The rule of Qwen2-VL's processor. Raises ValueError for an aspect ratio over 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: an aspect ratio over 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(x / shrink / factor) * factor) for x in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(x * grow / factor) * factor for x in (height, width))
    return h, w


def load_image(path):
    """An image file -> Pillow RGB, upright (EXIF), transparency on white. Raises VideoError naming the file."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16 bits a pixel; convert() would clip them
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise VideoError(f"{path}: an image of {image.mode!r} pixels, expected 8 or 16 bits a channel")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow raises SyntaxError for a broken PNG
        raise VideoError(f"{path}: cannot be read as an image: {e}") from e


def resize(image, min_pixels, max_pixels):
    """A Pillow image -> uint8 (H, W, 3) at smart_resize's size, bicubic with antialiasing."""
    height, width = smart_resize(image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels)
    return np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC))


# ---- the side of the trainer

_worker = threading.local()  # one worker process per reading thread
_running = set()  # all of them


class Clip(NamedTuple):
    """Frames of a video. frames: uint8 (T, H, W, 3), T even, H and W multiples of 28. seconds: the clip's true duration / T.
    available: frames that the clip would show without max_frames. indices: of the T frames in the file."""
    frames: np.ndarray
    seconds: float
    available: int
    indices: list[int]


def read_video(path, **how):
    """Decodes a video file -> (frames uint8 [T, H, W, 3], seconds per frame); read_clip says how and what is raised."""
    return read_clip(path, **how)[:2]


def read_clip(path, *, target_fps=2.0, min_frames=4, max_frames=16, min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28,
              segment=None, timeout=60.0, decoded=None):
    """Decodes a video file, or its `segment` (start, end) in seconds -> Clip; rotated videos come upright.

    decoded: {frame index: frame} of earlier calls for this file at this size; these are not decoded again, new ones are added.
    Raises VideoError, naming the file: missing, unreadable, fewer than 2 frames, or not decoded after `timeout` seconds (the
    worker is then killed, and the next call starts another).
    """
    decoded = {} if decoded is None else decoded
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    process = _open_worker()
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        request = dict(path=str(path), target_fps=target_fps, min_frames=min_frames, max_frames=max_frames,
                       min_pixels=min_pixels, max_pixels=max_pixels, segment=segment, skip=list(decoded))
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        if "error" not in reply:
            frames = np.frombuffer(process.stdout.read(math.prod(reply["shape"])), np.uint8).reshape(reply["shape"])
            indices = reply["indices"]
            decoded.update(zip((i for i in indices if i not in decoded), frames))
            return Clip(np.stack([decoded[i] for i in indices]), reply["seconds"], reply["available"], indices)
    except (ValueError, OSError) as e:  # the worker is gone: no answer, or half of one
        late = not timer.is_alive()
        close_worker()
        reason = f"not decoded after {timeout:g} s" if late else f"the decoder crashed ({e})"
        raise VideoError(f"{path}: {reason}") from e
    finally:
        timer.cancel()
    raise VideoError(f"{path}: {reply['error']}")


def _open_worker():
    process = getattr(_worker, "process", None)
    if process is None or process.poll() is not None or _worker.clips >= CLIPS_PER_WORKER:
        close_worker()
        # in a session of its own: ctrl-C and torchrun signal all of a process's group, and a run that stops ends its step first
        _worker.process = subprocess.Popen([sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           start_new_session=True)
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

def decode(path, skip, segment, *, target_fps, min_frames, max_frames, min_pixels, max_pixels):
    """What read_clip promises, in this process -> (reply, the frames whose indices are not in `skip`)."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(path, num_threads=1)
    fps = float(reader.get_avg_fps())
    counts = dict(target_fps=target_fps, min_frames=min_frames, max_frames=max_frames)
    indices, seconds, available = choose_frames(len(reader), fps, segment, **counts)
    wanted = sorted(set(indices) - set(skip))
    frames = [resize(Image.fromarray(frame), min_pixels, max_pixels)
              for i in range(0, len(wanted), 16) for frame in reader.get_batch(wanted[i : i + 16]).asnumpy()]
    shape = (len(frames), *frames[0].shape) if frames else (0,)
    reply = dict(indices=indices, seconds=seconds, shape=shape, available=available)
    return reply, b"".join(frame.tobytes() for frame in frames)


def work(requests, replies):
    """Answers one JSON request a line with one JSON line, and on success the frames' bytes behind it."""
    for line in requests:
        request = json.loads(line)
        try:
            reply, data = decode(**request)
        except Exception as e:  # whatever a broken file makes a native library raise is this file's error, not the run's
            message = " ".join(str(e).split()).replace(request["path"], "")
            reply, data = dict(error=f"cannot be decoded: {type(e).__name__}: {message[:300]}"), b""
        replies.write(json.dumps(reply).encode() + b"\n" + data)
        replies.flush()


if __name__ == "__main__":
    import os
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a native library prints goes to standard error, not between the replies
    work(sys.stdin.buffer, replies)
