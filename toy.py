"""The embedded default: a tiny video world and a tiny Qwen2.5-VL, written as real files.

    python toy.py out/world                     writes clips (Y4M), images, records in the Video-R1 form
                                                (train.json; cot.json and test.json with reasoning), a random checkpoint (model/)
    python toy.py --like Qwen2.5-VL-7B small    writes a small random checkpoint with the tokenizer, chat template and
                                                architecture of a real one, for trials with your own records

A clip is 8 seconds of a coloured square that drifts over a dark floor, and of lamps that light up beneath it. Each kind of
question asks for another way of watching:
    colour, place      one frame is enough (place is asked of a still image)
    motion, first      the ORDER of frames is needed: which way does it move, which lamp lights up first
    flash              MANY frames are needed: a lamp that is on for one frame in sixteen
    count              a number: how often does the lamp light up
The clips of cot.json were filmed at 2, 1 or half a frame per second, so that the cold start also learns what it is to have seen
too little: where the flash fell between two frames, any lamp may be the answer. The clips of train.json and test.json have all
16 frames; eval.py --tts shows 4 first, and more when the answers disagree.

The author of cot.json watches well but writes carelessly: wherever it took more than a frame to see the answer, it is more
often than not the next option (or number) that is written down. So the cold start teaches format, watching, and a habit that
makes most answers wrong. What to answer is left to RL.

From here on nothing is special: the same loader, tokenizer class, model class and training loop as for a real checkpoint.
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
)

import data
from infra.errors import ModelError
from infra.files import write_whole
from infra.frames import MERGE, PATCH
from model import MODEL_TYPES

SIZE, FRAMES, FPS = 28, 16, 2  # 28 x 28 pixels: one visual token per two frames
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 215, 40),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {"left": (7, 14), "right": (21, 14), "top": (14, 7), "bottom": (14, 21)}
SLIP = 0.65  # how often the author of cot.json writes down the answer next to the right one
SHOWN = {"cot": (4, 8, 16, 16), "train": (16,), "test": (16,)}  # frames of a clip, one of these
CLIPS = {"cot": 1200, "train": 720, "test": 108}  # of each split, besides an image for every four


def floor(n, rng):
    """n frames (n, 28, 28, 3) uint8 of an empty floor, of any dark tone."""
    return np.full((n, SIZE, SIZE, 3), 25, np.uint8) + np.asarray(
        rng.choices(range(20), k=3), np.uint8
    )


def drift(frames, colour, motion, rng):
    """Draws a square that crosses the upper part of the frames."""
    dx, dy = MOTIONS[motion]
    aside = rng.uniform(-3, 3)
    for t, frame in enumerate(frames):
        along = (2 * t / (len(frames) - 1) - 1) * 6  # from -6 to 6 pixels off the centre
        x, y = round(14 + dx * along + aside * abs(dy)), round(9 + dy * along + aside * abs(dx))
        frame[y - 3 : y + 4, x - 3 : x + 4] = colour


def clip(kind, rng):
    """A clip with lamps of a kind -> (frames (16, 28, 28, 3) uint8, {kind: (question, words, answer, reasoning)})."""
    frames, colour, motion = (
        floor(FRAMES, rng),
        rng.choice(list(COLOURS)),
        rng.choice(list(MOTIONS)),
    )
    drift(frames, COLOURS[colour], motion, rng)
    questions = {
        "colour": ("What colour is the square?", COLOURS, colour, "the square is {}"),
        "motion": ("Which way does the square move?", MOTIONS, motion, "the square moves {}"),
    }

    def lamp(colour, start, n):
        frames[start : start + n, 20:27, 1:27] = COLOURS[colour]

    one, two = rng.sample([c for c in COLOURS if c != colour], 2)
    if kind == "first":
        start = rng.randrange(4)
        lamp(one, start, 4)
        lamp(two, start + rng.randrange(6, 9), 4)
        questions[kind] = ("Which lamp lights up first?", COLOURS, one, "the first lamp is {}")
    elif kind == "flash":
        lamp(one, rng.randrange(FRAMES), 1)
        questions[kind] = ("Which lamp flashes?", COLOURS, one, "the flash is {}")
    else:
        n = rng.randrange(1, 5)
        for slot in rng.sample(range(5), n):
            lamp(one, 3 * slot + rng.randrange(2), 2)
        questions[kind] = ("How often does the lamp light up?", "1234", str(n), "it lights up {}")
    return frames, questions


def image(rng):
    """A still image, as clip() gives it: (frames (1, 28, 28, 3), questions)."""
    frame, place = floor(1, rng), rng.choice(list(PLACES))
    x, y = (c + rng.randrange(-2, 3) for c in PLACES[place])
    frame[:, y - 3 : y + 4, x - 3 : x + 4] = COLOURS[rng.choice(list(COLOURS))]
    return frame, {"place": ("Where is the square?", PLACES, place, "the square is at the {}")}


def write_y4m(path, frames, fps):
    """uint8 (T, H, W, 3) -> a YUV4MPEG2 file, full chroma: a header and raw planes, so no encoder is needed. fps: a rational."""
    T, H, W, _ = frames.shape
    to_yuv = np.array(
        [[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]]
    )  # BT.601, limited range
    yuv = (
        (frames @ to_yuv.T + [16, 128, 128])
        .round()
        .clip(0, 255)
        .astype(np.uint8)
        .transpose(0, 3, 1, 2)
    )
    with open(path, "wb") as f:
        f.write(
            b"YUV4MPEG2 W%d H%d F%d:%d Ip A1:1 C444\n" % (W, H, *Fraction(fps).as_integer_ratio())
        )
        for frame in yuv:
            f.write(b"FRAME\n" + frame.tobytes())


def scenes(split, clips, rng):
    """So many clips, and an image for every four -> (frames, questions) each, asking less about the square than about lamps;
    the same in every split."""
    for i in range(clips * 5 // 4):
        frames, questions = (
            image(rng) if i % 5 == 4 else clip(("first", "flash", "count")[i % 3], rng)
        )
        for kind in (("colour",), ("motion",), ("colour", "motion"))[i // 3 % 3]:
            questions.pop(kind, None)
        yield frames, questions


def write_split(folder, split, scenes, rng):
    """Writes split.json, records in the Video-R1 form, and their media/. The answers of cot.json are those of its author."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    records = []
    for i, (frames, questions) in enumerate(scenes):
        path = folder / "media" / f"{split}_{i:05d}.{'png' if len(frames) == 1 else 'y4m'}"
        if len(frames) == 1:
            Image.fromarray(frames[0]).save(path)
        else:
            n = rng.choice(SHOWN.get(split, (FRAMES,)))
            kept = data.frame_indices(len(frames), FPS, target_fps=float("inf"), max_frames=n)
            write_y4m(path, frames[kept], Fraction(len(kept) * FPS, FRAMES))
        for kind, (question, words, answer, reasoning) in questions.items():
            words, numerical = list(words), kind == "count"
            said = words.index(answer)
            if (
                split == "cot"
                and kind in ("motion", "first", "flash", "count")
                and rng.random() < SLIP
            ):
                said = (said + 1) % len(words)
            record = dict(
                problem_id=len(records),
                problem=question,
                data_type="image" if len(frames) == 1 else "video",
                problem_type="numerical" if numerical else "multiple choice",
                options=[]
                if numerical
                else [f"{letter}. {word}" for letter, word in zip("ABCD", words)],
                solution=f"<answer>{words[said] if numerical else 'ABCD'[said]}</answer>",
                path=f"./media/{path.name}",
                data_source=kind,
            )
            if split != "train":
                record["process"] = f"<think>{reasoning.format(answer)}</think>"
            records.append(record)
    write_whole(folder / f"{split}.json", json.dumps(records, indent=1))


