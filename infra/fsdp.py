"""Fully sharded data parallelism (FSDP2, torch's fully_shard): what DDP keeps whole on every rank is kept in WORLD parts.

    shard       parameters, and with them gradients and Adam's moments, are cut over all ranks. A training pass gathers one layer
                of the language model at a time; embeddings, last norm, head and a trained vision tower for the whole pass
    gathered    for a rollout or an evaluation everything is gathered once, and then no rank waits for another
    full_state  parts -> the checkpoint that one process would write;  load_optimizer reads it back into parts or whole
In a training pass all ranks must do the same number of forwards and backwards: step.backward sees to that.
"""

import contextlib
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.errors import ModelError


def shard(policy):
    """Cuts a policy's parameters over all ranks, in place; its optimizer is made afterwards. On GPUs, fp32 parts are gathered in
    bf16 and gradients averaged in fp32.

    A vision tower is called as often as a rank has frames, so it is no unit of its own: one that is frozen stays whole, one that
    is trained is gathered before the first call and its gradient averaged after the last.
    """
    gpu, frozen = (
        policy.device.type == "cuda",
        not any(p.requires_grad for p in policy.parameters()),
    )
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if gpu else {}
    how = dict(mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False))
    for layer in policy.text.layers:
        fully_shard(layer, **how)
    whole = {p for p in policy.net.model.visual.parameters() if not p.requires_grad}
    fully_shard(
        policy, ignored_params=whole, reshard_after_forward=True if frozen else None, **how
    )  # None: not before backward


@contextlib.contextmanager
def gathered(policy):
    """Inside, all parameters are whole and stay so, whatever is called how often: each rank has its own number of tokens to
    decode. Every rank must enter. Does nothing to a policy that is not sharded."""
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    registered = [
        hooks for unit in units for hooks in (unit._forward_pre_hooks, unit._forward_hooks)
    ]  # they gather and let go
    for unit in units:
        unit.unshard()
    kept = [dict(hooks) for hooks in registered]
    for hooks in registered:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, all_of_them in zip(registered, kept):
            hooks.update(all_of_them)
        for unit in units:
            unit.reshard()


def full_state(policy, optimizer):
    """What a checkpoint holds -> (weights by name, the optimizer's state), with whole tensors: on rank 0; every rank must ask.
    Where the checkpoint's weights are rounded to a narrower dtype, the state holds the trained ones as they are: "weights"."""

    def whole(x):
        if not isinstance(x, DTensor):
            return x.detach()
        x = x.detach().full_tensor()
        return x.cpu() if dist.get_rank() == 0 else None

    parts = policy.net.state_dict(keep_vars=True)
    once = {p: whole(p) for p in parts.values()}  # embeddings and head may be one parameter
    state = optimizer.state_dict()
    state["state"] = {
        i: {name: whole(x) for name, x in s.items()} for i, s in state["state"].items()
    }
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if policy.saved_dtype not in (None, trained[0].dtype):
        state["weights"] = [once[p] for p in trained]
    return {name: once[p] for name, p in parts.items()}, state


def load_optimizer(optimizer, file):
    """Loads the optimizer's state, and the trained weights where they are beside it, from a checkpoint's file; of a parameter
    that is sharded, this rank's part. Raises ModelError for a file that holds something else."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def part(x, p):
        if not x.ndim or not isinstance(p, DTensor):
            return x
        return distribute_tensor(
            x, p.device_mesh, p.placements, src_data_rank=None
        ).clone()  # not a view of the whole

    try:
        state = torch.load(file, map_location="cpu", mmap=True)
        if "weights" in state:
            with torch.no_grad():
                for p, x in zip(trained, state.pop("weights"), strict=True):
                    p.copy_(part(x, p))
        state["state"] = {
            i: {name: part(x, trained[i]) for name, x in s.items()}
            for i, s in state["state"].items()
        }
        optimizer.load_state_dict(state)
    except torch.OutOfMemoryError:  # the file is not to blame
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        UnpicklingError,
    ) as e:
        raise ModelError(
            f"{file}: not the state of this run's optimizer: {type(e).__name__}: {' '.join(str(e).split())}"
        ) from e
