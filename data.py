"""Records -> Sample -> Media -> Prompt: what the policy is asked, and what it sees.

    load_samples    a file of records -> Samples. Files as Video-R1 (260k, COT-165k, evaluation),
                    Video-RTS (CG-Bench), LongVideo-Reason and GSM8K publish them
    load_media      a Sample's video, image or folder of frames -> Media: uint8 frames at the
                    model's size, and their time
    PromptBuilder   Sample + Media -> Prompt, by the checkpoint's own tokenizer and chat template.
                    SFT, RL, test-time scaling and evaluation share one wording (Video-R1's release
                    has five, slightly different)
    Loader          the prompts of each step, loaded ahead of it

Importable from here too: frame_indices, smart_resize, read_video (infra/frames.py, infra/video.py),
normalize, patchify (infra/patches.py), about, missing_media (infra/records.py).
Nothing is replaced and nothing is truncated: what cannot be used raises DataError, naming file and
record.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short_repr  # of any value: short, on one line, printable

import numpy as np
import torch
from jinja2 import TemplateError

import rewards
from infra import records
from infra.errors import DataError
from infra.families import read_family
from infra.frames import MERGE, PATCH, frame_indices, smart_resize  # noqa: F401
from infra.model_folder import load_tokenizer
from infra.options import lettered, split_options
from infra.patches import MEAN, STD, normalize, patchify  # noqa: F401
from infra.records import about, missing_media  # noqa: F401
from infra.video import Clip, read_clip, read_folder, read_image, read_video  # noqa: F401

# ---- records -> Sample

FOLDER_FPS = 3.0  # of a folder whose record has no "fps"; as MVBench's TVQA, the one such set


@dataclass(frozen=True)
class Sample:
    """One question, about one medium or, with the data type text, about none."""

    id: str  # the record's own, else its position in the file, from 0
    question: str
    options: list[str]  # with their letters, in order: "A. x", "A) x", "(A) x" or "A: x"; or []
    problem_type: str  # one of rewards.PROBLEM_TYPES
    data_type: str  # one of records.DATA_TYPES
    path: str  # of the medium; "" for text
    answer: str  # the text inside <answer>
    reasoning: str = ""  # the text inside <think>, "" if none
    source: str = ""
    fps: float = FOLDER_FPS  # of a folder of frames
    about: dict = field(default_factory=dict)  # those of the fields records.ABOUT that it has
    segment: tuple[float, float] | None = None  # the part of the video asked about, in seconds
    where: str = field(default="", compare=False)  # "FILE, record 0 (id 3)"

    @property
    def name(self):
        """What errors call it: the place of its record or, for a Sample made by hand, its id."""
        return self.where or f"record {self.id}"


def load_samples(path, *, media_root=None, skipped=None):
    """Reads a .json or .jsonl file -> list[Sample], in the file's order.

    media_root: the folder that the records' paths are relative to; default: the folder of the file.
    skipped: a dict that receives {position of the record: message} for every bad record, which is
    then left out; without it the first bad record raises.
    Raises DataError: no such file, not JSON, an empty file, a bad record.
    """
    path = Path(path)
    root = (Path(media_root) if media_root else path.parent).absolute()
    samples = []
    for i, (where, read) in enumerate(records.read_records(path)):
        try:
            samples.append(_sample(read(), i, where, root, path.stem))
        except DataError as e:
            if skipped is None:
                raise
            skipped[i] = str(e)
    if not samples:
        first = next(iter(skipped.values())) if skipped else None
        why = f"first problem: {first}" if first else f"expected {records.FORM}"
        raise DataError(f"{path}: holds no usable record, {why}")
    return samples


def _sample(record, position, where, root, stem):
    """A record -> Sample. root: the folder that paths are relative to. stem: the name of the file.
    Raises DataError."""
    if not isinstance(record, dict):
        found = short_repr(record)
        raise DataError(f"{where}: found {found}, expected an object with {records.FIELDS}")
    record = records.from_gsm8k(record)
    name, where = records.name_and_place(record, where)
    question = records.question(record, where)
    medium, data_type = records.medium(record, where)
    kind = _kind(record, where)
    question, options = _options(record, question, kind, where)
    answer = _answer(record, kind, options, where)
    fps = records.number(record, where, "fps", least=1e-6, most=1e6)
    segment = records.segment(record, where)
    source = records.text(record, where, "data_source") or stem
    sample = Sample(
        id=str(position) if name is None else name,
        question=question,
        options=options,
        problem_type=kind,
        data_type=data_type,
        path=str(root / medium) if medium else "",
        answer=answer,
        source=source,
        fps=FOLDER_FPS if fps is None else fps,
        about=about(record),
        segment=segment,
        where=where,
    )
    sample = replace(sample, reasoning=_reasoning(record, sample, where))
    texts = sample.id, question, sample.path, answer, sample.reasoning, source, *options
    for text in texts:
        if not records.is_unicode(text):
            raise DataError(f"{where}: a text that is not valid Unicode: {short_repr(text)}")
    return sample


def problem_type(record):
    """The one of rewards.PROBLEM_TYPES that a record names; if it names none, multiple choice, or
    numerical for GSM8K; None for anything else."""
    if not isinstance(record, dict):
        return None
    _, kind = records.first(records.from_gsm8k(record), "problem_type")
    if kind is None:
        return "multiple choice"
    if not isinstance(kind, str):
        return None
    spelled = {name.lower().replace("-", " "): name for name in rewards.PROBLEM_TYPES}
    return spelled.get(kind.strip().lower().replace("-", " "))


def _kind(record, where):
    """The problem type. Raises DataError."""
    kind = problem_type(record)
    if kind is None:
        found, expected = short_repr(record["problem_type"]), ", ".join(rewards.PROBLEM_TYPES)
        raise DataError(f"{where}: unknown problem type {found}, expected one of {expected}")
    return kind


def _options(record, question, kind, where):
    """(the question without options, the options with letters), from `options` or else the last
    lines of the question."""
    options = record.get("options")
    if records.is_empty(options):
        options = []
        if kind == "multiple choice":
            question, options = split_options(question)
    options = lettered(options, where)
    if not question:
        raise DataError(f"{where}: no question beside the options in 'problem'")
    return question, options


def _answer(record, kind, options, where):
    """The text of the answer, with or without <answer> </answer> in the record. Raises DataError if
    it does not fit the problem type."""
    solution = records.solution(record, where)
    answer = rewards.extract_answer(solution)
    if answer is None:
        answer = solution.strip()
    if not answer:
        raise DataError(f"{where}: an empty solution {short_repr(solution)}")
    if kind == "multiple choice" and not options:
        raise DataError(f"{where}: multiple choice without options")
    if kind == "multiple choice" and rewards.choice_letter(answer, options) is None:
        expected = ", ".join(map(short_repr, options))
        raise DataError(
            f"{where}: the answer {short_repr(answer)} is not exactly one of the options {expected}"
        )
    if kind in ("numerical", "regression") and rewards.parse_number(answer) is None:
        raise DataError(
            f"{where}: the answer {short_repr(answer)} of a {kind} question is not a number"
        )
    if kind == "grounding" and rewards.parse_times(answer) is None:
        raise DataError(
            f"{where}: the answer {short_repr(answer)} of a grounding question is not two times "
            "in seconds, the start before the end, such as 12.3 to 18.9"
        )
    return answer


def _reasoning(record, sample, where):
    """The text of the reasoning, "" without any. `process` holds that text, all of it in <think>
    </think> or without these tags; or a whole response, whose answer must be the record's."""
    process = records.text(record, where, "process", "reasoning")
    if process.endswith("</answer>"):
        given = rewards.extract_answer(process)
        gold = rewards.normalize_answer(sample.answer, sample)
        if given is None or rewards.normalize_answer(given, sample) != gold:
            raise DataError(
                f"{where}: the reasoning answers {short_repr(given)}, "
                f"the solution is {short_repr(sample.answer)}"
            )
        process = process[: process.rindex("<answer>")].strip()
    whole = re.fullmatch("<think>(.*)</think>", process, re.DOTALL)
    reasoning = (whole[1] if whole else process).strip()
    if not rewards.format_reward(supervised_response(reasoning, sample.answer)):
        raise DataError(
            f"{where}: a tag within the reasoning {short_repr(process)} or the solution "
            f"{short_repr(sample.answer)}, expected one <think>...</think> around all of the "
            "reasoning, or no tags"
        )
    return reasoning


