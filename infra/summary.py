"""From scores to a table: means, their intervals, categories, and the table as text."""

import re


def mean(xs):
    """The mean of numbers; 0 for none."""
    xs = list(xs)
    return sum(xs) / len(xs) if xs else 0.0


def interval(accuracy, n):
    """The 95 % interval of a mean of n scores in [0, 1] -> [low, high].
    Wilson's, for scores of 0 or 1; scores in between spread less."""
    z = 1.96
    middle = accuracy + z * z / (2 * n)
    half = z * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return [max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)]


def natural(name):
    """A sort key that orders numbers by value: greedy-8 before greedy-16."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]


def by_group(lines):
    """Accuracy by category -> {field: {value: [accuracy, questions]}}.

    A field of the records is a category if it has 2 to 30 values, fewer than there are questions. A
    missing value, or one that is not text, counts as "none". Of fields that split the questions in
    the same way, the first is kept.
    """
    out, splits = {}, []
    fields = {}  # an ordered set
    for r in lines:
        fields |= dict.fromkeys((*r.get("about", {}), "problem_type", "data_type"))
    for field in fields:
        found = [r.get("about", {}).get(field) or r.get(field) for r in lines]
        values = [v if isinstance(v, str) and v else "none" for v in found]
        scores = {}
        for value, r in zip(values, lines):
            scores.setdefault(value, []).append(r["score"])
        if not 2 <= len(scores) <= min(30, len(lines) - 1):
            continue
        split = [values.index(v) for v in values]  # the same whatever the values are called
        if split not in splits:
            splits.append(split)
            out[field] = {value: [mean(xs), len(xs)] for value, xs in sorted(scores.items())}
    return out


def table(summary):
    """The summary of an evaluation, as in summary.json, as text; "-" where nothing was computed."""
    rows = summary["methods"]
    out = [
        f"{summary['model']} on {summary['data']}: {rows[0]['questions']} questions. "
        "Accuracy of the best constant answer to each problem type, if the right answers were "
        f"known: {summary['constant_answer']:.3f}.",
        "",
        "method        accuracy  95 % interval   frames x pixels  visual tokens  rounds  failures  "
        "seconds",
    ]
    for r in rows:
        low, high = r["interval"]
        frames, pixels = _fixed(r["mean_frames"], 1), _fixed(r["pixels"], 0)
        tokens, rounds = _fixed(r["mean_visual_tokens"], 1), _fixed(r["mean_rounds"], 2)
        out.append(
            f"{r['method']:13} {r['accuracy']:8.3f}  {low:.3f} - {high:.3f}   "
            f"{frames:>6} x {pixels:6} {tokens:>14}  {rounds:>6}  {r['failures']:8}  "
            f"{r['seconds']:7.1f}"
        )
        scores = [name for name in r if name.startswith(("vsi_bench", "grounding"))]
        out += [f"{'':13} {name} {r[name]:.3f}" for name in scores]
    for field in rows[0]["by"]:
        out += ["", f"by {field} (questions)"]
        for r in rows:
            groups = r["by"].get(field, {}).items()
            cells = [f"{value} {accuracy:.3f} ({n})" for value, (accuracy, n) in groups]
            out.append(f"{r['method']:13} {'  '.join(cells)}")
    return "\n".join(out)


def _fixed(x, digits):
    return "-" if x is None else f"{x:.{digits}f}"
