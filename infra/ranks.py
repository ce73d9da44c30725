"""The processes of a run, one per GPU, as torchrun starts them; without torchrun, only rank 0.

A script runs inside `ranks(...)`, which joins and leaves the process group and turns an error into
one line. Inside, RANK and WORLD say which process this is, `gather` exchanges objects, `say` prints
once, and `seed` derives a random seed that does not depend on the number of ranks.
"""

import contextlib
import gc
import os
import random
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from infra.errors import DataError, ModelError

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # the rank on this machine, which picks the GPU


def start_ranks(patience):
    """Joins the process group, if there are several ranks, and returns this rank's device.

    patience: a timedelta, how long a collective operation waits for the other ranks.
    """
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def stop_ranks():
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # The group's threads live until the last reference to it is gone, which may sit in a cycle.
        # A thread that outlives the interpreter aborts the process.
        gc.collect()


@contextlib.contextmanager
def ranks(patience, stopped="stopped"):
    """Runs the body between start_ranks and stop_ranks; yields this rank's device.

    An error of the user's (DataError, ModelError, OSError) ends the program with one line, any
    other with a traceback. Only the first rank to fail prints: the others fail because it left.
    stopped: the line to print after ctrl-C.
    """
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
    except Exception:
        if not _first_to_fail():
            raise SystemExit(1) from None
        raise
    finally:
        stop_ranks()


def _first_to_fail():
    """Whether no other rank has called this before."""
    if WORLD == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # rank 0, which keeps the count, has left: it failed first
        return False


def gather(x, every=1):
    """The objects `x` of all ranks, as a list in rank order. Every rank must call it.

    every: keep only those of ranks 0, every, 2 * every, ... (neighbours hold the same object).
    """
    if WORLD == 1:
        return [x]
    out = [None] * WORLD
    dist.all_gather_object(out, x)
    return out[::every]


def say(text):
    """Prints a line above the progress bar, on rank 0 only."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def seed(*parts):
    """A random seed from what identifies a random choice: the run's seed, the step, the prompt."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)
