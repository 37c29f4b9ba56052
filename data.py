"""The token stream: a batch is a pure function of (seed, step).

Text becomes bytes: tokens 0 to 255 are the UTF-8 bytes of a document, 256 ends it. The stream is
endless: every epoch deals out all documents once, in an order of its own, one after the other. It
is cut into rows of `seqlen` tokens, and the rows are shuffled within windows of about an epoch, so
that a batch does not hold neighbours. Each row is taken once: no token is dropped or repeated, and
any rank can build any row without having built another. Step n takes the rows from n x batch_size
on.
"""

import functools
import glob
import os
import sysconfig
from dataclasses import dataclass

import numpy as np

END_OF_DOCUMENT = 256
IGNORED_LABEL = -100


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
class TextSource:
    """Documents as bytes, in memory.

    tokens: [tokens], uint16, all documents one after the other, each with its end-of-document.
    starts: [documents + 1], int64: document d is tokens[starts[d] : starts[d + 1]].
    description: one line for the log.
    """

    tokens: np.ndarray
    starts: np.ndarray
    seed: int
    description: str

    def __post_init__(self) -> None:
        # Pure functions, asked for the same again and again: a batch touches at most two windows,
        # and those at most three epochs.
        self.epoch_order = functools.lru_cache(maxsize=3)(self._epoch_order)
        self.window_order = functools.lru_cache(maxsize=2)(self._window_order)

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run."""
        tokens = np.empty((num_rows, seqlen), dtype=np.int64)
        labels = np.full((num_rows, seqlen), IGNORED_LABEL, dtype=np.int64)
        document_lengths = []
        window_size = max(1, len(self.tokens) // seqlen)
        for row in range(num_rows):
            window, index = divmod(first_row + row, window_size)
            order = self.window_order(window, window_size)
            position = (window * window_size + int(order[index])) * seqlen
            filled = 0
            while filled < seqlen:
                epoch, offset = divmod(position + filled, len(self.tokens))
                documents, ends = self.epoch_order(epoch)
                place = np.searchsorted(ends, offset, side="right")
                end = self.starts[documents[place] + 1]  # of this document, in self.tokens
                begin = end - (ends[place] - offset)
                length = int(min(end - begin, seqlen - filled))
                following = self.tokens[begin + 1 : min(begin + length + 1, end)]
                tokens[row, filled : filled + length] = self.tokens[begin : begin + length]
                labels[row, filled : filled + len(following)] = following
                document_lengths.append(length)
                filled += length
        return Rows(tokens, labels, document_lengths)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's order of documents, and where each ends in the epoch's stream."""
        documents = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.starts) - 1)
        return documents, np.cumsum(np.diff(self.starts)[documents])

    def _window_order(self, window: int, window_size: int) -> np.ndarray:
        """Returns the order in which the rows of a window are taken."""
        return np.random.default_rng([self.seed, 1, window]).permutation(window_size)


@dataclass(eq=False)
class RandomSource:
    """Uniformly random tokens and, independent of them, labels: nothing to learn, for timing."""

    vocab_size: int
    seed: int
    description: str = "random tokens and labels, one document per row"

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run."""
        tokens, labels = (np.empty((num_rows, seqlen), dtype=np.int64) for _ in range(2))
        for row in range(num_rows):
            rng = np.random.default_rng([self.seed, first_row + row])
            tokens[row] = rng.integers(self.vocab_size, size=seqlen)
            labels[row] = rng.integers(self.vocab_size, size=seqlen)
        return Rows(tokens, labels, [seqlen] * num_rows)


@functools.lru_cache(maxsize=1)
def open_source(
    source: str, vocab_size: int, seed: int, skip_undecodable: bool
) -> TextSource | RandomSource:
    """Opens what `data_config.source` names; asked again for the same, it returns the same object.

    source: `python-stdlib` (every .py file of the running interpreter's standard library),
    `random`, or a path or glob of text files; a folder stands for all files below it.
    skip_undecodable: leave out files that are not UTF-8, and say so in the description.

    Raises ValueError if there is no such file, no text, a file that is not UTF-8 and not to be
    skipped, or a token id beyond vocab_size.
    """
    if source == "random":
        return RandomSource(vocab_size, seed)
    if vocab_size <= END_OF_DOCUMENT:
        raise ValueError(
            f"data_config.source={source!r} has token ids up to {END_OF_DOCUMENT} (bytes and the "
            f"end of a document), and the model's vocab_size is {vocab_size}; it must be at least "
            f"{END_OF_DOCUMENT + 1}"
        )
    if source == "python-stdlib":
        paths, skip_undecodable = _stdlib_paths(), True  # its own tests hold broken files
    else:
        paths = _text_paths(source)

    documents, skipped = [], []
    for path in paths:
        try:
            with open(path, "rb") as file:
                document = file.read()
            document.decode("utf-8")
        except OSError as error:
            raise ValueError(f"data_config.source: {path} cannot be read: {error}") from None
        except UnicodeDecodeError as error:
            if not skip_undecodable:
                raise ValueError(
                    f"{path} is not UTF-8 (byte {error.start}); convert or remove it, or leave "
                    f"such files out with data_config.skip_undecodable=true"
                ) from None
            skipped.append(os.path.basename(path))
        else:
            documents.append(document)
    if not any(documents):
        raise ValueError(
            f"data_config.source={source!r} holds no text: {len(documents)} of its {len(paths)} "
            f"files are empty, {len(skipped)} are not UTF-8"
        )

    lengths = np.array([len(document) + 1 for document in documents])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty(starts[-1], dtype=np.uint16)
    for start, document in zip(starts[:-1], documents, strict=True):
        tokens[start : start + len(document)] = np.frombuffer(document, dtype=np.uint8)
    tokens[starts[1:] - 1] = END_OF_DOCUMENT
    description = f"{source}, {len(documents):,} documents, {len(tokens):,} tokens"
    if skipped:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        description += f", without {len(skipped)} files that are not UTF-8: {names}"
    return TextSource(tokens, starts, seed, description)


def _stdlib_paths() -> list[str]:
    files = _files_below(sysconfig.get_path("stdlib"), ("site-packages", "dist-packages"))
    return [path for path in files if path.endswith(".py")]


def _text_paths(source: str) -> list[str]:
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        paths = _files_below(pattern)
    elif os.path.isfile(pattern):
        paths = [pattern]
    else:
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError(
            f"data_config.source={source!r} names no file; it must be 'python-stdlib', 'random', "
            f"or a path, folder or glob of text files"
        )
    return paths


def _files_below(root: str, left_out: tuple[str, ...] = ()) -> list[str]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in left_out]
        paths += [os.path.join(folder, name) for name in names]
    return sorted(paths)
