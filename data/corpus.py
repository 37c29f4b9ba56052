"""Corpora: tokenized documents from text, prepared folders and token files.

The tokens of text are its UTF-8 bytes, 0 to 255; token 256 ends each document. The folders of
`python -m data prepare` and the token files of nanoGPT and llm.c are memory-mapped.
"""

import codecs
import functools
import glob
import hashlib
import json
import os
import sysconfig
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

END_OF_DOCUMENT = 256  # the token after the bytes of a text
CHECKED_BYTES = 2**28  # the checksums of files up to this size are compared at every start
# A token file of llm.c (dev/data/data_common.py there) begins with 256 int32. The first is a key of
# LLM_C_DTYPES, and the third is the number of tokens.
LLM_C_HEADER_BYTES = 1024
LLM_C_DTYPES = {20240520: "uint16", 20240801: "uint32"}

JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
DOCUMENT_FILES = (*JSON_LINES, ".json", ".parquet")  # files of several documents, for `prepare`
OTHER_FILES = (".arrow", ".csv", ".npy", ".tar", ".tsv", ".warc")  # no documents, also if UTF-8


@dataclass(eq=False)
class Corpus:
    """Tokenized documents, in memory or memory-mapped.

    files: arrays of unsigned integers: the tokens, in order. Each document is in one array.
    starts: [documents + 1], int64: document d is the tokens starts[d] to starts[d + 1] - 1.
    vocab_size: token ids are smaller than this.
    tokenizer: the SHA-256 of the tokenizer's vocabulary; `bytes` for text; empty if unknown.
    fingerprint: text that is equal for equal documents, wherever their files are.
    note: a remark at the end of the corpus's line in the log.
    special_tokens: ids by Hugging Face's names; eos_token_id is the last token of a document.
    """

    files: list[np.ndarray]
    starts: np.ndarray
    vocab_size: int
    tokenizer: str
    fingerprint: str
    note: str = ""
    special_tokens: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file_starts = np.cumsum([0, *(len(file) for file in self.files)])

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns the tokens start to start + length - 1, which are of one document."""
        file = np.searchsorted(self.file_starts, start, side="right") - 1
        start -= self.file_starts[file]
        return self.files[file][start : start + length]


@functools.lru_cache(maxsize=2)
def open_corpus(key: str, name: str, skip_undecodable: bool, end_of_text_id: int) -> Corpus:
    """Opens a corpus. key: the config key of `name`. The others are also keys of `data_config`."""
    folder = os.path.expanduser(name)
    if is_prepared(folder):
        return read_prepared(folder, CHECKED_BYTES)
    is_stdlib = name == "python-stdlib"
    paths = find_files(key, name)
    for path in paths:
        if extension(path) in DOCUMENT_FILES + OTHER_FILES or is_compressed(path):
            raise ValueError(
                f"{key}={name!r}: {path} is neither text nor a .bin file of tokens; tokenize "
                f".json, .jsonl, .parquet and compressed files with `python -m data prepare`, "
                f"convert other kinds, or give a glob of text files"
            )
    others = [path for path in paths if extension(path) != ".bin"]
    if not others:
        return _read_token_files(paths, end_of_text_id)
    if len(others) < len(paths):
        raise ValueError(
            f"{key}={name!r} has .bin files ({len(paths) - len(others)}) and others "
            f"({len(others)}: {shortened(others)}); give a glob of one kind, such as 'folder/*.bin'"
        )
    documents, skipped = [], []
    for path in paths:
        # Some files of Python's tests are not UTF-8.
        document = read_text(path, skip_undecodable or is_stdlib)
        if document is None:
            skipped.append(path)
        else:
            # Runs on python-stdlib have trained on its few byte-order marks, and must resume.
            documents.append(document if is_stdlib else document.removeprefix(codecs.BOM_UTF8))
    if not any(documents):
        raise ValueError(
            f"{key}={name!r} has no text ({len(documents)} of its {len(paths)} files are empty, "
            f"{len(skipped)} are not UTF-8); give other files"
        )
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    tokens = np.empty(starts[-1], dtype=np.uint16)
    for start, document in zip(starts[:-1], documents, strict=True):
        tokens[start : start + len(document)] = np.frombuffer(document, dtype=np.uint8)
    tokens[starts[1:] - 1] = END_OF_DOCUMENT
    note = ""
    if skipped:
        note = f", without {len(skipped)} files that are not UTF-8: {shortened(skipped)}"
    fingerprint = hashlib.sha256(tokens).hexdigest()
    eos = {"eos_token_id": END_OF_DOCUMENT}
    return Corpus([tokens], starts, END_OF_DOCUMENT + 1, "bytes", fingerprint, note, eos)


def read_text(path: str, skip_undecodable: bool) -> bytes | None:
    """Returns the file's UTF-8 bytes, or None if it is not UTF-8 and skip_undecodable is set."""
    try:
        with open(path, "rb") as file:
            text = file.read()
        text.decode("utf-8")
    except OSError as error:
        raise _unreadable(error) from None
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return None
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); convert or remove it, or skip such files "
            f"with data_config.skip_undecodable=true (in `prepare`, with --skip-undecodable)"
        ) from None
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path} is a pointer of Git LFS; get the file with `git lfs pull`")
    return text


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{error.filename} cannot be read ({error.strerror}); make it readable")


