"""Files of JSON records, and the fields of a record, checked: every error names file, record, found and expected."""

import json
import math
import re
from functools import partial
from pathlib import Path
from reprlib import repr as shown  # of any value: short, on one line, printable

from infra.errors import DataError

FIELDS = "problem, options, problem_type, data_type, solution, path"
FORM = f"a list of objects with {FIELDS}"
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
    """The records of a file -> [(where, a function that returns the record), ...]; `where` names file and record. One bad line
    raises only when its function is called.

    The content decides, not the file's name: a JSON list, else JSON lines. Raises DataError for any other file.
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
    lines = [line for line in enumerate(text.split("\n"), 1) if line[1].strip()]
    if whole and len(lines) > 1:
        raise DataError(f"{path}: holds one JSON {type(whole).__name__}, expected {FORM}")
    named = [(f"{path}, line {i}", line) for i, line in lines]
    return [(where, partial(_parse, line, where)) for where, line in named]


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


def first_field(record, *keys):
    """(key, value) of the first of these fields that has a value, (None, None) without any. null and "" are no values."""
    for key in keys:
        if record.get(key) is not None and record[key] != "":
            return key, record[key]
    return None, None


def text_field(record, where, *keys):
    """The text of the first of these fields, stripped; "" without any. Raises DataError: not a text."""
    key, value = first_field(record, *keys)
    if key and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {shown(value)}, expected text")
    return (value or "").strip()


def number_field(record, where, key, *, least, most):
    """The number of a field, also if it is written as text; None without one. Raises DataError: not a number, or outside
    [least, most]."""
    _, value = first_field(record, key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise DataError(
            f"{where}: {key!r} is {shown(value)}, expected a number from {least:g} to {most:g}"
        )
    return number


def not_finite(value):
    """Is this NaN (how pandas writes null) or infinite?"""
    return isinstance(value, float) and not math.isfinite(value)


def is_unicode(text):
    """Without the lone surrogates that JSON allows and no file can hold?"""
    return not re.search("[\ud800-\udfff]", text)
