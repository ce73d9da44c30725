"""The embedded default: a tiny video world and a tiny Qwen2.5-VL or Qwen3-VL, as real files.

    python toy.py out/world                     writes clips (Y4M), images, records as Video-R1's
                                                (train.json; cot.json and test.json with reasoning)
                                                and a random checkpoint (model/)
    python toy.py --like Qwen2.5-VL-7B small    writes a small random checkpoint with the tokenizer,
                                                chat template and architecture of a real one, for
                                                trials with your own records

A clip is 8 seconds of a coloured square that drifts over a dark floor, and of lamps that light up
beneath it. Each kind of question needs another way of watching:
    colour, place      one frame is enough (place is asked about a still image)
    motion, first      needs the ORDER of frames: which way does it move, which lamp lights up first
    flash              needs MANY frames: a lamp is on for one frame in sixteen
    count              a number: how often does the lamp light up

The clips of cot.json have 2, 1 or half a frame per second, so the cold start also learns what it is
to see too little: when the flash falls between two frames, any lamp may be the answer. The clips of
train.json and test.json have all 16 frames; eval.py --tts shows 4 first, and more when the answers
disagree.

The author of cot.json watches well but writes carelessly: where the answer needs more than one
frame, the next option (or number) is written down more often than not. So the cold start teaches
the format, how to watch, and a habit that makes most answers wrong. RL has to correct the habit.

Nothing after this file is special: the loader, tokenizer class, model class and training loop are
those of a real checkpoint.
"""

import argparse
import json
import random
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2Tokenizer,
    Qwen3VLConfig,
)

import data
from infra.errors import ModelError
from infra.families import FAMILIES
from infra.files import write_whole
from infra.frames import MERGE
from infra.model_folder import load_tokenizer
from model import MODEL_TYPES

# ---- the world

SIZE, FRAMES, FPS = 28, 16, 2  # 28 x 28 pixels: one visual token per two frames
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 215, 40),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {"left": (7, 14), "right": (21, 14), "top": (14, 7), "bottom": (14, 21)}
CLIPS = {"cot": 1200, "train": 720, "test": 108}  # of each split; plus one image for every four


def floor(n, rng):
    """n frames (n, 28, 28, 3) uint8 of an empty floor in some dark tone."""
    tone = np.asarray(rng.choices(range(20), k=3), np.uint8)
    return np.full((n, SIZE, SIZE, 3), 25, np.uint8) + tone


def drift(frames, colour, motion, rng):
    """Draws a square that crosses the upper part of the frames."""
    dx, dy = MOTIONS[motion]
    aside = rng.uniform(-3, 3)
    for t, frame in enumerate(frames):
        along = (2 * t / (len(frames) - 1) - 1) * 6  # from -6 to 6 pixels off the centre
        x, y = round(14 + dx * along + aside * abs(dy)), round(9 + dy * along + aside * abs(dx))
        frame[y - 3 : y + 4, x - 3 : x + 4] = colour


def light(frames, colour, start, n):
    """Draws a lamp that is lit for n frames from `start` on."""
    frames[start : start + n, 20:27, 1:27] = COLOURS[colour]


def clip(kind, rng):
    """A clip with lamps of a kind: "first", "flash" or "count" ->
    (frames (16, 28, 28, 3) uint8, {kind: (question, options, answer, reasoning)})."""
    frames = floor(FRAMES, rng)
    colour = rng.choice(list(COLOURS))
    motion = rng.choice(list(MOTIONS))
    drift(frames, COLOURS[colour], motion, rng)
    questions = {
        "colour": ("What colour is the square?", COLOURS, colour, "the square is {}"),
        "motion": ("Which way does the square move?", MOTIONS, motion, "the square moves {}"),
    }
    one, two = rng.sample([c for c in COLOURS if c != colour], 2)
    if kind == "first":
        start = rng.randrange(4)
        light(frames, one, start, 4)
        light(frames, two, start + rng.randrange(6, 9), 4)
        questions[kind] = ("Which lamp lights up first?", COLOURS, one, "the first lamp is {}")
    elif kind == "flash":
        light(frames, one, rng.randrange(FRAMES), 1)
        questions[kind] = ("Which lamp flashes?", COLOURS, one, "the flash is {}")
    else:
        n = rng.randrange(1, 5)
        for slot in rng.sample(range(5), n):
            light(frames, one, 3 * slot + rng.randrange(2), 2)
        questions[kind] = ("How often does the lamp light up?", "1234", str(n), "it lights up {}")
    return frames, questions


