"""Tokenizes a corpus into a folder that training reads with only numpy.

    python -m data prepare 'books/*.txt' more.jsonl --tokenizer T --output DIR

An INPUT is a text file (one document), a .jsonl or .json file (a document per line, or a list of
documents), a .parquet file (a document per row), one of these with .gz or .zst, a folder or a glob
of such files, `python-stdlib`, or the split `train` of a Hugging Face dataset, OWNER/NAME or
OWNER/NAME:CONFIG. Files come before datasets, in the given order.

T is `bytes`, a tokenizer.json, or a folder or hub name for transformers.AutoTokenizer. Each
document ends with the end-of-text token. Special tokens inside a text are encoded as text.

DIR then holds tokens.bin, offsets.bin, meta.json and, except for `bytes`, the tokenizer. Its name
is DIR.partial until it is complete. The next run empties an interrupted run's DIR.partial.
"""

import argparse
import collections
import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np

from .corpus import (
    DOCUMENT_FILES,
    OTHER_FILES,
    extension,
    find_files,
    is_prepared,
    read_prepared,
    read_text,
    sha256,
    shortened,
    token_dtype,
)
from .documents import check_columns, checked, cut, read_texts, text_of, unpack
from .encoder import Encoder

ENCODED_DOCUMENTS = 64  # documents per call of the tokenizer
WRITTEN = {"cache", "lock", "meta.json", "offsets.bin", "tokenizer", "tokens.bin"}


def prepare(
    inputs: list[str],
    tokenizer: str,
    output: str,
    field: str,
    end_of_text: str | None,
    skip_undecodable: bool,
    allow_lossy_tokenizer: bool,
    processes: int,
) -> None:
    """Tokenizes `inputs` into the folder `output`; the arguments are those of the command line.

    Raises ValueError if an argument or a document cannot be used. A failed run leaves no files.
    """
    output = os.path.abspath(output)
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    _check_absent(output)
    try:
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; to prepare, `pip install datasets transformers`") from None
    # A tokenizer that has used threads warns when the workers are forked.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Encoder(tokenizer, end_of_text, allow_lossy_tokenizer)
    files, hub_names = _find_inputs(inputs)

    partial = f"{output}.partial"
    cache = os.path.join(partial, "cache")
    lock = _lock(partial)
    try:
        _check_absent(output)  # another process may have completed it
        _empty(partial)
        start = time.perf_counter()
        os.mkdir(cache)
        files = [unpack(path, cache) for path in files]
        parts = [_open_files(files, field, skip_undecodable)] if files else []
        parts += [_open_hub(name, field, skip_undecodable) for name in hub_names]
        parts = [
            _tokenize(dataset, read, encoder, os.path.join(cache, f"{i}.arrow"), processes)
            for i, (dataset, read) in enumerate(parts)
        ]
        num_documents, num_tokens, num_bytes, left_out = _write_tokens(partial, parts)
        if num_bytes == 0:
            raise ValueError(f"the INPUTs {', '.join(inputs)} have no text; give other files")
        shutil.rmtree(cache)
        meta = {
            "tokenizer": tokenizer,
            "tokenizer_sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
            "end_of_text_id": encoder.end_of_text_id,
            **encoder.special_tokens,
            "dtype": str(token_dtype(encoder.vocab_size)),
            "num_documents": num_documents,
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
            "sha256": {n: sha256(os.path.join(partial, n)) for n in ("tokens.bin", "offsets.bin")},
        }
        with open(os.path.join(partial, "meta.json"), "w") as file:
            json.dump(meta, file, indent=2)
        if encoder.tokenizer is not None:
            try:
                encoder.tokenizer.save_pretrained(os.path.join(partial, "tokenizer"))
            except Exception as error:  # of tokenizers, on a full disk, in place of an OSError
                raise ValueError(f"--output {output} cannot be written: {error}") from None
        for folder, _, names in os.walk(partial):
            for name in {*names, "."} - {"lock"}:  # closing it would release the lock
                _fsync(os.path.join(folder, name))
        os.rename(partial, output)  # with the lock, so that no other process can empty it before
    except BaseException as error:
        with contextlib.suppress(OSError):  # what cannot be removed is the next run's to empty
            if _is_at_its_path(lock):
                _empty(partial)
                os.remove(lock.name)
                os.rmdir(partial)
        if isinstance(error, ValueError) and cache in str(error):
            # An unpacked file has the path of the compressed one, below the cache.
            raise ValueError(str(error).replace(cache, "")) from None
        raise
    finally:
        lock.close()
    os.remove(os.path.join(output, "lock"))
    _fsync(output)
    _fsync(os.path.dirname(output))
    seconds = time.perf_counter() - start
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
    print(
        f"{output}: {num_documents:,} documents, {num_tokens:,} tokens, "
        f"{num_bytes / num_tokens:.2f} bytes per token, {num_tokens / seconds:,.0f} tokens/s"
        + (f"; left out: {kinds}" if kinds else "")
    )


