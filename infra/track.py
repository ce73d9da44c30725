"""The log in another library too: --track wandb, trackio or tensorboard.

It gets the numbers of log.jsonl and, every --log_every steps, four samples. A resumed run continues
the same run there: its id is in RUN/track.txt. Once training has begun, a failure of the library
is printed, and the run goes on without it. wandb reads its own environment (WANDB_MODE=offline,
WANDB_PROJECT); `tensorboard --logdir RUN` shows what tensorboard gets.
"""

import importlib.util
import math
import os
import uuid
from numbers import Real

from infra.errors import DataError
from infra.files import write_whole
from infra.ranks import say

LIBRARIES = ("wandb", "trackio", "tensorboard")
COLUMNS = "step question answer response reward advantage".split()  # of a table of samples


def missing(library):
    """What to do about a library that is not installed, as text; None if it is."""
    return None if importlib.util.find_spec(library) else f"not installed: pip install {library}"


def like_wandb(library, out, run_id, config):  # trackio is
    """Starts or continues a run -> (log(step, {name: number}, rows of samples), close)."""
    module = importlib.import_module(library)
    how = dict(id=run_id, dir=out) if library == "wandb" else {}
    how |= dict(name=f"{out.name}-{run_id}", config=config, resume="allow")
    run = module.init(project=os.environ.get("WANDB_PROJECT", "video-reasoning"), **how)

    def log(step, numbers, rows):
        table = {"samples": module.Table(columns=COLUMNS, data=rows)} if rows else {}
        run.log(numbers | table, step=step)  # wandb drops the steps that it has: they are the same

    return log, run.finish


def to_tensorboard(out, start):
    """The same for tensorboard; hides what was logged after `start`, the step that is resumed."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=start + 1 if start else 0)

    def log(step, numbers, rows):
        for key, x in numbers.items():
            writer.add_scalar(key, x, step)
        for i, row in enumerate(rows):
            text = "\n\n".join(f"**{key}** {x}" for key, x in zip(COLUMNS, row))
            writer.add_text(f"samples/{i}", text, step)
        writer.flush()

    return log, writer.close


def numbers_of(line):
    """The numbers of a line of log.jsonl by name; "seconds/step" for those of an inner object."""
    flat = {key: x for key, x in line.items() if key != "step"}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": x for name, x in value.items()}
    return {key: float(x) for key, x in flat.items() if isinstance(x, Real) and math.isfinite(x)}


class Tracker:
    """Writes lines of log.jsonl and samples.jsonl to a library. Raises DataError at its start."""

    def __init__(self, library, out, config, start):
        self.library, self._log, self._close = library, None, None
        try:
            if library == "tensorboard":
                self._log, self._close = to_tensorboard(out, start)
            elif library:
                file = out / "track.txt"
                if start == 0 or not file.exists():
                    write_whole(file, uuid.uuid4().hex[:8])
                self._log, self._close = like_wandb(library, out, file.read_text(), config)
        except Exception as e:  # whatever a library raises
            raise DataError(f"--track {library}: cannot start: {type(e).__name__}: {e}") from e

    def log(self, line):
        self._do(self._log, line["step"], numbers_of(line), [])

    def samples(self, lines):
        self._do(self._log, lines[0]["step"], {}, [[x[key] for key in COLUMNS] for x in lines])

    def close(self):
        self._do(self._close)

    def _do(self, action, *args):
        try:
            if action:
                action(*args)
        except Exception as e:  # whatever a library raises
            self._log = self._close = None
            say(f"--track {self.library}: {type(e).__name__}: {e}; the run goes on without it")
