"""The pictures of an image or video file, by presentation time, as a player shows them.

    load_image(path)     Pillow
    AvVideo(path)        PyAV, the default: the right pictures, or an error
    DecordVideo(path)    decord, which counts frames after a seek: silently wrong for files whose
                         frames are decoded in another order than they are displayed

A seek in a video only lands near its target, and then the decoder returns pictures in its own
order. AvVideo relies on neither:
    1. It reads all packets of the file, without decoding them. Their presentation time stamps,
       sorted, are the list of the pictures.
    2. To show some pictures, it feeds the decoder from a key frame on. It checks that the packets
       are those of the first reading, and that the pictures are the next ones of the list.
    3. If a seek lands elsewhere, it reads the file from its start. If the pictures still differ
       from what the stamps promise, it refuses the file.
A file without reliable stamps is decoded whole, twice: the pictures that come out are the clip
(`count`). The file alone decides how it is read, so an index always means the same picture.

av and decord are imported where they are used: in the worker process of video.py.
"""

import bisect
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from infra.errors import VideoError

# containers, by their first names in FFmpeg
STAMPED = ("mov", "matroska", "gif", "yuv4mpegpipe")  # store the display time of every frame
SAYS_ITS_LENGTH = ("mov", "matroska", "flv")  # in the header; of others FFmpeg estimates it
NO_VIDEO = ("tty", "concat", "hls", "dash")  # text shown as pictures, and lists of other files
LAG = 4  # frames that a decoder may delay the first one; more: the video starts after its sound


class StampsDisagree(Exception):
    """The decoder returned other pictures than the packets' time stamps promise."""


class Picture(NamedTuple):
    """An upright RGB picture, and the (height, width) at which a player shows it: pixels may not be
    square."""

    image: Image.Image
    shape: tuple[int, int]


class Packet(NamedTuple):
    """One compressed frame of the first reading. pts, dts: when it is displayed and decoded, in
    ticks; None if missing. place: (position in the file, size), which identify it."""

    pts: int | None
    dts: int | None
    place: tuple[int | None, int]


