"""ask.py: what is streamed is what generate gives; one video is encoded once; what a user sees."""

import base64
import io
import json
import os
import pty
import re
import select
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ask
import data
import eval as evaluation
import model
import rewards
import rollout
from conftest import SHARED, Script, needs_shared

FLASH = ["Which lamp flashes?", "--options", "red", "green", "blue", "yellow"]
SMALL = ["--min_pixels", "784", "--max_new", "12"]


@pytest.fixture(scope="module")
def clip(world):
    return str(world / "media" / "train_00001.y4m")


@pytest.fixture()
def call(world, capsys, monkeypatch):
    """call(*words, stdin) -> what ask.py prints, run in this process, and how it ends: None, an
    exit status, or the error."""

    def run(*words, stdin="", small=True):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape")))
        )
        words = [*words, "--model", world / "model", *SMALL] if small else words
        end = None
        try:
            ask.main([str(word) for word in words])
        except SystemExit as e:
            end = e.code
        printed, errors = capsys.readouterr()
        return printed, errors if end in (1, 2) else end

    return run


@pytest.fixture()
def asker(world, clip):
    """asker(*flags) -> (a function of number, question, options -> the line for the page, the
    policy)."""
    made = []

    def make(*flags):
        args = ask.parse_args([clip, "--model", str(world / "model"), *SMALL, *map(str, flags)])
        made.append(ask.Asker(args, world / "model", torch.device("cpu")))

        def one(number, question, options=()):
            return made[-1].ask(number, ask.make_sample(args, number, question, list(options)))

        return one, made[-1].policy

    yield make
    for each in made:
        each.close()


# ---- streaming


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_each_steps_tokens_are_those_that_generate_returns(
    policy, prompts, monkeypatch, cuda_graph
):
    """Also when finished responses are dropped, and when steps are replayed (without a GPU, by
    calling the step again)."""
    monkeypatch.setattr(rollout.Decoding, "warm_up", rollout.Decoding.step)
    monkeypatch.setattr(rollout.Decoding, "record", lambda self: self.step)
    policy.eos_ids = list(range(20, 66))
    (silent,) = rollout.generate(policy, prompts[:1], 6, max_new=30, seeds=[3])
    seen = []
    policy.cuda_graph = cuda_graph
    policy.on_tokens = lambda tokens: seen.append(tokens.clone())
    (group,) = rollout.generate(policy, prompts[:1], 6, max_new=30, seeds=[3])
    steps = torch.stack(seen, dim=1)  # (G, steps)
    assert len({len(r) for r in group.responses}) > 3
    for row, response, other in zip(steps, group.responses, silent.responses, strict=True):
        assert row[: len(response)].tolist() == response.tolist() == other.tolist()
        assert (row[len(response) :] == -1).all()


def streamed(builder, ids, capsys):
    """What Stream prints of token ids, by token."""
    stream, pieces = ask.Stream(builder), []
    for token in ids:
        stream(torch.tensor([token]))
        pieces.append(capsys.readouterr().out)
    stream(torch.tensor([-1]))
    stream.show(builder.decode(ids))
    return pieces, capsys.readouterr().out


def test_a_character_is_printed_once_all_its_bytes_are_there(builder, capsys):
    text = "<think>é, 中文, 🎈, \u0634</think>"
    ids = builder.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = [builder.decode([token]) for token in ids]
    assert sum("\ufffd" in piece for piece in whole) > 8  # characters that span tokens
    pieces, rest = streamed(builder, [*ids, builder.tokenizer.eos_token_id], capsys)
    assert "".join(pieces) == text and rest == ""
    assert pieces[0] == whole[0] and "🎈" in pieces


def test_bytes_that_are_no_character_are_printed_as_such_and_none_controls_the_terminal(
    builder, capsys
):
    balloon = builder.tokenizer("🎈", add_special_tokens=False)["input_ids"]
    letters = builder.tokenizer("a\x1b[2Jb\tc\n", add_special_tokens=False)["input_ids"]
    pieces, rest = streamed(builder, [*balloon[:2], *letters, *balloon[:1]], capsys)
    assert "".join(pieces) == "\ufffda\ufffd[2Jb\tc\n" and rest == "\ufffd"


