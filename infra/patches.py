"""Frames -> the patch rows that the vision tower of a Qwen-VL takes."""

from functools import lru_cache

import torch

from infra.frames import MERGE, PATCH

# of pixels, in Qwen2-VL and Qwen2.5-VL (infra/families.py)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(frames, dtype=torch.float32, mean=MEAN, std=STD):
    """uint8 (N, 3, ...) -> (x / 255 - mean) / std."""
    shape = 3, *[1] * (frames.ndim - 2)
    mean = constant(tuple(mean), dtype, frames.device).view(shape)
    std = constant(tuple(std), dtype, frames.device).view(shape)
    return (frames.to(dtype) / 255 - mean) / std


@lru_cache
def constant(numbers, dtype, device):
    """A tensor that is copied to a GPU once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def patchify(frames, patch=PATCH):
    """frames (T, 3, H, W), T even or 1 -> (patches (t * h * w, 3 * 2 * patch * patch), (t, h, w)).

    The layout of transformers' Qwen2-VL processors: a patch holds (channel, frame of the grid, row,
    column). Patches run over time, then over 2 x 2 blocks, so that 4 neighbouring rows merge into
    one visual token. An image counts as two frames.
    patch: its side in pixels. Raises ValueError: an odd number of frames, or sides that are not
    multiples of 2 * patch.
    """
    T, C, H, W = frames.shape
    if T == 1:
        frames, T = frames.expand(2, -1, -1, -1), 2
    t, h, w, m = T // 2, H // patch, W // patch, MERGE
    side = m * patch
    if T % 2 or H % side or W % side:
        raise ValueError(
            f"{T} frames of {H} x {W}: expected an even number, sides in multiples of {side}"
        )
    x = frames.reshape(t, 2, C, h // m, m, patch, w // m, m, patch)
    # -> t, block row, block column, row, column, C, frame, y, x
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, C * 2 * patch * patch), (t, h, w)