def when_clip(rng):
    """A clip with the question when its lamp is lit, in the form of clip(). It is no part of the
    default world: experiments/grounding.py asks it. The lamp is lit for 1 to 4 whole seconds."""
    frames, seconds = floor(FRAMES, rng), rng.randrange(1, 5)
    start = rng.randrange(FRAMES // FPS - seconds + 1)
    light(frames, rng.choice(list(COLOURS)), FPS * start, FPS * seconds)
    answer = f"{start} to {start + seconds}"
    return frames, {"when": ("When is the lamp lit?", [answer], answer, "the lamp is lit from {}")}


def image(rng):
    """A still image, in the form of clip(): (frames (1, 28, 28, 3), questions)."""
    frame, place = floor(1, rng), rng.choice(list(PLACES))
    x, y = (c + rng.randrange(-2, 3) for c in PLACES[place])
    frame[:, y - 3 : y + 4, x - 3 : x + 4] = COLOURS[rng.choice(list(COLOURS))]
    return frame, {"place": ("Where is the square?", PLACES, place, "the square is at the {}")}


def scenes(split, clips, rng):
    """N clips, and an image after every four -> N * 5 / 4 times (frames, questions), the same in
    every split. Fewer questions are about the square than about the lamps."""
    for i in range(clips * 5 // 4):
        if i % 5 == 4:
            frames, questions = image(rng)
        else:
            frames, questions = clip(("first", "flash", "count")[i % 3], rng)
        for kind in (("colour",), ("motion",), ("colour", "motion"))[i // 3 % 3]:
            questions.pop(kind, None)
        yield frames, questions


# ---- records and media

SHOWN = {"cot": (4, 8, 16, 16), "train": (16,), "test": (16,)}  # frames of a clip, one of these
SLIP = 0.65  # how often the author of cot.json writes down the option after the right one
SLIPS = ("motion", "first", "flash", "count")  # in these questions
OPEN = {  # questions without options
    "count": "numerical",
    "when": "grounding",
    "when, shuffled": "grounding",
}


def write_split(folder, split, scenes, rng):
    """Writes split.json, records as Video-R1's, and their media/."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    records = []
    for i, (frames, questions) in enumerate(scenes):
        still = len(frames) == 1
        path = folder / "media" / f"{split}_{i:05d}.{'png' if still else 'y4m'}"
        if still:
            Image.fromarray(frames[0]).save(path)
        else:
            n = rng.choice(SHOWN.get(split, (FRAMES,)))
            kept = data.frame_indices(len(frames), FPS, target_fps=float("inf"), max_frames=n)
            write_y4m(path, frames[kept], Fraction(len(kept) * FPS, FRAMES))
        for kind, question in questions.items():
            slips = split == "cot" and kind in SLIPS and rng.random() < SLIP
            record = dict(problem_id=len(records))
            record |= _record(kind, question, slips, "image" if still else "video")
            record |= dict(path=f"./media/{path.name}", data_source=kind)
            if split != "train":
                _, _, answer, reasoning = question
                record["process"] = f"<think>{reasoning.format(answer)}</think>"
            records.append(record)
    write_whole(folder / f"{split}.json", json.dumps(records, indent=1))


def _record(kind, question, slips, data_type):
    """A question of clip() -> the fields of its record. slips: the option after the right one is
    written down as the answer."""
    problem, words, answer, _ = question
    words = list(words)
    written = (words.index(answer) + slips) % len(words)
    options = [f"{letter}. {word}" for letter, word in zip("ABCD", words)]
    return dict(
        problem=problem,
        data_type=data_type,
        problem_type=OPEN.get(kind, "multiple choice"),
        options=[] if kind in OPEN else options,
        solution=f"<answer>{words[written] if kind in OPEN else 'ABCD'[written]}</answer>",
    )


def write_y4m(path, frames, fps):
    """uint8 (T, H, W, 3) -> a YUV4MPEG2 file in full chroma. It is a header and raw planes, so no
    encoder is needed. fps: a rational."""
    T, H, W, _ = frames.shape
    to_yuv = np.array(  # BT.601, limited range
        [[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]]
    )
    yuv = (frames @ to_yuv.T + [16, 128, 128]).round().clip(0, 255).astype(np.uint8)
    rate = Fraction(fps).as_integer_ratio()
    with open(path, "wb") as f:
        f.write(b"YUV4MPEG2 W%d H%d F%d:%d Ip A1:1 C444\n" % (W, H, *rate))
        for frame in yuv.transpose(0, 3, 1, 2):  # (T, 3, H, W)
            f.write(b"FRAME\n" + frame.tobytes())


def root(seed, family="qwen2_5_vl"):
    """Where the embedded default lives: world/, and the runs of train.py and eval.py."""
    name = "toy" if family == "qwen2_5_vl" else f"toy_{family}"
    return Path("out") / (f"{name}-seed{seed}" if seed else name)


# ---- the checkpoint

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] in ('image', 'video') %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, texts):
    """Writes a byte-level BPE of Qwen's own tokenizer class -> the tokenizer. It encodes any text;
    its merges are learned from `texts`, so these take few tokens."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [texts],
        vocab_size=256 + len(SPECIAL) + 300,
        new_special_tokens=SPECIAL[1:],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


INIT_STD = 0.08  # with the usual 0.02 so small a model makes no progress for hundreds of steps


def tiny_config(
    tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2, vision_hidden=64, vision_layers=2
):
    """A Qwen2.5-VL of about a million parameters, with every part of the real architecture,
    including M-RoPE and window attention."""
    d = hidden // heads
    # rotary frequencies for time, height and width, in the 7B's ratio: 16 + 24 + 24 = d / 2
    t, h = d // 8, 3 * d // 16
    rotary = dict(mrope_section=[t, h, d // 2 - t - h])
    vision = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_heads=2,
        out_hidden_size=hidden,
        fullatt_block_indexes=[vision_layers - 1],
        tokens_per_second=2,
        initializer_range=INIT_STD,
    )
    return Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, hidden, layers, heads, kv_heads, rotary),
        vision_config=vision,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        **vision_tokens(tokenizer),
    )


def tiny_qwen3_config(
    tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2, vision_hidden=64, vision_layers=4
):
    """A Qwen3-VL of that size: three layers of the tower are seen again by the first three of the
    language model, and a head is larger than hidden / heads, as in the 4B."""
    d = 5 * hidden // heads // 4
    h = d // 2 * 20 // 64  # in the ratio of the real ones: 24 + 20 + 20 = d / 2, interleaved
    rotary = dict(mrope_section=[d // 2 - 2 * h, h, h], mrope_interleaved=True)
    text = _text_config(tokenizer, hidden, layers, heads, kv_heads, rotary)
    vision = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_heads=2,
        out_hidden_size=hidden,
        num_position_embeddings=64,  # learned on a grid of 8 x 8 patches, interpolated
        deepstack_visual_indexes=list(range(vision_layers - 1))[-3:],
        initializer_range=INIT_STD,
    )
    return Qwen3VLConfig(
        text_config=text | dict(head_dim=d),
        vision_config=vision,
        tie_word_embeddings=True,
        **vision_tokens(tokenizer),
    )


def _text_config(tokenizer, hidden, layers, heads, kv_heads, rotary):
    """The language model's configuration. rotary: how M-RoPE splits its frequencies."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, **rotary),
        initializer_range=INIT_STD,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def vision_tokens(tokenizer):
    """The ids of the tokens around and in the place of pixels, by their names in config.json."""
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    return dict(
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )


TINY = {"qwen2_5_vl": tiny_config, "qwen3_vl": tiny_qwen3_config}  # the toy's families
COLD_START_STEPS = {"qwen2_5_vl": 600, "qwen3_vl": 1200}  # until colours are told apart
PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def write_model(folder, config, tokenizer, seed=0):
    """Writes a random checkpoint in the form of a real one: config, generation config, safetensors,
    and the processors' configuration if there is none."""
    torch.manual_seed(seed)
    net = AutoModelForImageTextToText.from_config(config)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    net.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    net.save_pretrained(folder)
    family = FAMILIES[config.model_type]
    processor = dict(  # as in the real checkpoints; AutoProcessor reads videos' settings here too
        image_processor_type="Qwen2VLImageProcessor",
        processor_class=PROCESSORS[config.model_type],
        patch_size=family.patch,
        temporal_patch_size=2,
        merge_size=MERGE,
        image_mean=list(family.mean),
        image_std=list(family.std),
        min_pixels=4 * 28 * 28,
        max_pixels=16384 * 28 * 28,
    )
    file = Path(folder) / "preprocessor_config.json"
    if not file.exists():
        write_whole(file, json.dumps(processor, indent=2))


def write(folder, seed=0, clips=CLIPS, scenes=scenes, family="qwen2_5_vl", **size):
    """Writes the whole world: records, media and model/ -> the folder.

    It is written under another name and moved into place, so a folder that exists is complete.
    The tokenizer learns from the first split. family: of the model, one of TINY. size: of the model
    (tiny_config).
    """
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, n in clips.items():
        rng = random.Random(f"{split} {seed}")
        write_split(partial, split, scenes(split, n, rng), rng)
    first = next(iter(clips))
    texts = _texts(data.load_samples(partial / f"{first}.json"))
    if FAMILIES[family].time_text:
        texts += ["<0.5 seconds>"] * 50
    tokenizer = write_tokenizer(partial / "model", texts)
    write_model(partial / "model", TINY[family](tokenizer, **size), tokenizer, seed)
    partial.rename(folder)
    return folder


def check_family(world, family):
    """Raises ModelError if the model of a world is of another family."""
    file = Path(world) / "model" / "config.json"
    found = json.loads(file.read_text())["model_type"]
    if found != family:
        raise ModelError(
            f"{file}: a {found}, expected --family's {family}: give each family its own --out"
        )


def _texts(samples):
    """What the tokenizer learns from: questions, options, responses, and the prompt's own words."""
    texts = []
    for sample in samples:
        response = data.supervised_response(sample.reasoning, sample.answer)
        texts += [sample.question, *sample.options, sample.reasoning, response]
    # these five whatever the world asks: otherwise its tokenizer and random model would change
    kinds = ["multiple choice", "numerical", "OCR", "free-form", "regression"]
    kinds += sorted({s.problem_type for s in samples} - {*kinds})
    instructions = [data.INSTRUCTION + data.CLOSING[kind] for kind in kinds]
    return texts + ["system\nuser\nassistant\nOptions:\n", *instructions] * 50


# ---- a small checkpoint like a real one

LIKE_FILES = ("*.json", "*.txt", "*.jinja")  # all but the weights
TEXT_SIZES = (
    "hidden_size",
    "head_dim",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "initializer_range",
    "layer_types",
    "max_window_layers",
)
VISION_SIZES = (
    "depth",
    "num_heads",
    "hidden_size",
    "intermediate_size",
    "out_hidden_size",
    "initializer_range",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
)


def shrink(config, tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2):
    """Gives transformers' configuration of a real checkpoint the widths and depths of the toy's, in
    place; it keeps its vocabulary, tokens and kinds of layers."""
    tiny = TINY.get(config.model_type, tiny_config)
    small = tiny(tokenizer, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads)
    copy_sizes(TEXT_SIZES, small.text_config, config.text_config)
    sections = small.text_config.rope_parameters["mrope_section"]
    config.text_config.rope_parameters["mrope_section"] = sections
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    vision = config.vision_config
    if config.model_type == "qwen2_vl":  # other names
        copy_sizes(("depth", "num_heads", "initializer_range"), small.vision_config, vision)
        vision.embed_dim, vision.hidden_size = small.vision_config.hidden_size, hidden
    else:
        copy_sizes(VISION_SIZES, small.vision_config, vision)


def copy_sizes(names, small, config):
    """Sets those of the numbers that both configurations have."""
    for name in names:
        if hasattr(small, name) and hasattr(config, name):
            setattr(config, name, getattr(small, name))


def write_like(folder, like, seed=0):
    """Writes a small random checkpoint; everything but the weights and widths is from `like`, a hub
    name or a model folder (which needs no weights). Raises ModelError, DataError."""
    folder, partial = Path(folder), Path(f"{folder}.partial")
    if folder.exists():
        raise ModelError(f"{folder}: exists already")
    source, config = _find(like)
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"{like}: model type {config.model_type!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    tokenizer = load_tokenizer(source)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in LIKE_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, partial / file.name)
    shrink(config, tokenizer)
    write_model(partial, config, tokenizer, seed)
    partial.rename(folder)


def _find(like):
    """(the folder, transformers' configuration) of a model folder or hub name."""
    source = Path(like)
    try:
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            source = Path(snapshot_download(str(like), allow_patterns=list(LIKE_FILES)))
        return source, AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"{like}: neither a model folder nor a model that the hub could deliver ({e})"
        ) from e


# ---- the command line


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="where to write; must not exist yet")
    parser.add_argument(
        "--like",
        help="write only a model: small and random, otherwise like this folder or hub name",
    )
    parser.add_argument("--seed", type=int, default=0, help="of clips, questions and weights")
    args = parser.parse_args(argv)
    try:
        if args.like:
            write_like(args.folder, args.like, args.seed)
            print(f"{args.folder}: a small random model like {args.like}")
        else:
            write(args.folder, args.seed)
            counts = ", ".join(f"{n} {split}" for split, n in CLIPS.items())
            print(f"{args.folder}: {counts} clips, model in {args.folder}/model")
    except (data.DataError, ModelError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
