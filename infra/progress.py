"""What a run shows while it trains: log.jsonl, samples.jsonl, a progress bar, and console lines."""

import math

import torch
from tqdm import tqdm

from infra.clock import seconds
from infra.errors import DataError
from infra.files import append
from infra.ranks import RANK, gather, say
from infra.track import Tracker

IDLE_STEPS = 10  # after this many steps in a row without learning, a line says what may help
EMPTY_STEPS = 10  # a run ends if most samples of this many steps in a row could not be loaded
ON_BAR = ("loss", "reward", "accuracy", "response_length", "grad_norm")
ON_LINE = ("zero_std_groups", "truncated")


class Progress:
    """Logs each step of a run. `close` ends the bar, and what --track names.

    out: the run folder.  args: the run's flags.  start: the step that the run starts or resumes at.
    """

    def __init__(self, out, args, start):
        self.out, self.args = out, args
        self.skipped_updates = self.idle_steps = 0
        hidden = None if RANK == 0 else True  # None: hidden where there is no terminal
        self.bar = tqdm(
            total=args.steps, initial=start, disable=hidden, desc=args.algo, unit="step"
        )
        self.tracker = Tracker(args.track if RANK == 0 else None, out, vars(args), start)

    def close(self):
        self.bar.close()
        self.tracker.close()

    def log(self, step, entry):
        """Appends a step's entry to log.jsonl and shows it. Step 0 is the evaluation at the start.

        Adds the seconds of each phase and, on a GPU, the peak memory.
        """
        if torch.cuda.is_available():
            entry = entry | {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        rounded = {phase: round(t, 4) for phase, t in seconds.items()}
        line = {"step": step, **entry, "seconds": rounded}
        if RANK == 0:
            append(self.out / "log.jsonl", [line])
        self.tracker.log(line)
        self.skipped_updates += entry.get("skipped_updates", 0)
        figures = {key: f"{entry[key]:.3f}" for key in ON_BAR if key in entry}
        self.bar.set_postfix(figures)
        if step:
            self.bar.update()
            if step % self.args.log_every == 0 or step == self.args.steps:
                self._show_step(step, entry, figures)
        if "eval_accuracy" in entry:
            by_source = entry["eval_by_source"].items()
            sources = "  ".join(f"{source} {accuracy:.2f}" for source, accuracy in by_source)
            say(f"step {step:5d}  held-out accuracy {entry['eval_accuracy']:.3f}   {sources}")
        if "grad_norm" in entry:
            self._watch(step, entry)

    def samples(self, lines):
        """Appends to samples.jsonl. Every --log_every steps, --track gets the first four."""
        if RANK == 0:
            append(self.out / "samples.jsonl", lines)
        if lines and lines[0]["step"] % self.args.log_every == 0:
            self.tracker.samples(lines[:4])

    def _show_step(self, step, entry, figures):
        figures = figures | {key: f"{entry[key]:.3f}" for key in ON_LINE if key in entry}
        figures["skipped_updates"] = str(self.skipped_updates)
        words = "  ".join(f"{key} {value}" for key, value in figures.items())
        phases = ", ".join(f"{phase} {t:.2f}" for phase, t in seconds.items() if phase != "step")
        say(f"step {step:5d}  {words}  {seconds['step']:.2f} s: {phases}")

    def _watch(self, step, entry):
        """Counts steps without learning, and gives advice after IDLE_STEPS of them."""
        learned = not entry["skipped_update"] and entry.get("zero_std_groups") != 1
        self.idle_steps = 0 if learned else self.idle_steps + 1
        if self.idle_steps == IDLE_STEPS:
            say(f"step {step}: no learning in {IDLE_STEPS} steps; {advice(entry, self.args)}")


def advice(entry, args):
    """Why steps like that of this log entry teach nothing, and what may help: one line."""
    if not math.isfinite(entry["grad_norm"]):
        return "the gradient is not finite: lower --lr, or check the weights it started from"
    if entry["truncated"] > 0.5:
        cut = f"{entry['truncated']:.0%} of the responses"
        return f"{cut} are truncated at --max_new {args.max_new}: raise it"
    if entry["format"] == 0:
        return (
            "no response has the format <think> </think><answer> </answer>: "
            "begin with a cold start (--algo sft)"
        )
    return (
        "all responses to a question get the same reward: choose questions that are neither too "
        "easy nor too hard (eval.py --filter), or raise --group"
    )


class LoadErrors:
    """Samples that could not be loaded: each is named, and a run of mostly such samples ends.

    prompts: samples of a step, over all ranks.  steps: of the run.
    """

    def __init__(self, prompts, steps):
        self.prompts, self.window = prompts, min(EMPTY_STEPS, steps)
        self.recent = []  # the messages of each of the last steps
        self.in_step = []

    def next_step(self):
        """Forgets the messages of the step before."""
        self.in_step = []

    def usable(self, loaded):
        """The prompts of this rank among [(position, Prompt or DataError), ...] of a Loader. Names
        what could not be loaded on any rank."""
        failed = [str(p) for _, p in loaded if isinstance(p, DataError)]
        for message in sum(gather(failed), []):
            say(f"skipped: {message}")
            self.in_step.append(message)
        return [(i, p) for i, p in loaded if not isinstance(p, DataError)]

    def check(self):
        """Raises DataError if most samples of the last steps could not be loaded."""
        self.recent = [*self.recent, list(self.in_step)][-self.window :]
        messages, drawn = sum(self.recent, []), len(self.recent) * self.prompts
        if len(self.recent) == self.window and 2 * len(messages) > drawn:
            raise DataError(
                f"{len(messages)} of the {drawn} samples of {len(self.recent)} steps in a row "
                f"could not be loaded; the last: {messages[-1]}"
            )
