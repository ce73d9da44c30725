"""The picture of time t is the one shown: clips of every kind that show their own numbers."""

import re
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import data
from clips import KINDS, ROUNDS, SIZE, cut, number, picture, shown, write
from data import DataError, Sample
from infra import reader, video
from infra.errors import VideoError
from infra.frames import choose_times, frame_indices

EVERY = dict(target_fps=float("inf"), min_frames=2)  # as many frames as max_frames says


def frame_numbers(n, of=48, **how):
    return frame_indices(of, 25, target_fps=float("inf"), max_frames=n, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_shows_its_right_frames(tmp_path, kind):
    """2 to 64 frames, as in the rounds of sparse-to-dense, and frames of a part of the clip."""
    file, options = KINDS[kind]
    path = write(tmp_path / file, range(48), **options)
    decoded, rate = {}, 25
    for n in ROUNDS:
        numbers, clip = shown(path, **EVERY, max_frames=n, decoded=decoded)
        assert (
            numbers == frame_numbers(n) == clip.indices
            and shown(path, **EVERY, max_frames=n)[0] == numbers
        )
        assert clip.seconds * len(numbers) == pytest.approx(48 / rate, abs=0.002)
    assert shown(path, **EVERY, segment=(0.4, 1.2), max_frames=64)[0] == list(range(10, 30))
    assert shown(path, **EVERY, segment=(1.0, 1.5), max_frames=4)[0] == [
        25 + i for i in frame_numbers(4, of=12)
    ]
    assert shown(path, **EVERY, segment=(1.6, 99), max_frames=64)[0] == list(range(40, 48))
    with pytest.raises(
        VideoError, match=f"{file}: no frames from 5 to 8 s: it has those from 0.00 to 1.92 s"
    ):
        shown(path, segment=(5, 8))


SCREEN = [
    *range(20),
    *(20 + i / 25 for i in range(25)),
]  # a picture a second for 20 s, then 25 in one


@pytest.mark.parametrize(
    "file, codec",
    [
        ("s.mp4", "libx264"),
        ("s.mkv", "libx264"),
        ("s.ts", "libx264"),
        ("s.webm", "libvpx-vp9"),
        ("s.mov", "mpeg4"),
    ],
)
def test_frames_of_a_variable_rate_are_spread_evenly_in_time(tmp_path, file, codec):
    """At time t: the picture that appeared last, not the nearest one, not one by its count."""
    path = write(tmp_path / file, range(45), codec=codec, times=SCREEN)
    numbers, clip = shown(path, target_fps=2, max_frames=16)
    assert clip.seconds * 16 == pytest.approx(21, abs=0.05)
    times = np.linspace(0, SCREEN[-1], 16) + 1e-6
    assert numbers == [int(np.searchsorted(SCREEN, t, "right")) - 1 for t in times]
    assert shown(path, segment=(5, 10), target_fps=1, max_frames=16)[0] == [
        5,
        6,
        8,
        9,
    ]  # at 5, 6.65, 8.31 and 9.96 s
    assert (
        shown(path, segment=(7.2, 7.8), target_fps=4, max_frames=16)[0] == [7] * 4
    )  # a still all that time
    assert shown(path, segment=(19.5, 20.5), **EVERY, max_frames=64)[0][:2] == [19, 19]


def test_a_still_that_lasts_takes_its_share_of_the_frames(tmp_path):
    """Pictures 0 to 9 in the first second, then 10 for nine seconds, inside the clip or last."""
    start = [i / 10 for i in range(11)]
    middle = write(tmp_path / "m.mp4", range(12), times=[*start, 10.0])
    assert shown(middle, target_fps=1, max_frames=16)[0] == [0, *[10] * 8, 11]
    indices, seconds, _ = choose_times(
        np.array(start), 10.0, None, target_fps=1, min_frames=4, max_frames=16
    )
    assert indices == [0, *[10] * 9] and seconds == 1


def test_a_last_picture_that_stays_is_part_of_the_clip(tmp_path):
    """A GIF stores durations: pictures 0 to 8 for 0.1 s each, and the last for 5 s."""
    path = tmp_path / "last.gif"
    images = [Image.fromarray(picture(i)) for i in range(10)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100] * 9 + [5000])
    numbers, clip = shown(path, target_fps=2, max_frames=16)
    assert numbers == [0, 6, *[9] * 8] and clip.seconds * 10 == pytest.approx(
        5.9, abs=0.02
    )  # at 0, 0.64, 1.29 s ...


