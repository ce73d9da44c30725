"""Command-line flags, and files of flags.

A script makes a `Parser`, adds flags to its `section`s, and calls `parse_args`. On a command line,
`@FILE` stands for the flags in FILE, which may hold # comments; errors name the file and the line.
`flag_lines` writes a run's flags as such a file (config.txt), and `refuse_changes` compares it with
the command that resumes the run. `media_flags`, `ordered` and `peek` are shared by the scripts.
"""

import argparse
import functools
import math
import operator
import re
import shlex
import sys
from pathlib import Path

from infra.errors import DataError
from infra.ranks import RANK

# earlier name of a flag -> its name: runs and recipes with the earlier one still work
RENAMED = {"updates": "minibatches", "checkpointing": "grad_checkpointing"}
# flags of earlier versions that are gone, and the only value that today's code still has
DROPPED = {"shuffles": "1"}


def renamed(text):
    """A word of a command line, or a line of a flag file, with an earlier flag name replaced.

    "--updates 2" -> "--minibatches 2"
    """
    flag = re.match(r"--([\w-]+)", text)
    if flag and flag[1] in RENAMED:
        return f"--{RENAMED[flag[1]]}{text[flag.end() :]}"
    return text


# ---- parsing

BOUNDS = {
    "above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
    "below": operator.lt,
}


def number(parser, name, default, within, text):
    """The value of the numeric flag --name, from its text.

    default: an int or a float, which sets the type; only if it is infinite may the value be.
    within: the bounds, such as "above 0, at most 1". Any other text is a parser error, which names
    the flag, the value and what is expected.
    """
    try:
        x = type(default)(text)
    except ValueError:
        x = math.nan
    infinite = abs(x) == math.inf and math.isfinite(default)
    if x != x or infinite:  # x != x: NaN
        kind = "whole" if isinstance(default, int) else "finite"
        parser.error(f"--{name} {text}: expected a {kind} number, {within}")
    for bound in within.split(", "):
        relation, limit = bound.rsplit(" ", 1)
        if not BOUNDS[relation](x, float(limit)):
            parser.error(f"--{name} {x}: expected {within}")
    return x


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reads flag files (@FILE). Its errors are one line of rank 0."""

    def __init__(self, doc="", dropped=(), **kw):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False, **kw)
        # argparse takes -1e-3 and -inf for flags; they are values
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")
        self.dropped = dropped  # names in DROPPED that this script once had
        self.given = {}  # word of the command line -> [(place, word after it), ...], see _place

    def section(self, title):
        """A titled part of --help, to which flags are added."""
        return Section(self, title)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, with flag files expanded. Notes where each flag was given, for errors."""
        self.given = {}
        placed = self._expand(sys.argv[1:] if args is None else args, place="", inside=())
        placed = self._without_dropped(placed)
        for i, (place, word) in enumerate(placed):
            name, equals, value = word.partition("=")
            if not equals and placed[i + 1 : i + 2]:
                next_place, next_word = placed[i + 1]
                value = next_word if next_place == place else ""
            self.given.setdefault(name, []).append((place, value))
        return super().parse_known_args([word for _, word in placed], namespace)

    def _expand(self, words, place, inside):
        """Replaces each @FILE by the words of the file. Returns [(place, word), ...].

        place: where the words come from, "FILE, line N: " or "" for the command line.
        inside: the flag files that are being expanded.
        """
        placed = []
        for word in words:
            if not word.startswith("@"):
                new = renamed(word)
                known = new.partition("=")[0] in self._option_string_actions
                placed.append((place, new if known else word))
                continue
            file = Path(word[1:])
            if file.resolve() in inside:
                self.error(f"{place}{word}: a flag file that includes itself")
            try:
                lines = flag_words(file)
            except DataError as e:
                self.error(f"{place}{e}")
            for i, line in lines.items():
                placed += self._expand(line, f"{file}, line {i}: ", (*inside, file.resolve()))
        return placed

    def _without_dropped(self, placed):
        """Removes flags that are gone, so that the config.txt of an earlier run is still read."""
        kept = []
        words = iter(placed)
        for place, word in words:
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or name not in self.dropped:
                kept.append((place, word))
                continue
            if not equals:
                value = next(words, ("", "nothing"))[1]
            if value != DROPPED[name]:
                self.error(
                    f"{place}--{name} {value}: this flag is gone; {DROPPED[name]} is built in"
                )
        return kept

    def error(self, message):
        """Ends the program with the message, after the place of the flag that it is about."""
        self.exit(2, f"error: {self._place(message)}{message}\n" if RANK == 0 else None)

    def _place(self, message):
        """The place of the flag that a message is about: "FILE, line N: ", or "".

        The flag is the first that the message names. If it was given several times, the message is
        about the last time that its value is in the message, or else about the last time.
        """
        for word in message.split():
            given = self.given.get(word.strip(":,'").partition("=")[0])
            if given:
                with_value = [place for place, value in given if value in message]
                return with_value[-1] if with_value else given[-1][0]
        return ""


