"""Charts of means and 95 % intervals over seeds, as SVG (matplotlib).

    draw(title, panels, values) -> Figure;  svg(figure) -> the text of a file

Every mean is drawn with its interval (a thin line) and a dot for each seed. The background is
transparent and the text grey, so that a chart reads on a light and on a dark page.
"""

import io
import math
import re
import textwrap

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.stats import number

WIDTH, HEIGHT = 4.8, 3.3  # inches of a panel
TEXT = "#797979"  # as far from white as from GitHub's dark page
COLOURS = ("#3b82f6", "#d9730d", "#2e9e4f", "#9366e0", "#a07d00", "#7d8590", "#e5484d")
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "claims",  # the same chart is the same file
    "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw(title, panels, values):
    """Panels (experiments.shared.Panel) of values, nested dicts of stats -> Figure, two panels in
    a row."""
    with matplotlib.rc_context(STYLE):
        rows = math.ceil(len(panels) / 2)
        figure = Figure((2 * WIDTH, rows * HEIGHT + 0.3), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=9.5)
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(rows, 2, i + 1)
            shapes = {"lines": lines, "bars": bars}
            names = shapes[panel.kind](axes, panel, values[panel.key])
            legend_rows = legend(axes, names)
            axes.set_title(panel.title, loc="left", weight="bold", size=9, pad=6 + 12 * legend_rows)
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
    return figure


def svg(figure):
    """The figure as the text of an SVG file."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return re.sub("<[^>]*>", shorten, file.getvalue())


def shorten(tag):
    """A tag of the file with its coordinates to hundredths of a point, which halves the file."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def legend(axes, names):
    """Names the series above the axes -> rows that this takes."""
    if not names:
        return 0
    fitting = int(60 / (max(map(len, names)) + 5))  # columns, by the number of letters
    columns = max(1, min(len(names), fitting))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.99),
        ncols=columns,
        borderaxespad=0,
        handlelength=1,
        columnspacing=1.2,
        labelspacing=0.3,
        fontsize=8,
    )
    return math.ceil(len(names) / columns)


def spread(stats):
    """The lowest and the highest value that some stats draw."""
    seen = []
    for s in stats:
        seen += [s["mean"], *s["interval"], *s["seeds"]]
    return min(seen), max(seen)


def scale(axes, stats, room):
    """Sets the y axis: from 0, shares up to 1, and `room` (a part of the range) above for
    numbers."""
    low, high = spread(stats)
    seeds = [v for s in stats for v in s["seeds"]]
    if min(seeds) >= 0 and 0.5 < max(seeds) <= 1:  # shares, whose intervals may reach beyond 0 or 1
        low, high = min(low, 0), max(high, 1)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    low, high = min(low, 0), max(high, 0)
    size = (high - low) or 1
    axes.set_ylim(low - (0.04 * size if low < 0 else 0), high + room * size)


def marks(axes, xs, stats, colour, step):
    """The intervals of stats at xs, and the seeds' dots, `step` apart."""
    means = [s["mean"] for s in stats]
    below = [s["mean"] - s["interval"][0] for s in stats]
    above = [s["interval"][1] - s["mean"] for s in stats]
    axes.errorbar(xs, means, [below, above], fmt="none", ecolor=colour, elinewidth=1.2)
    places, seeds = [], []
    for x, s in zip(xs, stats):
        middle = (len(s["seeds"]) - 1) / 2
        places += [x + (i - middle) * step for i in range(len(s["seeds"]))]
        seeds += s["seeds"]
    axes.plot(places, seeds, "o", color=colour, markersize=2, markeredgewidth=0)


def lines(axes, panel, data):
    """{series: {x: stat}} as curves, x a number or its digits. Returns the series' names."""
    scale(axes, [s for series in data.values() for s in series.values()], room=0.06)
    xs = sorted({float(x) for series in data.values() for x in series})
    if panel.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    shown = xs[:: math.ceil(len(xs) / 8)]
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    width = xs[-1] - xs[0] or 1.0
    ends = []
    for i, (name, series) in enumerate(data.items()):
        colour, aside = COLOURS[i], 0.012 * (i - (len(data) - 1) / 2)
        ordered = sorted((float(x), s) for x, s in series.items())
        stats = [s for _, s in ordered]
        if panel.log:  # beside each other, so that no interval hides another
            places = [x * (xs[-1] / xs[0]) ** aside for x, _ in ordered]
        else:
            places = [x + width * aside for x, _ in ordered]
        means = [s["mean"] for s in stats]
        axes.plot(places, means, "o-", color=colour, label=name, markersize=3.5, linewidth=1.5)
        marks(axes, places, stats, colour, 0)
        ends.append((means[-1], colour))
    label_ends(axes, ends)
    return list(data)


def label_ends(axes, ends):
    """Writes the last value of each curve, (value, colour), beside the axes, one above the
    other."""
    bottom, top = axes.get_ylim()
    line, y = 0.05 * (top - bottom), -math.inf
    for value, colour in sorted(ends):
        y = max(value, y + line)
        axes.annotate(
            number(value),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            size=7.5,
        )


def bars(axes, panel, data):
    """{bar: stat}, or {group: {bar: stat}}, as bars. Returns the bars' names, if a legend has to
    tell them."""
    grouped = all("mean" not in s for s in data.values())
    groups = data if grouped else {name: {name: s} for name, s in data.items()}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.84 / (len(names) if grouped else 1)
    narrow = width / len(groups) < 0.08  # too narrow for a number: it stands upright
    stats = [s for group in groups.values() for s in group.values()]
    scale(axes, stats, room=0.18 if narrow else 0.1)
    for i, name in enumerate(names):
        places, drawn = [], []
        for g, group in enumerate(groups.values()):
            if name in group:
                places.append(g + (width * (i - (len(names) - 1) / 2) if grouped else 0))
                drawn.append(group[name])
        means = [s["mean"] for s in drawn]
        axes.bar(places, means, 0.9 * width, color=COLOURS[i], alpha=0.55, label=name)
        marks(axes, places, drawn, COLOURS[i], 0.1 * width)
        for x, s in zip(places, drawn):
            axes.annotate(
                number(s["mean"]),
                (x, max(spread([s])[1], 0)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if narrow else 0,
                size=7.5,
            )
    letters = int(60 / len(groups))
    fold = textwrap.TextWrapper(letters, break_on_hyphens=False, break_long_words=False).fill
    labels = [fold(name) for name in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.tick_params(axis="x", length=0, labelsize=8 if len(groups) < 6 else 7.5)
    axes.axhline(0, color=TEXT, linewidth=0.8)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    return names if grouped else []
