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
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

from rewards import PROBLEM_TYPES, choice_letter, extract_answer, parse_number
from video import (
    MERGE,
    PATCH,
    Clip,
    VideoError,
    choose_frames,
    frame_indices,
    load_image,
    read_clip,
    read_video,
    resize,
    smart_resize,
)

__all__ = ["DataError", "Sample", "load_samples", "Media", "load_media", "Prompt", "PromptBuilder", "Loader", "patchify",
           "normalize", "frame_indices", "read_video", "smart_resize"]

ABOUT = ("data_source", "original_question_type", "task_type", "category", "duration", "domain", "sub_category")
FOLDER_FPS = 3.0  # of a folder of frames whose record has no "fps": the rate of MVBench's TVQA frames, the one such set


class DataError(ValueError):
    """A record or medium that cannot be used: names the file, the record, what was found and what was expected."""


@dataclass(frozen=True)
class Sample:
    """One question about one medium. `answer` is the text inside <answer>; `reasoning` that inside <think>, "" if none."""
    id: str
    question: str
    options: list[str]  # with their letters, "A. text" or "A) text"; [] for other problem types
    problem_type: str  # one of rewards.PROBLEM_TYPES
    data_type: str  # "video", "image" or "frame", a folder of frames
    path: str
    answer: str
    reasoning: str = ""
    source: str = ""
    fps: float = FOLDER_FPS  # of a folder of frames
    about: dict = field(default_factory=dict)  # what else the record says of itself: those of ABOUT that it has
    segment: tuple[float, float] | None = None  # seconds of the video that the question is about; None: all of it


# ---- records

def load_samples(path, *, media_root=None, skipped=None):
    """Reads a .json (a list of objects) or .jsonl file -> list[Sample], in the file's order.

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
            samples.append(_sample(read(), where, root, path.stem))
        except DataError as e:
            if skipped is None:
                raise
            skipped[i] = str(e)
    if not samples:
        first = f", first problem: {next(iter(skipped.values()))}" if skipped else ""
        raise DataError(f"{path}: holds no usable record{first}")
    return samples


def read_records(path):
    """The records of a file as they are -> [(where, a function that gives the record), ...]; `where` names file and record."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from e
    if not text.strip():
        raise DataError(f"{path}: is empty")
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, partial(_json, line, where)) for where, line in lines]
    records = _json(text, path)
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a JSON {type(records).__name__}, expected a list of records")
    return [(f"{path}, record {i}", lambda r=r: r) for i, r in enumerate(records)]


def _json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON, or cut off: {e}") from e


