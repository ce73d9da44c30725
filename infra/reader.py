"""The pictures of a file: of an image, and of a video by presentation time, as a player shows them.

    load_image(path)     Pillow
    AvVideo(path)        PyAV, the default: the right pictures, or a refusal
    DecordVideo(path)    decord, which counts frames after a seek: wrong, without a word, where
                         frames are not decoded in the order in which they are displayed

A seek in a video lands near the place that was asked for, and the decoder then gives pictures in
its own order. AvVideo trusts neither. It first reads all packets of the file, without decoding
them: their presentation time stamps, sorted, are the pictures of the clip. To show some of them, it
feeds the decoder from a key frame on, checks that the packets are those of the first reading and
that the pictures are the next ones of the list. Where a seek lands elsewhere, it reads the file from
its start; where the pictures are still not those that the stamps promise, it refuses the file.
A file without dependable stamps is decoded whole, twice: what comes out is the clip (`count`). Which
way a file is read depends on the file alone, so the same index is the same picture every time.

av and decord are imported where they are used: in the worker process of video.py.
"""

import bisect
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from infra.errors import VideoError

# containers, by their first names in FFmpeg
STAMPED = ("mov", "matroska", "gif", "yuv4mpegpipe")  # hold the time of display of every frame
SAYS_ITS_LENGTH = ("mov", "matroska", "flv")  # in the header; others have it estimated
NO_VIDEO = ("tty", "concat", "hls", "dash")  # text shown as pictures, and lists of other files
LAG = (
    4  # frames: a later first frame is no decoder's delay, but a video that starts after its sound
)


class StampsDisagree(Exception):
    """The decoder gave other pictures than the packets' time stamps promise."""


class Picture(NamedTuple):
    """An upright RGB picture, and the (height, width) at which a player shows it: the pixels of a
    video need not be square."""

    image: Image.Image
    shape: tuple[int, int]


class Packet(NamedTuple):
    """One compressed frame of the first reading. pts: when it is displayed, None where missing.
    place: (byte of the file, size), which tell it from all others."""

    pts: int | None
    dts: int | None
    place: tuple[int | None, int]


