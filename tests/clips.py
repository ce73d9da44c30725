"""Clips whose pictures show their own numbers, so a test can read back which were shown.

python tests/clips.py              which files each reader reads rightly, docs/videos.md's table
python tests/clips.py FILE ...     CPU seconds of each reader for 16, 64 and 512 frames of a file
"""

import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra import errors, video  # noqa: E402
from infra.frames import frame_indices  # noqa: E402

SIZE = 96
H264 = {"codec": "libx264", "g": 12}
OPEN = H264 | {"x264-params": "open-gop=1:bframes=3"}
HEVC = {
    "codec": "libx265",
    "preset": "ultrafast",
    "x265-params": "keyint=12:bframes=3:log-level=none",
}
MPEG2 = {"codec": "mpeg2video", "bf": 2, "g": 12}
MPEG4 = {"codec": "mpeg4", "bf": 2, "g": 12}
# name: file, codec and its options (g: pictures from one key frame to the next)
# of a clip of 48 pictures, 25 a second
KINDS = {
    "H.264, mp4": ("h264.mp4", H264),
    "H.264, mkv": ("h264.mkv", H264),
    "H.264, flv": ("h264.flv", H264),
    "H.264, ts": ("h264.ts", H264),
    "H.264, avi": ("h264.avi", H264),
    "H.264 with open groups, mp4": ("open.mp4", OPEN),
    "H.264 with open groups, ts": ("open.ts", OPEN),
    "H.264 without time stamps": ("raw.h264", H264),
    "HEVC with open groups, mp4": ("hevc.mp4", HEVC),
    "HEVC with open groups, ts": ("hevc.ts", HEVC),
    "MPEG-4 with B-frames, avi": ("mpeg4.avi", MPEG4),
    "MPEG-4 with B-frames, mp4": ("mpeg4.mp4", MPEG4),
    "MPEG-2, ts": ("mpeg2.ts", MPEG2),
    "MPEG-2, mpg": ("mpeg2.mpg", MPEG2),
    "MPEG-2, mkv": ("mpeg2.mkv", MPEG2),
    "VP8, webm": ("vp8.webm", {"codec": "libvpx", "g": 24, "auto-alt-ref": 1, "lag-in-frames": 8}),
    "VP9, webm": (
        "vp9.webm",
        {"codec": "libvpx-vp9", "g": 24, "lag-in-frames": 8, "deadline": "realtime"},
    ),
    "AV1, mp4": ("av1.mp4", {"codec": "libsvtav1", "g": 24, "preset": 12}),
    "Motion JPEG, avi": ("mjpeg.avi", {"codec": "mjpeg"}),
    "GIF": ("anim.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
}
ROUNDS = (2, 4, 8, 16, 32, 64)  # numbers of frames


def picture(number):
    """uint8 (96, 96, 3): nine blocks, block b bright where bit b of the number is 1."""
    bits = np.array([number >> b & 1 for b in range(9)], np.uint8).reshape(3, 3) * 185 + 35
    return np.repeat(np.kron(bits, np.ones((32, 32), np.uint8))[..., None], 3, 2)


def number(frame):
    """The number that a frame (H, W, 3) shows."""
    h, w = frame.shape[0] // 3, frame.shape[1] // 3
    bright = 0
    for b in range(9):
        y, x = b // 3 * h, b % 3 * w
        middle = frame[y + h // 4 : y + h - h // 4, x + w // 4 : x + w - w // 4]
        bright |= int(middle.mean() > 127) << b
    return bright


def write(
    path,
    numbers,
    *,
    codec="libx264",
    times=None,
    ticks=1000,
    rate=25,
    pix_fmt="yuv420p",
    edit=None,
    **options,
):
    """Writes a clip that shows `numbers`, at `rate` a second or at `times` in seconds, rounded to
    `ticks` a second -> path. edit: called with the stream before anything is written."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=rate, options={name: str(value) for name, value in options.items()}
        )
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, ticks)
        if edit:
            edit(stream)
        for i, n in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(n), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * ticks), Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source, target, start, first=0):
    """Copies the packets of a clip from number `first` on, without encoding them again -> target.
    Second `start` becomes second 0."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(old.demux(video=0)):
            if packet.size and i >= first:
                shift = round(start / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift,
                    packet.dts - shift,
                    stream,
                )
                new.mux(packet)
    return target


def shown(path, **how):
    """What read_clip shows of a clip -> (numbers, Clip)."""
    clip = video.read_clip(path, min_pixels=SIZE * SIZE, **how)
    return [number(frame) for frame in clip.frames], clip


def shows_rightly(path, reader):
    """Are 2 to 64 frames of a clip of 48 pictures the right ones? In the words of the table."""
    for n in ROUNDS:
        try:
            numbers, _ = shown(path, reader=reader, target_fps=float("inf"), max_frames=n)
        except errors.VideoError:
            return "refused"
        if numbers != frame_indices(48, 25, target_fps=float("inf"), max_frames=n):
            return "**wrong frames**"
    return "right"


def table():
    """Prints for each kind of clip whether each reader shows the right frames."""
    print("| file | `--reader av` | `--reader decord` |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, options) in KINDS.items():
            path = write(Path(folder) / file, range(48), **options)
            print(
                f"| {name} | {shows_rightly(path, 'av')} | {shows_rightly(path, 'decord')} |",
                flush=True,
            )
    video.close_workers()


def speed(path):
    """Prints the CPU seconds of each reader, the median of three, and the frames it decoded."""
    from infra import reader

    for n in (16, 64, 512):
        seconds, pixels, decoded = {name: [] for name in reader.READERS}, {}, 0
        for _ in range(3):
            for name, kind in reader.READERS.items():
                began = time.process_time()
                clip = kind(path)
                indices = frame_indices(
                    len(clip.keys), clip.rate, target_fps=float("inf"), max_frames=n
                )
                pixels[name] = [np.asarray(p.image) for p in clip.pictures(indices)]
                seconds[name].append(time.process_time() - began)
                decoded = max(decoded, getattr(clip, "decoded", 0))
        same = all(map(np.array_equal, pixels["av"], pixels["decord"]))
        a, d = (median(seconds[name]) for name in ("av", "decord"))
        print(
            f"{path}: {len(indices)} of {len(clip.keys)} frames: "
            f"av {a:.2f} s ({decoded} decoded), decord {d:.2f} s, ratio {a / d:.2f}, "
            f"{'the same' if same else 'other'} pixels"
        )


if __name__ == "__main__":
    for file in sys.argv[1:]:
        speed(file)
    if not sys.argv[1:]:
        table()