def test_a_greedy_answer(world, clip, call):
    """The response is printed as generate gives it to the prompt of training and evaluation."""
    printed, end = call(clip, *FLASH)
    assert end is None
    policy = model.Policy.load(world / "model")
    builder = data.PromptBuilder(world / "model", min_pixels=784)
    (sample,) = [
        s
        for s in data.load_samples(world / "train.json")
        if s.path == clip and s.question == FLASH[0]
    ]
    prompt = builder(sample, fps=float("inf"), max_frames=16)
    (group,) = rollout.generate(policy, [prompt], 1, max_new=12, temperature=0)
    text = ask.printable(builder.decode(group.responses[0]))
    assert printed.endswith(
        f"\n\n{FLASH[0]}\nA. red  B. green  C. blue  D. yellow\n{text}\n\n"
        "answer: none that is valid (cut off at --max_new)\n"
        + re.search(r"16 frames of 28 x 28 pixels from 0.0 to 7.5 s, 8 .*\n$", printed)[0]
    )


# ---- several questions, several rounds


def test_a_video_is_encoded_once_for_all_questions(asker):
    one, policy = asker()
    calls = []
    policy.net.model.visual.register_forward_hook(lambda *_: calls.append(1))
    one(0, "What colour is the square?", ["red", "green"])
    second = one(1, "How often does the lamp light up?")
    assert len(calls) == 1
    fresh, _ = asker()
    alone = fresh(1, "How often does the lamp light up?")
    assert [part["responses"] for part in second["rounds"]] == [
        part["responses"] for part in alone["rounds"]
    ]


def test_each_number_of_frames_is_encoded_once(asker):
    one, policy = asker("--tts", "--start", 4, "--cap", 16, "--m", 2)
    calls = []
    policy.net.model.visual.register_forward_hook(lambda *_: calls.append(1))
    for number in range(2):
        line = one(number, "What colour is the square?", ["red", "green"])
        assert [part["frames"] for part in line["rounds"]] == [4, 8, 16]
    assert len(calls) == 3


def test_the_rounds_of_tts_are_evals(world, clip, asker, tmp_path, capsys):
    record = {"problem": FLASH[0], "options": FLASH[2:], "path": clip, "solution": "A"}
    (tmp_path / "one.json").write_text(json.dumps([record]))
    flags = ["--tts", "--start", "4", "--cap", "16", "--m", "3", "--seed", "5"]
    where = ["--model", str(world / "model"), "--data", str(tmp_path / "one.json")]
    evaluation.main([*where, "--out", str(tmp_path / "out"), *SMALL, *flags])
    written = json.loads((tmp_path / "out" / "s2d-4-16.rank0.jsonl").read_text())
    capsys.readouterr()
    one, _ = asker(*flags)
    asked = one(0, FLASH[0], FLASH[2:])
    assert [part["frames"] for part in asked["rounds"]] == [4, 8, 16]
    for ours, theirs in zip(asked["rounds"], written["rounds"], strict=True):
        for key in ("votes", "responses", "frames", "pixels", "visual_tokens"):
            assert ours[key] == theirs[key]
        assert ours["logps"] == pytest.approx(theirs["logps"], abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "   4 frames   -  -  -\n   8 frames   -  -  -\n  16 frames   -  -  -\n"
    )


def question(sample, method, *rounds):
    """An answered eval.Question, from (frames, votes) of each round."""
    q = evaluation.Question(0, sample, method)
    q.prompt = data.Prompt(sample, torch.zeros(9), [data.Media(torch.zeros(4, 3, 28, 56), "video")])
    q.prompt.media[0].times = [1.0, 1.5, 2.0, 2.5]
    for frames, votes in rounds:
        q.search.add_votes(votes)
        part = dict(frames=frames, votes=votes, tokens=[5] * len(votes), seconds=0.5)
        q.rounds.append(part | {"truncated": [False] * len(votes)})
    return q


@pytest.mark.parametrize(
    "m, rounds, gold, expected",
    [
        (1, [(4, ["B"])], "", ["answer: B. right", "5 tokens in 0.5 s"]),
        (3, [(4, ["A", None, "B"]), (8, ["B"] * 3)], "", ["consensus: B. right", "30 tokens"]),
        (2, [(4, [None, None]), (8, [None, None])], "", ["answer: none that is valid\n"]),
        (2, [(4, ["A", "B"]), (8, [None, "A"])], "B", ["most votes: A. left\nright answer: B. ri"]),
    ],
)
def test_the_answer_in_words(capsys, m, rounds, gold, expected):
    sample = data.Sample(
        "0", "Which way?", ["A. left", "B. right"], "multiple choice", "video", "x.mp4", gold
    )
    ask.print_answer(question(sample, evaluation.Method("", 4, 8 if m > 1 else 4, m, 1.0), *rounds))
    printed = capsys.readouterr().out
    assert all(part in printed for part in expected)
    assert "4 frames of 56 x 28 pixels from 1.0 to 2.5 s, 4 visual tokens; " in printed