class AvVideo:
    """A video file, read by PyAV.

    times: float64 (N,), seconds on a player's clock at which each picture appears, ascending.
    end: the second at which the last one goes.
    rate: pictures per second where that is constant, else None.
    keys: one integer for each picture, the same in every reading of the file.
    decoded: how many frames were decoded so far, shown or not.
    Raises VideoError: no video, a codec without a decoder, a file that is cut off or damaged.
    """

    def __init__(self, path):
        self.path, self.decoded = path, 0
        self.seeks = self.checks = False  # checks: the stamps of frames against self.keys
        self._open()
        self.packets, self.key_frames, shown = self._scan()
        if not self.packets:
            raise VideoError("cannot be decoded: it holds no whole frame")
        self.places = {packet.place: i for i, packet in enumerate(self.packets)}
        self._open()
        first = next(self.frames, None)
        self.frames = itertools.chain([first] if first else [], self.frames)
        if self._stamped(first, shown):
            stamps = sorted(shown)  # packets before a clip's first key frame show nothing
            self._set(stamps[stamps.index(first.pts) :], shown[stamps[-1]])
            self.seeks = self.checks = True
        else:
            self.count()

    def _stamped(self, first, shown):
        """Have all packets a stamp of display, and not that of decoding under its name? first: the
        first frame that comes out, or None.  shown: {stamp: duration}."""
        if not self.container.format.name.startswith(STAMPED) or None in shown:
            return False
        pts, dts = ([x for x in column if x is not None] for column in list(zip(*self.packets))[:2])
        only_decoding = self.decoder.has_b_frames and pts == sorted(pts)
        if only_decoding or dts != sorted(dts) or first is None or first.pts not in shown:
            return False
        return first.key_frame or first.pts == min(shown)

    def count(self):
        """Decodes the whole file: the pictures that come out are the clip, in that order. Their times
        are their stamps, or else those of the packets that brought them out, or else the average rate's."""
        self._open()
        found = [(frame.pts, frame.dts, frame.duration) for frame in self.frames]
        self._open()
        if not found:
            raise VideoError("cannot be decoded: not a single frame comes out of it")
        ticks = 1 / (self.stream.average_rate or 25) / self.stream.time_base
        pts, dts, durations = map(list, zip(*found))
        for i, stamp in enumerate(dts):
            if (
                stamp is None and i and dts[i - 1] is not None
            ):  # the last ones come after all packets
                dts[i] = dts[i - 1] + round(ticks)
        columns = [pts, dts, [round(i * ticks) for i in range(len(found))]]
        if self.container.format.name == "avi":  # its stamps of display are guesses
            columns = columns[1:]
        stamps = next(column for column in columns if None not in column and _ascending(column))
        self._set(stamps, durations[-1] if stamps is pts else 0)

    def pictures(self, indices):
        """Yields the Picture of each of some ascending indices."""
        for i in indices:
            try:
                frame = self._find(i)
            except StampsDisagree:
                frame = self._find_from_start(i)
            yield _upright(frame, self.stream.sample_aspect_ratio)

    def _set(self, stamps, last):
        """Takes ascending stamps for the pictures of the clip. last: the last one's duration, or 0."""
        tick, rate = float(self.stream.time_base), float(self.stream.average_rate or 0)
        times = np.array(stamps, np.float64) * tick
        period = (times[-1] - times[0]) / max(1, len(times) - 1)
        start = (self.container.start_time or 0) / 1e6  # of all streams
        if times[0] - start <= LAG * period or self.container.start_time is None:
            start = times[0]
        last = (last or 0) * tick or np.diff(times[-2:]).sum()
        close = min(tick, 0.001) * 1.01  # stamps are rounded to ticks, in Matroska to milliseconds
        for self.rate in (rate, 1 / period if period else 0, None):
            if (
                self.rate
                and abs(times - times[0] - np.arange(len(times)) / self.rate).max() <= close
            ):
                break
        if self.rate and last * self.rate > 1.5:  # the last picture stays
            self.rate = None
        self.keys, self.times = stamps, times - start
        self.end = self.times[-1] + (1 / self.rate if self.rate else last)

    # ---- packets and frames

    def _open(self):
        """Opens the file at its start; self.frames gives its frames in order."""
        import av

        av.logging.set_level(None)
        try:
            self.container = av.open(self.path, metadata_errors="replace")
        except av.error.FFmpegError as e:
            raise VideoError(f"cannot be decoded: no video, or a damaged one ({e.strerror})") from e
        if self.container.format.name in NO_VIDEO:
            raise VideoError(
                f"no video in this file: it is read as {self.container.format.long_name}"
            )
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            only = ", only a cover picture" if self.container.streams.video else ""
            raise VideoError(f"no video in this file{only}")
        best = self.container.streams.best("video")
        self.stream = best if best in streams else streams[0]
        self.decoder = self.stream.codec_context
        if self.decoder is None:
            raise VideoError("the codec of this video is not supported")
        self.decoder.thread_count = 1  # files are decoded side by side, each by a worker
        self.decoder.options = {"err_detect": "explode"}  # an error instead of a guessed picture
        self.position = 0  # the next packet to decode
        self.number = -1  # of the picture decoded last
        self.frames = self._decode(self._demux(self.stream), 0)

    def _demux(self, *streams):
        """The packets of some streams, from where the container stands."""
        import av

        try:
            for packet in self.container.demux(*streams):
                if packet.size:
                    yield packet
        except av.error.FFmpegError as e:
            raise VideoError(
                f"cannot be decoded: the file is cut off or damaged ({e.strerror})"
            ) from e

    def _scan(self):
        """Reads all packets -> (packets, which are key frames, {stamp: duration} of those shown)."""
        packets, key_frames, shown, until = [], [], {}, 0.0
        for p in self._demux(*self.container.streams):
            if p.pts is not None:
                until = max(until, float((p.pts + (p.duration or 0)) * p.time_base))
            if p.stream_index != self.stream.index:
                continue
            if p.is_keyframe:
                key_frames.append(len(packets))
            packets.append(Packet(p.pts, p.dts, (p.pos, p.size)))
            if not p.is_discard:  # an edit list has frames decoded that are not shown
                shown[None if p.pts in shown else p.pts] = p.duration
        says = (self.container.duration or 0) / 1e6
        if self.container.format.name.startswith(SAYS_ITS_LENGTH) and until < 0.95 * says - 1:
            raise VideoError(
                f"cut off: it ends after {until:.1f} s, and its header says {says:.1f} s"
            )
        return packets, key_frames, shown

    def _decode(self, packets, first):
        """Decodes packets, number `first` of the file and those after it -> frames as displayed."""
        import av

        start = self.packets[first].pts if first else None
        for packet in itertools.chain(packets, [None]):
            if packet:
                if first and (packet.pos, packet.size) != self.packets[self.position].place:
                    raise StampsDisagree
                self.position += 1
            try:
                frames = self.decoder.decode(packet)
            except av.error.InvalidDataError:
                self._damaged(first)
                continue
            for frame in frames:
                if (
                    start is not None
                ):  # after a seek, pictures before the key frame lack what they refer to
                    if frame.pts is not None and frame.pts < start:
                        continue
                    if frame.pts != start or not frame.key_frame:
                        raise StampsDisagree
                    start = None
                if frame.is_corrupt:
                    self._damaged(first)
                    continue
                self.decoded += 1
                self.number += 1
                if self.checks and self.keys[self.number : self.number + 1] != [frame.pts]:
                    raise StampsDisagree
                yield frame

    def _damaged(self, first):
        """Raises for a frame that is not whole; but a cut clip may begin with the rest of a group of pictures."""
        if first:
            raise StampsDisagree
        if self.number >= 0:
            raise VideoError(f"cannot be decoded: damaged after frame {self.number}")

    def _find(self, i):
        """The frame of picture i, which is not before the one found last."""
        if self.seeks:
            at = bisect.bisect(self.key_frames, self.keys[i], key=lambda k: self.packets[k].pts)
            if at and self.key_frames[at - 1] > self.position:
                self._seek(self.key_frames[at - 1])
        for frame in self.frames:
            if self.number == i:
                return frame
        raise StampsDisagree

    def _find_from_start(self, i):
        """_find without seeks, for a file whose seeks or key frames lie. Raises VideoError if its stamps do too."""
        self.seeks = False
        self._open()
        try:
            return self._find(i)
        except StampsDisagree:
            raise VideoError(
                f"cannot be decoded: after frame {self.number} come others than its time stamps say"
            ) from None

    def _seek(self, key_frame):
        """Goes on at a key frame, the number of a packet."""
        import av

        try:
            self.container.seek(self.packets[key_frame].dts, stream=self.stream)
        except (av.error.FFmpegError, TypeError) as e:  # TypeError: no stamp to seek
            raise StampsDisagree from e
        self.decoder.flush_buffers()
        packets = self._demux(self.stream)
        for packet in packets:
            at = self.places.get((packet.pos, packet.size), -1)
            if at == key_frame:
                self.position = key_frame
                self.number = bisect.bisect_left(self.keys, self.packets[key_frame].pts) - 1
                self.frames = self._decode(itertools.chain([packet], packets), key_frame)
                return
            if at > key_frame:
                break
        raise StampsDisagree


