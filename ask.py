"""Ask a video: the reasoning as it is decoded, then the answer.

    python ask.py
        a clip of the toy and its question, after `python train.py`
    python ask.py clip.mp4 "Which lamp flashes?" --options red green blue yellow --model DIR
        one greedy answer from 16 frames
    python ask.py clip.mp4 "Which lamp flashes?" --options red green blue yellow --model DIR --tts
        sparse-to-dense (tts.py; Video-RTS, arXiv 2507.06485, section 3.3): the votes of each round
    python ask.py clip.mp4 --model DIR
        asks for questions, one a line; a question may bring options:
        Which lamp flashes? | red | green | blue | yellow

On a terminal, every answer is followed by a prompt for the next question. Ctrl-C stops an answer;
/quit, ctrl-D or ctrl-C at the prompt ends. Instead of a video, an image or a folder of frames will
do. An animated GIF is a video, a still one an image. All questions share its visual embeddings.
"""

import os
import re
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from PIL import Image
from transformers.utils import logging as hf_logging

import report
import rewards
import toy
from data import Sample, load_samples
from eval import Method, Question, answer_flags, check_frames, draw_round, line, load_model
from infra import records
from infra.errors import DataError, ModelError
from infra.files import write_whole
from infra.flags import Parser, peek
from infra.model_folder import local_folder
from infra.options import lettered
from infra.ranks import ranks
from infra.video import PICTURES, close_workers

# ---- the questions


def make_sample(args, number, question, options, answer=""):
    """A question about the video of the command line -> Sample. Raises DataError.

    options: with or without letters.  answer: the right one, "" if nobody knows.
    """
    where = f"question {number + 1}"
    if not question:
        raise DataError(f"{where}: empty, expected a text")
    if not records.is_unicode(question + "".join(options)):
        raise DataError(f"{where}: {question!r}, {options}: expected Unicode")
    if len(options) == 1:
        raise DataError(f"{where}: one option, {options[0]!r}, expected none, or two or more")
    clip, segment = Path(args.clip), None
    image = is_image(clip)
    if args.times:
        segment = records.segment({"start": args.times[0], "end": args.times[1]}, "--times")
    if args.times and image:
        raise DataError(f"--times: expected a video, {clip} is an image")
    return Sample(
        id=str(number),
        question=question,
        options=lettered(options, where),
        problem_type="multiple choice" if options else args.problem_type,
        data_type="frame" if clip.is_dir() else "image" if image else "video",
        path=args.clip,
        answer=answer,
        about={"seconds": "{:g} to {:g}".format(*segment)} if segment else {},
        segment=segment,
        where=where,
    )


BROKEN = (OSError, ValueError, SyntaxError, IndexError, struct.error)  # of a damaged GIF, in Pillow


def is_image(clip):
    """Whether a file is an image rather than a video: by its name, a GIF by its number of
    frames."""
    if clip.suffix.lower() != ".gif" or not clip.is_file():
        return clip.suffix.lower() in PICTURES and not clip.is_dir()
    try:
        with Image.open(clip) as gif:
            return gif.n_frames == 1
    except (*BROKEN, Image.DecompressionBombError):
        return False  # the reader of videos says what is wrong


def questions(args, terminal):
    """Yields (question, options): that of the command line; on a terminal, or without a question
    there, those of standard input."""
    if args.question is not None:
        print(f"\n{args.question}")
        yield args.question.strip(), args.options
        if not terminal:
            return
    if terminal:
        print("\nOne question a line, with options: question | option | option. /quit ends.")
        with suppress(ImportError):  # on Windows
            import readline  # noqa: F401  lets input() edit lines
    sys.stdin.reconfigure(errors="surrogateescape")  # make_sample refuses what is not Unicode
    while True:
        if terminal:
            print()
        try:
            text = input("> " if terminal else "").lstrip("\ufeff").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if not text:  # a blank line
            continue
        question, *options = [part.strip() for part in text.split("|")]
        if not terminal:
            print(f"\n{question}")
        yield question, options or ([] if args.question else args.options)


# ---- the answers