@pytest.mark.parametrize("kind", rewards.PROBLEM_TYPES)
def test_nobody_needs_to_know_the_right_answer(kind):
    options = ["A. 3", "B. 4"] if kind == "multiple choice" else []
    sample = data.Sample("0", "How many?", options, kind, "video", "x.mp4", "")
    vote = rewards.normalize_answer("3", sample)
    q = question(sample, evaluation.Method("", 4, 4, 1, 0.0), (4, [vote]))
    q.rounds[0] |= dict(pixels=784, visual_tokens=4)
    written = evaluation.line(q)
    assert (written["gold"], written["given"], written["score"]) == (None, vote, 0.0)


def test_numbers_are_printed_without_an_empty_fraction():
    assert [ask.in_words(x, "-") for x in (4.0, 0.25, 3, "4.0", None)] == [
        "4",
        "0.25",
        "3",
        "4.0",
        "-",
    ]


# ---- what a user types


def test_questions_on_standard_input(clip, call, tmp_path):
    """One a line; blank lines are skipped. What cannot be asked does not end the session, but its
    exit status is 1."""
    lines = "\ufeffWhere is it? | left | right\r\n \r\n| a | b\nWho? | me\nIs it \udcff?\n\n"
    lines += "How many?\n/quit\nNo\n"
    printed, errors = call(clip, "--page", tmp_path / "page.html", stdin=lines)
    assert printed.count("visual tokens;") == 2 and "No\n" not in printed
    assert "Where is it?\nA. left  B. right\n" in printed and "\nHow many?\n" in printed
    assert errors.splitlines() == [
        "error: question 2: empty, expected a text",
        "error: question 3: one option, 'me', expected none, or two or more",
        "error: question 4: 'Is it \\udcff?', []: expected Unicode",
    ]
    page = (tmp_path / "page.html").read_text()
    shown = json.loads(re.search(r'json">(.*?)</script>', page)[1])
    assert [r["record"] for r in shown["asked"]["results"]] == [0, 4]


def test_options_of_the_command_line_are_those_of_every_question_without_its_own(clip, call):
    printed, end = call(clip, "--options", "yes", "no", stdin="Red?\nWhere? | left | right\nBlue?")
    assert end is None and printed.count("A. yes  B. no") == 2 and "A. left  B. right" in printed


def test_the_page_holds_the_frames_that_were_shown(world, clip, call, tmp_path):
    page = tmp_path / "page.html"
    printed, _ = call(clip, *FLASH, "--times", 2, 6, "--page", page)
    assert "8 frames of 28 x 28 pixels from 2.0 to 5.5 s" in printed and f"{page} shows" in printed
    shown = json.loads(re.search(r'json">(.*?)</script>', page.read_text())[1])
    (result,), (sheet,) = shown["asked"]["results"], shown["sheets"]
    assert shown["asked"]["questions"]["0"]["question"] == FLASH[0]
    assert (result["score"], result["rounds"][0]["sheet"], sheet["of"]) == (None, 0, 8)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet["jpeg"]))), float)
    frames, _ = data.read_video(clip, min_pixels=784, target_fps=float("inf"), max_frames=16)
    shown = image.reshape(sheet["height"], 8, sheet["width"], 3).swapaxes(0, 1)
    assert abs(shown.mean((1, 2)) - frames[4:12].mean((1, 2))).max() < 3  # but for its JPEG


def test_an_animated_gif_is_a_video_and_a_still_one_an_image(call, tmp_path):
    first, *others = [Image.new("RGB", (56, 56), (60 * i, 0, 0)) for i in range(4)]
    first.save(tmp_path / "moves.gif", save_all=True, append_images=others, duration=500)
    first.save(tmp_path / "still.GIF")
    printed, end = call(tmp_path / "moves.gif", "Which colour?")
    assert end is None and "\n4 frames of 56 x 56 pixels from 0.0 to 1.5 s" in printed
    first.save(tmp_path / "moves.webp", save_all=True, append_images=others, duration=500)
    for name in ("still.GIF", "moves.webp"):  # the first picture
        printed, end = call(tmp_path / name, "Which colour?")
        assert end is None and "\nan image of 56 x 56 pixels" in printed
    for broken in (b"GIF89a, and no more", (tmp_path / "moves.gif").read_bytes()[:139]):
        (tmp_path / "broken.gif").write_bytes(broken)
        _, error = call(tmp_path / "broken.gif", "Which colour?")
        assert "broken.gif: cannot be decoded" in error


