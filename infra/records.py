"""A file of JSON records, whatever it is called."""

import json
from functools import partial
from pathlib import Path

from infra.errors import DataError

FIELDS = "problem, options, problem_type, data_type, solution, path"
FORM = f"a list of objects with {FIELDS}"
BINARY = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\3\4": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}  # the first bytes of files that are not records


def read_records(path):
    """The records of a file as they are -> [(where, a function that gives the record), ...]; `where` names file and record.

    By content, whatever the file is called: a JSON list, or else JSON lines. Raises DataError for any other file.
    """
    path = Path(path)
    text = _text(path)
    try:
        whole = _json(text, path)
    except DataError:
        if (
            text.lstrip().startswith("[") and path.suffix != ".jsonl"
        ):  # there it is a line that is no record
            raise
        whole = None
    if isinstance(whole, list):
        return [(f"{path}, record {i}", lambda r=r: r) for i, r in enumerate(whole)]
    lines = [
        (f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if whole and len(lines) > 1:
        raise DataError(f"{path}: holds one JSON {type(whole).__name__}, expected {FORM}")
    return [(where, partial(_json, line, where)) for where, line in lines]


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


def _json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON, or cut off: {e}; expected {FORM}") from e