@pytest.mark.parametrize("codec, bf", [("libx264", 0), ("libx264", 2), ("mpeg4", 0), ("mpeg4", 2)])
def test_frames_that_an_avi_left_out_leave_their_time(tmp_path, codec, bf):
    """AVI stores decoding times only; 16 pictures are missing after the 20th."""
    numbers, times = [*range(20), *range(36, 48)], [i / 25 for i in (*range(20), *range(36, 48))]
    mkv = write(tmp_path / "gap.mkv", numbers, codec=codec, times=times, bf=bf)
    avi = write(tmp_path / "gap.avi", numbers, codec=codec, ticks=25, times=times, bf=bf)
    expected, clip = shown(mkv, **EVERY, max_frames=16)
    assert expected.count(19) == 5 and clip.seconds * 16 == pytest.approx(48 / 25, abs=0.002)
    numbers, clip = shown(avi, **EVERY, max_frames=16)
    assert numbers == expected and clip.seconds * 16 == pytest.approx(48 / 25, abs=0.045)


def test_a_rate_rounded_to_milliseconds_is_constant(tmp_path):
    """24000/1001 pictures a second in Matroska: the same frames as in mp4, however many."""
    for file in ("a.mkv", "a.mp4"):
        path = write(tmp_path / file, range(120), rate=Fraction(24000, 1001))
        assert reader.AvVideo(str(path)).rate == pytest.approx(24000 / 1001, abs=1e-3)
        for n in (6, 10, 34, 64):
            assert shown(path, **EVERY, max_frames=n)[0] == frame_numbers(n, of=120)


# ---- clips that were cut without encoding them again


def test_what_an_edit_list_leaves_out_is_not_shown(tmp_path):
    source = write(tmp_path / "a.mp4", range(48), g=12)
    path = cut(
        source, tmp_path / "cut.mp4", start=Fraction(17, 25), first=12
    )  # packets from 12 on, shown from 17 on
    numbers, clip = shown(path, **EVERY, max_frames=64)
    assert numbers == [17 + i for i in frame_numbers(64, of=31)]
    assert shown(path, **EVERY, max_frames=2)[0] == [17, 47] and clip.seconds * 30 == pytest.approx(
        31 / 25
    )
    assert shown(path, segment=(0.2, 0.6), **EVERY, max_frames=64)[0] == list(range(22, 32))


@pytest.mark.parametrize(
    "kind", ["H.264, ts", "H.264 with open groups, ts", "HEVC with open groups, ts", "MPEG-2, ts"]
)
@pytest.mark.parametrize("first", [5, 12, 30])
def test_a_cut_within_a_group_begins_with_the_first_whole_picture(tmp_path, kind, first):
    """Never with a picture whose reference is missing."""
    file, options = KINDS[kind]
    path = cut(
        write(tmp_path / file, range(48), **options), tmp_path / f"cut_{file}", start=0, first=first
    )
    start = shown(path, **EVERY, max_frames=2)[0][0]
    assert first - 2 <= start <= first + 12
    for n in (2, 4, 8, 64):
        assert shown(path, **EVERY, max_frames=n)[0] == [
            start + i for i in frame_numbers(n, of=48 - start)
        ]


def test_two_recordings_in_one_file_are_shown_one_after_the_other(tmp_path):
    """Their stamps start again at 0, so they give no order."""
    data = write(tmp_path / "a.ts", range(48), g=12).read_bytes()
    (tmp_path / "two.ts").write_bytes(data + data)
    assert shown(tmp_path / "two.ts", **EVERY, max_frames=96)[0] == [*range(48), *range(48)]


