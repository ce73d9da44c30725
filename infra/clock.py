"""Seconds of the phases of a step."""

import contextlib
import time

import torch

seconds = {}  # of the phases of the step


@contextlib.contextmanager
def timed(phase):
    """Adds the seconds of its body to the phase, the GPU's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