def supervised_response(reasoning, answer):
    """The response that SFT teaches."""
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"


# ---- Sample -> Media


@dataclass(eq=False)  # compared by identity, not by pixels
class Media:
    """What the vision tower sees. One grid = 2 frames = 1 time step."""

    frames: torch.Tensor  # uint8 (T, 3, H, W); T even, or 1 for an image
    kind: str  # "video" or "image"
    seconds_per_grid: float = 0.0
    available: int = 1  # frames that the file would show without max_frames
    key: str | None = None  # identifies the pixels: file (path, size, time), frames, frame size
    patch: int = PATCH  # pixels of a patch, down and across
    times: list[float] = field(default_factory=list)  # (T,): when each appears, in seconds

    @property
    def grid(self):
        """(t, h, w): time steps, and patches down and across."""
        T, _, H, W = self.frames.shape
        return (T + 1) // 2, H // self.patch, W // self.patch

    @property
    def tokens(self):
        """How many visual tokens."""
        t, h, w = self.grid
        return t * h * w // MERGE**2

    @property
    def grid_times(self):
        """Of each 2-frame grid, the middle of its frames' times, in seconds."""
        return [(a + b) / 2 for a, b in zip(self.times[::2], self.times[1::2])]

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
    patch=PATCH,
    reader="av",
    decode_timeout=60.0,
    decoded=None,
):
    """A Sample's file -> Media of at most max_frames frames of at most max_pixels. Raises
    DataError, naming file and record.

    patch: of the vision tower, in pixels; sides of frames are multiples of 2 * patch.
    reader: of videos, one of infra.reader.READERS.
    decoded: {key of a frame: frame} of earlier calls for this sample and size. These are not
    decoded again; new ones are added.
    """
    how = dict(min_pixels=min_pixels, max_pixels=max_pixels, factor=patch * MERGE)
    how |= dict(timeout=decode_timeout)
    which = dict(target_fps=fps, min_frames=min_frames, max_frames=max_frames)
    which |= dict(segment=sample.segment)
    path = sample.path
    try:
        file = _identity(Path(path))
        if sample.data_type == "image":
            frame = read_image(path, **{**how, "max_pixels": image_max_pixels})
            clip = Clip(frame[None], 0.0, 1, [0], [0], [0.0])
        elif sample.data_type == "video":
            clip = read_clip(path, **which, **how, decoded=decoded, reader=reader)
        else:
            clip = read_folder(path, sample.fps, **which, **how)
    except (ValueError, OSError) as e:  # VideoError is a ValueError too
        where = "" if path in str(e) else f"{path}: "
        raise DataError(f"{sample.name}: {where}{e}") from e
    frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip.frames, 3, 1)))
    key = repr((file, reader, clip.keys, tuple(frames.shape[2:])))
    kind = "image" if sample.data_type == "image" else "video"
    return Media(frames, kind, 2 * clip.seconds, clip.available, key, patch, clip.times)