@pytest.mark.parametrize("first", [5, 12])
def test_an_index_is_the_same_picture_in_every_round(tmp_path, first):
    """The second recording begins ten seconds later, within a group of pictures: its first packets
    show nothing."""
    source = write(tmp_path / "a.ts", range(48), g=12)
    late = cut(source, tmp_path / "late.ts", start=-10, first=first)
    (tmp_path / "both.ts").write_bytes(source.read_bytes() + late.read_bytes())
    decoded, seen = {}, {}
    for n in (2, 4, 8, 16, 32, 64):
        numbers, clip = shown(tmp_path / "both.ts", **EVERY, max_frames=n, decoded=decoded)
        assert numbers == shown(tmp_path / "both.ts", **EVERY, max_frames=n)[0]
        assert all(seen.setdefault(i, x) == x for i, x in zip(clip.indices, numbers))
        assert clip.seconds * len(numbers) == pytest.approx(
            seen.setdefault("seconds", clip.seconds * len(numbers))
        )


def test_a_video_that_starts_after_its_sound_keeps_the_clock_of_the_file(tmp_path):
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        video_stream, sound = (
            container.add_stream("libx264", rate=25),
            container.add_stream("aac", rate=8000),
        )
        video_stream.width = video_stream.height = SIZE
        video_stream.pix_fmt, sound.layout = "yuv420p", "mono"
        for i in range(50):
            samples = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            samples.sample_rate, samples.pts = 8000, 1024 * i
            container.mux(sound.encode(samples))
        for i in range(48):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = 100 + i, Fraction(1, 25)  # from 4 s on
            container.mux(video_stream.encode(frame))
        container.mux([*video_stream.encode(), *sound.encode()])
    assert shown(tmp_path / "late.mkv", **EVERY, segment=(4.4, 5.2), max_frames=64)[0] == list(
        range(10, 30)
    )
    with pytest.raises(VideoError, match="no frames from 0 to 2 s"):
        shown(tmp_path / "late.mkv", segment=(0, 2))


# ---- how a player shows them


@pytest.mark.parametrize(
    "matrix, turned",
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
)
def test_a_clip_comes_upright(tmp_path, matrix, turned):
    """Display matrices: turned by 90, 180, 270 degrees; mirrored; flipped across the diagonal."""
    a, b, c, d = (65536 * x for x in matrix)

    def turn(stream):
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])

    path = write(
        tmp_path / "turned.mp4", [3, 3], edit=turn
    )  # two blocks in a corner: no two ways of turning it look alike
    assert shown(path, **EVERY, max_frames=2)[0] == [number(turned(picture(3)))] * 2


