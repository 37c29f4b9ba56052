"""The token stream: a batch is a pure function of (seed, step).

    python data.py prepare INPUT... --tokenizer T --output DIR    # tokenizes a corpus
    python data.py verify DIR                                     # compares it with its checksums

A corpus is many documents, each a run of tokens: text files, whose tokens 0 to 255 are UTF-8 bytes
and 256 ends a document; a folder that `prepare` wrote; or token files of nanoGPT and llm.c. The
last two are memory-mapped.

The stream is endless: every epoch deals out all documents once, in an order of its own, one after
the other. It is cut into rows of `seqlen` tokens, so that long documents are cut and short ones
packed. The rows that begin in an epoch are shuffled, so that a batch does not hold neighbours. Each
row is taken once: no token is dropped or repeated, and any rank can build any row without having
built another. Step n takes the rows from n x batch_size on.
"""

import functools
import glob
import hashlib
import json
import os
import sys
import sysconfig
from dataclasses import dataclass
from typing import Any

import numpy as np

END_OF_DOCUMENT = 256  # of text as bytes
IGNORED_LABEL = -100
WINDOW_ROWS = 2**20  # rows are shuffled within windows of so many, however long the epoch
CHECKED_BYTES = 2**28  # files up to this size are compared with their checksum at every start
# llm.c's token files (its dev/data/data_common.py): 256 int32, of which the first is one of these
# and the third the number of tokens; then the tokens.
LLM_C_HEADER_BYTES = 1024
LLM_C_DTYPES = {20240520: "uint16", 20240801: "uint32"}


@dataclass
class Rows:
    """Some rows of a global batch.

    tokens, labels: [rows, seqlen], int64. A label is the token that follows in the same document,
    `IGNORED_LABEL` where none does.
    document_lengths: tokens of each piece of a document, row by row; each row's sum is seqlen.
    """

    tokens: np.ndarray
    labels: np.ndarray
    document_lengths: list[int]