def _read_token_files(paths: list[str], end_of_text_id: int) -> Corpus:
    """Memory-maps token files of nanoGPT (uint16, no header) or llm.c.

    It reads each file once to find the documents. They end with end_of_text_id or with their file.
    """
    files, starts, largest, base, crc32 = [], [np.zeros(1, dtype=np.int64)], 0, 0, 0
    has_ends = False
    for path in paths:
        try:
            size = os.path.getsize(path)
            header = np.fromfile(path, dtype=np.int32, count=LLM_C_HEADER_BYTES // 4)
        except OSError as error:
            raise _unreadable(error) from None
        if os.path.exists(os.path.splitext(path)[0] + ".idx"):
            raise ValueError(
                f"{path} has an .idx file beside it, as Megatron writes, but .bin files must be "
                f"nanoGPT's or llm.c's; give its text to `python -m data prepare`"
            )
        is_llm_c = len(header) == LLM_C_HEADER_BYTES // 4 and header[0] in LLM_C_DTYPES
        dtype = np.dtype(LLM_C_DTYPES[header[0]] if is_llm_c else "uint16")
        offset = LLM_C_HEADER_BYTES if is_llm_c else 0
        num_tokens, rest = divmod(size - offset, dtype.itemsize)
        if num_tokens == 0 or rest or (is_llm_c and num_tokens != header[2]):
            content = f"the {header[2]:,} tokens of its header" if is_llm_c else "whole tokens"
            raise ValueError(
                f"{path} has {size:,} bytes, but must hold {content} as {dtype}; create it again"
            )
        tokens = np.asarray(np.memmap(path, dtype, mode="r", offset=offset))
        # In 32-bit tokens, the high halves are all small. The low halves are not.
        low, high = tokens[: 2**24 : 2], tokens[1 : 2**24 : 2]
        if not is_llm_c and num_tokens % 2 == 0 and high.max() < 16 <= low.max():
            raise ValueError(
                f"{path} looks like tokens of 32 bits, but without llm.c's header they must be "
                f"uint16; add the header, or give the text to `python -m data prepare`"
            )
        for first in range(0, num_tokens, 2**24):
            block = tokens[first : first + 2**24]
            ends = np.flatnonzero(block == end_of_text_id)
            has_ends = has_ends or len(ends) > 0
            starts.append(ends + base + first + 1)
            largest = max(largest, int(block.max()))
            crc32 = zlib.crc32(block, crc32)
        files.append(tokens)
        base += num_tokens
        if tokens[-1] != end_of_text_id:
            starts.append(np.array([base]))
    starts = np.concatenate(starts)
    fingerprint = f"{base} tokens, {crc32:08x} {zlib.crc32(starts):08x}"
    eos = {"eos_token_id": end_of_text_id if has_ends else None}
    return Corpus(files, starts, largest + 1, "", fingerprint, special_tokens=eos)


def is_prepared(folder: str) -> bool:
    """Returns whether the folder holds a prepared corpus, or a part of one."""
    files = ("meta.json", "tokens.bin")
    return any(os.path.exists(os.path.join(folder, file)) for file in files)


def read_prepared(folder: str, checked_bytes: float) -> Corpus:
    """Memory-maps a folder that `python -m data prepare` wrote.

    checked_bytes: the checksums of larger files are not compared.
    Raises ValueError if the files do not match `meta.json`.
    """
    again = "the folder is damaged or incomplete; prepare the corpus again"
    try:
        with open(os.path.join(folder, "meta.json")) as file:
            meta = json.load(file)
        vocab_size, dtype = int(meta["vocab_size"]), np.dtype(meta["dtype"])
        counts = {"tokens.bin": int(meta["num_tokens"])}
        counts["offsets.bin"] = int(meta["num_documents"]) + 1
        checksums = {name: meta["sha256"][name] for name in counts}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); {again}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/meta.json is invalid ({error!r}); {again}") from None
    if (wanted := token_dtype(vocab_size)) != dtype:
        raise ValueError(
            f"{folder}/meta.json has dtype {dtype}, but {vocab_size:,} ids need {wanted}; {again}"
        )
    arrays = {}
    for name, item in (("tokens.bin", dtype), ("offsets.bin", np.dtype(np.int64))):
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != counts[name] * item.itemsize:
            raise ValueError(
                f"{path} has {size:,} bytes, but meta.json gives {counts[name]:,} x "
                f"{item.itemsize}; {again}"
            )
        try:
            if size <= checked_bytes and sha256(path) != checksums[name]:
                raise ValueError(f"{path} does not match its checksum in meta.json; {again}")
            arrays[name] = np.asarray(np.memmap(path, item, mode="r"))  # memmap slices are slow
        except OSError as error:
            raise _unreadable(error) from None
    tokens, starts = arrays["tokens.bin"], arrays["offsets.bin"]
    if starts[0] != 0 or starts[-1] != len(tokens) or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{folder}/offsets.bin does not rise from 0 to {len(tokens)}; {again}")
    fingerprint = f"{checksums['tokens.bin']} {checksums['offsets.bin']}"
    ids = {name: meta.get(name) for name in ("bos_token_id", "pad_token_id")}
    ids["eos_token_id"] = meta.get("end_of_text_id")
    tokenizer = meta.get("tokenizer_sha256", "")
    return Corpus([tokens], starts, vocab_size, tokenizer, fingerprint, special_tokens=ids)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest unsigned type that holds the token ids 0 to vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1)


