"""Decoding in a process that can be killed: real files, broken files, files that never end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import data
import toy
from conftest import ROOT, SHARED, needs_shared
from data import DataError, Sample
from infra import errors, video

MEDIA = SHARED / "media"


@pytest.fixture()
def clip(tmp_path):
    toy.write_y4m(tmp_path / "clip.y4m", np.zeros((8, 56, 56, 3), np.uint8), fps=4)
    return tmp_path / "clip.y4m"


@pytest.mark.parametrize("data_type", ["video", "image"])
def test_a_file_that_hangs_is_given_up_and_its_worker_replaced(tmp_path, clip, data_type):
    """As some files do, a named pipe that nobody writes to blocks a decoder in native code."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    video.read_video(clip)
    worker = video._worker.process
    hold = os.open(pipe, os.O_RDWR)  # opened, never written
    began = time.monotonic()
    with pytest.raises(DataError, match="record 7: .*pipe.png: not decoded after 1 s"):
        data.load_media(
            Sample("7", "?", [], "numerical", data_type, str(pipe), "1"), decode_timeout=1.0
        )
    os.close(hold)
    assert time.monotonic() - began < 10 and worker.poll() is not None
    assert video.read_video(clip)[0].shape == (4, 56, 56, 3)


def test_a_decoder_that_dies_costs_one_sample(clip):
    video.read_video(clip)
    video._worker.process.send_signal(signal.SIGSTOP)  # in the middle of its work
    threading.Timer(0.3, video._worker.process.kill).start()
    with pytest.raises(errors.VideoError, match="clip.y4m: the decoder crashed"):
        video.read_video(clip)
    assert video.read_video(clip)[0].shape == (4, 56, 56, 3)


def test_an_answer_that_was_not_waited_for_goes_to_nobody(tmp_path, clip):
    """Ctrl-C between a request and its answer."""
    toy.write_y4m(tmp_path / "other.y4m", np.full((4, 56, 84, 3), 200, np.uint8), fps=4)
    video.read_video(clip)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    video._worker.process.send_signal(signal.SIGSTOP)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        video.read_video(clip)
    signal.signal(signal.SIGALRM, before)
    assert video.read_video(tmp_path / "other.y4m")[0].shape == (4, 56, 84, 3)


def test_a_worker_whose_trainer_has_gone_ends(tmp_path):
    """It blocks on a named pipe, and only its alarm ends it."""
    os.mkfifo(tmp_path / "pipe")
    request = dict(op="image", path=str(tmp_path / "pipe"), min_pixels=784, max_pixels=784, alarm=1)
    worker = subprocess.Popen(
        [sys.executable, "-m", "infra.video"], cwd=ROOT, stdin=subprocess.PIPE
    )
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    assert worker.wait(timeout=20) == -signal.SIGALRM
    worker.stdin.close()


def test_a_forked_process_has_workers_of_its_own(clip):
    video.read_video(clip)
    mine = video._worker.process.pid
    pid = os.fork()
    if not pid:
        shape = video.read_video(clip, timeout=20)[0].shape
        os._exit(0 if shape == (4, 56, 56, 3) and video._worker.process.pid != mine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert video.read_video(clip)[0].shape == (4, 56, 56, 3) and video._worker.process.pid == mine


def test_workers_of_all_threads_can_be_ended(clip):
    """The workers of a pool outlive its threads; a thread that reads again gets another worker."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: video.read_video(clip), range(6)))
    video.read_video(clip)
    mine, running = video._worker.process, list(video._running)
    assert len(running) >= 2 and mine in running
    video.close_workers()
    assert all(p.poll() is not None for p in running) and not video._running
    assert video.read_video(clip)[0].shape == (4, 56, 56, 3)


def test_missing_and_broken_files_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name, message in (("nowhere.mp4", "no such file"), ("text.mp4", "cannot be decoded")):
        with pytest.raises(DataError, match=f"record 7: .*{name}: {message}"):
            data.load_media(Sample("7", "?", [], "numerical", "video", str(tmp_path / name), "1"))


def test_short_clips_show_what_they_have(tmp_path):
    toy.write_y4m(tmp_path / "three.y4m", np.zeros((3, 56, 56, 3), np.uint8), fps=1)
    frames, seconds = video.read_video(tmp_path / "three.y4m", min_frames=16)
    assert len(frames) == 2 and seconds == 1.5
    toy.write_y4m(tmp_path / "one.y4m", np.zeros((1, 56, 56, 3), np.uint8), fps=1)
    with pytest.raises(errors.VideoError, match="one.y4m: .*1 frames .* needs at least 2"):
        video.read_video(tmp_path / "one.y4m")


@needs_shared
def test_the_real_example_video():
    frames, seconds = video.read_video(MEDIA / "video_r1_example.mp4")
    assert (
        frames.shape == (16, 224, 420, 3)
        and seconds == pytest.approx(491 / 22.29 / 16, rel=1e-3)
        and frames.std() > 10
    )


@needs_shared
def test_a_corrupted_video_is_named():
    with pytest.raises(errors.VideoError, match="corrupted.mp4: cannot be decoded: damaged"):
        video.read_video(MEDIA / "corrupted.mp4")


@needs_shared
def test_rotated_clips_come_upright():
    upright, turned = (video.read_video(MEDIA / f"video_{angle}.mov")[0] for angle in (0, 90))
    assert upright.shape[2] > upright.shape[1] and turned.shape[1] > turned.shape[2]


@needs_shared
def test_a_file_with_unordered_timestamps_gives_all_its_frames():
    frames, seconds = video.read_video(MEDIA / "unordered.mov")
    assert frames.shape[0] == 4 and seconds == pytest.approx(1 / 32)