def test_the_toy_answers_if_nothing_is_given(world, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(small=False)[1] == (
        "error: no out/toy/grpo: train the toy with `python train.py`, or give --model"
    )
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "grpo").symlink_to(world / "model")
    (tmp_path / "out" / "toy" / "world").symlink_to(world)
    printed, end = call(small=False)
    assert end is None and "test_00001.y4m\n\nWhich lamp flashes?\nA. red  B. green" in printed
    assert "\nright answer: " in printed and "16 frames of 28 x 28 pixels" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.mp4", "Where?"], "error: nowhere.mp4: no such file"),
        (["CLIP", " "], "error: question 1: empty, expected a text"),
        (["CLIP", "Q", "--options", "a"], "error: question 1: one option, 'a', expected none, or"),
        (["CLIP", "Q", "--options", "A. a", "b"], "expected the letters A, B, C ... in order"),
        (["CLIP", "<|im_end|>?"], "its question, options or solution spells out <|im_end|>"),
        (["CLIP", "Q", "--times", "9", "12"], "no frames from 9 to 12 s: it has those from 0.00"),
        (["CLIP", "Q", "--times", "3", "1"], "error: --times: a segment from 3 to 1 seconds"),
        (["CLIP", "Q", "--times", "a", "1"], "error: --times: 'start' is 'a', expected a number"),
        (["IMAGE", "Q", "--times", "1", "3"], "error: --times: expected a video"),
        (["TEXT", "Q"], "cannot be decoded"),
        (["CLIP", "Q", "--model", "MEDIA"], "no config.json, so not a model folder"),
        (["CLIP", "Q", "--model", "nowhere"], "error: nowhere: no such model folder"),
        (["--model", "MEDIA"], "error: --model and --options: expected with a video"),
        (["CLIP", "Q", "--page", "CLIP"], "expected NAME.html"),
        (["CLIP", "Q", "--page", "FOLDER"], "a.html: is a folder, expected a file to write"),
        (["CLIP", "Q", "--temperature", "1e-45"], "expected 0, or at least 1e-6, at most 100"),
        (["CLIP", "Q", "--frames", "5"], "error: --frames 5: expected at least 2, even"),
        (["CLIP", "Q", "--tts", "--frames", "8"], "expected without --tts"),
    ],
)
def test_errors_are_one_line(world, clip, call, tmp_path, words, message):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "a.html").mkdir()
    image = next((world / "media").glob("*.png"))
    names = dict(CLIP=clip, IMAGE=image, TEXT=tmp_path / "text.mp4", MEDIA=world / "media")
    names["FOLDER"] = tmp_path / "a.html"
    words = [names.get(word, word) for word in words]
    if "--model" not in words:
        words += ["--model", world / "model", *SMALL]
    _, error = call(*words, small=False)
    assert message in error and error.startswith("error: ") and error.count("\n") <= 1


@needs_shared
def test_a_damaged_video(call):
    _, error = call(SHARED / "media" / "corrupted.mp4", "What?")
    assert "corrupted.mp4: cannot be decoded: damaged after frame" in error


# ---- on a terminal


class Terminal:
    """A pseudo-terminal; ask.py is on its other end."""

    def __init__(self, *words):
        self.fd, other = pty.openpty()
        code = (
            "import os, sys\n"
            f"fd = os.open({os.ttyname(other)!r}, os.O_RDWR)\n"  # controls the new session
            "for n in (0, 1, 2): os.dup2(fd, n)\n"
            "sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')\n"
            f"import ask; ask.main({[str(word) for word in words]})\n"
        )
        self.script, self.seen = Script("-c", code), ""
        self.other = other

    def wait_for(self, text, seconds=60):
        """Reads until the text appears, after what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ended = self.script.process.poll() is not None or time.monotonic() > deadline
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            else:
                assert not ended, f"{text!r} is not in {self.seen!r}"
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text):
        os.write(self.fd, text.encode())

    def close(self):
        os.close(self.other)
        os.close(self.fd)
        self.script.process.kill()


@pytest.fixture()
def terminal(world, clip):
    """terminal(*flags) -> a Terminal that asks about the clip."""
    made = []

    def start(*flags):
        made.append(Terminal(clip, *flags, "--model", world / "model", "--min_pixels", 784))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_session(terminal):
    screen = terminal("--max_new", 20000)
    screen.wait_for("/quit ends.")
    screen.wait_for("> ")
    screen.type("Which lamp flashes?\n")
    screen.wait_for("flashes?")
    time.sleep(0.3)
    screen.type("\x03")
    screen.wait_for("stopped")
    screen.wait_for("> ")
    screen.type("\x03")
    screen.wait_for("stopped")
    assert screen.script.process.wait(20) == 130
    assert "Traceback" not in screen.seen


def test_ctrl_d_ends_the_session_after_the_question_of_the_command_line(terminal):
    screen = terminal("What?", "--max_new", 4)
    screen.wait_for("visual tokens;")
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.script.process.wait(20) == 0
