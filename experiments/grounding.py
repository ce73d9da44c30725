"""OneThinker (arXiv 2512.03043), VideoAuto-R1 (2601.05175): RL teaches grounding in time.

python -m experiments.claims grounding
"""

import toy
from experiments.lab import log
from experiments.shared import rl


def run(lab):
    """When is the lamp lit? RL from a cold start whose teacher watches well and mostly writes down
    a span that starts a second late; the reward is the temporal IoU. Two controls: the trained
    policies on test clips with shuffled frames, and the same RL on shuffled clips."""
    world = lab.world("when", write_when)
    cold = lab.train("when-cold", "sft", world / "model", world / "cot.json", 600, points=1)
    arms = {
        "GRPO": rl(lab, "when-grpo", cold, world / "train.json"),
        "GRPO on shuffled frames": rl(lab, "when-shuffled", cold, world / "shuffled.json"),
    }
    return {"mIoU": {name: miou_curve(arm) for name, arm in arms.items()}}


def miou_curve(run, source="when"):
    """{step: mIoU} of a run on the held-out questions of a source."""
    entries = [entry for entry in log(run) if "eval_by_source" in entry]
    return {str(entry["step"]): entry["eval_by_source"][source] for entry in entries}


def write_when(folder, seed, clips):
    """Writes a world with this question only. shuffled.json: training clips with shuffled
    frames."""
    splits = {"cot": clips["cot"], "train": clips["train"]}
    splits |= {"shuffled": clips["train"], "test": clips["test"]}
    toy.write(folder, seed, splits, when_scenes, hidden=64, layers=3)


def when_scenes(split, clips, rng):
    """Yields (frames, questions), as toy.scenes. In the test every clip is followed by itself with
    its frames shuffled."""
    for _ in range(clips):
        frames, questions = toy.when_clip(rng)
        mixed = frames[rng.sample(range(len(frames)), len(frames))]
        if split != "shuffled":
            yield frames, questions
        if split in ("shuffled", "test"):
            yield mixed, {"when, shuffled": questions["when"]}