def _sample(r, where, root, stem):
    if not isinstance(r, dict):
        raise DataError(f"{where}: a {type(r).__name__}, expected an object")
    first = lambda *keys: next((r[k] for k in keys if r.get(k) not in (None, "")), None)
    name = first("problem_id", "qid", "question_id", "id")
    where = f"{where} (id {name})"

    question, medium = first("problem", "question"), first("path", "video", "videos", "image")
    if not isinstance(question, str):
        raise DataError(f"{where}: no question ('problem')")
    if not isinstance(medium, str):
        raise DataError(f"{where}: no medium ('path', 'video' or 'videos')")
    solution = first("solution", "answer")  # `solution` first: some evaluation files hold the option's text in `answer`
    if solution is None:
        raise DataError(f"{where}: no 'solution'")
    answer = extract_answer(str(solution))
    answer = str(solution).strip() if answer is None else answer
    if not answer:
        raise DataError(f"{where}: an empty solution {solution!r}")

    options = first("options") or []
    if not (isinstance(options, list) and all(isinstance(o, str) for o in options)):
        raise DataError(f"{where}: 'options' is {options!r}, expected a list of strings")
    kind = str(first("problem_type") or "multiple choice").lower()
    if kind not in PROBLEM_TYPES and kind.replace("-", " ") in PROBLEM_TYPES:
        kind = kind.replace("-", " ")
    kind = next((k for k in PROBLEM_TYPES if k.lower() == kind), kind)
    if kind not in PROBLEM_TYPES:
        raise DataError(f"{where}: unknown problem type {kind!r}, expected one of {', '.join(PROBLEM_TYPES)}")
    if kind == "multiple choice":
        if not options:
            question, options = _split_options(question)
        if not all(re.match(r"\s*\(?[A-Z][.):]", o) for o in options):
            options = [f"{chr(65 + i)}. {o}" for i, o in enumerate(options)]
        if not options:
            raise DataError(f"{where}: multiple choice without options")
        if choice_letter(answer, options) is None:
            raise DataError(f"{where}: the answer {answer!r} is not among the options {', '.join(o[:20] for o in options)}")
    elif kind in ("numerical", "regression") and parse_number(answer) is None:
        raise DataError(f"{where}: the answer {answer!r} of a {kind} question is not a number")

    data_type = first("data_type") or "video"
    if data_type not in ("video", "image", "frame"):
        raise DataError(f"{where}: data type {data_type!r}, expected video, image or frame")
    reasoning = re.sub(r"</?think>", "", str(first("process", "reasoning") or "")).strip()
    try:
        fps = float(first("fps") or FOLDER_FPS)
    except (TypeError, ValueError):
        fps = 0.0
    if not 0 < fps < float("inf"):
        raise DataError(f"{where}: 'fps' is {r['fps']!r}, expected a number of frames per second")
    segment = None
    if isinstance(r.get("start"), (int, float)) and isinstance(r.get("end"), (int, float)):  # MVBench
        segment = float(r["start"]), float(r["end"])
        if not 0 <= segment[0] < segment[1]:
            raise DataError(f"{where}: a segment from {r['start']} to {r['end']} seconds")
    for text in (question, answer, reasoning, medium, *options):
        if re.search("[\ud800-\udfff]", text):
            raise DataError(f"{where}: a text that is not valid Unicode: {text[:60]!r}")
    return Sample(id=str(name), question=question.strip(), options=options, problem_type=kind, data_type=data_type,
                  path=str(root / medium), answer=answer, reasoning=reasoning, source=str(first("data_source") or stem),
                  fps=fps, about=about(r), segment=segment)


def about(record):
    """Those of the fields ABOUT that a record has; {} for what is no record."""
    return {key: record[key] for key in ABOUT if isinstance(record, dict) and isinstance(record.get(key), str) and record[key]}


def _split_options(question):
    """Video-RTS and LongVideo-Reason end the question with its options, A, B, C ..., one a line -> (question, options)."""
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    for i in range(len(lines)):
        if all(re.match(rf"\(?{chr(65 + k)}[.):]", line) for k, line in enumerate(lines[i:])) and len(lines) - i <= 26:
            return "\n".join(lines[:i]), lines[i:]
    return question, []


# ---- media

@dataclass(eq=False)  # a medium is itself, whatever its pixels are
class Media:
    """What the vision tower sees. frames: uint8 (T, 3, H, W), T even, or 1 for an image. One grid = 2 frames = 1 time step."""
    frames: torch.Tensor
    kind: str  # "video" or "image"
    seconds_per_grid: float = 0.0
    available: int = 1  # frames that the file would show without max_frames
    key: str | None = None  # what the pixels are a function of: file (path, size, time), frame indices, frame size

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