class Section:
    """A titled part of --help. `value` adds a flag with a value, `switch` one without."""

    def __init__(self, parser, title):
        self.parser = parser
        self.group = parser.add_argument_group(title)

    def value(self, name, default, help, within="at least 0", **kw):
        """Adds --name, of the type of its default. A list's default sets the type of its elements.

        within: bounds of a number, see `number`.  kw: argparse's own, such as choices and nargs.
        """
        one = default[0] if isinstance(default, list) else default
        if isinstance(one, (int, float)):
            kw["type"] = functools.partial(number, self.parser, name, one, within)
        if default not in (None, ""):
            help += " (default: %(default)s)"
        self.group.add_argument(f"--{name}", default=default, help=help, **kw)

    def switch(self, name, help):
        """Adds --name, which is off unless it is given."""
        self.group.add_argument(f"--{name}", action="store_true", help=help)


# ---- flags that scripts share

# of media_flags, those that data.load_media takes
MEDIA = (
    "fps",
    "min_frames",
    "min_pixels",
    "max_pixels",
    "image_max_pixels",
    "reader",
    "decode_timeout",
)


def media_flags(p, *, fps, max_pixels, max_prompt, workers=2):
    """Adds the section of media and prompts, with a script's own defaults, and returns it.
    workers: 0 for a script that loads nothing ahead."""
    g = p.section("media and prompts")
    g.value("fps", fps, "at most this many frames per second of video", "above 0")
    g.value("min_frames", 4, "at least this many frames, whatever --fps says", "at least 2")
    g.value("min_pixels", 4 * 28 * 28, "smaller frames and images are scaled up", "at least 1")
    g.value("max_pixels", max_pixels, "larger video frames are scaled down", "at least 1")
    g.value("image_max_pixels", 256 * 28 * 28, "larger images are scaled down", "at least 1")
    g.value(
        "max_prompt",
        max_prompt,
        "most tokens in a prompt; a sample with more is skipped and counted, never truncated",
        "at least 1",
    )
    g.value(
        "reader",
        "av",
        "of videos: av decodes the right frames or fails; decord may not (docs/videos.md)",
        choices=("av", "decord"),
    )
    g.value(
        "decode_timeout",
        60.0,
        "seconds to decode one video; then its decoder is killed and the sample skipped",
        "above 0, at most 86400",
    )
    if workers:
        ahead = "threads that load media ahead, each with its own decoder"
        g.value("workers", workers, ahead, "at least 1")
    return g


def ordered(p, args, *pairs):
    """Ends the program with a parser error unless low <= high for each pair of flags."""
    for low, high in pairs:
        least, value = getattr(args, low), getattr(args, high)
        if value < least:
            p.error(f"--{high} {value}: expected at least {least}, the value of --{low}")


def peek(argv, **defaults):
    """Reads a few flags, given with their defaults, from a command line that may hold others."""
    p = Parser(add_help=False)
    flags = p.section("")
    for name, default in defaults.items():
        flags.value(name, default, "")
    return p.parse_known_args(argv)[0]


# ---- files of flags


def read_config(file):
    """The text of a flag file, UTF-8 with or without a byte order mark. Raises DataError."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8 text, expected flags, one a line ({e})") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read: {e.strerror}") from e


def flag_words(file):
    """The words of a flag file by line: {line number, from 1: [word, ...]}.

    Quotes work as in a shell and # begins a comment; a backslash is a plain character, for Windows
    paths. Raises DataError, which names the file and the line.
    """
    found = {}
    for i, line in enumerate(read_config(file).splitlines(), 1):
        lexer = shlex.shlex(line, posix=True)
        lexer.whitespace_split = True
        lexer.escape = ""
        try:
            found[i] = list(lexer)
        except ValueError as e:
            raise DataError(f"{file}, line {i}: cannot be read: {e}: {line[:80]!r}") from e
        if "--" in found[i]:
            raise DataError(f"{file}, line {i}: -- is not a flag: {line[:80]!r}")
    return found


def flag_lines(args):
    """The flags of a run as the lines of a flag file, one flag a line."""
    lines = []
    for name, value in vars(args).items():
        if value is None or value is False or name == "resume":
            continue
        words = value if isinstance(value, list) else [str(value)]
        lines.append(f"--{name}" if value is True else shlex.join([f"--{name}", *words]))
    return lines


def by_name(lines):
    """The lines of a config.txt by the name of their flag, or of their comment.

    ["# records 1234", "--prompts 4"] -> {"# records": "# records 1234", "prompts": "--prompts 4"}
    """
    found = {}
    for line in map(renamed, lines):
        words = line.split()
        if words and words[0] == "#":
            found[" ".join(words[:2])] = line
        elif words:
            found[words[0].removeprefix("--")] = line
    return found


def refuse_changes(config, lines, names, defaults=()):
    """Ends the program if `lines` differ from the config.txt of the run that is to be resumed.

    names: the flags and comments to compare. A comment is compared only where both have it.
    defaults: lines for flags that config.txt does not have because it is older than they are.
    """
    now = by_name(lines)
    before = by_name(defaults) | by_name(read_config(config).splitlines())
    changes = []
    for name in before | now:
        found, expected = now.get(name), before.get(name)
        new_comment = name.startswith("#") and not (found and expected)
        dropped = DROPPED.get(name) and expected and expected != f"--{name} {DROPPED[name]}"
        if dropped or (name in names and found != expected and not new_comment):
            changes.append(f"{found or 'none'} now, {expected or 'none'} when it started")
    if changes:
        raise SystemExit(
            f"error: {config.parent} cannot be resumed with other settings: {'; '.join(changes)}. "
            "Give this run its own --out, or delete that folder to start over"
        )