def sha256(path: str) -> str:
    """Returns the file's SHA-256 in hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def extension(path: str) -> str:
    """Returns the file's extension in lower case, and not the one of compression."""
    path = path.lower()
    return os.path.splitext(os.path.splitext(path)[0] if is_compressed(path) else path)[1]


def is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".zst"))


def shortened(paths: list[str]) -> str:
    """Returns the names of the first five files."""
    names = ", ".join(os.path.basename(path) for path in paths[:5])
    return names + (", ..." if len(paths) > 5 else "")


def find_files(key: str, name: str) -> list[str]:
    """Returns the files of a path, folder, glob or `python-stdlib`, in a fixed order.

    key: the config key of `name`. Raises ValueError if there are none.
    """
    if name == "python-stdlib":
        stdlib = _files_below(sysconfig.get_path("stdlib"), ("site-packages", "dist-packages"))
        return [path for path in stdlib if path.endswith(".py")]
    pattern = os.path.expanduser(name)
    if os.path.isdir(pattern):
        paths = _files_below(pattern)
    elif os.path.isfile(pattern):
        paths = [pattern]
    else:
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        random = ", or 'random'" if key == "data_config.source" else ""
        where = "" if os.path.isabs(pattern) else f" (looked in {os.getcwd()})"
        raise ValueError(
            f"{key}={name!r} names no file; it must be 'python-stdlib', a path, a folder or a glob"
            f"{random}{where}"
        )
    return paths


def _files_below(root: str, excluded: tuple[str, ...] = ()) -> list[str]:
    """Returns all regular files below a folder, also those of linked folders, each folder's once.

    It leaves out hidden files, as a glob does, and the dataset cards of the hub's repositories.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    paths, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # links may form a cycle
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(  # which of two links is followed must not depend on the disk
            name for name in subfolders if name not in excluded and not name.startswith(".")
        )
        card = "README.md" if ".gitattributes" in names else None
        paths += [
            os.path.join(folder, name)
            for name in names
            if name != card and not name.startswith(".")
        ]
    # Reading a pipe would wait forever. A broken link stays, so that reading it is an error.
    return sorted(path for path in paths if os.path.isfile(path) or os.path.islink(path))
