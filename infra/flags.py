"""Command-line flags and files of flags."""

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

# flags that load_media takes
MEDIA = (
    "fps",
    "min_frames",
    "min_pixels",
    "max_pixels",
    "image_max_pixels",
    "reader",
    "decode_timeout",
)
# names of flags in runs of earlier versions: still understood
RENAMED = {"updates": "minibatches", "checkpointing": "grad_checkpointing"}
HOLDS = {
    "above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
    "below": operator.lt,
}


def number(parser, name, default, within, text):
    """The value of a numeric flag from its text: of the default's kind, finite unless the default is not, and within bounds
    such as "above 0, at most 1". Anything else is the parser's error, which names the flag, the value and the bounds."""
    try:
        x = type(default)(text)
    except ValueError:
        x = math.nan
    if x != x or (abs(x) == math.inf and math.isfinite(default)):
        kind = "whole" if isinstance(default, int) else "finite"
        parser.error(f"--{name} {text}: expected a {kind} number, {within}")
    for words, limit in (bound.rsplit(" ", 1) for bound in within.split(", ")):
        if not HOLDS[words](x, float(limit)):
            parser.error(f"--{name} {x}: expected {within}")
    return x


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line, of rank 0, without the usage. @FILE stands for the words of a flag file."""

    def __init__(self, doc="", **kw):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False, **kw)
        # -1e-3 is a value too, which argparse takes for a flag
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")
        self.places = {}  # {word: [(file and line, or "" for the command line; the word after it), ...]}

    def section(self, title):
        """A titled part of --help, to which flags are added -> Section."""
        return Section(self, title)

    def error(self, message):
        words = (word.strip(":,'").split("=")[0] for word in message.split())
        found = next((self.places[word] for word in words if word in self.places), [("", "")])
        place = next((place for place, value in reversed(found) if value in message), found[-1][0])
        self.exit(2, f"error: {place}{message}\n" if RANK == 0 else None)

    def parse_known_args(self, args=None, namespace=None):
        self.places.clear()
        return super().parse_known_args(
            self._expand(sys.argv[1:] if args is None else args, "", ()), namespace
        )

    def _expand(self, words, place, inside):
        """The words with those of the flag files that they name. place: where they stand; inside: the files around them."""
        out = []
        for word, following in zip(words, [*words[1:], ""]):
            if not word.startswith("@"):
                flag, equals, value = word.partition("=")
                self.places.setdefault(flag, []).append((place, value if equals else following))
                out.append(word)
                continue
            file = Path(word[1:])
            if file.resolve() in inside:
                self.error(f"{place}{word}: a flag file that includes itself")
            try:
                lines = flag_words(file)
            except DataError as e:
                self.error(f"{place}{e}")
            for i, more in lines.items():
                out += self._expand(more, f"{file}, line {i}: ", (*inside, file.resolve()))
        return out


def flag_words(file):
    """The lines of a flag file -> {number, from 1: its words}. Quotes are those of a shell, # begins a comment, and a backslash
    is itself, as in a path of Windows. Raises DataError, which names the file and the line."""
    found = {}
    for i, line in enumerate(read_config(file).splitlines(), 1):
        lexer = shlex.shlex(line, posix=True)
        lexer.whitespace_split, lexer.escape = True, ""
        try:
            found[i] = list(lexer)
        except ValueError as e:
            raise DataError(f"{file}, line {i}: cannot be read: {e}: {line[:80]!r}") from e
        if "--" in found[i]:
            raise DataError(f"{file}, line {i}: -- is no flag: {line[:80]!r}")
    return found


class Section:
    """A titled part of --help: `value` adds a flag with a value, `switch` one without."""

    def __init__(self, parser, title):
        self.parser, self.group = parser, parser.add_argument_group(title)

    def value(self, name, default, help, within="at least 0", **kw):
        """Adds --name. Its type is that of `default`; within: the bounds of a number (see
        `number`), or of each number of a list. kw: of argparse, such as choices and nargs."""
        one = default[0] if isinstance(default, list) else default
        if isinstance(one, (int, float)):
            kw["type"] = functools.partial(number, self.parser, name, one, within)
        if default not in (None, ""):
            help += " (default: %(default)s)"
        spellings = [name, *(old for old, new in RENAMED.items() if new == name)]
        self.group.add_argument(*(f"--{x}" for x in spellings), default=default, help=help, **kw)

    def switch(self, name, help):
        """Adds --name, which is off unless it is given."""
        self.group.add_argument(f"--{name}", action="store_true", help=help)


def media_flags(p, *, fps, max_pixels, max_prompt):
    """The flags of media and prompts, with a script's own defaults -> their group."""
    g = p.section("media and prompts")
    g.value("fps", fps, "frames shown for each second of video, at most", "above 0")
    g.value("min_frames", 4, "at least this many frames, whatever --fps says", "at least 2")
    g.value("min_pixels", 4 * 28 * 28, "a smaller frame is scaled up", "at least 1")
    g.value("max_pixels", max_pixels, "of a video frame; a larger one is scaled down", "at least 1")
    g.value("image_max_pixels", 256 * 28 * 28, "of an image", "at least 1")
    g.value(
        "max_prompt",
        max_prompt,
        "tokens; a sample with a longer prompt is refused and counted, never cut",
        "at least 1",
    )
    g.value(
        "reader",
        "av",
        "of videos: av shows the right frames or refuses a file; decord can show wrong ones (README)",
        choices=("av", "decord"),
    )
    g.value(
        "decode_timeout",
        60.0,
        "seconds for one video, after which its decoder is killed and the sample refused",
        "above 0, at most 86400",
    )
    g.value(
        "workers", 2, "threads that load media ahead, each with a decoder process", "at least 1"
    )
    return g


