"""Fully sharded data parallelism (FSDP2): DDP keeps a whole copy on every rank, this 1 / WORLD.

    shard           shards parameters, and with them gradients and Adam's moments, over all ranks.
                    A training pass gathers one layer of the language model at a time; embeddings,
                    last norm, head and a trained vision tower for the whole pass
    unsharded       gathers everything once, for a rollout or an evaluation: no rank waits inside
    full_state      shards -> the checkpoint that one process would write
    load_optimizer  reads it back, sharded or whole

In a training pass all ranks must run the same number of forwards and backwards.
"""

import contextlib
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.errors import ModelError


def shard(policy):
    """Shards a policy's parameters over all ranks, in place; make its optimizer afterwards.

    They may be on the meta device; `local_rows` and `fill` then give each rank its part.

    On GPUs, fp32 shards are gathered in bf16 and gradients averaged in fp32.

    Ranks call the vision tower as often as they have frames, so it is not a unit of its own.
    Frozen, it stays whole on every rank; trained, it is gathered before the first call and its
    gradient averaged after the last.
    """
    gpu = policy.device.type == "cuda"
    frozen = not any(p.requires_grad for p in policy.parameters())
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if gpu else {}
    precision = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    for layer in policy.language_model.layers:
        fully_shard(layer, mp_policy=precision)
    whole = {p for p in policy.net.model.visual.parameters() if not p.requires_grad}
    fully_shard(
        policy,
        mp_policy=precision,
        ignored_params=whole,
        reshard_after_forward=True if frozen else None,  # None: not before the backward pass
    )


def local_rows(p):
    """The rows of a parameter that this rank keeps: all, or those of its shard -> slice."""
    if not isinstance(p, DTensor):
        return slice(None)
    mesh, (placement,) = p.device_mesh, p.placements
    of_rank = (p.shape[0], mesh.size(), mesh.get_local_rank())
    n, first = placement.local_shard_size_and_offset(*of_rank)
    return slice(first, first + n)


def fill(p, x):
    """Gives a parameter of the meta device its numbers x: of its `local_rows`, on the device.

    It stays the same object, wherever it is used.
    """
    if isinstance(p, DTensor):
        whole = dict(shape=p.shape, stride=p.stride())
        x = DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, **whole)
    torch.utils.swap_tensors(p, nn.Parameter(x, p.requires_grad))


@contextlib.contextmanager
def unsharded(policy):
    """Inside, all parameters are whole, however often a rank calls the policy.

    So ranks may decode different numbers of tokens. Every rank must enter. Does nothing to a policy
    that is not sharded.
    """
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
    hooks = []  # they gather and reshard: removed for now
    for unit in units:
        hooks += [unit._forward_pre_hooks, unit._forward_hooks]
    kept = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, content in zip(hooks, kept):
            h.update(content)
        for unit in units:
            unit.reshard()


def full_state(policy, optimizer):
    """What a checkpoint holds -> (weights by name, the optimizer's state), whole on rank 0.

    Every rank must ask. Where a checkpoint's weights are rounded to a narrower dtype,
    state["weights"] are the trained ones, unrounded. An adapter's are not rounded.
    """
    parameters = policy.saved_parameters()
    # embeddings and head may be one parameter
    once = {p: full_tensor(p) for p in parameters.values()}
    state = optimizer.state_dict()
    state["state"] = {
        i: {name: full_tensor(x) for name, x in moments.items()}
        for i, moments in state["state"].items()
    }
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if policy.adapter is None and policy.saved_dtype not in (None, trained[0].dtype):
        state["weights"] = [once[p] for p in trained]
    return {name: once[p] for name, p in parameters.items()}, state


def full_tensor(x):
    """A tensor, or the whole of a sharded one on rank 0 and None on the others."""
    if not isinstance(x, DTensor):
        return x.detach()
    x = x.detach().full_tensor()
    return x.cpu() if dist.get_rank() == 0 else None


def load_optimizer(optimizer, file):
    """Loads a checkpoint's optimizer state, and the trained weights where it has them.

    Of a sharded parameter, this rank's shard. Raises ModelError: a file that holds something else.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        state = torch.load(file, map_location="cpu", mmap=True)
        if "weights" in state:
            with torch.no_grad():
                for p, x in zip(trained, state.pop("weights"), strict=True):
                    p.copy_(shard_like(x, p))
        for i, moments in state["state"].items():
            for name, x in moments.items():
                moments[name] = shard_like(x, trained[i])
        optimizer.load_state_dict(state)
    except torch.OutOfMemoryError:  # not the file's fault
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
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ModelError(f"{file}: not the state of this run's optimizer: {reason}") from e


def shard_like(x, p):
    """This rank's shard of x, where the parameter p is sharded; a scalar is whole."""
    if not x.ndim or not isinstance(p, DTensor):
        return x
    part = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
    return part.clone()  # not a view of the whole
