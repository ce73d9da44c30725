"""The embedded default: a tiny video world and a tiny Qwen2.5-VL, written as real files.

    python toy.py out/world          writes clips (Y4M, read back by decord), images, records in the Video-R1 form
                                     (train.json, cot.json with reasoning, test.json) and a random checkpoint (model/)

A clip is 8 seconds of a coloured square that drifts over a dark floor, and of lamps that light up beneath it. Each kind of
question asks for another way of watching:
    colour, place      one frame is enough (place is asked of a still image)
    motion, first      the ORDER of frames is needed: which way does it move, which lamp lights up first
    flash              MANY frames are needed: a lamp that is on for one frame in sixteen
    count              a number: how often does the lamp light up
The author of the reasoning in cot.json watched carelessly: right about what one frame shows, and more often than not making
the typical mistake where it takes more (the last lamp for the first, the other direction, the square's colour for the
flash's, one count too few). So the cold start teaches format and a mediocre skill; what to make of it is left to RL.
From here on nothing is special: the same loader, tokenizer class, model class and training loop as for a real checkpoint.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import data

SIZE, FRAMES, FPS = 28, 16, 2  # 28 x 28 pixels: one visual token per two frames
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (235, 215, 40)}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
KINDS = ("colour", "motion", "first", "flash", "count", "place")
CARE = 0.3  # how often the author of the reasoning avoids the typical mistake
SPLITS = {"train": 1536, "test": 240}


def scene(kind, rng):
    """One question of a kind -> (frames (T, 28, 28, 3) uint8, question, words to choose from, answer, a typical mistake, reasoning)."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), 25, np.uint8)
    frames += np.asarray(rng.choices(range(20), k=3), np.uint8)  # a floor of any dark tone
    colour, motion = rng.choice(list(COLOURS)), rng.choice(list(MOTIONS))
    dx, dy = MOTIONS[motion]
    cross = rng.uniform(-3, 3)  # how far off the middle it passes
    for t in range(FRAMES):
        along = (2 * t / (FRAMES - 1) - 1) * 7  # from -7 to 7 pixels off the centre
        x, y = 14 + dx * along + (cross if dx == 0 else 0), 11 + dy * along + (cross if dy == 0 else 0)
        frames[t, max(0, round(y) - 3) : round(y) + 4, round(x) - 3 : round(x) + 4] = COLOURS[colour]

    def lamp(colour, start, n, side):
        frames[start : start + n, 21:27, 1 + 14 * side : 13 + 14 * side] = COLOURS[colour]

    if kind == "colour":
        return frames, "What colour is the square?", COLOURS, colour, colour, "the square is {}"
    if kind == "motion":
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[motion]
        return frames, "Which way does the square move?", MOTIONS, motion, opposite, "the square moves {}"
    if kind == "first":
        one, two = rng.sample(list(COLOURS), 2)
        start, side = rng.randrange(0, 4), rng.randrange(2)
        lamp(one, start, 4, side), lamp(two, start + rng.randrange(6, 9), 4, 1 - side)
        return frames, "Which lamp lights up first?", COLOURS, one, two, "the first lamp is {}"
    if kind == "flash":
        seen = rng.choice([c for c in COLOURS if c != colour])
        lamp(seen, rng.randrange(FRAMES), 1, rng.randrange(2))
        return frames, "Which lamp flashes?", COLOURS, seen, colour, "the flash is {}"
    if kind == "count":
        n, seen, side = rng.randrange(1, 5), rng.choice(list(COLOURS)), rng.randrange(2)
        for slot in rng.sample(range(5), n):
            lamp(seen, 3 * slot + rng.randrange(2), 2, side)
        return frames, "How often does the lamp light up?", "1234", str(n), str(n - 1 or 2), "it lights up {}"
    places = {"left": (7, 14), "right": (21, 14), "top": (14, 7), "bottom": (14, 21)}
    where = rng.choice(list(places))
    x, y = (c + rng.randrange(-2, 3) for c in places[where])
    frames[:] = frames[0, 0, 0]
    frames[:, y - 3 : y + 4, x - 3 : x + 4] = COLOURS[colour]
    return frames, "Where is the square?", places, where, where, "the square is at the {}"


