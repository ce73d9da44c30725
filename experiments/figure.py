"""Charts of means and intervals over seeds, as SVG by hand: lines and bars, readable in light and in dark.

    draw(title, [Panel("bars", {"A": stat, "B": stat}, "title", "", "accuracy"), ...]) -> the text of an SVG file
A stat is what lab.stat gives: {"mean", "interval": [low, high], "seeds": [a value each]}. Every mark is drawn with its
interval and with a dot for each seed, and says its numbers when pointed at.
    lines    {series: {x: stat}}, x a number, or its digits
    bars     {bar: stat}, or {group: {bar: stat}}
"""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 320  # of a panel
LEFT, RIGHT, BOTTOM = 58, 442, 262  # of its axes; the top depends on the legend
LIGHT = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#57606a", "#cf222e")
DARK = ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#d29922", "#8b949e", "#ff7b72")
STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --faint: #d0d7de; %s }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; %s } }
text { font: 12px system-ui, sans-serif; fill: var(--ink) } .big { font-size: 13px; font-weight: 600 }
.title { font-size: 12.5px; font-weight: 600 } .small { font-size: 10px }
.middle { text-anchor: middle } .end { text-anchor: end }
.paper { fill: var(--paper) } .grid { stroke: var(--faint) } .whisker { fill: none } .seed { opacity: 0.7 }
"""


class Panel(NamedTuple):
    """One chart. log: the x axis of lines is logarithmic."""

    kind: str
    data: dict
    title: str
    x: str
    y: str
    log: bool = False


def number(x):
    """Three digits, as short as they go."""
    return (
        f"{x:.0f}"
        if abs(x) >= 100 or abs(x - round(x)) < 1e-9
        else f"{x:.3g}"
        if abs(x) >= 0.001
        else f"{x:.0e}"
    )


def says(name, stat):
    """A stat in words."""
    low, high = stat["interval"]
    return escape(
        f"{name}: {number(stat['mean'])} [{number(low)}, {number(high)}], {len(stat['seeds'])} seeds"
    )


def text(x, y, words, kind="", more=""):
    """An SVG text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" {more}>{escape(str(words))}</text>'


def legend(names):
    """Names beside squares of their colours, in as many lines as it takes -> (elements, height)."""
    out, x, y = [], LEFT, 34
    for i, name in enumerate(names):
        width = 24 + 6.9 * len(name)
        if x > LEFT and x + width > RIGHT:
            x, y = LEFT, y + 15
        out += [
            f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="var(--c{i % len(LIGHT)})"/>',
            text(x + 14, y, name),
        ]
        x += width
    return out, y


def scale(stats, top):
    """A y axis for stats, from 0 or from 0 to 1 where these fit -> (y of a value, grid and numbers)."""
    seen = [v for s in stats for v in (*s["interval"], *s["seeds"], s["mean"])]
    least, most = min(seen), max(seen)
    if (
        0 <= min(min(s["seeds"]) for s in stats)
        and 0.5 < most
        and max(max(s["seeds"]) for s in stats) <= 1
    ):
        low, high, step = 0.0, 1.0, 0.2  # shares; an interval may reach beyond, and is cut
    else:
        low, high = min(0.0, least), max(0.0, most) or 1.0
        step = 10 ** math.floor(math.log10(high - low))
        step *= next(k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (k * step) <= 6)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    at = lambda v: BOTTOM - (min(max(v, low), high) - low) / (high - low) * (BOTTOM - top)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    out = []
    for v in ticks:
        out += [
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{at(v):.1f}" y2="{at(v):.1f}" class="grid"/>',
            text(LEFT - 6, at(v) + 4, f"{round(v, 10):g}", "end"),
        ]
    return at, out


def mark(x, at, stat, colour, dots=2.0):
    """The interval and the seeds' dots of a stat at x."""
    low, high = map(at, stat["interval"])
    path = f"M{x - 3:.1f} {low:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {high:.1f}h6"
    out = [f'<path d="{path}" class="whisker" stroke="{colour}"/>']
    for i, v in enumerate(stat["seeds"]):
        cx = x + (i - (len(stat["seeds"]) - 1) / 2) * dots
        out.append(
            f'<circle cx="{cx:.1f}" cy="{at(v):.1f}" r="{min(max(dots, 1.5), 2)}" class="seed" fill="{colour}"/>'
        )
    return out


