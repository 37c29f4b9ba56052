"""Reads the documents of text, JSON and parquet files, one part of a file at a time.

A bad document raises ValueError with its file and its line, element or row, or is left out.
"""

import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .corpus import JSON_LINES, extension, is_compressed, read_text

PIECE_BYTES = 2**22  # size of a piece, the text that a process gets at a time
BATCH_ROWS = 64  # parquet rows that are read at a time
LARGEST_READ = 2**31  # bytes of a text file, a .json file or a line, which are read whole


class BadDocument(ValueError):
    """Its arguments: the kind of the fault, to count such documents, and the reason."""


def unpack(path: str, folder: str) -> str:
    """Returns the path, or for a compressed file the path of its content, written below folder."""
    if not is_compressed(path):
        return path
    import pyarrow

    content = folder + os.path.abspath(path)
    os.makedirs(os.path.dirname(content), exist_ok=True)
    compression = "gzip" if path.lower().endswith(".gz") else "zstd"
    try:
        with pyarrow.input_stream(path, compression=compression) as packed:
            with open(content, "wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
    except OSError as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); replace it") from None
    return content


def cut(files: list[str], field: str) -> Iterator[list[tuple[str, int, int]]]:
    """Yields pieces of about PIECE_BYTES, each a list of (file, begin, end): a part of a large
    file, or several small files. begin and end count bytes, or row groups in parquet.
    """
    piece, piece_bytes = [], 0
    for path in files:
        size = os.path.getsize(path)
        if extension(path) == ".parquet":
            parts = _row_groups(path, field)
        elif extension(path) in JSON_LINES:
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
    path: str, begin: int, end: int, field: str, left_out: list[str] | None
) -> Iterator[str]:
    """Yields the texts of a part of a file.

    left_out: gets the kind of fault of each document that is empty or bad. If it is None, a bad
    document raises ValueError with its place.
    """
    if extension(path) == ".parquet":
        yield from _read_parquet(path, begin, end, field, left_out)
    elif extension(path) in JSON_LINES:
        yield from _read_lines(path, begin, end, field, left_out)
    elif end > LARGEST_READ:
        raise ValueError(f"{path} has {end:,} bytes, but may have {LARGEST_READ:,}; cut it")
    elif (content := read_text(path, left_out is not None)) is None:
        print(f"warning: {path} is not UTF-8 and skipped", file=sys.stderr)
        left_out.append("not UTF-8")
    elif extension(path) != ".json":
        yield from checked(content.removeprefix(codecs.BOM_UTF8).decode, lambda: path, left_out)
    elif not (content := content.removeprefix(codecs.BOM_UTF8)).lstrip().startswith(b"["):
        yield from _read_lines(path, begin, end, field, left_out)
    else:
        documents = checked(lambda: json.loads(content), lambda: path, left_out)
        if not documents:
            print(f"warning: {path} is {left_out[-1]} and skipped", file=sys.stderr)
        for i, document in enumerate(documents[0] if documents else []):
            yield from checked(
                lambda: text_of(document, field),  # noqa: B023  called at once
                lambda: f"{path}, element {i + 1}",  # noqa: B023
                left_out,
            )


def _read_lines(
    path: str, begin: int, end: int, field: str, left_out: list[str] | None
) -> Iterator[str]:
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
        while (position := file.tell()) < end and (line := file.readline(LARGEST_READ + 1)):
            if len(line) > LARGEST_READ:
                raise ValueError(f"{where()}: a line may have {LARGEST_READ:,} bytes; cut it")
            if line := line.removeprefix(codecs.BOM_UTF8).strip():
                yield from checked(
                    lambda: text_of(json.loads(line.decode()), field),  # noqa: B023  called at once
                    where,
                    left_out,
                )


def _read_parquet(
    path: str, begin: int, end: int, field: str, left_out: list[str] | None
) -> Iterator[str]:
    """Yields the texts of the row groups begin to end - 1."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(begin))
        for batch in file.iter_batches(BATCH_ROWS, list(range(begin, end)), [field]):
            for value in batch.column(0):
                row += 1
                yield from checked(
                    lambda: text_of({field: value.as_py()}, field),  # noqa: B023  called at once
                    lambda: f"{path}, row {row}",  # noqa: B023
                    left_out,
                )


def checked(
    load: Callable[[], Any], where: Callable[[], str], left_out: list[str] | None
) -> list[Any]:
    """Returns what `load` returns in a list, or [] if it is left out.

    where: returns the place, for the message. left_out: see `read_texts`.
    """
    try:
        loaded = load()
        if loaded != "" or left_out is None:
            return [loaded]
        kind = "empty"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        kind, reason = "invalid JSON", f"invalid JSON ({error.msg} at {line}column {error.colno})"
    except RecursionError:
        kind = reason = "JSON nested too deeply"
    except UnicodeError as error:
        kind, reason = "not UTF-8", f"not UTF-8 ({error.reason})"
    except BadDocument as error:
        kind, reason = error.args
    except ValueError as error:  # such as a number of too many digits
        kind, reason = "invalid JSON", f"invalid JSON ({error})"
    if left_out is None:
        raise ValueError(
            f"{where()}: {reason}; correct it, or leave out such documents with --skip-undecodable"
        )
    left_out.append(kind)
    return []


def text_of(document: Any, field: str) -> str:
    """Returns the document's text. Raises BadDocument or UnicodeError if it has none."""
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise BadDocument("not an object", f"it is a {kind}, not an object with a field {field!r}")
    if field not in document:
        fields = ", ".join(document) or "none"
        raise BadDocument(
            f"without field {field!r}", f"--field {field!r} is not one of its fields ({fields})"
        )
    text = document[field]
    if text is None:
        raise BadDocument("null", f"field {field!r} is null, not a string")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadDocument("not a string", f"field {field!r} is of type {kind}, not a string")
    text.encode()  # raises UnicodeError for half a surrogate pair, which JSON allows
    return text


def check_columns(columns: list[str], name: str, field: str) -> None:
    if field not in columns:
        raise ValueError(f"no column {field!r} in {name}; choose --field from {', '.join(columns)}")
