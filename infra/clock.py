"""Where the time of a step goes: `with timed("rollout"): ...` adds to `seconds["rollout"]`.

The training loop clears `seconds` before each step and logs it after.
"""

import contextlib
import time

import torch

seconds = {}  # phase -> seconds in this step


@contextlib.contextmanager
def timed(phase):
    """Adds the wall-clock seconds of the body, GPU work included, to the phase."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