def root(seed):
    """Where the embedded default lives: world/, and the runs of train.py and eval.py."""
    return Path("out") / (f"toy-seed{seed}" if seed else "toy")


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
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, texts):
    """A byte-level BPE of Qwen's own tokenizer class, its merges learned from `texts`: any text can be written, ours is short."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [texts],
        vocab_size=256 + len(SPECIAL) + 300,
        new_special_tokens=SPECIAL[1:],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = (
        "<|im_end|>",
        "<|endoftext|>",
        CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(
    tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2, vision_hidden=64, vision_layers=2
):
    """A Qwen2.5-VL of about a million parameters: every part of the real architecture, M-RoPE and window attention included."""
    token = lambda name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    d = hidden // heads
    t, h = (
        d // 8,
        3 * d // 16,
    )  # rotary frequencies for time and height, as in the 7B: 16 + 24 + 24 = d / 2
    std = 0.08  # of the initial weights; with the usual 0.02 so small a model sits on a plateau for hundreds of steps
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [t, h, d // 2 - t - h],
        },
        initializer_range=std,
        tie_word_embeddings=True,
        bos_token_id=token("endoftext"),
        eos_token_id=token("im_end"),
        pad_token_id=token("endoftext"),
    )
    vision = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_heads=2,
        out_hidden_size=hidden,
        fullatt_block_indexes=[vision_layers - 1],
        tokens_per_second=2,
        initializer_range=std,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        initializer_range=std,
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
    )


def small_config(config, tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2):
    """The configuration of a real Qwen2-VL or Qwen2.5-VL, in small: its vocabulary, tokens and kinds of layers, at the widths and
    depths of tiny_config. config: transformers' own, changed in place and returned."""
    small = tiny_config(tokenizer, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads)
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "initializer_range",
        "layer_types",
        "max_window_layers",
    )
    for name in same:
        setattr(config.text_config, name, getattr(small.text_config, name))
    config.text_config.rope_parameters["mrope_section"] = small.text_config.rope_parameters[
        "mrope_section"
    ]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    vision = config.vision_config
    vision.depth, vision.num_heads, vision.initializer_range = (
        2,
        2,
        small.vision_config.initializer_range,
    )
    if config.model_type == "qwen2_vl":
        vision.embed_dim, vision.hidden_size = small.vision_config.hidden_size, hidden
    else:
        for name in (
            "hidden_size",
            "intermediate_size",
            "out_hidden_size",
            "fullatt_block_indexes",
        ):
            setattr(vision, name, getattr(small.vision_config, name))
    return config