class AvVideo:
    """A video file, read by PyAV.

    times: float64 (N,), the seconds at which the pictures appear, on a player's clock, ascending.
    end: the second at which the last one disappears.
    rate: pictures per second if that is constant, else None.
    keys: one integer for each picture, the same in every reading of the file.
    decoded: how many frames were decoded so far, shown or not.
    Raises VideoError: no video, a codec without a decoder, a file that is cut off or damaged.
    """

    def __init__(self, path):
        self.path, self.decoded = path, 0
        self.seeks = self.checks = False  # checks: compares the frames' stamps with self.keys
        self._open()
        self.packets, self.key_frames, shown = self._scan()
        if not self.packets:
            raise VideoError("cannot be decoded: it holds no whole frame")
        self.places = {packet.place: i for i, packet in enumerate(self.packets)}
        self._open()
        first = next(self.frames, None)
        self.frames = itertools.chain([first] if first else [], self.frames)
        if self._stamped(first, shown):
            stamps = sorted(shown)
            stamps = stamps[stamps.index(first.pts) :]  # earlier packets lack their key frame
            self._set(stamps, shown[stamps[-1]])
            self.seeks = self.checks = True
        else:
            self.count()

    def _stamped(self, first, shown):
        """Do all packets have a display stamp, and is it not the decoding stamp under another name?
        first: the first frame that comes out, or None.  shown: {stamp: duration}."""
        if not self.container.format.name.startswith(STAMPED) or None in shown:
            return False
        pts = [packet.pts for packet in self.packets if packet.pts is not None]
        dts = [packet.dts for packet in self.packets if packet.dts is not None]
        only_decoding = self.decoder.has_b_frames and pts == sorted(pts)
        if only_decoding or dts != sorted(dts) or first is None or first.pts not in shown:
            return False
        return first.key_frame or first.pts == min(shown)

    def count(self):
        """Decodes the whole file: the pictures that come out are the clip, in that order. Their
        times are their stamps; or else those of the packets after which they came out; or else they
        follow the average rate."""
        self._open()
        found = [(frame.pts, frame.dts, frame.duration) for frame in self.frames]
        self._open()
        if not found:
            raise VideoError("cannot be decoded: the decoder returns no frame")
        ticks = 1 / (self.stream.average_rate or 25) / self.stream.time_base
        pts, dts, durations = map(list, zip(*found))
        for i, stamp in enumerate(dts):
            if stamp is None and i and dts[i - 1] is not None:  # came out after all packets
                dts[i] = dts[i - 1] + round(ticks)
        columns = [pts, dts, [round(i * ticks) for i in range(len(found))]]
        if self.container.format.name == "avi":  # its display stamps are guesses
            columns = columns[1:]
        stamps = next(column for column in columns if None not in column and _ascending(column))
        self._set(stamps, durations[-1] if stamps is pts else 0)

    def pictures(self, indices):
        """Yields the Pictures of some ascending indices."""
        for i in indices:
            try:
                frame = self._find(i)
            except StampsDisagree:
                frame = self._find_from_start(i)
            yield _upright(frame, self.stream.sample_aspect_ratio)

    def _set(self, stamps, last):
        """Sets keys, times, rate and end from the ascending stamps of the pictures. last: the
        duration of the last one, or 0; all in ticks."""
        tick = float(self.stream.time_base)
        times = np.array(stamps, np.float64) * tick
        last = (last or 0) * tick or np.diff(times[-2:]).sum()
        period = (times[-1] - times[0]) / max(1, len(times) - 1)
        start = (self.container.start_time or 0) / 1e6  # of all streams
        if times[0] - start <= LAG * period or self.container.start_time is None:
            start = times[0]
        self.rate = self._constant_rate(times, period)
        if self.rate and last * self.rate > 1.5:  # the last picture stays
            self.rate = None
        self.keys, self.times = stamps, times - start
        self.end = self.times[-1] + (1 / self.rate if self.rate else last)

    def _constant_rate(self, times, period):
        """The rate at which all pictures come, the stream's or else 1 / period; None if neither."""
        tick = float(self.stream.time_base)
        close = min(tick, 0.001) * 1.01  # stamps are rounded to ticks, in Matroska to milliseconds
        for rate in (float(self.stream.average_rate or 0), 1 / period if period else 0):
            if rate and abs(times - times[0] - np.arange(len(times)) / rate).max() <= close:
                return rate
        return None

    # ---- packets and frames

    def _open(self):
        """Opens the file at its start; self.frames yields its frames in order."""
        import av

        av.logging.set_level(None)
        try:
            self.container = av.open(self.path, metadata_errors="replace")
        except av.error.FFmpegError as e:
            raise VideoError(f"cannot be decoded: no video, or a damaged one ({e.strerror})") from e
        if self.container.format.name in NO_VIDEO:
            kind = self.container.format.long_name
            raise VideoError(f"no video in this file: it is read as {kind}")
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
        self.decoder.thread_count = 1  # several workers decode files in parallel
        self.decoder.options = {"err_detect": "explode"}  # errors, not guessed pictures
        self.position = 0  # the next packet to decode
        self.number = -1  # the picture decoded last
        self.frames = self._decode(self._demux(self.stream), 0)

    def _demux(self, *streams):
        """The packets of some streams, from the container's position on."""
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
        """Reads all packets -> (packets, the numbers of key frames, {stamp: duration} of those
        shown)."""
        packets, key_frames, shown, until = [], [], {}, 0.0
        for p in self._demux(*self.container.streams):
            if p.pts is not None:
                until = max(until, float((p.pts + (p.duration or 0)) * p.time_base))
            if p.stream_index != self.stream.index:
                continue
            if p.is_keyframe:
                key_frames.append(len(packets))
            packets.append(Packet(p.pts, p.dts, (p.pos, p.size)))
            if not p.is_discard:  # an edit list hides frames that must be decoded
                shown[None if p.pts in shown else p.pts] = p.duration
        says = (self.container.duration or 0) / 1e6
        if self.container.format.name.startswith(SAYS_ITS_LENGTH) and until < 0.95 * says - 1:
            raise VideoError(
                f"cut off: it ends after {until:.1f} s, and its header says {says:.1f} s"
            )
        return packets, key_frames, shown

    def _decode(self, packets, first):
        """Decodes packets, from number `first` of the file on -> frames in order of display."""
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
                if start is not None:  # after a seek; the key frame has not come out yet
                    if frame.pts is not None and frame.pts < start:
                        continue  # it refers to frames before the key frame
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
        """Raises for a damaged frame. But before the first picture of a file, frames may lack their
        key frame: the file was cut."""
        if first:
            raise StampsDisagree
        if self.number >= 0:
            raise VideoError(f"cannot be decoded: damaged after frame {self.number}")

    def _find(self, i):
        """The frame of picture i, which must not precede the last one found."""
        if self.seeks:
            at = bisect.bisect(self.key_frames, self.keys[i], key=lambda k: self.packets[k].pts)
            if at and self.key_frames[at - 1] > self.position:
                self._seek(self.key_frames[at - 1])
        for frame in self.frames:
            if self.number == i:
                return frame
        raise StampsDisagree

    def _find_from_start(self, i):
        """_find without seeks, for a file whose seeks or key frames are wrong. Raises VideoError if
        its stamps are wrong too."""
        self.seeks = False
        self._open()
        try:
            return self._find(i)
        except StampsDisagree:
            raise VideoError(
                f"cannot be decoded: the frames after {self.number} do not match its time stamps"
            ) from None

    def _seek(self, key_frame):
        """Continues at a key frame, given by the number of its packet."""
        import av

        try:
            self.container.seek(self.packets[key_frame].dts, stream=self.stream)
        except (av.error.FFmpegError, TypeError) as e:  # TypeError: no stamp to seek to
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
    """A decoded frame -> Picture, rotated and mirrored as its display matrix says.
    pixel_ratio: width of a pixel / its height."""
    alpha = any(component.is_alpha for component in frame.format.components)
    transparent = frame.format.has_palette or alpha
    # One thread, as of the decoder: PyAV would start one a core for every frame, 3 ms each. argb,
    # not rgba: FFmpeg leaves the last columns of yuva420p unwritten in rgba (50, 52, 98 wide).
    pixels = frame.to_ndarray(format="argb" if transparent else "rgb24", threads=1)
    if transparent:
        pixels = np.roll(pixels, -1, axis=2)  # to rgba
    height, width = pixels.shape[0], max(1, round(pixels.shape[1] * float(pixel_ratio or 1)))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()  # x' = a x + c y, y' = b x + d y
        straight, quarter = abs(a) + abs(d), abs(b) + abs(c)
        if min(straight, quarter) > 0.01 * max(straight, quarter):
            raise VideoError("rotated by an angle that is not a multiple of 90 degrees")
        if abs(b) > abs(a):
            pixels, height, width = pixels.swapaxes(0, 1), width, height
            a, d = c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return Picture(_on_white(image) if transparent else image, (height, width))


class DecordVideo:
    """A video file, read by decord. As AvVideo, but frames are counted at the average rate."""

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
        """Yields the Pictures of some indices."""
        for i in range(0, len(indices), 16):
            for frame in self.reader.get_batch(indices[i : i + 16]).asnumpy():
                yield Picture(Image.fromarray(frame), frame.shape[:2])


def load_image(path):
    """An image file -> Pillow RGB: upright (EXIF), on white if transparent. Raises VideoError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16 bits per pixel; convert() would clip them
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise VideoError(
                    f"an image of {image.mode!r} pixels, expected 8 or 16 bits per channel"
                )
            if "A" in image.getbands() or "transparency" in image.info:
                return _on_white(image)
            return image.convert("RGB")
    # SyntaxError: a broken PNG
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise VideoError(f"cannot be read as an image: {e}") from e


def _on_white(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


READERS = {"av": AvVideo, "decord": DecordVideo}
