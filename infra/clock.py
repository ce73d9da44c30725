"""Where the time of a step goes: `with timed("rollout"): ...` adds to `seconds["rollout"]`.

The training loop calls `new_step` before each step and logs `seconds` after it.
"""

import contextlib
import time

import torch

seconds = {}  # phase -> seconds in this step


def new_step():
    """Starts the phases of a step, and its peak memory on a GPU, at 0."""
    seconds.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def timed(phase):
    """Adds the wall-clock seconds of the body, GPU work included, to the phase."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
