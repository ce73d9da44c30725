"""README.md's links to lines, line counts and files are those of the code.

python tests/test_readme.py        refreshes them
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def line_of(file, names):
    """The line on which a definition starts, such as ["Policy", "encode"] in model.py."""
    node = ast.parse((ROOT / file).read_text())
    for name in names:
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name)
    return node.lineno


def lines_in(path):
    """Lines of a file, or of the Python files in a folder."""
    path = ROOT / path
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def refreshed(text):
    """README's text with the lines and counts of today's code."""
    counts = []

    def link(found):
        name, file = found[1], found[2]
        return f"[`{name}`]({file}#L{line_of(file, name.split('.')[1:])})"

    def row(found):
        paths = re.findall(r"\]\(([\w/]+(?:\.py)?)\)", found[1])
        counts.append(sum(map(lines_in, paths)))
        return f"| {found[1]} | {counts[-1]:,} |"

    text = re.sub(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)", link, text)
    text = re.sub(r"^\| (\[.*?\)) \| [\d,]+ \|", row, text, flags=re.M)
    afternoon = round(sum(counts[:8]), -2)
    return re.sub(r"about [\d,]+ lines", f"about {afternoon:,} lines", text)


def test_links_and_counts_are_those_of_the_code():
    """`python tests/test_readme.py` mends them."""
    text = README.read_text()
    for now, then in zip(refreshed(text).splitlines(), text.splitlines(), strict=True):
        assert then == now, "run `python tests/test_readme.py` to refresh links and counts"
    assert len(text.splitlines()) <= 180


def test_every_relative_link_leads_to_a_file():
    for page in (README, *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
