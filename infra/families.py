"""The families of checkpoints, and what differs between them.

                  Qwen2-VL           Qwen2.5-VL          Qwen3-VL (dense, Instruct)
    patch         14 x 14 pixels     14 x 14             16 x 16
    temporal id   counts the grids   counts time         where its grid starts in the prompt
    time as text  none               none                "<12.5 seconds>" before each grid
    deepstack     no                 no                  early layers see visual features again

arXiv 2409.12191, 2502.13923 and 2511.21631. One grid = 2 frames. What a checkpoint says itself, in
config.json and preprocessor_config.json, counts; the table only fills what it leaves out. All else
that differs (layers, norms, heads, the vision tower) is inside transformers' network.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from infra.errors import ModelError
from infra.frames import PATCH
from infra.model_folder import read_object
from infra.patches import MEAN, STD


@dataclass(frozen=True)
class Family:
    """What data.py and model.py need to know of a checkpoint's family."""

    patch: int = PATCH  # pixels of a patch, down and across
    mean: tuple[float, ...] = MEAN  # of pixels in [0, 1], red, green, blue
    std: tuple[float, ...] = STD
    time_ids: bool = False  # M-RoPE's temporal id counts time, not grids
    time_text: bool = False  # each grid of a video is a medium of its own, after its time as text
    deepstack: int = 0  # layers of the language model after which visual features are added

    def shown_as(self, media):
        """The media that a prompt shows for a data.Media: itself, or each of its grids -> [(t, h,
        w) in patches, ...]. Each is an unbroken run of visual tokens."""
        t, h, w = media.grid
        return [(1, h, w)] * t if self.time_text and media.kind == "video" else [(t, h, w)]


FAMILIES = {  # by the model type in config.json
    "qwen2_vl": Family(),
    "qwen2_5_vl": Family(time_ids=True),
    "qwen3_vl": Family(patch=16, mean=(0.5,) * 3, std=(0.5,) * 3, time_text=True),
}


def read_family(folder, config):
    """The Family of a checkpoint, with its own numbers.

    config: the content of its config.json. Raises ModelError: another model type, or numbers that
    cannot be used.
    """
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise ModelError(
            f"{folder}: model type {config.get('model_type')!r}, "
            f"expected one of {', '.join(FAMILIES)}"
        )
    vision = config.get("vision_config", {})
    patch = vision.get("patch_size", family.patch) if isinstance(vision, dict) else None
    if type(patch) is not int or patch < 1:
        raise ModelError(
            f"{folder}: expected a 'vision_config' with a 'patch_size' in pixels, found {vision!r}"
        )
    layers = vision.get("deepstack_visual_indexes", [])
    known = range(vision.get("depth", 0))
    if len({*layers}) < len(layers) or not all(layer in known for layer in layers):
        raise ModelError(
            f"{folder}: 'deepstack_visual_indexes' is {layers}, expected different layers of the "
            f"vision tower, which has {len(known)}"
        )
    mean, std = read_normalization(folder, family)
    return replace(family, patch=patch, mean=mean, std=std, deepstack=len(layers))


def read_normalization(folder, family):
    """Mean and std of pixels, by the files in which a processor keeps them; the family's without.

    Raises ModelError: numbers that cannot be used, or that differ between files.
    """
    folder, found = Path(folder), {}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).exists():
            found[name] = read_object(folder / name)
    if (folder / "processor_config.json").exists():
        parts = read_object(folder / "processor_config.json")
        for part in ("image_processor", "video_processor"):
            found[f"processor_config.json, {part}"] = parts.get(part) or {}
    wanted = {}
    for name, part in found.items():
        mean, std = part.get("image_mean"), part.get("image_std")
        if part.get("do_normalize") is False or (mean is None) != (std is None):
            raise ModelError(f"{folder / name}: expected pixels normalised by a mean and a std")
        if mean is None:
            continue
        if not (three_numbers(mean) and three_numbers(std) and min(std) > 0):
            raise ModelError(
                f"{folder / name}: expected three numbers as 'image_mean' and three above 0 as "
                f"'image_std', found {mean!r} and {std!r}"
            )
        wanted[tuple(mean), tuple(std)] = name
    if len(wanted) > 1:
        raise ModelError(f"{folder}: {' and '.join(wanted.values())} normalise pixels differently")
    return next(iter(wanted), (family.mean, family.std))


def three_numbers(x):
    """Whether x is a list of three finite numbers."""
    return (
        isinstance(x, (list, tuple))
        and len(x) == 3
        and all(type(n) in (int, float) and math.isfinite(n) for n in x)
    )