def load_media(sample, *, fps=2.0, min_frames=4, max_frames=16, min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28,
               image_max_pixels=256 * 28 * 28, decode_timeout=60.0, decoded=None):
    """A Sample's file -> Media, at most max_frames frames of at most max_pixels. Raises DataError naming file and record.

    decoded: {frame index: frame} of earlier calls for this sample and size, filled and not decoded again.
    """
    counts = dict(target_fps=fps, min_frames=min_frames, max_frames=max_frames)
    pixels = dict(min_pixels=min_pixels, max_pixels=max_pixels)
    try:
        file = _identity(Path(sample.path))
        if sample.data_type == "image":
            clip = Clip(resize(load_image(sample.path), min_pixels, image_max_pixels)[None], 0.0, 1, [0])
        elif sample.data_type == "video":
            clip = read_clip(sample.path, **counts, **pixels, segment=sample.segment, timeout=decode_timeout, decoded=decoded)
        else:
            clip = _read_folder(sample, counts, pixels)
    except (ValueError, OSError) as e:  # VideoError and DataError are ValueErrors, and so are those of sizes and counts
        where = "" if sample.path in str(e) else f"{sample.path}: "
        raise DataError(f"record {sample.id}: {where}{e}") from e
    frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip.frames, 3, 1)))
    return Media(frames, "image" if sample.data_type == "image" else "video", 2 * clip.seconds, clip.available,
                 repr((file, clip.indices, tuple(frames.shape[2:]))))


