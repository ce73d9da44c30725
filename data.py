"""Records of the real data sets -> Sample -> Prompt: what the policy is asked, and what it is shown.

    load_samples    Video-R1-260k / COT-165k, its evaluation files, Video-RTS's CG-Bench file, LongVideo-Reason -> Sample
    load_media      a Sample's video, image or folder of frames -> Media: uint8 frames at the model's size, and their time
    PromptBuilder   Sample + Media -> Prompt, by the checkpoint's own tokenizer and chat template; one wording for SFT,
                    RL, test-time scaling and evaluation (Video-R1's release has five, slightly different)
    patchify        frames -> the patch rows of the vision tower
    Loader          the prompts of every step, loaded ahead of it
Nothing is replaced and nothing is truncated: what cannot be used raises DataError, naming file and record.
"""

import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from reprlib import repr as shown  # of whatever a record holds: short, on one line, and printable

import numpy as np
import torch
from jinja2 import TemplateError

from infra.errors import DataError, VideoError
from infra.frames import MERGE, PATCH, choose_frames, frame_indices, smart_resize
from infra.model_folder import load_tokenizer
from infra.records import FIELDS, FORM, read_records
from infra.video import Clip, read_clip, read_image, read_video
from rewards import (
    PROBLEM_TYPES,
    choice_letter,
    extract_answer,
    format_reward,
    normalize_answer,
    parse_number,
)

__all__ = [
    "DataError",
    "Sample",
    "load_samples",
    "missing_media",
    "Media",
    "load_media",
    "Prompt",
    "PromptBuilder",
    "Loader",
    "patchify",
    "normalize",
    "frame_indices",
    "read_video",
    "smart_resize",
]

ABOUT = (
    "data_source",
    "original_question_type",
    "task_type",
    "category",
    "duration",
    "domain",
    "sub_category",
)
BEGINS = re.compile(  # an option with a letter of its own: "a. x", "(A) x", "[A] x", "A、x", "A - x", "**A.** x", "Option A: x"
    r"[\W_]*?(?P<open>[*_`]*)(?:(?:option|choice|answer)\s+\(?)?(?P<letter>[A-ZＡ-Ｚ])(?P<mark>"
    r"[*_`]*\s*(?:[.):\]}、．）：］】](?!\w\.)|[-–—](?=\s))[*_`]*"  # "A.M." has none
    r"|(?P=open)(?<=[*_`])(?=\s*\S)|(?P<space>\s)(?=\s*\S))\s*",
    re.IGNORECASE,
)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # the frames of a folder
FOLDER_FPS = 3.0  # of a folder of frames whose record has no "fps": the rate of MVBench's TVQA frames, the one such set


@dataclass(frozen=True)
class Sample:
    """One question about one medium. `answer` is the text inside <answer>; `reasoning` that inside <think>, "" if none."""

    id: str  # the record's number in its file, from 0, where it has none
    question: str
    options: list[
        str
    ]  # with their letters in order, "A. text", "A) text", "(A) text" or "A: text"; [] if there are none
    problem_type: str  # one of rewards.PROBLEM_TYPES
    data_type: str  # "video", "image" or "frame", a folder of frames
    path: str
    answer: str
    reasoning: str = ""
    source: str = ""
    fps: float = FOLDER_FPS  # of a folder of frames
    about: dict = field(
        default_factory=dict
    )  # what else the record says of itself: those of ABOUT that it has
    segment: tuple[float, float] | None = (
        None  # seconds of the video that the question is about; None: all of it
    )
    where: str = field(default="", compare=False)  # the record stands: "FILE, record 0 (id 3)"

    @property
    def name(self):
        """What errors call it: where its record stands or, made by hand, its id."""
        return self.where or f"record {self.id}"


# ---- records


def load_samples(path, *, media_root=None, skipped=None):
    """Reads a .json or .jsonl file -> list[Sample], in the file's order.

    media_root: what the records' relative paths start from; the folder of the file unless told.
    skipped: a dict that receives {number of the record: message} for every bad one, which is then left out; without it the
    first one raises.
    Raises DataError: no such file, not JSON, an empty file, a bad record.
    """
    path = Path(path)
    root = (Path(media_root) if media_root else path.parent).absolute()
    samples = []
    for i, (where, read) in enumerate(read_records(path)):
        try:
            samples.append(_sample(read(), i, where, root, path.stem))
        except DataError as e:
            if skipped is None:
                raise
            skipped[i] = str(e)
    if not samples:
        first = (
            f", first problem: {next(iter(skipped.values()))}" if skipped else f", expected {FORM}"
        )
        raise DataError(f"{path}: holds no usable record{first}")
    return samples