def _check_absent(output: str) -> None:
    if os.path.lexists(output):
        raise ValueError(f"--output {output} already exists; remove it or give another")


def _lock(partial: str) -> TextIO:
    """Returns the locked file `lock` of the folder `partial`, which it creates or finds.

    Raises ValueError if another process has the lock, or if `prepare` did not make the folder.
    """
    path = os.path.join(partial, "lock")
    os.makedirs(os.path.dirname(partial), exist_ok=True)
    try:
        os.mkdir(partial)
    except FileExistsError:
        is_folder = os.path.isdir(partial) and not os.path.islink(partial)
        names = set(os.listdir(partial)) if is_folder else set()
        if "lock" not in names or not names <= WRITTEN or os.path.islink(path):
            raise ValueError(
                f"{partial} is not a folder that an interrupted `prepare` left; move it, or give "
                f"another --output"
            ) from None
    lock, is_taken = open(path, "a"), False
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends
    except (BlockingIOError, PermissionError):
        is_taken = True
    except OSError:
        pass  # a file system without locks
    if is_taken or not _is_at_its_path(lock):
        lock.close()
        raise ValueError(f"another process writes {partial}; give another --output")
    return lock


def _is_at_its_path(lock: TextIO) -> bool:
    """Returns False once another process has renamed or removed the file that was opened."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def _empty(partial: str) -> None:
    """Removes all except the lock."""
    for entry in os.scandir(partial):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        elif entry.name != "lock":
            os.remove(entry)


def _find_inputs(inputs: list[str]) -> tuple[list[str], list[str]]:
    """Returns the files, and the names of Hugging Face datasets."""
    files, hub_names = [], []
    for name in inputs:
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name) and not os.path.lexists(name):
            hub_names.append(name)
            continue
        found = find_files("INPUT", name)
        taken = found
        if name == "python-stdlib":  # some files of Python's tests are not UTF-8
            taken = [path for path in found if read_text(path, skip_undecodable=True) is not None]
        elif os.path.isdir(os.path.expanduser(name)):
            taken = [path for path in found if extension(path) in DOCUMENT_FILES] or found
        if len(taken) < len(found):
            kinds = ", ".join(sorted({extension(path) for path in taken}))
            others = sorted(set(found) - set(taken))
            print(
                f"warning: INPUT={name!r} gives its {kinds} files ({len(taken)}), without others "
                f"({len(others)}: {shortened(others)})",
                file=sys.stderr,
            )
            found = taken
        for path in found:
            if extension(path) in (*OTHER_FILES, ".bin"):
                raise ValueError(
                    f"{path} is neither text nor one of {', '.join(DOCUMENT_FILES)}; convert it, "
                    f"or choose other files with a glob"
                )
        if not any(os.path.getsize(path) for path in found):
            raise ValueError(f"INPUT={name!r} has only empty files ({len(found)}); give others")
        files += found
    return files, hub_names


def _open_files(files: list[str], field: str, skip_undecodable: bool) -> tuple[Any, Callable]:
    """Returns a dataset of the files' pieces, and a function that yields the texts of a batch. The
    function appends the kinds of the documents that it leaves out to a list.
    """
    import datasets

    def read(batch: dict[str, list[str]], left_out: list[str]) -> Iterator[str]:
        for piece in batch["piece"]:
            for path, begin, end in json.loads(piece):
                yield from read_texts(
                    path, begin, end, field, left_out if skip_undecodable else None
                )

    pieces = [json.dumps(piece) for piece in cut(files, field)]
    return datasets.Dataset.from_dict({"piece": pieces}), read


def _open_hub(name: str, field: str, skip_undecodable: bool) -> tuple[Any, Callable]:
    """Returns the same for a Hugging Face dataset. `datasets` downloads it into its cache."""
    import datasets

    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split="train")
    except Exception as error:  # of many types: no network, no such name, no such config
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"INPUT={name!r} is neither a file nor a dataset: {reason}; looked in {os.getcwd()}"
        ) from None
    check_columns(dataset.column_names, name, field)

    def read(batch: dict[str, list], left_out: list[str]) -> Iterator[str]:
        for text in batch[field]:
            yield from checked(
                lambda: text_of({field: text}, field),  # noqa: B023  called at once
                lambda: name,
                left_out if skip_undecodable else None,
            )

    return dataset.select_columns([field]), read


def _tokenize(dataset: Any, read: Callable, encoder: Encoder, path: str, processes: int) -> Any:
    """Returns a dataset, stored at path: a row per document, with the columns of `Encoder.encode`.
    The row of a document that is left out has its kind of fault, and no tokens.

    read: yields the texts of a batch of `dataset`.
    """
    import datasets

    parent, dtype = os.getpid(), token_dtype(encoder.vocab_size)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded, left_out = {"tokens": [], "num_bytes": [], "left_out": []}, []
        texts = read(batch, left_out)
        while chunk := list(itertools.islice(texts, ENCODED_DOCUMENTS)):
            if parent not in (os.getpid(), os.getppid()):
                os._exit(1)  # the parent was killed
            for column, values in encoder.encode(chunk).items():
                encoded[column] += values
        encoded["tokens"] += [np.empty(0, dtype)] * len(left_out)
        encoded["num_bytes"] += [0] * len(left_out)
        encoded["left_out"] += left_out
        return encoded

    processes = min(processes, len(dataset))
    return dataset.map(
        encode,
        batched=True,
        batch_size=1 if dataset.column_names == ["piece"] else ENCODED_DOCUMENTS,
        remove_columns=dataset.column_names,
        features=datasets.Features(
            {
                "tokens": datasets.Sequence(datasets.Value(str(dtype))),
                "num_bytes": datasets.Value("int64"),
                "left_out": datasets.Value("string"),
            }
        ),
        cache_file_name=path,
        load_from_cache_file=False,
        new_fingerprint=os.path.basename(path),  # the default hashes the whole tokenizer
        num_proc=processes if processes > 1 else None,
        desc="Tokenizing",
    )


def _write_tokens(folder: str, parts: list[Any]) -> tuple[int, int, int, collections.Counter]:
    """Writes tokens.bin and offsets.bin. Returns the number of documents, tokens and text bytes,
    and of the documents that are left out, by kind.
    """
    num_documents = num_tokens = num_bytes = 0
    left_out = collections.Counter()
    with (
        open(os.path.join(folder, "tokens.bin"), "wb") as tokens,
        open(os.path.join(folder, "offsets.bin"), "wb") as offsets,
    ):
        offsets.write(np.zeros(1, dtype=np.int64).tobytes())
        for part in parts:
            for table in part.with_format("arrow").iter(batch_size=1000):
                left_out.update(table["left_out"].drop_null().to_pylist())
                table = table.filter(table["left_out"].is_null())
                for documents in table["tokens"].chunks:
                    ends = num_tokens + np.cumsum(documents.value_lengths().to_numpy())
                    offsets.write(ends.astype(np.int64).tobytes())
                    tokens.write(documents.flatten().to_numpy().tobytes())
                    num_tokens += len(documents.flatten())
                num_documents += len(table)
                num_bytes += sum(table["num_bytes"].to_pylist())
    return num_documents, num_tokens, num_bytes, left_out


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="tokenize a corpus")
    command.add_argument("inputs", nargs="+", type=os.path.expanduser, metavar="INPUT")
    command.add_argument("--tokenizer", required=True, type=os.path.expanduser, metavar="T")
    command.add_argument("--output", required=True, type=os.path.expanduser, metavar="DIR")
    command.add_argument("--field", default="text", help="field with the text (default: text)")
    command.add_argument(
        "--end-of-text", metavar="TOKEN", help="last token of a document (default: T's eos_token)"
    )
    command.add_argument(
        "--skip-undecodable",
        action="store_true",
        help="leave out documents that are empty, null, invalid or not UTF-8, and count them",
    )
    command.add_argument(
        "--allow-lossy-tokenizer",
        action="store_true",
        help="accept a T that changes text, or finds the end-of-text token inside a document",
    )
    command.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="default: one per core"
    )
    command = commands.add_parser("verify", help="compare a prepared folder with its checksums")
    command.add_argument("folder", type=os.path.expanduser, metavar="DIR")
    options = vars(parser.parse_args(arguments))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated: nothing was written"))
    # An idle worker would not run this handler, and the pool would wait for the worker.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        if options.pop("command") == "prepare":
            prepare(**options)
        else:
            folder = options["folder"]
            if not is_prepared(folder):
                path = os.path.abspath(os.path.join(folder, "meta.json"))
                raise ValueError(f"DIR={folder!r} is not a prepared folder: there is no {path}")
            read_prepared(folder, checked_bytes=float("inf"))
            print(f"{folder}: complete, and all checksums match")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
