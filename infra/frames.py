"""Which frames of a clip are shown, and at what size: the rules of Video-R1 (arXiv 2503.21776,
released code) and of Qwen2-VL's processor.

    frame_indices    evenly spaced frames, as many as the rate and the limits allow
    choose_frames    the same for a part of a clip
    choose_times     the same for a clip of variable frame rate
    smart_resize     sides in multiples of 28, or 32 for Qwen3-VL
"""

import math

import numpy as np
from PIL import Image

from infra.errors import VideoError

PATCH, MERGE = 14, 2  # Qwen2.5-VL: a visual token is 28 x 28 pixels in two frames


def frame_indices(num_frames, fps, *, target_fps=2.0, min_frames=4, max_frames=16):
    """Which frames of a clip to show: an even number n, evenly spaced from the first to the last.

    n = seconds * target_fps, within [min_frames, max_frames] and at most num_frames, made even;
    indices = round(linspace(0, num_frames - 1, n)). For a fixed number of frames set target_fps to
    inf and max_frames to the number.
    Raises ValueError for a clip with fewer than 2 frames: a visual token spans two.
    """
    limits = dict(target_fps=target_fps, min_frames=min_frames, max_frames=max_frames)
    n = frame_count(num_frames, fps, **limits)
    return np.linspace(0, num_frames - 1, n).round().astype(int).tolist()


def frame_count(num_frames, fps, *, target_fps, min_frames, max_frames=math.inf):
    """The n of frame_indices; without max_frames, the most frames that the clip can show."""
    if num_frames < 2 or not 0 < fps < math.inf:
        raise ValueError(
            f"{num_frames} frames at {fps:g} frames per second, a video needs at least 2 frames"
        )
    n = min(max(num_frames / fps * target_fps, min_frames), max_frames, num_frames)
    return max(2, int(n + 1e-6) // 2 * 2)


def choose_frames(num_frames, fps, segment, *, start=0.0, target_fps, min_frames, max_frames):
    """Which frames to show of a clip of constant frame rate, or of its `segment` (from, to) in
    seconds -> (indices in the clip, seconds per frame shown, the most frames it could show).

    start: the second at which the first frame appears. Raises ValueError: as frame_indices, or a
    segment outside the clip.
    """
    first, end = 0, num_frames
    if segment is not None:
        a, b = _within(segment, start, start + num_frames / fps)
        first, end = int((a - start) * fps + 1e-6), int((b - start) * fps + 1e-6)
    how = dict(target_fps=target_fps, min_frames=min_frames)
    indices = [first + i for i in frame_indices(end - first, fps, max_frames=max_frames, **how)]
    return indices, (end - first) / fps / len(indices), frame_count(end - first, fps, **how)


def choose_times(times, end, segment, *, target_fps, min_frames, max_frames):
    """choose_frames for a clip of variable frame rate: what is on the screen at evenly spaced
    times.

    times (N,): when each picture appears, ascending; end: when the last one disappears; in seconds.
    A picture that stays on the screen may be shown several times; it counts as the frames that it
    would be at the clip's median rate. The last time is when the last picture appears, or one such
    frame before the end if that is later.
    """
    if len(times) < 2:
        raise VideoError(f"{len(times)} frames, a video needs at least 2 frames")
    start, period = times[0], float(np.median(np.diff(times)))
    if segment is not None:
        start, end = _within(segment, start, end)
    pictures = np.searchsorted(times, end) - np.searchsorted(times, start, "right") + 1
    num_frames = max(int(pictures), round((end - start) / period), 2)
    how = dict(target_fps=target_fps, min_frames=min_frames)
    rate = num_frames / (end - start)
    n = frame_count(num_frames, rate, max_frames=max_frames, **how)
    last = max(times[times < end][-1], end - 1 / rate)
    indices = np.searchsorted(times, np.linspace(start, last, n) + 1e-9, "right") - 1
    return indices.tolist(), (end - start) / n, frame_count(num_frames, rate, **how)


def _within(segment, start, end):
    """The part of a segment (from, to) that lies between start and end; all in seconds."""
    a, b = max(segment[0], start), min(segment[1], end)
    if not a < b:
        raise VideoError(
            f"no frames from {segment[0]:g} to {segment[1]:g} s: "
            f"it has those from {start:.2f} to {end:.2f} s"
        )
    return a, b


def smart_resize(height, width, *, min_pixels, max_pixels, factor=PATCH * MERGE):
    """(height, width) as multiples of `factor`, with an area within [min_pixels, max_pixels] and
    nearly the same aspect ratio.

    The rule of Qwen2-VL's processor. That of Qwen3-VL limits the pixels of all frames together, so
    that more frames become smaller; for its videos too, the limits here are those of one frame, as
    in Video-R1. Raises ValueError for an aspect ratio over 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: an aspect ratio over 200")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def resize(image, min_pixels, max_pixels, factor=PATCH * MERGE, shape=None):
    """A Pillow image -> uint8 (H, W, 3) at smart_resize's size, bicubic with antialiasing.
    shape: (height, width) as displayed, if pixels are not square."""
    height, width = shape or (image.height, image.width)
    limits = dict(min_pixels=min_pixels, max_pixels=max_pixels)
    height, width = smart_resize(height, width, **limits, factor=factor)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