def _identity(path):
    """Changes if a file (or a file of a folder) changes: paths, sizes, modification times."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(f.resolve()), f.stat()) for f in files if f.exists()]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


# ---- Sample + Media -> Prompt

INSTRUCTION = "Think inside <think> </think>, then answer inside <answer> </answer> "
CLOSING = {
    "multiple choice": "with the letter of one option.",
    "numerical": "with one number.",
    "OCR": "with the text as it is written.",
    "free-form": "with a short text.",
    "regression": "with one number.",
    "grounding": "with the start and the end in seconds, such as 12.3 to 18.9.",
}


@dataclass(eq=False)
class Prompt:
    """A question as the policy gets it."""

    sample: Sample
    ids: torch.Tensor  # (P,) token ids, one video or image token per visual token of `media`
    media: list[Media] = field(default_factory=list)  # [] for text
    target: torch.Tensor | None = None  # (R,) the response to learn (PromptBuilder.target)

    @property
    def frames_x_pixels(self):
        """(frames, pixels of a frame) of the first medium, (0, 0) without one. Scores are
        comparable only if both are the same."""
        if not self.media:
            return 0, 0
        T, _, H, W = self.media[0].frames.shape
        return T, H * W

    @property
    def visual_tokens(self):
        """How many, of all media."""
        return sum(m.tokens for m in self.media)


class PromptBuilder:
    """Sample -> Prompt with a checkpoint's own tokenizer and chat template: one user turn, the
    medium first, if there is one, then the text.

    folder: the checkpoint.  max_prompt: tokens; a longer prompt is refused, never cut.
    media: load_media's keywords.
    Raises DataError, naming the folder: a tokenizer or chat template that is missing, broken, or
    not the model's; a Thinking checkpoint. Raises ModelError: a family that is not supported.

    In a Qwen3-VL's prompt every 2-frame grid of a video stands after its time (`write_times`).
    """

    def __init__(self, folder, *, max_prompt=16384, **media):
        self.tokenizer = load_tokenizer(folder)
        template = _chat_template(folder)
        if template is not None:
            self.tokenizer.chat_template = template
        if not self.tokenizer.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template")
        config = records.read_json(Path(folder) / "config.json")
        self.family = read_family(folder, config)
        self.max_prompt, self.media = max_prompt, {"patch": self.family.patch, **media}
        self.pad, expected = {}, {}  # kind: the token whose place a visual token takes
        for kind in ("video", "image"):
            self.pad[kind] = self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
            expected[kind] = config.get(f"{kind}_token_id")
        if self.pad != expected:
            raise DataError(
                f"{folder}: the tokenizer has the vision tokens {self.pad}, the model {expected}"
            )
        for kind in self.pad:
            self._try_template(folder, kind)

    def __call__(self, sample, **media):
        """Loads the medium and builds the prompt; `media` overrides the builder's keywords. Raises
        DataError."""
        if sample.data_type == "text":
            return self.build(sample, [])
        return self.build(sample, [load_media(sample, **{**self.media, **media})])

    def build(self, sample, media):
        """The prompt of loaded media, [] for text. Raises DataError: too long, or a text that
        contains a special token."""
        text = self.text(sample)
        self._refuse_special(sample, "question, options or solution", f"{text}\n{sample.answer}")
        chat = self._chat([m.kind for m in media], text)
        shown = {kind: [m for m in media if m.kind == kind] for kind in self.pad}
        for kind in self.pad:
            places, expected = chat.count(f"<|{kind}_pad|>"), len(shown[kind])
            if places != expected:  # a template for text only
                raise DataError(
                    f"{sample.name}: {places} places for media in the prompt, expected {expected}"
                )
        if self.family.time_text:
            chat = write_times(chat, [m.grid_times for m in shown["video"]])
        ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        for kind, pad in self.pad.items():
            grids = [grid for m in shown[kind] for grid in self.family.shown_as(m)]
            ids = _repeat(ids, pad, [t * h * w // MERGE**2 for t, h, w in grids])
        if len(ids) > self.max_prompt:
            visual = sum(m.tokens for m in media)
            place = f"{sample.name}: {sample.path}" if sample.path else sample.name
            raise DataError(
                f"{place}: a prompt of {len(ids)} tokens "
                f"({visual} visual), more than --max_prompt {self.max_prompt}"
            )
        return Prompt(sample, torch.tensor(ids), media)

    def text(self, sample):
        """The text of the user's turn."""
        options = ["Options:", *sample.options] if sample.options else []
        return "\n".join([sample.question, *options, INSTRUCTION + CLOSING[sample.problem_type]])

    def target(self, sample):
        """Token ids (R,) of a supervised response: reasoning, answer, end of turn. Raises DataError
        without reasoning."""
        if not sample.reasoning:
            raise DataError(f"{sample.name}: no reasoning ('process') to learn from")
        text = supervised_response(sample.reasoning, sample.answer)
        ids = self._refuse_special(sample, "reasoning or solution", text)
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def decode(self, ids):
        """Token ids -> the response's text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _chat(self, kinds, text):
        """The user's turn as the chat template writes it, and the start of the assistant's."""
        content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": text}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _try_template(self, folder, kind):
        """Raises DataError unless the chat template writes one placeholder for one medium, and
        leaves <think> to the response."""
        try:
            chat = self._chat([kind], "?")
        except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise DataError(
                f"{folder}: the chat template is broken, or made for text only: "
                f"{type(e).__name__}: {e}"
            ) from e
        places = chat.count(f"<|{kind}_pad|>")
        if places != 1:
            raise DataError(f"{folder}: the chat template has {places} places for one {kind}")
        if chat.rstrip().endswith("<think>"):
            raise DataError(
                f"{folder}: a Thinking checkpoint: its chat template opens <think> in the prompt, "
                "but the format reward and the targets of SFT expect it in the response; "
                "use the Instruct checkpoint"
            )

    def _refuse_special(self, sample, what, text):
        """The text's token ids. Raises DataError if it contains a special token, such as
        <|im_end|>, which ends a turn."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if special := set(ids) & set(self.tokenizer.all_special_ids):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(special)))
            raise DataError(
                f"{sample.name}: its {what} spells out {names}, "
                "expected text without special tokens"
            )
        return ids