def lines(panel):
    """A panel of curves."""
    out, top = legend(panel.data)
    at, grid = scale([s for series in panel.data.values() for s in series.values()], top + 14)
    xs = sorted({float(x) for series in panel.data.values() for x in series})
    f = (lambda x: math.log(x)) if panel.log else (lambda x: x)
    place = lambda x: (
        LEFT + 14 + (f(x) - f(xs[0])) / ((f(xs[-1]) - f(xs[0])) or 1) * (RIGHT - LEFT - 50)
    )
    shown = xs if len(xs) <= 8 else xs[:: math.ceil(len(xs) / 8)]
    out += grid + [text(place(x), BOTTOM + 16, f"{x:g}", "middle") for x in shown]
    for i, (name, series) in enumerate(panel.data.items()):
        colour, shift = f"var(--c{i % len(LIGHT)})", 3 * (i - (len(panel.data) - 1) / 2)
        points = sorted((place(float(x)) + shift, x, s) for x, s in series.items())
        path = "L".join(f"{px:.1f} {at(s['mean']):.1f}" for px, _, s in points)
        out.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        for px, x, s in points:
            title = f"<title>{says(f'{name}, {panel.x} {x}', s)}</title>"
            out += [
                "<g>",
                title,
                *mark(px, at, s, colour, 1.2),
                f'<circle cx="{px:.1f}" cy="{at(s["mean"]):.1f}" r="3" fill="{colour}"/>',
                "</g>",
            ]
    ends = sorted(
        (at(s[max(s, key=float)]["mean"]), i, s[max(s, key=float)]["mean"])
        for i, s in enumerate(panel.data.values())
    )
    y = 0.0
    for end, i, value in ends:  # the last values, one under the other
        y = max(end + 4, y + 11)
        out.append(
            text(RIGHT - 28, y, number(value), "small", f'style="fill: var(--c{i % len(LIGHT)})"')
        )
    return out


def bars(panel):
    """A panel of bars, in groups or not."""
    data = panel.data if all("mean" not in s for s in panel.data.values()) else {"": panel.data}
    names = list(dict.fromkeys(name for group in data.values() for name in group))
    out, top = legend(names)
    room = (RIGHT - LEFT) / len(data)
    width = min(56, 0.86 * room / len(names))
    upright = width < 26  # the numbers
    at, grid = scale(
        [s for group in data.values() for s in group.values()], top + (40 if upright else 22)
    )
    out += grid
    for g, (label, group) in enumerate(data.items()):
        middle = LEFT + (g + 0.5) * room
        out.append(text(middle, BOTTOM + 16, label, "small middle" if len(data) > 4 else "middle"))
        for name, s in group.items():
            i = names.index(name)
            x, y0, y1 = middle + (i - len(names) / 2) * width, at(0), at(s["mean"])
            colour = f"var(--c{i % len(LIGHT)})"
            rect = f'<rect x="{x + 1:.1f}" y="{min(y0, y1):.1f}" width="{width - 2:.1f}" height="{abs(y1 - y0):.1f}" '
            above = min(at(max(*s["interval"], *s["seeds"])), y0) - 5
            out += [
                "<g>",
                f"<title>{says(f'{label} {name}'.strip(), s)}</title>",
                rect + f'fill="{colour}" opacity="0.55"/>',
                *mark(x + width / 2, at, s, colour, min(4.0, width / 8)),
            ]
            turn = f'transform="rotate(-90 {x + width / 2 + 3:.1f} {above:.1f})"'
            out += [
                text(x + width / 2 + 3, above, number(s["mean"]), "small", turn)
                if upright
                else text(x + width / 2, above, number(s["mean"]), "small middle"),
                "</g>",
            ]
    return out


def draw(title, panels):
    """The SVG of some panels, two beside each other."""
    columns = min(2, len(panels))
    width, height = columns * WIDTH, 40 + -(-len(panels) // columns) * HEIGHT
    palette = lambda colours: " ".join(f"--c{i}: {c};" for i, c in enumerate(colours))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE % (palette(LIGHT), palette(DARK))}</style>",
        f'<rect width="{width}" height="{height}" class="paper"/>',
        text(16, 27, title, "big"),
    ]
    for i, panel in enumerate(panels):
        corner = f"{i % columns * WIDTH} {40 + i // columns * HEIGHT}"
        out += [
            f'<g transform="translate({corner})">',
            text(16, 14, panel.title, "title"),
            *{"lines": lines, "bars": bars}[panel.kind](panel),
            text((LEFT + RIGHT) / 2, BOTTOM + 36, panel.x, "middle"),
            text(
                0,
                0,
                panel.y,
                "middle",
                f'transform="translate(14 {(BOTTOM + 40) / 2}) rotate(-90)"',
            ),
            "</g>",
        ]
    return "\n".join([*out, "</svg>"]) + "\n"