def _sample(r, number, where, root, stem):
    """A record -> Sample. number: of the record in its file, from 0. Raises DataError."""
    if not isinstance(r, dict):
        raise DataError(f"{where}: a {type(r).__name__}, expected an object with {FIELDS}")
    _, name = _first(r, "problem_id", "qid", "question_id", "id")
    if name is not None and not where.endswith(f"record {name}"):
        where = f"{where} (id {shown(name)})"
    if isinstance(name, bool | list | dict) or _not_finite(name):
        raise DataError(f"{where}: expected text or a number as its id")
    question = _text_of(r, where, "problem", "question")
    key, medium, data_type = _medium(r, where)
    for what, value in (
        ("question ('problem')", question),
        ("medium ('path', 'video', 'videos' or 'image')", medium),
    ):
        if not value:
            raise DataError(
                f"{where}: no {what}; it has {', '.join(map(shown, r)) or 'no fields'}; expected {FORM}"
            )
    if data_type not in ("video", "image", "frame"):
        raise DataError(f"{where}: data type {shown(data_type)}, expected video, image or frame")

    kind = problem_type(r)
    if kind is None:
        raise DataError(
            f"{where}: unknown problem type {shown(r['problem_type'])}, expected one of {', '.join(PROBLEM_TYPES)}"
        )
    options = r.get("options")
    if options in (None, "", []):
        question, options = (
            _split_options(question) if kind == "multiple choice" else (question, [])
        )
    options = _lettered(options, where)
    if not question:
        raise DataError(f"{where}: no question beside the options in 'problem'")
    answer = _answer(r, where)
    if kind == "multiple choice":
        if not options:
            raise DataError(f"{where}: multiple choice without options")
        if choice_letter(answer, options) is None:
            raise DataError(
                f"{where}: the answer {shown(answer)} is not among the options {', '.join(map(shown, options))}"
            )
    elif kind in ("numerical", "regression") and parse_number(answer) is None:
        raise DataError(f"{where}: the answer {shown(answer)} of a {kind} question is not a number")

    fps = _number(r, "fps", where, least=1e-6, most=1e6)
    sample = Sample(
        id=str(number if name is None else name),
        question=question.strip(),
        options=options,
        problem_type=kind,
        data_type=data_type,
        path=str(root / medium),
        answer=answer,
        source=_text_of(r, where, "data_source") or stem,
        fps=FOLDER_FPS if fps is None else fps,
        about=about(r),
        segment=_segment(r, where),
        where=where,
    )
    sample = replace(sample, reasoning=_reasoning(r, sample, where))
    for text in (
        sample.id,
        sample.question,
        sample.path,
        answer,
        sample.reasoning,
        sample.source,
        *options,
    ):
        if not _is_unicode(text):
            raise DataError(f"{where}: a text that is not valid Unicode: {shown(text)}")
    return sample


def _not_finite(value):
    """Is this NaN (how pandas writes null) or infinite?"""
    return isinstance(value, float) and not math.isfinite(value)


def _first(r, *keys):
    """(key, value) of the first of these fields that a record has: null and "" are none. (None, None) without any."""
    return next(((k, r[k]) for k in keys if r.get(k) is not None and r[k] != ""), (None, None))


def _medium(r, where):
    """(the field that names the medium, None without any; its path; the data type) of a record.

    `path` is read first: MVBench's records name their source's file in `video` too. A video and an image are two media.
    """
    keys = "path", "video", "videos", "image"
    (key, _), medium = _first(r, *keys), _text_of(r, where, *keys)
    data_type = _text_of(r, where, "data_type") or ("image" if key == "image" else "video")
    also_image = _first(r, "image")[0] and data_type != "image"
    media = {k: r[k] for k in keys if _first(r, k)[0] and (k != "path" or also_image)}
    if any(value != next(iter(media.values())) for value in media.values()):
        raise DataError(
            f"{where}: several media, {', '.join(f'{k!r} {shown(v)}' for k, v in media.items())}, expected one"
        )
    return key, medium, data_type


