"""Reads the documents of text, JSON and parquet files, one part of a file at a time.

A bad document raises ValueError with its file and its line, element or row.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .corpus import read_text

PIECE_BYTES = 2**22  # size of a piece, the text that a process gets at a time
BATCH_ROWS = 64  # parquet rows that are read at a time


def cut(files: list[str], field: str) -> Iterator[list[tuple[str, int, int]]]:
    """Yields pieces of about PIECE_BYTES, each a list of (file, begin, end): a part of a large
    file, or several small files. begin and end count bytes, or row groups in parquet.
    """
    piece, piece_bytes = [], 0
    for path in files:
        size = os.path.getsize(path)
        if path.endswith(".parquet"):
            parts = _row_groups(path, field)
        elif path.endswith(".jsonl"):
            begins = range(0, size, PIECE_BYTES)
            parts = [(begin, begin + PIECE_BYTES, min(size, PIECE_BYTES)) for begin in begins]
        else:
            parts = [(0, size, size)]
        for begin, end, part_bytes in parts:
            piece.append((path, begin, end))
            piece_bytes += part_bytes
            if piece_bytes >= PIECE_BYTES:
                yield piece
                piece, piece_bytes = [], 0
    if piece:
        yield piece


def _row_groups(path: str, field: str) -> list[tuple[int, int, int]]:
    """Returns (index, index + 1, bytes) of each row group."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); replace it") from None
    check_columns(names, path, field)
    groups = range(metadata.num_row_groups)
    return [(i, i + 1, metadata.row_group(i).total_byte_size) for i in groups]


def read_texts(
    path: str, begin: int, end: int, field: str, skip_undecodable: bool
) -> Iterator[str]:
    """Yields the texts of a part of a file. Raises ValueError with the place of a bad document."""
    if path.endswith(".parquet"):
        yield from _read_parquet(path, begin, end, field)
    elif path.endswith(".jsonl"):
        yield from _read_lines(path, begin, end, field)
    elif (text := read_text(path, skip_undecodable)) is None:
        print(f"warning: {path} is not UTF-8 and skipped", file=sys.stderr)
    elif not path.endswith(".json"):
        yield text.decode()
    elif not text.lstrip().startswith(b"["):
        yield from _read_lines(path, begin, end, field)
    else:
        with located(lambda: path):
            documents = json.loads(text)
        for i, document in enumerate(documents):
            with located(lambda: f"{path}, element {i + 1}"):  # noqa: B023  called at once
                document = text_of(document, field)
            yield document


def _read_lines(path: str, begin: int, end: int, field: str) -> Iterator[str]:
    """Yields the texts of the JSON lines that begin at one of the bytes begin to end - 1."""

    def where() -> str:
        file.seek(0)  # lines are counted only for an error
        number = 1
        while file.tell() < position:
            file.readline()
            number += 1
        return f"{path}, line {number}"

    with open(path, "rb") as file:
        if begin > 0:
            file.seek(begin - 1)
            file.readline()
        while (position := file.tell()) < end and (line := file.readline()):
            if not line.isspace():
                with located(where):
                    text = text_of(json.loads(line.decode().strip()), field)
                yield text


def _read_parquet(path: str, begin: int, end: int, field: str) -> Iterator[str]:
    """Yields the texts of the row groups begin to end - 1."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(begin))
        for batch in file.iter_batches(BATCH_ROWS, list(range(begin, end)), [field]):
            for value in batch.column(0):
                row += 1
                with located(lambda: f"{path}, row {row}"):  # noqa: B023  called at once
                    text = text_of({field: value.as_py()}, field)
                yield text


@contextlib.contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Adds the place to the message of a ValueError that the `with` block raises."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"invalid JSON ({error.msg} at {line}column {error.colno}); correct it"
        raise ValueError(f"{where()}: {reason}") from None
    except UnicodeError as error:
        raise ValueError(f"{where()}: not UTF-8 ({error.reason}); correct it") from None
    except ValueError as error:
        raise ValueError(f"{where()}: {error}") from None


def text_of(document: Any, field: str) -> str:
    """Returns the document's text. Raises ValueError, without the place, if it has none."""
    if not isinstance(document, dict):
        raise ValueError(f"it is a {type(document).__name__}, not an object with a field {field!r}")
    if field not in document:
        fields = ", ".join(document) or "none"
        raise ValueError(f"it has no field {field!r}; choose --field from its fields: {fields}")
    text = document[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is of type {type(text).__name__}; it must be a string")
    text.encode()  # raises UnicodeError for half a surrogate pair, which JSON allows
    return text


def check_columns(columns: list[str], name: str, field: str) -> None:
    if field not in columns:
        raise ValueError(f"no column {field!r} in {name}; choose --field from {', '.join(columns)}")
