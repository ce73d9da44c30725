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
    file = Path(folder) / "preprocessor_config.json"
    found = read_object(file) if file.exists() else {}
    mean = found.get("image_mean", family.mean)
    std = found.get("image_std", family.std)
    for numbers in (mean, std):
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
            raise ModelError(
                f"{file}: expected three numbers as 'image_mean' and 'image_std', found {numbers!r}"
            )
    deepstack = len(vision.get("deepstack_visual_indexes", ()))
    return replace(family, patch=patch, mean=tuple(mean), std=tuple(std), deepstack=deepstack)