def _text_of(r, where, *keys):
    """The first of these fields, which must be text, stripped; "" without any."""
    key, value = _first(r, *keys)
    if key and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {shown(value)}, expected text")
    return (value or "").strip()


def _number(r, key, where, *, least, most):
    """A field's number, which may be written as text; None without one."""
    _, value = _first(r, key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise DataError(
            f"{where}: {key!r} is {shown(value)}, expected a number from {least:g} to {most:g}"
        )
    return number


def _segment(r, where):
    """(start, end) in seconds, as in MVBench; None for a record of the whole video."""
    start, end = (_number(r, key, where, least=0, most=1e9) for key in ("start", "end"))
    if (start is None) != (end is None):
        raise DataError(
            f"{where}: only one of 'start' ({start}) and 'end' ({end}), expected both, in seconds, or none"
        )
    if start is not None and start >= end:
        raise DataError(f"{where}: a segment from {start:g} to {end:g} seconds")
    return None if start is None else (start, end)


def _answer(r, where):
    """The text of the answer, from `solution` first: some evaluation files hold the option's text in `answer`."""
    key, solution = _first(r, "solution", "answer")
    if key is None:
        raise DataError(f"{where}: no 'solution'")
    if (
        isinstance(solution, bool)
        or not isinstance(solution, (str, int, float))
        or _not_finite(solution)
    ):
        raise DataError(f"{where}: {key!r} is {shown(solution)}, expected text or a number")
    answer = extract_answer(str(solution))
    answer = str(solution).strip() if answer is None else answer
    if not answer:
        raise DataError(f"{where}: an empty solution {shown(solution)}")
    return answer


def _reasoning(r, sample, where):
    """The reasoning that leads to the answer; "" without any. `process` is that text, all of it in <think> </think> or without
    these tags, or a whole response, whose answer must be the record's."""
    process = _text_of(r, where, "process", "reasoning")
    if process.endswith("</answer>"):
        given = extract_answer(process)
        if given is None or normalize_answer(given, sample) != normalize_answer(
            sample.answer, sample
        ):
            raise DataError(
                f"{where}: the reasoning answers {shown(given)}, the solution is {shown(sample.answer)}"
            )
        process = process[: process.rindex("<answer>")].strip()
    whole = re.fullmatch("<think>(.*)</think>", process, re.DOTALL)
    reasoning = (whole[1] if whole else process).strip()
    if not format_reward(supervised_response(reasoning, sample.answer)):
        raise DataError(
            f"{where}: a tag within the reasoning {shown(process)} or the solution {shown(sample.answer)}, expected "
            "one <think>...</think> around all of the reasoning, or no tags"
        )
    return reasoning


def supervised_response(reasoning, answer):
    """The response that a record teaches."""
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"


def _is_unicode(text):
    return not re.search("[\ud800-\udfff]", text)


def about(record):
    """Those of the fields ABOUT that a record has as text that can be printed; {} for what is no record."""
    texts = {key: record.get(key) for key in ABOUT} if isinstance(record, dict) else {}
    return {
        key: text
        for key, text in texts.items()
        if isinstance(text, str) and text and _is_unicode(text)
    }


def problem_type(record):
    """The one of rewards.PROBLEM_TYPES that a record names, multiple choice where it names none; None for anything else."""
    if not isinstance(record, dict):
        return None
    key, kind = _first(record, "problem_type")
    kind = "multiple choice" if key is None else kind
    spelled = {name.lower().replace("-", " "): name for name in PROBLEM_TYPES}
    return spelled.get(kind.strip().lower().replace("-", " ")) if isinstance(kind, str) else None


def _lettered(options, where):
    """The options with their letters A, B, C ... in order, which they have or get.

    "A. x", "A) x", "(A) x" and "A: x" stay as they are. Letters in another style (BEGINS) are written as "A. x", and so the
    prompt shows them. "A left", "B right" are letters only if all options begin so, in order.
    Where some begin with a letter of these, but not all with their own, it could be meant either way ("A. left", "right"), so
    the record is refused. "J. Smith", "K. Brown" and "A.M.", "P.M." are text, which gets letters.
    """
    if not (isinstance(options, list) and all(isinstance(o, str) for o in options)):
        raise DataError(f"{where}: 'options' is {shown(options)}, expected a list of strings")
    if len(options) > 26 or not all(o.strip() for o in options):
        raise DataError(f"{where}: {len(options)} options, expected at most 26, none of them empty")
    options, letters = [o.lstrip() for o in options], [chr(65 + i) for i in range(len(options))]
    if all(re.match(rf"\(?{letter}[.):]", o) for letter, o in zip(letters, options)):
        return options
    begins = [BEGINS.match(o) for o in options]
    found = [unicodedata.normalize("NFKC", m["letter"]).upper() if m else None for m in begins]
    if found == letters:
        around = [
            "" if m["open"] in m["mark"] else m["open"] for m in begins
        ]  # of "**A. x**", but not of "**A.** x"
        return [
            f"{letter}. {o[m.end() :].removesuffix(a)}"
            for letter, o, m, a in zip(letters, options, begins, around)
        ]
    marked = {letter for letter, m in zip(found, begins) if m and not m["space"]}
    if not marked.isdisjoint(letters):
        raise DataError(
            f"{where}: the options {', '.join(map(shown, options))}, expected the letters A, B, C ... in order "
            "before all of them, or before none"
        )
    return [f"{letter}. {o}" for letter, o in zip(letters, options)]


def _split_options(question):
    """Video-RTS and LongVideo-Reason end the question with its options, A, B, C ..., one a line -> (question, options); no
    options where a line before them begins with one of their letters too."""
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    found = [m[1] if (m := re.match(r"\(?([A-Z])[.):]", line)) else None for line in lines]
    for i in range(max(0, len(lines) - 26), len(lines) - 1):
        letters = [chr(65 + k) for k in range(len(lines) - i)]
        if found[i:] == letters and set(found[:i]).isdisjoint(letters):
            return "\n".join(lines[:i]), lines[i:]
    return question, []


def missing_media(samples, data, media_root):
    """Looks for the file or folder of every sample -> (a line that counts by folder those that are not there, "" if all are;
    whether they are more than half).

    data, media_root: as given to load_samples, for the line.
    """
    there = {path: os.path.exists(path) for path in dict.fromkeys(s.path for s in samples)}
    missing = [s for s in samples if not there[s.path]]
    if not missing:
        return "", False
    folders = Counter(str(Path(s.path).parent) for s in missing).most_common()
    counts = ", ".join(f"{n} in {folder}" for folder, n in folders[:3])
    others = f", the others in {len(folders) - 3} more folders" if len(folders) > 3 else ""
    start = Path(data).absolute().parent
    root = (
        f"--media_root was {media_root}"
        if media_root
        else f"--media_root was not set, so paths start from {start}"
    )
    return (
        f"{data}: the media of {len(missing)} of {len(samples)} records are missing: {counts}{others}; the first: "
        f"{missing[0].name.removeprefix(f'{Path(data)}, ')}, {missing[0].path}; {root}"
    ), 2 * len(missing) > len(samples)


# ---- media


@dataclass(eq=False)  # a medium is itself, whatever its pixels are
class Media:
    """What the vision tower sees. frames: uint8 (T, 3, H, W), T even, or 1 for an image. One grid = 2 frames = 1 time step."""

    frames: torch.Tensor
    kind: str  # "video" or "image"
    seconds_per_grid: float = 0.0
    available: int = 1  # frames that the file would show without max_frames
    key: str | None = (
        None  # what the pixels are a function of: file (path, size, time), frame indices, frame size
    )

    @property
    def grid(self):
        """(t, h, w): time steps, and patches down and across."""
        T, _, H, W = self.frames.shape
        return (T + 1) // 2, H // PATCH, W // PATCH

    @property
    def tokens(self):
        t, h, w = self.grid
        return t * h * w // MERGE**2

    def frames_of(self, grid, n=1):
        """The frames of n time steps from `grid` on."""
        return self.frames[2 * grid : 2 * (grid + n)]


def load_media(
    sample,
    *,
    fps=2.0,
    min_frames=4,
    max_frames=16,
    min_pixels=4 * 28 * 28,
    max_pixels=128 * 28 * 28,
    image_max_pixels=256 * 28 * 28,
    reader="av",
    decode_timeout=60.0,
    decoded=None,
):
    """A Sample's file -> Media, at most max_frames frames of at most max_pixels. Raises DataError naming file and record.

    reader: of videos, one of reader.READERS.
    decoded: {key of a frame: frame} of earlier calls for this sample and size, filled and not decoded again.
    """
    counts = dict(target_fps=fps, min_frames=min_frames, max_frames=max_frames)
    pixels = dict(min_pixels=min_pixels, max_pixels=max_pixels)
    try:
        file = _identity(Path(sample.path))
        if sample.data_type == "image":
            frame = read_image(
                sample.path,
                min_pixels=min_pixels,
                max_pixels=image_max_pixels,
                timeout=decode_timeout,
            )
            clip = Clip(frame[None], 0.0, 1, [0], [0])
        elif sample.data_type == "video":
            clip = read_clip(
                sample.path,
                **counts,
                **pixels,
                segment=sample.segment,
                timeout=decode_timeout,
                decoded=decoded,
                reader=reader,
            )
        else:
            clip = _read_folder(sample, counts, pixels, decode_timeout)
    except (
        ValueError,
        OSError,
    ) as e:  # VideoError and DataError are ValueErrors, and so are those of sizes and counts
        where = "" if sample.path in str(e) else f"{sample.path}: "
        raise DataError(f"{sample.name}: {where}{e}") from e
    frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip.frames, 3, 1)))
    return Media(
        frames,
        "image" if sample.data_type == "image" else "video",
        2 * clip.seconds,
        clip.available,
        repr((file, reader, clip.keys, tuple(frames.shape[2:]))),
    )


