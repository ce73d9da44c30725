"""What answers come to: the score of one, and of many by category, with an interval and a constant answer to compare with.

An answer scores as it is rewarded in training (rewards.py), but for numbers to be estimated: those score VSI-Bench's mean
relative accuracy (arXiv 2412.14171). A line is what eval.py writes of a question; failures are lines too, and score 0.
"""

from collections import Counter

import rewards


def score(answer, sample):
    """Of a normalised answer, in [0, 1]: mean relative accuracy for regression, else as in training."""
    if sample.problem_type == "regression" and answer is not None:
        return rewards.mean_relative_accuracy(answer, rewards.parse_number(sample.answer))
    return rewards.grade(answer, sample)


def constant_answer(samples):
    """The accuracy of always giving one answer, the best of the most frequent ones of each problem type."""
    right = 0.0
    for kind in {s.problem_type for s in samples}:
        group = [s for s in samples if s.problem_type == kind]
        some = 50 if kind == "regression" else 5  # of graded texts few recur; letters and numbers are right or wrong
        frequent = Counter(rewards.normalize_answer(s.answer, s) for s in group).most_common(some)
        right += max(sum(score(answer, s) for s in group) for answer, _ in frequent)
    return right / len(samples)


def interval(accuracy, n):
    """The 95 % interval of a mean of n scores in [0, 1] (Wilson's, for scores of 0 or 1; scores between spread less)."""
    z = 1.96
    middle, half = accuracy + z * z / (2 * n), z * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def mean(xs):
    """0 for nothing."""
    xs = list(xs)
    return sum(xs) / len(xs) if xs else 0.0


def by_group(lines):
    """{field: {value: [accuracy, questions]}} of every field of the records that splits them into 2 to 30 groups."""
    out, splits = {}, []
    for name in dict.fromkeys(k for r in lines for k in (*r.get("about", {}), "problem_type", "data_type")):
        values = [r.get("about", {}).get(name) or r.get(name) for r in lines]
        groups = {}
        for value, r in zip(values, lines):
            groups.setdefault(value or "none", []).append(r["score"])
        if not 2 <= len(groups) <= 30:
            continue
        same = [values.index(v) for v in values]  # the split itself, whatever its groups are called
        if same not in splits:
            splits.append(same)
            out[name] = {value: [mean(scores), len(scores)] for value, scores in sorted(groups.items())}
    return out


VSI = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation", "object_rel_distance",
       "object_rel_direction", "route_planning", "obj_appearance_order")


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
        kinds.setdefault(r["problem_type"], []).append(r["score"])
        if r["problem_type"] == "regression" and r.get("given") is not None:
            exact = rewards.mean_relative_accuracy(r["given"], rewards.parse_number(r["answer"]), inclusive=True)
        else:
            exact = r["score"]
        tasks.setdefault(task, {}).setdefault(kind, []).append(exact)
    official = mean(mean(map(mean, levels.values())) for levels in tasks.values())
    unknown = {"vsi_bench_unknown": len(lines) - len(known)} if len(known) < len(lines) else {}
    return {"vsi_bench_official": official, "vsi_bench_video_r1": mean(map(mean, kinds.values())), **unknown} if known else {}


def summarize(lines, method):
    """What the lines of a method (its name) come to; every line counts, failures as 0."""
    n, shown = len(lines), [r for r in lines if r["rounds"]]
    accuracy = mean(r["score"] for r in lines)
    return {"method": method, "questions": n, "accuracy": accuracy, "interval": interval(accuracy, n),
            "failures": sum(r["failure"] is not None for r in lines), "unreadable": n - len(shown),
            "mean_frames": mean(r["frames"] for r in shown), "pixels": mean(r["pixels"] for r in shown),
            "mean_visual_tokens": mean(r["visual_tokens"] for r in shown), "mean_rounds": mean(len(r["rounds"]) for r in shown),
            "seconds": sum(r.get("seconds", 0.0) for r in lines), "by": by_group(lines), **vsi_bench(lines)}


def table(summary):
    """The summary as text."""
    rows = summary["methods"]
    out = [f"{summary['model']} on {summary['data']}: {rows[0]['questions']} questions. Always the same answer: "
           f"{summary['constant_answer']:.3f}.", "",
           "method        accuracy  95 % interval   frames x pixels  visual tokens  rounds  failures  seconds"]
    for r in rows:
        low, high = r["interval"]
        shown = f"{r['mean_frames']:6.1f} x {r['pixels']:<6.0f}"
        out.append(f"{r['method']:13} {r['accuracy']:8.3f}  {low:.3f} - {high:.3f}   {shown}"
                   f" {r['mean_visual_tokens']:14.1f}  {r['mean_rounds']:6.2f}  {r['failures']:8}  {r['seconds']:7.1f}")
        out += [f"{'':13} {name} {r[name]:.3f}" for name in r if name.startswith("vsi_bench")]
    for name in rows[0]["by"]:
        out += ["", f"by {name} (questions)"]
        for r in rows:
            out.append(f"{r['method']:13} " + "  ".join(f"{v} {a:.3f} ({n})" for v, (a, n) in r["by"][name].items()))
    return "\n".join(out)
