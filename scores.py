"""What answers come to: the score of one, and of many by category, with an interval and a constant answer to compare with.

An answer scores as it is rewarded in training (rewards.py), but for numbers to be estimated: those score VSI-Bench's mean
relative accuracy (arXiv 2412.14171). A line is what eval.py writes of a question; failures are lines too, and score 0.
"""

import json
import re
from collections import Counter

import rewards

# ---- the form of a line

NONE, NUMBER = type(None), (int, float)
NAMES = {int: "a whole number", float: "a number", str: "text", dict: "an object", NONE: "null"}
# {key: the types that its value may have, [types] of the items of a list}
ANSWER = {
    "record": (int,),
    "score": NUMBER,
    "failure": (str, NONE),
    "rounds": ([dict],),
}  # of every line
MEDIUM = {"path": (str,), "data_type": (str,), "fps": NUMBER, "segment": (NONE, [int, float])}
SHOWN = {
    **MEDIUM,
    "answer": (str,),
    "frames": NUMBER,
    "pixels": NUMBER,
    "visual_tokens": NUMBER,
}  # of one with rounds
ROUND = {
    "frames": (int,),
    "votes": ([str, int, float, NONE],),
    "logps": ([int, float, NONE],),
    "responses": ([str],),
}
OPTIONAL = {
    "about": (dict,),
    "options": ([str],),
    "seconds": NUMBER,
    "given": (str, int, float, NONE),
}


def misfit(found, form):
    """What is wrong with an object of which the values should have the types of a form, as words, or None. A key that is
    missing counts as null."""
    for key, kinds in form.items():
        value = found.get(key)
        fits = [
            type(value) is list and all(type(x) in kind for x in value)
            if isinstance(kind, list)
            else type(value) is kind
            for kind in kinds
        ]
        if not any(fits):
            names = [
                f"a list of {' or '.join(map(NAMES.get, k))}" if isinstance(k, list) else NAMES[k]
                for k in kinds
            ]
            return f"{key!r} is {json.dumps(value)[:60]}, expected {' or '.join(names)}"
    return None


def answer_misfit(line):
    """What is wrong with a line of answers, an object, as words, or None."""
    wrong = misfit(line, ANSWER) or misfit(
        line, {key: kinds for key, kinds in OPTIONAL.items() if key in line}
    )
    if wrong is None and not 0 <= line["score"] <= 1:
        return f"'score' is {line['score']}, expected a number from 0 to 1"
    if wrong is None and line["rounds"]:
        wrong = misfit(line, SHOWN)
        wrong = wrong or next(
            (f"a round: {w}" for part in line["rounds"] if (w := misfit(part, ROUND))), None
        )
    return wrong


# ---- the score of an answer


def score(answer, sample):
    """Of a normalised answer, in [0, 1]: mean relative accuracy for regression, else as in training."""
    if sample.problem_type == "regression" and answer is not None:
        return rewards.mean_relative_accuracy(answer, rewards.parse_number(sample.answer))
    return rewards.grade(answer, sample)


def constant_answer(samples):
    """The accuracy of the best constant answer of each problem type, chosen among the most frequent gold answers with all of
    them known: what a policy that looks at nothing could reach if it knew how often each answer is right."""
    right = 0.0
    for kind in {s.problem_type for s in samples}:
        group = [s for s in samples if s.problem_type == kind]
        some = (
            50 if kind == "regression" else 5
        )  # of graded texts few recur; letters and numbers are right or wrong
        frequent = Counter(rewards.normalize_answer(s.answer, s) for s in group).most_common(some)
        right += max(sum(score(answer, s) for s in group) for answer, _ in frequent)
    return right / len(samples)


def interval(accuracy, n):
    """The 95 % interval of a mean of n scores in [0, 1] (Wilson's, for scores of 0 or 1; scores between spread less)."""
    z = 1.96
    middle, half = (
        accuracy + z * z / (2 * n),
        z * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5,
    )
    return [
        max(0.0, (middle - half) / (1 + z * z / n)),
        min(1.0, (middle + half) / (1 + z * z / n)),
    ]


def mean(xs):
    """0 for nothing."""
    xs = list(xs)
    return sum(xs) / len(xs) if xs else 0.0


