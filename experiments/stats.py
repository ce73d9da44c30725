"""Numbers over seeds: the mean, its 95 % interval (Student's t), and how both are printed."""

import statistics

# the 97.5 % quantile of Student's t, for 2 to 10 seeds
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def stat(values):
    """One value per seed -> {"mean", "interval": 95 % interval of the mean, "seeds": the
    values}."""
    n, middle = len(values), statistics.fmean(values)
    half = T[n - 2] * statistics.stdev(values) / n**0.5
    return {"mean": middle, "interval": [middle - half, middle + half], "seeds": list(values)}


def combine(trees):
    """Nested dicts of numbers, one per seed -> one such dict of stats."""
    first = trees[0]
    if not isinstance(first, dict):
        return stat(trees)
    return {key: combine([tree[key] for tree in trees]) for key in first}


def number(x):
    """Three digits at most: 0.906, 6.9, 128."""
    if abs(x) >= 100 or abs(x - round(x)) < 1e-9:
        return f"{x:.0f}"
    return f"{x:.3g}" if abs(x) >= 0.001 else f"{x:.0e}"


def table(tree, indent=0):
    """Nested dicts of stats -> text, one line per mean and interval."""
    lines = []
    for key, x in tree.items():
        head = f"{'  ' * indent}{key}"
        if "mean" in x:
            low, high = map(number, x["interval"])
            lines.append(f"{head:40} {number(x['mean']):>8}   [{low}, {high}]")
        else:
            lines += [head, table(x, indent + 1)]
    return "\n".join(lines)