def ordered(p, args, *pairs):
    """Ends the program unless, of each pair of flags, the second is at least the first."""
    for low, high in pairs:
        if getattr(args, high) < getattr(args, low):
            p.error(
                f"--{high} {getattr(args, high)}: expected at least {getattr(args, low)}, the value of --{low}"
            )


def peek(argv, **defaults):
    """A few flags of a command line, whatever its others are -> namespace."""
    p = Parser(add_help=False)
    flags = p.section("")
    for name, default in defaults.items():
        flags.value(name, default, "")
    return p.parse_known_args(argv)[0]


def flag_lines(args):
    """The flags as the lines of a flag file."""
    flags = {
        k: v for k, v in vars(args).items() if v is not None and v is not False and k != "resume"
    }
    return [f"--{k}" if v is True else f"--{k} {shlex.quote(str(v))}" for k, v in flags.items()]


def by_name(lines):
    """The lines of a flag file, or comments such as "# records 1234", by name: "prompts", "# records"."""
    found = {}
    for line in lines:
        words = line.removeprefix("--").split()
        if not words:
            continue
        if words[0] == "#":
            found[" ".join(words[:2])] = line
        else:
            name = RENAMED.get(words[0], words[0])
            found[name] = line.replace(f"--{words[0]}", f"--{name}", 1)
    return found


def read_config(file):
    """The text of a flag file, in UTF-8 with or without a byte order mark. Raises DataError, which names the file."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8 text, expected flags, one a line ({e})") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read: {e.strerror}") from e


def refuse_changes(config, lines, names, defaults=()):
    """Ends the program if a flag or comment that is named differs between the file of an earlier run and `lines`.
    defaults: the lines of flags that the file may not have, as it is older than they are; comments it need not have."""
    now = by_name(lines)
    before = by_name(defaults) | by_name(read_config(config).splitlines())
    was, now = (
        [
            line
            for name, line in a.items()
            if b.get(name) != line and name in names and (name in b or name[0] != "#")
        ]
        for a, b in ((before, now), (now, before))
    )
    if was or now:
        raise SystemExit(
            f"error: {config.parent} was run otherwise, so it cannot be resumed: it had {', '.join(was) or 'not'}; "
            f"now {', '.join(now) or 'not'}. Another --out starts anew, and so does deleting that folder"
        )
