"""A folder of answers: METHOD.rankN.jsonl, one line per question. Resumable on any number of ranks.

A line is a JSON object. Every line has the keys of ANSWER. A line with rounds, of a question that
was asked, also has those of SHOWN, and each of its rounds those of ROUND.
"""

import contextlib
import json
from pathlib import Path

from infra.errors import DataError
from infra.files import digest, write_whole
from infra.flags import MEDIA, by_name, flag_lines, read_config, refuse_changes
from infra.model_folder import fingerprint, text_fingerprint
from infra.ranks import RANK, gather, say
from infra.run_folder import claimed, commit
from infra.summary import natural

# what all answers of a folder have in common: the model, the records and these flags
SAME = ("# weights", "media_root", "seed", *MEDIA[:-1], "max_prompt", "max_new", "m", "temperature")

# ---- the form of a line
# {key: the types that its value may have}; [types] is a list of items of these

NONE, NUMBER = type(None), (int, float)
ANSWER = {"record": (int,), "score": NUMBER, "failure": (str, NONE), "rounds": ([dict],)}
OPTIONAL = {
    "about": (dict,),
    "options": ([str],),
    "seconds": NUMBER,
    "given": (str, int, float, NONE),
}
MEDIUM = {"path": (str,), "data_type": (str,), "fps": NUMBER, "segment": (NONE, [int, float])}
SHOWN = MEDIUM | {"answer": (str,), "frames": NUMBER, "pixels": NUMBER, "visual_tokens": NUMBER}
ROUND = {
    "frames": (int,),
    "votes": ([str, int, float, NONE],),
    "logps": ([int, float, NONE],),
    "responses": ([str],),
}
NAMES = {int: "a whole number", float: "a number", str: "text", dict: "an object", NONE: "null"}


def misfit(found, form):
    """Describes the first value of an object that does not have its type -> text, or None.
    A missing key counts as null."""
    for key, kinds in form.items():
        value = found.get(key)
        if not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(_name(kind) for kind in kinds)
            return f"{key!r} is {json.dumps(value)[:60]}, expected {expected}"
    return None


def _fits(value, kind):
    if isinstance(kind, list):
        return type(value) is list and all(type(item) in kind for item in value)
    return type(value) is kind


def _name(kind):
    if isinstance(kind, list):
        return f"a list of {' or '.join(NAMES[item] for item in kind)}"
    return NAMES[kind]


def answer_misfit(line):
    """Describes what is wrong with a line of answers, an object -> text, or None."""
    present = {key: kinds for key, kinds in OPTIONAL.items() if key in line}
    if wrong := misfit(line, ANSWER | present):
        return wrong
    if not 0 <= line["score"] <= 1:
        return f"'score' is {line['score']}, expected a number from 0 to 1"
    if line["rounds"] and (wrong := misfit(line, SHOWN)):
        return wrong
    for part in line["rounds"]:
        if wrong := misfit(part, ROUND):
            return f"a round: {wrong}"
    return None


# ---- the folder


@contextlib.contextmanager
def open_answers(args, folder):
    """Claims the folder of answers of these flags -> its path. Every rank must enter.

    folder: of the model. Ends the program if other processes are writing there, or if the answers
    there are of another model, other records or other flags. Raises DataError if config.txt does
    not say of which.
    """
    model = str(args.model).strip("./").replace("/", "-")
    out = Path(args.out or f"out/eval-{model}-{Path(args.data).stem}")
    with claimed(out):
        if RANK == 0:
            _write_config(out, args, folder)
        gather(None)
        yield out


def _write_config(out, args, folder):
    """Writes config.txt, once it is sure that it describes the answers that are there too."""
    weights = f"{fingerprint(folder)}, texts {text_fingerprint(folder)}"
    lines = [
        f"# weights {weights}, records {digest(args.data)}",
        f"# commit {commit()}",
        *flag_lines(args),
    ]
    config = out / "config.txt"
    if any(file.stat().st_size for file in out.glob("*.rank*.jsonl")):
        if not config.exists() or "# weights" not in by_name(read_config(config).splitlines()):
            raise DataError(
                f"{config}: missing, or without its line '# weights', so the model and the flags "
                f"of the answers beside it are unknown. Use another --out, or delete {out}"
            )
        refuse_changes(config, lines, SAME)
    write_whole(config, "\n".join(lines) + "\n")


def read_answers(out, method):
    """The lines of a method, by name, from all ranks -> {record: line}, in order of the records.
    Raises DataError, which names file and line, for a line that does not have the form above; a
    half-written last line is ignored."""
    found = _read_lines(out, method)
    for where, line in found:
        if wrong := answer_misfit(line):
            raise DataError(f"{where}: {wrong}; delete the line to ask its question again")
    answers = {line["record"]: line for _, line in found}
    return dict(sorted(answers.items()))


def _read_lines(out, method):
    """The lines of a method as they are -> [(file and line, object with a 'record')]."""
    found = []
    for file in sorted(out.glob(f"{method}.rank*.jsonl")):
        *lines, _ = file.read_bytes().split(b"\n")
        for i, text in enumerate(lines, 1):
            where = f"{file}, line {i}"
            try:
                line = json.loads(text)
                if type(line["record"]) is not int:
                    raise TypeError("'record' is not a whole number")
            except (ValueError, TypeError, KeyError) as e:
                raise DataError(
                    f"{where}: not JSON with the number of a 'record'; delete the line to ask its "
                    f"question again ({e})"
                ) from e
            found.append((where, line))
    return found


def unanswered(out, method, records):
    """The records without an answer by the method yet, the same on all ranks. Half-written last
    lines, left by a kill, are cut off."""
    left = None
    if RANK == 0:
        for file in out.glob(f"{method}.rank*.jsonl"):
            whole = file.read_bytes().rfind(b"\n") + 1
            with open(file, "r+b") as f:
                f.truncate(whole)
        answered = read_answers(out, method)
        left = [i for i in records if i not in answered]
    return gather(left)[0]


def earlier_answers(out, methods, records):
    """The answers by other methods than these, from earlier commands -> {method: {record: line}}.
    A method without an answer to every record is reported and left out."""
    found = {}
    names = {file.name.split(".rank")[0] for file in out.glob("*.rank*.jsonl")}
    for name in sorted(names - set(methods), key=natural):
        answered = {line["record"] for _, line in _read_lines(out, name)}
        if answered == set(records):
            found[name] = read_answers(out, name)
        else:
            say(
                f"{name}: has answers to {len(answered)} of {len(records)} questions, "
                "so it is not in summary.json"
            )
    return found