@dataclass(eq=False)
class Corpus:
    """Tokenized documents, in memory or memory-mapped.

    files: arrays of unsigned integers, which together are one long array of tokens.
    starts: [documents + 1], int64: document d is starts[d] to starts[d + 1] of it, in one file.
    vocab_size: no token id is this or larger.
    tokenizer: the same for corpora with the same token ids, empty where that is not known.
    note: what the log should say of it, beside its size.
    """

    files: list[np.ndarray]
    starts: np.ndarray
    vocab_size: int
    tokenizer: str
    note: str = ""

    def __post_init__(self) -> None:
        self.file_starts = np.cumsum([0, *(len(file) for file in self.files)])

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns the tokens from `start` on, of one document."""
        file = np.searchsorted(self.file_starts, start, side="right") - 1
        start -= self.file_starts[file]
        return self.files[file][start : start + length]


@dataclass(eq=False)
class TokenSource:
    """Rows of some of a corpus's documents.

    starts, lengths: [documents], int64: where in the corpus each begins, and its tokens.
    description: one line for the log.
    """

    corpus: Corpus
    starts: np.ndarray
    lengths: np.ndarray
    seed: int
    description: str

    def __post_init__(self) -> None:
        self.num_tokens = int(self.lengths.sum())  # of an epoch
        # Pure functions, asked for the same again and again. A batch seldom touches more than two
        # epochs; for 10 million documents each takes 0.5 s and 160 MB.
        self.epoch_order = functools.lru_cache(maxsize=2)(self._epoch_order)
        self.window_order = functools.lru_cache(maxsize=2)(self._window_order)

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run.

        Raises ValueError for a token id beyond the corpus's vocabulary, a damaged file.
        """
        tokens = np.empty((num_rows, seqlen), dtype=np.int64)
        labels = np.full((num_rows, seqlen), IGNORED_LABEL, dtype=np.int64)
        document_lengths = []
        for row in range(num_rows):
            position, filled = self._row_position(first_row + row, seqlen), 0
            while filled < seqlen:
                epoch, offset = divmod(position + filled, self.num_tokens)
                order, ends = self.epoch_order(epoch)
                place = np.searchsorted(ends, offset, side="right")
                document, left = order[place], int(ends[place]) - offset
                length = min(left, seqlen - filled)
                start = self.starts[document] + self.lengths[document] - left
                piece = self.corpus.read(start, min(left, length + 1))  # one more for its label
                tokens[row, filled : filled + length] = piece[:length]
                labels[row, filled : filled + len(piece) - 1] = piece[1:]
                document_lengths.append(length)
                filled += length
        if max(tokens.max(), labels.max()) >= self.corpus.vocab_size:
            raise ValueError(
                f"{self.description}: it holds the token {max(tokens.max(), labels.max())}, and "
                f"its vocabulary ends at {self.corpus.vocab_size - 1}; the files are damaged"
            )
        return Rows(tokens, labels, document_lengths)

    def _row_position(self, row: int, seqlen: int) -> int:
        """Returns where in the endless stream a row of the run begins."""
        epoch = row * seqlen // self.num_tokens
        # The rows that begin in the epoch, one more or less of them from epoch to epoch.
        first = -(-epoch * self.num_tokens // seqlen)
        end = -(-(epoch + 1) * self.num_tokens // seqlen)
        window, index = divmod(row - first, WINDOW_ROWS)
        first += window * WINDOW_ROWS
        order = self.window_order(epoch, window, min(WINDOW_ROWS, end - first))
        return (first + int(order[index])) * seqlen

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's order of documents, and where each ends in the epoch's stream."""
        order = permutation([self.seed, 0, epoch], len(self.lengths))
        ends = self.lengths.take(order)
        return order, np.cumsum(ends, out=ends)  # in place: fresh memory costs as much as the sum

    def _window_order(self, epoch: int, window: int, window_size: int) -> np.ndarray:
        """Returns the order in which the rows of a window are taken."""
        return permutation([self.seed, 1, epoch, window], window_size)


def permutation(seed: list[int], size: int) -> np.ndarray:
    """Returns the numbers 0 to size - 1 in a random order, [size], int64.

    Random numbers with 0, 1, 2... in their low bits are sorted: of 10 million in half the time of
    `Generator.permutation`, and numpy promises the numbers of PCG64 for all its versions, but not
    that order.
    """
    bits = size.bit_length()
    keys = np.random.PCG64(seed).random_raw(size)
    keys >>= bits
    keys <<= bits
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= (1 << bits) - 1
    return keys.view(np.int64)


@dataclass(eq=False)
class RandomSource:
    """Uniformly random tokens and, independent of them, labels: nothing to learn, for timing."""

    vocab_size: int
    seed: int
    document_length: int  # tokens; 0: a row is one document

    @property
    def description(self) -> str:
        length = f"of {self.document_length:,} tokens" if self.document_length else "of a whole row"
        return f"random tokens and labels, documents {length}"

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run."""
        tokens, labels = (np.empty((num_rows, seqlen), dtype=np.int64) for _ in range(2))
        for row in range(num_rows):
            rng = np.random.default_rng([self.seed, first_row + row])
            tokens[row] = rng.integers(self.vocab_size, size=seqlen)
            labels[row] = rng.integers(self.vocab_size, size=seqlen)
        length = min(self.document_length or seqlen, seqlen)
        rest = [seqlen % length] if seqlen % length else []
        return Rows(tokens, labels, ([length] * (seqlen // length) + rest) * num_rows)


@functools.lru_cache(maxsize=2)
def open_source(
    split: str,
    vocab_size: int,
    num_batches: int,
    *,
    source: str,
    random_document_length: int,
    skip_undecodable: bool,
    end_of_text_id: int,
    validation_fraction: float,
    validation_source: str,
    seqlen: int,
    batch_size: int,
    seed: int,
) -> TokenSource | RandomSource:
    """Opens one split of what `data_config` names; asked for the same again, it returns the same.

    split: "train" or "validation". vocab_size: the model's. num_batches: how many batches the split
    has to hold without repeating a token. The other arguments are the keys of `data_config`.

    The validation split's rows do not depend on the seed: runs can be compared.

    Raises ValueError for what cannot be read, token ids beyond vocab_size, and too little text.
    """
    key, name = "data_config.source", source
    if split == "validation" and validation_source:
        key, name = "data_config.validation_source", validation_source
    if name == "random":
        if validation_fraction or key != "data_config.source":
            raise ValueError(f"{key}='random' has no documents that could be held out; name a text")
        return RandomSource(vocab_size, seed, random_document_length)
    corpus = open_corpus(key, name, skip_undecodable, end_of_text_id)
    if corpus.vocab_size > vocab_size:
        raise ValueError(
            f"{key}={name!r} has token ids up to {corpus.vocab_size - 1}, and the model's "
            f"vocab_size is {vocab_size}; it must be at least {corpus.vocab_size} "
            f"(model_config.overrides.vocab_size), or the tokenizer another"
        )
    if key == "data_config.validation_source" and source != "random":
        trained_on = open_corpus("data_config.source", source, skip_undecodable, end_of_text_id)
        if len({corpus.tokenizer, trained_on.tokenizer} - {""}) > 1:
            raise ValueError(
                f"{key}={name!r} and data_config.source={source!r} have different tokenizers"
            )

    starts, lengths = corpus.starts[:-1], np.diff(corpus.starts)
    if validation_fraction:
        # Every so many documents one, whatever the seed: floor(documents x fraction) in all.
        held_out = np.diff(np.floor(np.arange(len(starts) + 1) * validation_fraction)) > 0
        if not 0 < held_out.sum() < len(starts):
            raise ValueError(
                f"data_config.validation_fraction={validation_fraction} of {len(starts):,} "
                f"documents holds out {held_out.sum()}, and both splits need one; change it or set "
                f"validation_source"
            )
        chosen = held_out if split == "validation" else ~held_out
        starts, lengths = starts[chosen], lengths[chosen]
    num_tokens, needed = int(lengths.sum()), num_batches * batch_size * seqlen
    if num_tokens < needed:
        what = "eval_iters" if split == "validation" else "one step:"
        raise ValueError(
            f"{key}={name!r} has {num_tokens:,} tokens for {split}, and {what} {num_batches} x "
            f"batch_size {batch_size} x seqlen {seqlen} = {needed:,} are needed; give more text or "
            f"lower one of these"
        )
    description = f"{name}, {len(starts):,} documents, {num_tokens:,} tokens{corpus.note}"
    return TokenSource(corpus, starts, lengths, 0 if split == "validation" else seed, description)


@functools.lru_cache(maxsize=2)
def open_corpus(key: str, name: str, skip_undecodable: bool, end_of_text_id: int) -> Corpus:
    """Opens what a key of the config, for messages, names; see `data_config` for the arguments."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) and {"meta.json", "tokens.bin"} & set(os.listdir(folder)):
        return read_prepared(folder, CHECKED_BYTES)
    skip_undecodable |= name == "python-stdlib"  # whose own tests hold broken files
    paths = find_files(key, name)
    if all(path.endswith(".bin") for path in paths):
        return _read_token_files(paths, end_of_text_id)
    documents, skipped = [], []
    for path in paths:
        document = read_text(path, skip_undecodable)
        if document is None:
            skipped.append(os.path.basename(path))
        else:
            documents.append(document)
    if not any(documents):
        raise ValueError(
            f"{key}={name!r} holds no text: {len(documents)} of its {len(paths)} files are empty, "
            f"{len(skipped)} are not UTF-8"
        )
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    tokens = np.empty(starts[-1], dtype=np.uint16)
    for start, document in zip(starts[:-1], documents, strict=True):
        tokens[start : start + len(document)] = np.frombuffer(document, dtype=np.uint8)
    tokens[starts[1:] - 1] = END_OF_DOCUMENT
    note = ""
    if skipped:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        note = f", without {len(skipped)} files that are not UTF-8: {names}"
    return Corpus([tokens], starts, END_OF_DOCUMENT + 1, "bytes", note)


def read_text(path: str, skip_undecodable: bool) -> bytes | None:
    """Returns the file's UTF-8 bytes, None for a file that is not UTF-8 and to be skipped."""
    try:
        with open(path, "rb") as file:
            text = file.read()
        text.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return None
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); convert or remove it, or leave such files "
            f"out with data_config.skip_undecodable=true (of `prepare`: --skip-undecodable)"
        ) from None
    return text


def _read_token_files(paths: list[str], end_of_text_id: int) -> Corpus:
    """Maps files of nanoGPT (uint16, no header) or llm.c, and finds the documents in them.

    A document ends with end_of_text_id or with its file. Each file is read once, to find them.
    """
    files, starts, largest, base = [], [np.zeros(1, dtype=np.int64)], 0, 0
    for path in paths:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype=np.int32, count=LLM_C_HEADER_BYTES // 4)
        is_llm_c = len(header) == LLM_C_HEADER_BYTES // 4 and header[0] in LLM_C_DTYPES
        dtype = np.dtype(LLM_C_DTYPES[header[0]] if is_llm_c else "uint16")
        offset = LLM_C_HEADER_BYTES if is_llm_c else 0
        num_tokens, rest = divmod(size - offset, dtype.itemsize)
        if num_tokens == 0 or rest or (is_llm_c and num_tokens != header[2]):
            number = (
                f"the {header[2]:,} tokens that it tells of" if is_llm_c else "one token or more"
            )
            raise ValueError(f"{path} has {size:,} bytes; {number} in {dtype} take another number")
        tokens = np.asarray(np.memmap(path, dtype, mode="r", offset=offset))
        for first in range(0, num_tokens, 2**24):
            block = tokens[first : first + 2**24]
            starts.append(np.flatnonzero(block == end_of_text_id) + base + first + 1)
            largest = max(largest, int(block.max()))
        files.append(tokens)
        base += num_tokens
        if tokens[-1] != end_of_text_id:
            starts.append(np.array([base]))
    return Corpus(files, np.concatenate(starts), largest + 1, tokenizer="")


def read_prepared(folder: str, checked_bytes: float) -> Corpus:
    """Maps a folder that `data.py prepare` wrote.

    checked_bytes: the size of files above which the checksum is not compared.
    Raises ValueError where the files do not fit `meta.json`.
    """
    again = f"the folder is damaged or not whole; remove {folder} and prepare it again"
    try:
        with open(os.path.join(folder, "meta.json")) as file:
            meta = json.load(file)
        vocab_size, dtype = int(meta["vocab_size"]), np.dtype(meta["dtype"])
        counts = {"tokens.bin": int(meta["num_tokens"])}
        counts["offsets.bin"] = int(meta["num_documents"]) + 1
        checksums = {name: meta["sha256"][name] for name in counts}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/meta.json makes no sense ({error!r}): {again}") from None
    if (wanted := token_dtype(vocab_size)) != dtype:
        raise ValueError(
            f"{folder}/meta.json: {vocab_size} ids are stored as {wanted}, not as {dtype}: {again}"
        )
    arrays = {}
    for name, item in (("tokens.bin", dtype), ("offsets.bin", np.dtype(np.int64))):
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != counts[name] * item.itemsize:
            raise ValueError(
                f"{path} has {size:,} bytes, not {counts[name]:,} x {item.itemsize}, as meta.json "
                f"says: {again}"
            )
        if size <= checked_bytes and sha256(path) != checksums[name]:
            raise ValueError(f"{path} does not have the checksum that meta.json says: {again}")
        arrays[name] = np.asarray(np.memmap(path, item, mode="r"))  # plain slices are faster
    tokens, starts = arrays["tokens.bin"], arrays["offsets.bin"]
    if starts[0] != 0 or starts[-1] != len(tokens) or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{folder}/offsets.bin does not cover tokens.bin: {again}")
    return Corpus([tokens], starts, vocab_size, meta.get("tokenizer_sha256", ""))


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


def find_files(key: str, name: str) -> list[str]:
    """Returns the files that a path, folder (all files below it), glob or `python-stdlib` stands
    for, in a fixed order. key: what the name was given as. Raises ValueError if there is none.
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
        raise ValueError(
            f"{key}={name!r} names no file; it must be 'python-stdlib', a path, a folder or a glob"
            + (", or 'random'" if key == "data_config.source" else "")
        )
    return paths


def _files_below(root: str, left_out: tuple[str, ...] = ()) -> list[str]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in left_out]
        paths += [os.path.join(folder, name) for name in names]
    return sorted(paths)


if __name__ == "__main__":
    import prepare_corpus  # its command line; training needs neither it nor its libraries

    prepare_corpus.main(sys.argv[1:])
