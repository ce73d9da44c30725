"""AdamW with a warm-up, a schedule and clipped gradients. Non-finite gradients are skipped."""

import math
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from infra.ranks import say


@dataclass
class Update:
    """One optimizer step. grad_norm: before clipping. skipped: nothing was updated."""

    grad_norm: float = 0.0
    skipped: bool = False


def make_optimizer(policy, args):
    """AdamW on the parameters that are trained. Weight decay acts on matrices only."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)


def learning_rate(step, args):
    """The learning rate of a step, counted from 0: linear warm-up, then constant or cosine."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def update(policy, optimizer, step, args):
    """Clips the gradient and updates the weights -> Update. Clears the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    trained = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # FSDP: over all shards
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
        torch.clear_autocast_cache()  # it holds bf16 copies of the weights before the update
    else:
        say(f"step {step + 1}: the gradient norm is {norm}, so this update is skipped")
    optimizer.zero_grad()
    return Update(norm, skipped=not finite)