def _identity(path):
    """What tells a file (or the files of a folder) from what stood there before: paths, sizes, times of change."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] * path.exists()
    return [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)]


def _read_folder(sample, counts, pixels):
    path = Path(sample.path)
    if not path.is_dir():
        raise VideoError(f"{path}: no such folder of frames")
    natural = lambda file: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", file.name)]
    files = sorted((f for f in path.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")), key=natural)
    indices, seconds, available = choose_frames(len(files), sample.fps, sample.segment, **counts)
    frames = [resize(load_image(files[i]), **pixels) for i in indices]
    if len(shapes := {f.shape for f in frames}) > 1:
        raise VideoError(f"{path}: frames of {len(shapes)} different sizes")
    return Clip(np.stack(frames), seconds, available, indices)


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels, in all Qwen-VL checkpoints


def normalize(frames, dtype=torch.float32, mean=MEAN, std=STD):
    """uint8 (N, 3, ...) -> (x / 255 - mean) / std, with the statistics that all Qwen-VL vision towers share."""
    column = lambda x: torch.tensor(x, dtype=dtype, device=frames.device).view(3, *[1] * (frames.ndim - 2))
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
        raise ValueError(f"{T} frames of {H} x {W}: expected an even number, sides in multiples of {m * PATCH}")
    x = frames.reshape(t, 2, C, h // m, m, PATCH, w // m, m, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, block row, block column, row, column, C, frame, y, x
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


def load_tokenizer(folder):
    """The tokenizer of a model folder. Raises DataError, naming the folder: none, or one that cannot be read."""
    if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise DataError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # whatever a broken file makes a native library raise is this file's error
        reason = " ".join(str(e).split())[:300]
        raise DataError(f"{folder}: the tokenizer cannot be read: {type(e).__name__}: {reason}") from e


class PromptBuilder:
    """Sample -> Prompt with a checkpoint's own tokenizer and chat template: medium first, then the text, one user turn.

    folder: the checkpoint.  max_prompt: tokens; a longer prompt is refused, never cut.  media: load_media's keywords.
    Raises DataError, naming the folder: a tokenizer or chat template that is missing, broken, or not that of the model.
    """

    def __init__(self, folder, *, max_prompt=16384, **media):
        self.tokenizer = load_tokenizer(folder)
        template = Path(folder) / "chat_template.json"  # older checkpoints keep the multimodal template apart
        if template.exists() and not template.with_suffix(".jinja").exists():  # the newer file wins, as in transformers
            content = _json(template.read_text(encoding="utf-8"), template)
            if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
                raise DataError(f"{template}: expected an object with a 'chat_template'")
            self.tokenizer.chat_template = content["chat_template"]
        if not self.tokenizer.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template")
        self.max_prompt, self.media = max_prompt, media
        self.pad = {kind: self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("video", "image")}
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if self.pad != (expected := {kind: config.get(f"{kind}_token_id") for kind in self.pad}):
            raise DataError(f"{folder}: the tokenizer has the vision tokens {self.pad}, the model {expected}")
        for kind in self.pad:
            self._try_template(folder, kind)

    def _try_template(self, folder, kind):
        """Raises DataError unless the chat template gives a turn with one medium and a text one place for the medium."""
        turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "?"}]}
        try:
            chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError) as e:  # TypeError: it expects text only
            raise DataError(f"{folder}: the chat template is broken, or made for text only: {type(e).__name__}: {e}") from e
        if chat.count(f"<|{kind}_pad|>") != 1:
            raise DataError(f"{folder}: the chat template has {chat.count(f'<|{kind}_pad|>')} places for one {kind}")

    def __call__(self, sample, **media):
        """Loads the medium and builds the prompt; `media` overrides the builder's, e.g. more frames. Raises DataError."""
        return self.build(sample, [load_media(sample, **{**self.media, **media})])

    def build(self, sample, media):
        content = [{"type": m.kind} for m in media] + [{"type": "text", "text": self.text(sample)}]
        turn = {"role": "user", "content": content}
        chat = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        counts = {self.pad[kind]: [m.tokens for m in media if m.kind == kind] for kind in self.pad}
        for token, wanted in counts.items():
            if ids.count(token) != len(wanted):  # a question that spells out a vision token, or a template for text only
                raise DataError(f"record {sample.id}: {ids.count(token)} places for media in the prompt, expected {len(wanted)}")
        counts = {token: iter(wanted) for token, wanted in counts.items()}
        ids = [x for i in ids for x in ([i] * next(counts[i]) if i in counts else [i])]
        if len(ids) > self.max_prompt:
            raise DataError(f"record {sample.id}: {sample.path}: a prompt of {len(ids)} tokens "
                            f"({sum(m.tokens for m in media)} visual), more than --max_prompt {self.max_prompt}")
        return Prompt(sample, torch.tensor(ids), media)

    def text(self, sample):
        """The user's words."""
        options = ["Options:", *sample.options] if sample.options else []
        return "\n".join([sample.question, *options, INSTRUCTION + CLOSING[sample.problem_type]])

    def target(self, sample):
        """Token ids (R,) of a supervised response: reasoning, answer, end of turn. Raises DataError without reasoning."""
        if not sample.reasoning:
            raise DataError(f"record {sample.id}: no reasoning ('process') to learn from")
        text = f"<think>{sample.reasoning}</think>\n<answer>{sample.answer}</answer>"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if special := set(ids) & set(self.tokenizer.all_special_ids):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise DataError(f"record {sample.id}: the reasoning spells out {names}")
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def decode(self, ids):
        """Token ids -> the response's text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ---- the prompts of every step

class Loader:
    """The prompts of a step, for one of `world` ranks, loaded in `workers` threads, each with a decoder process.

    Sample number i of a step is loaded by the rank whose turn, `rank`, is i mod world. Samples are drawn without replacement,
    in an order that each epoch shuffles anew from `seed`. target: build every prompt's supervised target too.
    """

    def __init__(self, samples, builder, *, prompts, seed=0, workers=2, target=False, rank=0, world=1):
        self.samples, self.builder, self.seed, self.target = samples, builder, seed, target
        self.prompts, self.positions = prompts, range(rank, prompts, world)
        self.pool = ThreadPoolExecutor(workers)
        self.pending = {}

    def load(self, step):
        """[(position in the step, Prompt or DataError), ...], and a start on the step after it."""
        for s in (step, step + 1):
            if s not in self.pending:
                self.pending[s] = self._submit([self.sample(s, i) for i in self.positions], self.target)
        return [(i, future.result()) for i, future in zip(self.positions, self.pending.pop(step))]

    def sample(self, step, i):
        """Sample number i of a step."""
        epoch, index = divmod(step * self.prompts + i, len(self.samples))
        return self.samples[_order(len(self.samples), self.seed, epoch)[index]]

    def refill(self, step, k):
        """As load, for the k-th extra draw of a step (k >= 1): from all samples, with replacement, at positions of their own."""
        positions = [k * self.prompts + i for i in self.positions]
        drawn = [random.Random(f"{self.seed} {step} refill {i}").choice(self.samples) for i in positions]
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
