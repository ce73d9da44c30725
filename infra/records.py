"""Records of questions about videos: a JSON file, and the checked fields of a record.

    read_records    the records of a file, each with the words that errors call it by
    read_parquet    the same of a parquet file, for prepare.py
    text, number    a field of one type
    question, medium, solution, segment, ...    what a record has, whatever its data set calls it
    from_gsm8k      a record of GSM8K -> a record with the fields of this file
    missing_media   which of the files do not exist

Every error names file, record, found and expected.
"""

import json
import math
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr  # of any value: short, on one line, printable

from infra.errors import DataError

FIELDS = "problem, options, problem_type, data_type, solution, path"
DATA_TYPES = ("video", "image", "frame", "text")  # frame: a folder of frames; text: no medium
MEDIA = ("path", "video", "videos", "image", "images")  # fields that name a medium
FORM = f"a list of objects with {FIELDS}"
ABOUT = tuple(  # what evaluation counts by
    "data_source original_question_type task_type category duration domain sub_category".split()
)
BINARY = {  # the first bytes of files that are not records
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\3\4": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}

# ---- files


def read_records(path):
    """The records of a file -> [(where, a function that returns the record), ...]. `where` names
    file and record. A bad line raises only when its function is called.

    The content decides, not the file's name: a JSON list, or else JSON lines. Raises DataError for
    any other file.
    """
    path = Path(path)
    text = _text(path)
    try:
        whole = _parse(text, path)
    except DataError:
        if text.lstrip().startswith("[") and path.suffix != ".jsonl":  # a broken list, not lines
            raise
        whole = None
    if isinstance(whole, list):
        return [(f"{path}, record {i}", partial(_same, r)) for i, r in enumerate(whole)]
    lines = []
    for i, line in enumerate(text.split("\n"), 1):
        line = line.lstrip("\ufeff")  # at the start of each file that was joined
        if line.strip():
            where = f"{path}, line {i}"
            lines.append((where, partial(_parse, line, where)))
    if whole and len(lines) > 1:
        raise DataError(f"{path}: holds one JSON {type(whole).__name__}, expected {FORM}")
    return lines


def read_parquet(path):
    """The rows of a parquet file, as read_records returns records; bytes, such as those of images,
    are left out. Raises DataError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: is a parquet file, which takes pyarrow to read: pip install pyarrow"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as e:
        raise DataError(f"{path}: cannot be read: {e}") from e
    named = [(f"{path}, record {i}", row) for i, row in enumerate(rows)]
    return [(where, partial(_same, _without_bytes(row))) for where, row in named]


def _without_bytes(row):
    """A row without fields that JSON cannot hold: bytes, and objects with bytes."""
    kept = {}
    for name, value in row.items():
        inside = value.values() if isinstance(value, dict) else [value]
        if not any(isinstance(x, bytes) for x in inside):
            kept[name] = value
    return kept


def read_json(file):
    """The content of a JSON file. Raises DataError."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file}: not JSON in UTF-8, or cut off: {e}") from e