def test_pixels_that_are_not_square_are_shown_as_a_player_shows_them(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    path = write(tmp_path / "wide.mp4", range(8), edit=wide)
    numbers, clip = shown(path, **EVERY, max_frames=8, max_pixels=4 * SIZE * SIZE)
    assert numbers == list(range(8)) and clip.frames.shape[1:3] == (
        84,
        196,
    )  # 96 x 192 in multiples of 28


def test_the_cover_picture_of_a_file_is_not_its_video(tmp_path):
    def cover(stream):
        stream.disposition = av.stream.Disposition.attached_pic

    path = write(tmp_path / "song.mp4", [3], codec="mjpeg", edit=cover)
    with pytest.raises(VideoError, match="song.mp4: no video in this file, only a cover picture"):
        shown(path)


# ---- refusals, by name


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.flv"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, file):
    options = {"movflags": "faststart"} if file == "a.mp4" else {}
    with av.open(str(tmp_path / "whole.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = SIZE
        for i in range(48):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with (
        av.open(str(tmp_path / "whole.mkv")) as old,
        av.open(str(tmp_path / file), "w", options=options) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    whole = (tmp_path / file).read_bytes()
    assert shown(tmp_path / file, **EVERY, max_frames=2)[0] == [0, 47]
    (tmp_path / file).write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(
        VideoError, match=rf"{file}: cut off: it ends after \d\.\d s, and its header says \d+\.\d s"
    ):
        shown(tmp_path / file)


def test_a_damaged_part_is_refused_where_it_is_shown(tmp_path):
    path = write(tmp_path / "a.mp4", range(48), g=12)
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][30]
    whole = bytearray(path.read_bytes())
    whole[at : at + 40] = bytes(range(40))
    path.write_bytes(whole)
    assert shown(path, **EVERY, segment=(0, 0.8), max_frames=64)[0] == list(range(20))
    with pytest.raises(
        VideoError, match=r"a.mp4: cannot be decoded: damaged after frame (2[5-9]|30)"
    ):
        shown(path, **EVERY, max_frames=64)


def test_a_codec_without_a_decoder_is_named_as_the_reason(tmp_path):
    path = write(tmp_path / "a.mp4", range(8))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(VideoError, match="a.mp4: the codec of this video is not supported"):
        shown(path)


@pytest.mark.parametrize("width", [48, 50, 52, 98, 100])
def test_every_column_of_a_transparent_frame_is_converted(width):
    """Grey at half opacity, on white, in memory that held something else."""
    frame = av.VideoFrame(width, 36, "yuva420p")
    for plane, value in zip(frame.planes, (126, 128, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    others = [np.full((36, width, 4), 7, np.uint8) for _ in range(50)]
    del others
    pixels = np.asarray(reader._upright(frame, None).image)
    assert pixels.shape == (36, width, 3) and (pixels == pixels[0, 0]).all()
    assert np.abs(pixels[0, 0] - 191.0).max() <= 2


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError, match="folder.mp4: a folder, expected a file"):
        shown(tmp_path / "folder.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(
        VideoError, match="empty.mp4: cannot be decoded: no video, or a damaged one"
    ):
        shown(tmp_path / "empty.mp4")
    (tmp_path / "begun.y4m").write_bytes(b"YUV4MPEG2 W28 H28 F2:1 C444\nFRAME\n")
    with pytest.raises(VideoError, match="begun.y4m: cannot be decoded: it holds no whole frame"):
        shown(tmp_path / "begun.y4m")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        samples.sample_rate = 8000
        container.mux(sound.encode(samples) + sound.encode())
    with pytest.raises(VideoError, match="sound.mkv: no video in this file$"):
        shown(tmp_path / "sound.mkv")


def test_lists_of_files_and_text_are_no_video(tmp_path):
    write(tmp_path / "a.mp4", range(8))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n")
    (tmp_path / "words.nfo").write_text("no pictures\n" * 50)
    for file in ("list.mp4", "words.nfo"):
        with pytest.raises(
            VideoError, match=f"{file}: (no video in this file: it is read as|cannot be decoded)"
        ):
            shown(tmp_path / file)


def test_a_name_is_a_file_and_no_address(tmp_path, monkeypatch):
    """FFmpeg reads "file:x" as a protocol; and a worker stays in the folder where it started."""
    monkeypatch.chdir(tmp_path)
    for file, first in (
        ("x.mp4", 0),
        ("file:x.mp4", 100),
        ("-dash.mp4", 200),
        ("10:00.mp4", 300),
        ("%03d \n'.mp4", 400),
    ):
        write(tmp_path / "new.mp4", range(first, first + 8)).rename(tmp_path / file)
        assert shown(file, **EVERY, max_frames=2)[0] == [first, first + 7]
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "x.mp4", range(50, 58))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shown("x.mp4", **EVERY, max_frames=2)[0] == [50, 57]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    a, b = (
        write(tmp_path / f"{name}.mp4", numbers)
        for name, numbers in (("a", range(8)), ("b", range(100, 140)))
    )

    class Changing(reader.AvVideo):
        def _set(self, *args):
            super()._set(*args)
            shutil.copy(b, a)

    reader.READERS["changing"] = Changing
    try:
        with pytest.raises(VideoError, match="changed while it was read"):
            video.answer(
                dict(
                    op="video",
                    path=str(a),
                    reader="changing",
                    min_pixels=784,
                    max_pixels=784,
                    max_frames=4,
                    **EVERY,
                )
            )
    finally:
        del reader.READERS["changing"]


def test_a_file_whose_size_changes_is_refused(tmp_path):
    small = write(tmp_path / "a.ts", range(24)).read_bytes()
    with av.open(str(tmp_path / "b.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 2 * SIZE, SIZE
        for i in range(24):
            frame = av.VideoFrame.from_ndarray(np.hstack([picture(i)] * 2), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "both.ts").write_bytes(small + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(VideoError, match="both.ts: frames of 2 different sizes"):
        shown(tmp_path / "both.ts", **EVERY, max_frames=8)


# ---- few frames of a long file


@pytest.mark.parametrize("names", [("1.png", "1.jpg"), ("7.png", "07.png")])
def test_two_frames_of_one_number_are_refused(tmp_path, names):
    for name in (*names, "2.png"):
        Image.new("RGB", (28, 28)).save(tmp_path / name)
    with pytest.raises(DataError, match=r"first\? They have the same number"):
        data.load_media(Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1"))


def test_long_numbers_keep_their_order(tmp_path):
    """They differ in the last of 40 digits, which a float does not have."""
    for n, colour in ((2, 20), (0, 0), (1, 10), (3, 30)):
        Image.new("RGB", (28, 28), (colour,) * 3).save(tmp_path / f"{10**39 + n}.png")
    sample = Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1", fps=2.0)
    media = data.load_media(sample, fps=2.0, min_pixels=784)
    assert media.frames[:, 0, 0, 0].tolist() == [0, 10, 20, 30]


def test_frames_numbered_in_two_ways_are_refused(tmp_path):
    """1.5 is more than 1.25, and 5 is less than 25."""
    for name in ("0.5", "1.25", "1.5", "2.0"):
        Image.fromarray(picture(0)).save(tmp_path / f"t_{name}.png")
    with pytest.raises(
        DataError,
        match=r"t_1.5.png or t_1.25.png first\? Number its frames with as many digits each",
    ):
        data.load_media(Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1"))
    (tmp_path / "t_1.5.png").rename(tmp_path / "t_1.50.bmp")
    data.load_media(Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1"))


def test_a_long_file_is_not_decoded_whole(tmp_path):
    """8 of 3,000 pictures, a key frame every 25: at most one group of pictures for each, and a few
    for the decoder's delay."""
    path = write(tmp_path / "long.mp4", [i % 512 for i in range(3000)], g=25, preset="ultrafast")
    clip = reader.AvVideo(str(path))
    indices = frame_numbers(8, of=3000)
    assert [number(np.asarray(p.image)) for p in clip.pictures(indices)] == [
        i % 512 for i in indices
    ]
    assert clip.decoded <= 8 * 25 + 10


def test_decord_reads_what_it_has_a_seek_for(tmp_path):
    pytest.importorskip("decord")
    path = write(tmp_path / "a.mp4", range(48), g=12)
    assert shown(path, **EVERY, max_frames=16, reader="decord")[0] == frame_numbers(16)


# ---- folders of frames


def test_hidden_files_are_no_frames_of_a_folder(tmp_path):
    for i in range(8):
        Image.fromarray(picture(i)).save(tmp_path / f"{i:05d}.png")
        (tmp_path / f"._{i:05d}.png").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    sample = Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1")
    media = data.load_media(sample, fps=float("inf"), min_pixels=SIZE * SIZE)
    assert [number(frame.permute(1, 2, 0).numpy()) for frame in media.frames] == list(range(8))
    shutil.copy(tmp_path / "._00003.png", tmp_path / "00003.png")
    with pytest.raises(DataError, match="00003.png: cannot be read as an image"):
        data.load_media(sample, fps=float("inf"))


@pytest.mark.parametrize("other", ["clip.mp4", "clip.gif", "notes.txt", "Thumbs.db", "day2.jpg/"])
def test_a_folder_of_frames_holds_pictures_only(tmp_path, other):
    """Frames beside videos, or folders, are not one clip."""
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    sample = Sample("7", "?", [], "numerical", "frame", str(tmp_path), "1")
    data.load_media(sample)
    (tmp_path / other).mkdir() if other.endswith("/") else (tmp_path / other).write_bytes(b"x")
    name = other.rstrip("/")
    message = (
        f"{tmp_path}: 1 of its 5 entries are not pictures, such as '{name}'; expected a folder"
    )
    with pytest.raises(DataError, match=re.escape(f"record 7: {message} of .jpg, ")):
        data.load_media(sample)