class Stream:
    """Prints a response while it is decoded. Policy.on_tokens calls it with the token (1,) of each
    step."""

    def __init__(self, builder):
        self.builder, self.ids, self.printed = builder, [], 0

    def __call__(self, tokens):
        if tokens[0] >= 0:  # not after the end
            self.ids.append(int(tokens[0]))
            # the first bytes of a character decode to U+FFFD, until its last one is there
            self.show(self.builder.decode(self.ids).rstrip("\ufffd"))

    def show(self, text):
        """Prints what `text`, all of the response so far, has that is not printed yet."""
        print(printable(text[self.printed :]), end="", flush=True)
        self.printed = max(self.printed, len(text))


def printable(text):
    """The text with U+FFFD for control characters: a policy may write any byte to the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class Remembered:
    """Visual embeddings in memory, with the methods of infra.embedding_cache.EmbeddingCache."""

    def __init__(self):
        self.known = {}

    def get(self, media):
        """The embedding (V, D) of a Media, or None."""
        return self.known.get(media.key)

    def put(self, media, embedding):
        """Keeps an embedding."""
        self.known[media.key] = embedding


class Asker:
    """Answers questions about one video; keeps its decoded frames and its embeddings."""

    def __init__(self, args, folder, device):
        self.args, self.decoded, self.pool = args, {}, ThreadPoolExecutor(1)
        self.policy, self.builder = load_model(args, folder, device)
        self.policy.embedding_cache = Remembered()
        self.method = Method("greedy", args.frames, args.frames, 1, args.temperature)
        if args.tts:
            self.method = Method("s2d", args.start, args.cap, args.m, args.temperature or 1.0)

    def ask(self, number, sample):
        """Prints the rounds as they come, then the answer -> the line for the page. Raises
        DataError."""
        q, args = Question(number, sample, self.method), self.args
        q.decoded = self.decoded
        while not q.done:
            stream = Stream(self.builder)
            self.policy.on_tokens = None if args.tts else stream
            q.load(self.builder, self.pool)
            draw_round(self.policy, self.builder, [q], self.method, args.max_new, args.seed)
            if q.prompt is None:
                raise DataError(q.failure)
            if args.tts:
                votes = "  ".join(in_words(vote, "-") for vote in q.rounds[-1]["votes"])
                print(f"{q.rounds[-1]['frames']:4} frames   {votes}", flush=True)
            else:
                stream.show(q.rounds[-1]["responses"][0])
                print()
        print_answer(q)
        unknown = {} if sample.answer else {"score": None, "answer": None}
        return line(q) | unknown

    def close(self):
        """Ends the decoder, even while it reads."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        close_workers()


def in_words(answer, none, options=()):
    """A normalised answer as text, as the option whose letter it is if there are options; `none`
    for None."""
    if answer is None:
        return none
    if isinstance(answer, float):
        return f"{answer:.10g}"
    return printable(options[ord(answer) - ord("A")] if options else str(answer))


def print_answer(q):
    """Prints the answer; the right one, if it is known; what was shown, and what it took."""
    last, options, name = q.rounds[-1], q.sample.options, "answer"
    if len(last["votes"]) > 1 and q.search.answer is not None:
        name = "consensus" if len(set(last["votes"])) == 1 else "most votes"
    why = " (cut off at --max_new)" if any(last["truncated"]) else ""
    print(f"\n{name}: {in_words(q.search.answer, f'none that is valid{why}', options)}")
    if q.sample.answer:
        gold = rewards.normalize_answer(q.sample.answer, q.sample)
        print(f"right answer: {in_words(gold, '', options)}")
    (media,) = q.prompt.media
    T, _, H, W = media.frames.shape
    shown = "an image" if media.kind == "image" else f"{T} frames"
    times = f" from {media.times[0]:.1f} to {media.times[-1]:.1f} s" if T > 1 else ""
    tokens = sum(sum(part["tokens"]) for part in q.rounds)
    seconds = sum(part["seconds"] for part in q.rounds)
    print(
        f"{shown} of {W} x {H} pixels{times}, {q.prompt.visual_tokens} visual tokens; "
        f"{tokens} tokens in {seconds:.1f} s"
    )