def _chat_template(folder):
    """The content of chat_template.json, where older checkpoints keep the multimodal template; None
    without it, or if there is a chat_template.jinja, which wins, as in transformers."""
    file = Path(folder) / "chat_template.json"
    if not file.exists() or file.with_suffix(".jinja").exists():
        return None
    content = records.read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
        raise DataError(f"{file}: expected an object with a 'chat_template'")
    return content["chat_template"]


def write_times(chat, times):
    """The chat of a Qwen3-VL with each <|video_pad|> written out: of every 2-frame grid its time,
    and between <|vision_start|> and <|vision_end|> one <|video_pad|>.

    As replace_video_token of transformers 5.23 (models/qwen3_vl/processing_qwen3_vl.py). The chat
    template's own <|vision_start|> and <|vision_end|> stay around all of them; up to 4.57 the
    processor removed that pair.
    times: of each video, those of its grids in seconds. They count from the start of the file, also
    for a segment: as the processor's, which come from the numbers of frames in the file. It assumes
    a constant frame rate; where the rate varies, ours are the times in the file (Clip.times).

    >>> write_times("<|vision_start|><|video_pad|><|vision_end|>", [[0.25]])
    '<|vision_start|><0.2 seconds><|vision_start|><|video_pad|><|vision_end|><|vision_end|>'
    """
    first, *rest = chat.split("<|video_pad|>")
    written = [first]
    for of_video, after in zip(times, rest, strict=True):
        for t in of_video:
            written.append(f"<{t:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>")
        written.append(after)
    return "".join(written)