def natural(name):
    """The key that sorts names as a reader counts: greedy-8 before greedy-16."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]


def by_group(lines):
    """{field: {value: [accuracy, questions]}} of every field of the records that is a category: it has 2 to 30 values, fewer
    than there are questions. A value that is missing or is no text counts as "none"."""
    out, splits = {}, []
    for name in dict.fromkeys(
        k for r in lines for k in (*r.get("about", {}), "problem_type", "data_type")
    ):
        found = [r.get("about", {}).get(name) or r.get(name) for r in lines]
        values = [v if isinstance(v, str) and v else "none" for v in found]
        groups = {}
        for value, r in zip(values, lines):
            groups.setdefault(value, []).append(r["score"])
        if not 2 <= len(groups) <= min(30, len(lines) - 1):
            continue
        same = [values.index(v) for v in values]  # the split itself, whatever its groups are called
        if same not in splits:
            splits.append(same)
            out[name] = {
                value: [mean(scores), len(scores)] for value, scores in sorted(groups.items())
            }
    return out


VSI = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "object_rel_distance",
    "object_rel_direction",
    "route_planning",
    "obj_appearance_order",
)


def vsi_bench(lines):
    """VSI-Bench's two aggregates, {} for other records. A record of which no sub-task is known is in neither, and counted.

    official: the mean over its eight sub-tasks (the three difficulties of a direction are one), MRA with <=.
    video_r1: Video-R1's "VSI-Bench", the mean of two means, accuracy of multiple choice and MRA.
    """
    tasks, kinds = {}, {}
    known = [r for r in lines if r.get("about")]
    for r in known:
        kind = r["about"].get("original_question_type", "")
        task = next((t for t in VSI if kind.startswith(t)), None)
        if task is None:
            return {}
        kinds.setdefault(r["problem_type"] == "regression", []).append(r["score"])
        if r["problem_type"] == "regression" and r.get("given") is not None:
            exact = rewards.mean_relative_accuracy(
                r["given"], rewards.parse_number(r["answer"]), inclusive=True
            )
        else:
            exact = r["score"]
        tasks.setdefault(task, {}).setdefault(kind, []).append(exact)
    official = mean(mean(map(mean, levels.values())) for levels in tasks.values())
    unknown = {"vsi_bench_unknown": len(lines) - len(known)} if len(known) < len(lines) else {}
    return (
        {
            "vsi_bench_official": official,
            "vsi_bench_video_r1": mean(map(mean, kinds.values())),
            **unknown,
        }
        if known
        else {}
    )


def summarize(lines, method):
    """What the lines of a method (its name) come to; every line counts, failures as 0. The means over what was shown are None
    if no question's medium could be read."""
    n, shown = len(lines), [r for r in lines if r["rounds"]]
    accuracy = mean(r["score"] for r in lines)
    means = {
        "mean_frames": mean(r["frames"] for r in shown),
        "pixels": mean(r["pixels"] for r in shown),
        "mean_visual_tokens": mean(r["visual_tokens"] for r in shown),
        "mean_rounds": mean(len(r["rounds"]) for r in shown),
    }
    return {
        "method": method,
        "questions": n,
        "accuracy": accuracy,
        "interval": interval(accuracy, n),
        "failures": sum(r["failure"] is not None for r in lines),
        "unreadable": n - len(shown),
        **(means if shown else dict.fromkeys(means)),
        "seconds": sum(r.get("seconds", 0.0) for r in lines),
        "by": by_group(lines),
        **vsi_bench(lines),
    }


def table(summary):
    """The summary as text; "-" for what was not computed."""
    rows = summary["methods"]
    out = [
        f"{summary['model']} on {summary['data']}: {rows[0]['questions']} questions. The best constant answer of each "
        f"problem type, chosen with the gold answers known: {summary['constant_answer']:.3f}.",
        "",
        "method        accuracy  95 % interval   frames x pixels  visual tokens  rounds  failures  seconds",
    ]
    for r in rows:
        low, high = r["interval"]
        frames, pixels, tokens, rounds = (
            "-" if r[name] is None else f"{r[name]:.{digits}f}"
            for name, digits in (
                ("mean_frames", 1),
                ("pixels", 0),
                ("mean_visual_tokens", 1),
                ("mean_rounds", 2),
            )
        )
        out.append(
            f"{r['method']:13} {r['accuracy']:8.3f}  {low:.3f} - {high:.3f}   {frames:>6} x {pixels:6}"
            f" {tokens:>14}  {rounds:>6}  {r['failures']:8}  {r['seconds']:7.1f}"
        )
        out += [f"{'':13} {name} {r[name]:.3f}" for name in r if name.startswith("vsi_bench")]
    for name in rows[0]["by"]:
        out += ["", f"by {name} (questions)"]
        for r in rows:
            out.append(
                f"{r['method']:13} "
                + "  ".join(f"{v} {a:.3f} ({n})" for v, (a, n) in r["by"].get(name, {}).items())
            )
    return "\n".join(out)