def answer_all(args, asker, answer):
    """Answers every question, and writes the page. answer: the right one to the first question.

    A question that cannot be asked does not keep the next ones from being asked; but if they do
    not come from a terminal, the program then ends with an error.
    """
    terminal, lines, failed = sys.stdin.isatty(), [], False
    for number, (question, options) in enumerate(questions(args, terminal)):
        try:
            sample = make_sample(args, number, question, options, answer if number == 0 else "")
            if options:
                print("  ".join(sample.options))
            lines.append(asker.ask(number, sample))
            if args.page:
                page = report.asked_page(args.clip, str(asker.policy.folder), lines)
                write_whole(args.page, page, errors="replace")
                print(f"{args.page} shows the frames and responses")
        except DataError as e:
            print(f"error: {e}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nstopped")
    if failed and not terminal:
        raise SystemExit(1)


# ---- the command


def parse_args(argv):
    """The flags, from argv; @FILE reads them from a file."""
    p = Parser(__doc__, usage="ask.py [clip] [question] [--options ...] [--model DIR] [flags]")
    p.add_argument("clip", nargs="?", help="a video, an image or a folder of frames")
    p.add_argument("question", nargs="?", help="without it, ask.py asks for questions")
    g = p.section("run")
    model = "model, adapter or run folder, or hub name (default: the toy of `python train.py`)"
    g.value("model", None, model)
    options = "two or more, with or without letters; without a question, those of every question"
    g.value("options", None, options, nargs="+")
    kinds = [kind for kind in rewards.PROBLEM_TYPES if kind != "multiple choice"]
    g.value("problem_type", "free-form", "of a question without options", choices=kinds)
    part = "show this part of the video only, in seconds"
    g.value("times", None, part, nargs=2, metavar=("FROM", "TO"))
    g.value("page", None, "HTML file of the answers, with frames and votes")
    g.value("seed", 0, "random seed of the sampling, and the toy's")
    g = answer_flags(p, workers=0)
    greedy = "0 is greedy; with --tts it stands for 1"
    g.value("temperature", 0.0, greedy, "at least 0, at most 100")
    args = p.parse_args(argv)
    args.options = args.options or []
    check_frames(p, args)
    if 0 < args.temperature < 1e-6:
        p.error(f"--temperature {args.temperature}: expected 0, or at least 1e-6, at most 100")
    if not args.clip and (args.model or args.options):
        p.error("--model and --options: expected with a video, an image or a folder of frames")
    page = Path(args.page or "x.html")
    if page.suffix != ".html" or not page.absolute().parent.is_dir():
        p.error(f"--page {page}: expected NAME.html, in a folder that exists")
    if os.path.isdir(page) and args.page:  # is_dir raises for a name that is too long
        p.error(f"--page {page}: is a folder, expected a file to write")
    return args


def run(args, device):
    """Loads the model and answers. What is not on the command line is the toy's."""
    model, answer = args.model or str(toy.root(args.seed) / "grpo"), ""
    if not args.model and not Path(model).exists():
        raise ModelError(f"no {model}: train the toy with `python train.py`, or give --model")
    if not args.clip:
        samples = load_samples(toy.root(args.seed) / "world" / "test.json")
        first = next(s for s in samples if s.source == "flash")
        args.clip, args.question, args.options = first.path, first.question, first.options
        answer = first.answer
    if not Path(args.clip).exists():
        raise DataError(f"{args.clip}: no such file")
    if args.question is not None:  # a mistake shows before the model is loaded
        make_sample(args, 0, args.question.strip(), args.options)
    began = time.perf_counter()
    asker = Asker(args, local_folder(model), device)
    print(f"{asker.policy.folder} loaded in {time.perf_counter() - began:.1f} s\n{args.clip}")
    try:
        answer_all(args, asker, answer)
    finally:
        asker.close()


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    if not peek(argv, model=None).model:
        argv = [f"@{Path(__file__).parent}/configs/toy_eval.txt", *argv]
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # not every terminal has all of Unicode
    with ranks(timedelta(minutes=30)) as device:
        run(args, device)


if __name__ == "__main__":
    main()