def _text(path):
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}") from e
    kind = next((kind for magic, kind in BINARY.items() if content.startswith(magic)), None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        kind = kind or "not UTF-8 text"
    if kind is None and "\0" in text[:100]:
        kind = "binary, or UTF-16 text"
    if kind:
        raise DataError(f"{path}: is {kind}, expected JSON in UTF-8: {FORM}")
    if not text.strip():
        raise DataError(f"{path}: is empty, expected {FORM}")
    return text


def _same(record):
    return record


def _parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON, or cut off: {e}; expected {FORM}") from e


# ---- fields


def first(record, *keys):
    """(key, value) of the first of these fields that has a value; null and "" are not values.
    (None, None) without any."""
    for key in keys:
        if record.get(key) is not None and record[key] != "":
            return key, record[key]
    return None, None


def text(record, where, *keys):
    """The text of the first of these fields, stripped; "" without any. Raises DataError: not
    text."""
    key, value = first(record, *keys)
    if key and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {short_repr(value)}, expected text")
    return (value or "").strip()


def number(record, where, key, *, least, most):
    """The number of a field, which may be written as text; None without one. Raises DataError: not
    a number, or outside [least, most]."""
    _, value = first(record, key)
    if value is None:
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not least <= found <= most:
        raise DataError(
            f"{where}: {key!r} is {short_repr(value)}, expected a number from {least:g} to {most:g}"
        )
    return found


def not_finite(value):
    """Is this NaN (how pandas writes null) or infinite?"""
    return isinstance(value, float) and not math.isfinite(value)


def is_unicode(text):
    """Is it free of lone surrogates, which JSON allows but UTF-8 files do not?"""
    return not re.search("[\ud800-\udfff]", text)


# ---- what a record has


def from_gsm8k(record):
    """A record of GSM8K (arXiv 2110.14168) -> one with `solution` and `process`; any other record
    as it is.

    GSM8K's `answer` holds the reasoning and, as its last line, the number: "#### 72". A record with
    such an answer is GSM8K's if it names neither a medium nor a `solution` nor other reasoning. Its
    data type is then text; its problem type is numerical, unless it names one. The calculator's
    annotations are left out of the reasoning: "48/2 = <<48/2=24>>24" becomes "48/2 = 24".
    """
    others = (*MEDIA, "solution", "process", "reasoning")
    _, data_type = first(record, "data_type")
    answer = record.get("answer")
    if not isinstance(answer, str) or data_type not in (None, "text") or _named(record, others):
        return record
    *reasoning, last = answer.strip().splitlines()
    if not last.startswith("####"):
        return record
    _, kind = first(record, "problem_type")
    return record | {
        "data_type": "text",
        "problem_type": "numerical" if kind is None else kind,
        "process": re.sub("<<[^<>]*>>", "", "\n".join(reasoning)),
        "solution": last.removeprefix("####").strip(),
    }


def name_and_place(record, where):
    """(the record's id as text, None without one; `where`, which now names the id too)."""
    _, name = first(record, "problem_id", "qid", "question_id", "id")
    if name is None:
        return None, where
    if not where.endswith(f"record {name}"):
        where = f"{where} (id {short_repr(name)})"
    if isinstance(name, bool | list | dict) or not_finite(name):
        raise DataError(f"{where}: expected text or a number as its id")
    return str(name), where


def question(record, where):
    """The question, as it is in the record."""
    asked = text(record, where, "problem", "question")
    if not asked:
        raise _missing("question ('problem')", record, where)
    return asked


def medium(record, where):
    """(path, data type) of a record's medium; ("", "text") for a question of text alone.

    `path` comes first: MVBench's records also name their source's file in `video`. But a video and
    an image are two media, and so are two videos.
    """
    data_type = text(record, where, "data_type")
    if data_type == "text":
        named = _named(record, MEDIA)
        if named:
            raise DataError(f"{where}: data type text with {_listed(named)}, expected no medium")
        return "", "text"
    named = _named(record, MEDIA)
    key = next(iter(named), None)
    path = text(named, where, *MEDIA)
    data_type = data_type or ("image" if key in ("image", "images") else "video")
    both = {"image", "images"} & {*named} and data_type != "image"
    if not both:
        named.pop("path", None)
    if any(value != next(iter(named.values())) for value in named.values()):
        raise DataError(f"{where}: several media, {_listed(named)}, expected one")
    if not path:
        what = f"medium ({', '.join(map(repr, MEDIA))}), and no data_type: text"
        raise _missing(what, record, where)
    if data_type not in DATA_TYPES:
        raise DataError(
            f"{where}: data type {short_repr(data_type)}, expected video, image, frame or text"
        )
    return path, data_type


def is_empty(value):
    """Whether a field has no value: null, which pandas writes as NaN, "" or []."""
    return value in (None, "", []) or value != value


def _named(record, keys):
    """{key: value} of those of these fields that have a value; of a list of one, its element."""
    named = {}
    for key in keys:
        value = record.get(key)
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if not is_empty(value):
            named[key] = value
    return named


def _listed(fields):
    return ", ".join(f"{key!r} {short_repr(value)}" for key, value in fields.items())


def solution(record, where):
    """The answer as it is in the record, as text. `solution` comes first: some evaluation files
    have the option's text in `answer`."""
    key, value = first(record, "solution", "answer")
    if key is None:
        raise DataError(f"{where}: no 'solution'")
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_text or not_finite(value):
        raise DataError(f"{where}: {key!r} is {short_repr(value)}, expected text or a number")
    return str(value)


def segment(record, where):
    """(start, end) in seconds, as in MVBench; None for the whole video."""
    start = number(record, where, "start", least=0, most=1e9)
    end = number(record, where, "end", least=0, most=1e9)
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise DataError(
            f"{where}: only one of 'start' ({start}) and 'end' ({end}), "
            "expected both, in seconds, or none"
        )
    if start >= end:
        raise DataError(f"{where}: a segment from {start:g} to {end:g} seconds")
    return start, end


def about(record):
    """The fields ABOUT that a record has as printable text; {} for what is not a record."""
    fields = {}
    for key in ABOUT if isinstance(record, dict) else ():
        value = record.get(key)
        if isinstance(value, str) and value and is_unicode(value):
            fields[key] = value
    return fields


def _missing(what, record, where):
    fields = ", ".join(map(short_repr, record)) or "no fields"
    return DataError(f"{where}: no {what}; it has {fields}; expected {FORM}")


# ---- media


def missing_media(samples, data, media_root):
    """Looks for the file or folder of every sample that has one -> (a line that counts the missing
    ones by folder, "" if there are none; whether more than half are missing).

    data, media_root: as given to load_samples, for the line.
    """
    samples = [s for s in samples if s.path]  # not those of text alone
    exists = {path: os.path.exists(path) for path in {s.path for s in samples}}
    missing = [s for s in samples if not exists[s.path]]
    if not missing:
        return "", False
    folders = Counter(str(Path(s.path).parent) for s in missing).most_common()
    counts = ", ".join(f"{n} in {folder}" for folder, n in folders[:3])
    if len(folders) > 3:
        counts += f", the others in {len(folders) - 3} more folders"
    place = missing[0].name.removeprefix(f"{Path(data)}, ")
    root = f"was not set, so paths start from {Path(data).absolute().parent}"
    if media_root:
        root = f"was {media_root}"
    line = (
        f"{data}: the media of {len(missing)} of {len(samples)} records are missing: {counts}; "
        f"the first: {place}, {missing[0].path}; --media_root {root}"
    )
    return line, 2 * len(missing) > len(samples)