def write_y4m(path, frames, fps):
    """uint8 (T, H, W, 3) -> a YUV4MPEG2 file, full chroma: a header and raw planes, so no encoder is needed."""
    T, H, W, _ = frames.shape
    to_yuv = np.array([[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]])  # BT.601, limited range
    yuv = (frames @ to_yuv.T + [16, 128, 128]).round().clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
    with open(path, "wb") as f:
        f.write(b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C444\n" % (W, H, fps))
        for frame in yuv:
            f.write(b"FRAME\n" + frame.tobytes())


def write_world(folder, seed=0, splits=SPLITS):
    """Writes media/ and {train,cot,test}.json. The splits come from different seeds; cot.json is train.json with reasoning."""
    folder = Path(folder)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    for split, size in splits.items():
        rng = random.Random(f"{split} {seed}")
        records, cot = [], []
        for i in range(size):
            kind = KINDS[i % len(KINDS)]
            frames, question, words, answer, mistake, reasoning = scene(kind, rng)
            said, options = answer if rng.random() < CARE else mistake, []
            reasoning = reasoning.format(said)
            if kind != "count":
                options = [f"{letter}. {word}" for letter, word in zip("ABCD", words)]
                answer, said = ("ABCD"[list(words).index(word)] for word in (answer, said))
            path = folder / "media" / f"{split}_{i:05d}.{'png' if kind == 'place' else 'y4m'}"
            if kind == "place":
                Image.fromarray(frames[0]).save(path)
            else:
                write_y4m(path, frames, FPS)
            records.append(dict(
                problem_id=i, problem=question, options=options, data_type="image" if kind == "place" else "video",
                problem_type="multiple choice" if options else "numerical", solution=f"<answer>{answer}</answer>",
                path=f"./media/{path.name}", data_source=kind))
            cot.append(records[-1] | dict(process=f"<think>{reasoning}</think>", solution=f"<answer>{said}</answer>"))
        if split == "train":
            (folder / "cot.json").write_text(json.dumps(cot, indent=1))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))


# ---- the checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder, texts):
    """A byte-level BPE of Qwen's own tokenizer class, its merges learned from `texts`: any text can be written, ours is short."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [texts], vocab_size=256 + len(SPECIAL) + 300, new_special_tokens=SPECIAL[1:], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(tokenizer, *, hidden=128, layers=4, heads=4, kv_heads=2, vision_hidden=64, vision_layers=2, initializer_range=0.08):
    """A Qwen2.5-VL of about a million parameters: every part of the real architecture, M-RoPE and window attention included.

    initializer_range: 0.08; with the usual 0.02 so small a model sits on a plateau for hundreds of steps.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad", "im_end", "endoftext")}
    d = hidden // heads
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [d // 8, d // 8 + d // 16, d // 2 - d // 4 - d // 16]},
            initializer_range=initializer_range, tie_word_embeddings=True,
            bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"]),
        vision_config=dict(
            depth=vision_layers, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=2, out_hidden_size=hidden,
            fullatt_block_indexes=[vision_layers - 1], tokens_per_second=2, initializer_range=initializer_range),
        tie_word_embeddings=True, initializer_range=initializer_range, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])


def write_model(folder, tokenizer, seed=0, **shape):
    """A random checkpoint in the form of a real one: config, generation config and safetensors beside the tokenizer."""
    torch.manual_seed(seed)
    net = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer, **shape))
    net.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id)
    net.save_pretrained(folder)
    return net


def write(folder, seed=0, splits=SPLITS):
    """The whole world: records, clips and model/. Written beside and moved into place, so a folder that is there is whole."""
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_world(partial, seed, splits)
    texts = []
    for sample in data.load_samples(partial / "cot.json"):
        texts += [sample.question, *sample.options, sample.reasoning, f"<think>{sample.reasoning}</think>\n<answer>{sample.answer}</answer>"]
    texts += ["system\nuser\nassistant\nOptions:\n", *(data.INSTRUCTION + closing for closing in data.CLOSING.values())] * 50
    tokenizer = write_tokenizer(partial / "model", texts)
    write_model(partial / "model", tokenizer, seed)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the clips, the questions and the weights")
    args = parser.parse_args()
    write(args.folder, args.seed)
    print(f"{args.folder}: {', '.join(f'{n} {split}' for split, n in SPLITS.items())} questions, model in {args.folder}/model")