def _ascending(numbers):
    return all(a < b for a, b in itertools.pairwise(numbers))


def _upright(frame, pixel_ratio):
    """A decoded frame -> Picture, turned as the file says. pixel_ratio: width of a pixel / height."""
    transparent = frame.format.has_palette or any(
        component.is_alpha for component in frame.format.components
    )
    pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24")
    height, width = pixels.shape[0], max(1, round(pixels.shape[1] * float(pixel_ratio or 1)))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()  # x' = a x + c y, y' = b x + d y
        if min(abs(a) + abs(d), abs(b) + abs(c)) > 0.01 * max(abs(a) + abs(d), abs(b) + abs(c)):
            raise VideoError("turned by an angle that is no quarter")
        if abs(b) > abs(a):
            pixels, height, width = pixels.swapaxes(0, 1), width, height
            a, d = c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return Picture(_on_white(image) if transparent else image, (height, width))


class DecordVideo:
    """A video file, read by decord: as AvVideo, with frames counted at the file's average rate."""

    def __init__(self, path):
        try:
            import decord
        except ImportError as e:
            raise VideoError(f"--reader decord: decord is not installed ({e})") from e
        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(path, num_threads=1)
        self.rate, self.keys = float(self.reader.get_avg_fps()), range(len(self.reader))
        self.times = np.arange(len(self.keys)) / self.rate
        self.end = len(self.keys) / self.rate

    def pictures(self, indices):
        """Yields the Picture of each of some indices."""
        for i in range(0, len(indices), 16):
            for frame in self.reader.get_batch(indices[i : i + 16]).asnumpy():
                yield Picture(Image.fromarray(frame), frame.shape[:2])


def load_image(path):
    """An image file -> Pillow RGB, upright (EXIF), transparency on white. Raises VideoError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16 bits a pixel; convert() would clip them
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise VideoError(
                    f"an image of {image.mode!r} pixels, expected 8 or 16 bits a channel"
                )
            if "A" in image.getbands() or "transparency" in image.info:
                return _on_white(image)
            return image.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as e:  # SyntaxError: a broken PNG
        raise VideoError(f"cannot be read as an image: {e}") from e


def _on_white(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


READERS = {"av": AvVideo, "decord": DecordVideo}
