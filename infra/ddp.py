"""Gradients of many rows on many ranks: every rank does the same number of backward passes.

DDP averages gradients over the ranks in the last backward pass; a sharded policy (fsdp.py) does in
each. Both divide by the number of ranks, so the caller multiplies each loss by WORLD.
"""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

from infra.ranks import gather


def unwrap(policy):
    """The module inside DistributedDataParallel. A module that is not wrapped is returned as is."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def passes(policy, rows):
    """Yields this rank's rows, then empty ones until every rank has had as many.

    Inside the loop the caller runs one forward and one backward pass. Only the last backward pass
    of a DDP policy communicates.
    """
    torch.clear_autocast_cache()  # older torch keeps weights that were cast without a gradient
    most = max(gather(len(rows)))
    for i, row in enumerate(rows + [[]] * (most - len(rows))):
        communicates = i + 1 == most or not isinstance(policy, DistributedDataParallel)
        with contextlib.nullcontext() if communicates else policy.no_sync():
            yield row