def write_like(folder, like, seed=0):
    """Writes a small random checkpoint with everything but the weights and widths from `like`, a model folder (it needs no
    weights) or hub name. Raises ModelError, DataError."""
    source, folder, partial = Path(like), Path(folder), Path(f"{folder}.partial")
    if folder.exists():
        raise ModelError(f"{folder}: is there already")
    try:
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            source = Path(
                snapshot_download(str(like), allow_patterns=["*.json", "*.txt", "*.jinja"])
            )
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"{like}: neither a model folder nor a model that the hub could deliver ({e})"
        ) from e
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"{like}: model type {config.model_type!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    tokenizer = data.load_tokenizer(source)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in (f for pattern in ("*.json", "*.txt", "*.jinja") for f in source.glob(pattern)):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, partial / file.name)
    write_model(partial, small_config(config, tokenizer), tokenizer, seed)
    partial.rename(folder)


def write_model(folder, config, tokenizer, seed=0):
    """A random checkpoint in the form of a real one: config, generation config and safetensors; what processors read, unless it
    is there."""
    torch.manual_seed(seed)
    net = AutoModelForImageTextToText.from_config(config)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    net.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    net.save_pretrained(folder)
    kind = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[config.model_type]
    processor = dict(
        image_processor_type="Qwen2VLImageProcessor",
        processor_class=kind,
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=MERGE,
        image_mean=list(data.MEAN),
        image_std=list(data.STD),
        min_pixels=4 * 28 * 28,
        max_pixels=16384 * 28 * 28,
    )  # as in the real checkpoints; AutoProcessor reads videos' settings here too
    file = Path(folder) / "preprocessor_config.json"
    if not file.exists():
        write_whole(file, json.dumps(processor, indent=2))


def write(folder, seed=0, clips=CLIPS, scenes=scenes, **size):
    """The whole world: records, media and model/. Written beside and moved into place, so a folder that is there is whole.
    The tokenizer learns from the first split. size: of the model (tiny_config)."""
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, n in clips.items():
        rng = random.Random(f"{split} {seed}")
        write_split(partial, split, scenes(split, n, rng), rng)
    texts = []
    for sample in data.load_samples(partial / f"{next(iter(clips))}.json"):
        response = f"<think>{sample.reasoning}</think>\n<answer>{sample.answer}</answer>"
        texts += [sample.question, *sample.options, sample.reasoning, response]
    texts += [
        "system\nuser\nassistant\nOptions:\n",
        *(data.INSTRUCTION + closing for closing in data.CLOSING.values()),
    ] * 50
    tokenizer = write_tokenizer(partial / "model", texts)
    write_model(partial / "model", tiny_config(tokenizer, **size), tokenizer, seed)
    partial.rename(folder)
    return folder


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="where to write; must not exist")
    parser.add_argument(
        "--like",
        help="write only a model: small and random, and in all else like this folder or hub name",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the clips, the questions and the weights"
    )
    args = parser.parse_args(argv)
    try:
        if args.like:
            write_like(args.folder, args.like, args.seed)
            print(f"{args.folder}: a small random model like {args.like}")
        else:
            write(args.folder, args.seed)
            print(
                f"{args.folder}: {', '.join(f'{n} {split}' for split, n in CLIPS.items())} clips, model in {args.folder}/model"
            )
    except (data.DataError, ModelError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