def _identity(path):
    """What tells a file (or the files of a folder) from what stood there before: paths, sizes, times of change."""
    files = [f for f in (sorted(path.iterdir()) if path.is_dir() else [path]) if f.exists()]
    return [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]


def _read_folder(sample, counts, pixels, timeout):
    path = Path(sample.path)
    if not path.is_dir():
        raise VideoError(f"{path}: no such folder of frames")
    files = _by_number(
        [f for f in path.iterdir() if f.suffix.lower() in PICTURES and f.name[0] != "."], path
    )
    indices, seconds, available = choose_frames(len(files), sample.fps, sample.segment, **counts)
    frames = [read_image(files[i], **pixels, timeout=timeout) for i in indices]
    if len(shapes := {f.shape for f in frames}) > 1:
        raise VideoError(f"{path}: frames of {len(shapes)} different sizes")
    return Clip(np.stack(frames), seconds, available, indices, indices)


def _by_number(files, folder):
    """Files in the order of the numbers in their names, 9 before 10. Raises VideoError where it matters whether 1.5 is one
    number or two."""

    def numbers(pattern, file):
        return [float(x) if i % 2 else x for i, x in enumerate(re.split(pattern, file.stem))]

    whole, decimal = (
        sorted(files, key=partial(numbers, pattern))
        for pattern in ("([0-9]+)", r"([0-9]+(?:\.[0-9]+)?)")
    )
    if whole != decimal:
        a, b = next(pair for pair in zip(whole, decimal) if pair[0] != pair[1])
        raise VideoError(
            f"{folder}: {a.name} or {b.name} first? Number its frames with as many digits each"
        )
    return whole


MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of pixels, in all Qwen-VL checkpoints


def normalize(frames, dtype=torch.float32, mean=MEAN, std=STD):
    """uint8 (N, 3, ...) -> (x / 255 - mean) / std, with the statistics that all Qwen-VL vision towers share."""
    column = lambda x: torch.tensor(x, dtype=dtype, device=frames.device).view(
        3, *[1] * (frames.ndim - 2)
    )
    return (frames.to(dtype) / 255 - column(mean)) / column(std)


def patchify(frames):
    """frames float (T, 3, H, W), T even or 1 -> (patches (t * h * w, 3 * 2 * 14 * 14), (t, h, w)).

    The layout of transformers' Qwen2-VL processors: a patch holds (channel, frame of the grid, row, column), and patches
    run over time, then over 2 x 2 blocks, so that 4 neighbouring rows merge into one visual token. An image counts twice.
    """
    T, C, H, W = frames.shape
    if T == 1:
        frames, T = frames.expand(2, -1, -1, -1), 2
    t, h, w, m = T // 2, H // PATCH, W // PATCH, MERGE
    if T % 2 or H % (m * PATCH) or W % (m * PATCH):
        raise ValueError(
            f"{T} frames of {H} x {W}: expected an even number, sides in multiples of {m * PATCH}"
        )
    x = frames.reshape(t, 2, C, h // m, m, PATCH, w // m, m, PATCH)
    x = x.permute(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )  # t, block row, block column, row, column, C, frame, y, x
    return x.reshape(t * h * w, C * 2 * PATCH * PATCH), (t, h, w)


# ---- prompts


@dataclass(eq=False)
class Prompt:
    """A question as the policy gets it. ids: (P,) token ids, one video or image token per visual token of `media`.
    target: (R,) the response to learn from, where there is one (PromptBuilder.target)."""

    sample: Sample
    ids: torch.Tensor
    media: list[Media] = field(default_factory=list)
    target: torch.Tensor | None = None

    @property
    def frames_x_pixels(self):
        """Of the first medium: (frames, pixels of a frame). Most irreproducible numbers in this field come from here."""
        T, _, H, W = self.media[0].frames.shape
        return T, H * W


INSTRUCTION = "Think inside <think> </think>, then answer inside <answer> </answer> "
CLOSING = {
    "multiple choice": "with the letter of one option.",
    "numerical": "with one number.",
    "OCR": "with the text as it is written.",
    "free-form": "with a short text.",
    "regression": "with one number.",
}


def _read_json(file):
    """What a JSON file of a model folder holds. Raises DataError, which names the file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file}: not JSON in UTF-8, or cut off: {e}") from e


class PromptBuilder:
    """Sample -> Prompt with a checkpoint's own tokenizer and chat template: medium first, then the text, one user turn.

    folder: the checkpoint.  max_prompt: tokens; a longer prompt is refused, never cut.  media: load_media's keywords.
    Raises DataError, naming the folder: a tokenizer or chat template that is missing, broken, or not that of the model.
    """

    def __init__(self, folder, *, max_prompt=16384, **media):
        self.tokenizer = load_tokenizer(folder)
        template = (
            Path(folder) / "chat_template.json"
        )  # older checkpoints keep the multimodal template apart
        if (
            template.exists() and not template.with_suffix(".jinja").exists()
        ):  # the newer file wins, as in transformers
            content = _read_json(template)
            if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
                raise DataError(f"{template}: expected an object with a 'chat_template'")
            self.tokenizer.chat_template = content["chat_template"]
        if not self.tokenizer.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template")
        self.max_prompt, self.media = max_prompt, media
        self.pad = {
            kind: self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
            for kind in ("video", "image")
        }
        config = _read_json(Path(folder) / "config.json")
        if self.pad != (expected := {kind: config.get(f"{kind}_token_id") for kind in self.pad}):
            raise DataError(
                f"{folder}: the tokenizer has the vision tokens {self.pad}, the model {expected}"
            )
        for kind in self.pad:
            self._try_template(folder, kind)

    def _try_template(self, folder, kind):
        """Raises DataError unless the chat template gives a turn with one medium and a text one place for the medium."""
        turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "?"}]}
        try:
            chat = self.tokenizer.apply_chat_template(
                [turn], tokenize=False, add_generation_prompt=True
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
        ) as e:  # TypeError: it expects text only
            raise DataError(
                f"{folder}: the chat template is broken, or made for text only: {type(e).__name__}: {e}"
            ) from e
        if chat.count(f"<|{kind}_pad|>") != 1:
            raise DataError(
                f"{folder}: the chat template has {chat.count(f'<|{kind}_pad|>')} places for one {kind}"
            )

    def __call__(self, sample, **media):
        """Loads the medium and builds the prompt; `media` overrides the builder's, e.g. more frames. Raises DataError."""
        return self.build(sample, [load_media(sample, **{**self.media, **media})])

    def build(self, sample, media):
        """The prompt of media that are loaded. Raises DataError: too long, or a text that spells out a special token."""
        self._refuse_special(
            sample, "question, options or solution", f"{self.text(sample)}\n{sample.answer}"
        )
        content = [{"type": m.kind} for m in media] + [{"type": "text", "text": self.text(sample)}]
        turn = {"role": "user", "content": content}
        chat = self.tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        counts = {self.pad[kind]: [m.tokens for m in media if m.kind == kind] for kind in self.pad}
        for token, wanted in counts.items():
            if ids.count(token) != len(wanted):  # a template for text only
                raise DataError(
                    f"{sample.name}: {ids.count(token)} places for media in the prompt, expected {len(wanted)}"
                )
        counts = {token: iter(wanted) for token, wanted in counts.items()}
        ids = [x for i in ids for x in ([i] * next(counts[i]) if i in counts else [i])]
        if len(ids) > self.max_prompt:
            raise DataError(
                f"{sample.name}: {sample.path}: a prompt of {len(ids)} tokens "
                f"({sum(m.tokens for m in media)} visual), more than --max_prompt {self.max_prompt}"
            )
        return Prompt(sample, torch.tensor(ids), media)

    def text(self, sample):
        """The user's words."""
        options = ["Options:", *sample.options] if sample.options else []
        return "\n".join([sample.question, *options, INSTRUCTION + CLOSING[sample.problem_type]])

    def target(self, sample):
        """Token ids (R,) of a supervised response: reasoning, answer, end of turn. Raises DataError without reasoning."""
        if not sample.reasoning:
            raise DataError(f"{sample.name}: no reasoning ('process') to learn from")
        text = supervised_response(sample.reasoning, sample.answer)
        ids = self._refuse_special(sample, "reasoning or solution", text)
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def _refuse_special(self, sample, what, text):
        """The text's token ids. Raises DataError if it spells out a special token, such as <|im_end|>, which ends a turn."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if special := set(ids) & set(self.tokenizer.all_special_ids):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise DataError(
                f"{sample.name}: its {what} spells out {names}, expected text without special tokens"
            )
        return ids

    def decode(self, ids):
        """Token ids -> the response's text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ---- the prompts of every step


class Loader:
    """The prompts of a step, for one of `world` ranks, loaded in `workers` threads, each with a decoder process.

    Sample number i of a step is loaded by the rank whose turn, `rank`, is i mod world. Samples are drawn without replacement,
    in an order that each epoch shuffles anew from `seed`. target: build every prompt's supervised target too.
    """

    def __init__(
        self, samples, builder, *, prompts, seed=0, workers=2, target=False, rank=0, world=1
    ):
        self.samples, self.builder, self.seed, self.target = samples, builder, seed, target
        self.prompts, self.positions = prompts, range(rank, prompts, world)
        self.pool = ThreadPoolExecutor(workers)
        self.pending = {}

    def load(self, step):
        """[(position in the step, Prompt or DataError), ...], and a start on the step after it."""
        for s in (step, step + 1):
            if s not in self.pending:
                self.pending[s] = self._submit(
                    [self.sample(s, i) for i in self.positions], self.target
                )
        return [(i, future.result()) for i, future in zip(self.positions, self.pending.pop(step))]

    def sample(self, step, i):
        """Sample number i of a step."""
        epoch, index = divmod(step * self.prompts + i, len(self.samples))
        return self.samples[_order(len(self.samples), self.seed, epoch)[index]]

    def refill(self, step, k):
        """As load, for the k-th extra draw of a step (k >= 1): from all samples, with replacement, at positions of their own."""
        positions = [k * self.prompts + i for i in self.positions]
        drawn = [
            random.Random(f"{self.seed} {step} refill {i}").choice(self.samples) for i in positions
        ]
        return [(i, future.result()) for i, future in zip(positions, self._submit(drawn, False))]

    def _submit(self, samples, target):
        return [self.pool.submit(_load, self.builder, s, target) for s in samples]


@lru_cache(maxsize=4)
def _order(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def _load(builder, sample, target):
    try:
        prompt = builder(sample)
        if target:
            prompt.target = builder.target(sample)
        return prompt
    except DataError as e:
        return e