def _repeat(ids, token, counts):
    """Token ids with the i-th `token` repeated counts[i] times."""
    counts, repeated = iter(counts), []
    for x in ids:
        repeated += [x] * next(counts) if x == token else [x]
    return repeated


# ---- the prompts of each step


class Loader:
    """The prompts of a step, for one of `world` ranks, loaded in `workers` threads, each with its
    own decoder process.

    Rank `rank` loads the samples i of a step with i mod world = rank. Samples are drawn without
    replacement, in an order that each epoch shuffles anew, from `seed`.
    target: also build each prompt's supervised target.
    """

    def __init__(
        self, samples, builder, *, prompts, seed=0, workers=2, target=False, rank=0, world=1
    ):
        self.samples, self.builder, self.seed, self.target = samples, builder, seed, target
        self.prompts, self.positions = prompts, range(rank, prompts, world)
        self.pool = ThreadPoolExecutor(workers)
        self.pending = {}  # step: futures

    def load(self, step):
        """[(position in the step, Prompt or DataError), ...]; starts to load the next step."""
        for s in (step, step + 1):
            if s not in self.pending:
                drawn = [self.sample(s, i) for i in self.positions]
                self.pending[s] = self._submit(drawn, self.target)
        return [(i, future.result()) for i, future in zip(self.positions, self.pending.pop(step))]

    def sample(self, step, i):
        """Sample number i of a step."""
        epoch, index = divmod(step * self.prompts + i, len(self.samples))
        return self.samples[_order(len(self.samples), self.seed, epoch)[index]]

    def refill(self, step, k):
        """As load, for the k-th extra draw of a step (k >= 1): from all samples, with replacement.
        Its positions follow those of the earlier draws."""
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
