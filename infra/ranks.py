"""The processes of a run: who this one is, meeting, leaving, and what only one of them prints."""

import contextlib
import gc
import os
import random
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from infra.errors import DataError, ModelError

RANK, WORLD, LOCAL = (
    int(os.environ.get(k, default))
    for k, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)


def start_ranks(patience):
    """Joins the other processes of torchrun, if there are any -> this rank's device. patience: a timedelta, for each wait."""
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def stop_ranks():
    """Leaves the other processes. The group's threads end with the last reference to it, which a cycle may hold; a thread that
    outlives the interpreter aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def ranks(patience, stopped="stopped"):
    """start_ranks and stop_ranks around the body; an error that ends it is one line, from the rank that fails first.
    stopped: the line for ctrl-C. What is no error of the user's has its traceback, also from one rank only."""
    device = start_ranks(patience)
    try:
        yield device
    except (DataError, ModelError, OSError) as e:  # an OSError names its file
        raise SystemExit(f"error: {e}" if _first_to_fail() else 1) from e
    except KeyboardInterrupt:
        if _first_to_fail():
            print(f"\n{stopped}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as e:
        if isinstance(e.code, str) and not _first_to_fail():
            raise SystemExit(1) from None
        raise
    except Exception:  # where another rank has failed first, only the news that it has left
        if not _first_to_fail():
            raise SystemExit(1) from None
        raise
    finally:
        stop_ranks()


def _first_to_fail():
    if WORLD == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # rank 0 kept the count, and has left
        return False


def gather(x, every=1):
    """The objects of all ranks, as a list; every: of the first rank of every so many, which all have the same."""
    if WORLD == 1:
        return [x]
    out = [None] * WORLD
    dist.all_gather_object(out, x)
    return out[::every]


def say(text):
    """Prints a line, on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def seed(*parts):
    """A seed from the run's seed, the step, and whatever else tells this random choice from all others."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)
