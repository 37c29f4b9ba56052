"""The token stream: a batch is a pure function of (seed, step).

    python -m data prepare INPUT... --tokenizer T --output DIR    # tokenizes a corpus
    python -m data verify DIR                                     # compares it with its checksums

The stream is endless. Each epoch holds every document of a corpus (corpus.py) once, in a new random
order. The stream is cut into rows of `seqlen` tokens: long documents are cut, and short documents
are packed. An epoch's rows are shuffled, so a batch seldom holds neighbours. Each row is used once:
no token of an epoch is dropped or repeated. Any rank can build any row without building others.
Step n, from 0, uses the rows n x batch_size to (n + 1) x batch_size - 1, counted from `first_row`.
"""

import functools
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus, open_corpus

IGNORED_LABEL = -100
WINDOW_ROWS = 2**20  # rows that are shuffled together; a long epoch has several windows


class DataError(ValueError):
    """A batch cannot be read, since the corpus is damaged."""


@dataclass
class Rows:
    """Some rows of a global batch.

    tokens, labels: [rows, seqlen], int64. A label is the next token of the same document, or
    `IGNORED_LABEL` at the document's end.
    document_lengths: tokens of each document in a row, row by row; they sum to seqlen in each row.
    """

    tokens: np.ndarray
    labels: np.ndarray
    document_lengths: list[int]


@dataclass(eq=False)
class TokenSource:
    """Builds rows from all or some documents of a corpus.

    starts, lengths: [documents], int64: each document's first token in the corpus, and its length.
    description: one line for the log. first_row: the run's first, counted in the stream.
    """

    corpus: Corpus
    starts: np.ndarray
    lengths: np.ndarray
    seed: int
    description: str
    first_row: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = int(self.lengths.sum())  # per epoch
        # An order is large, and many rows use it. A batch seldom needs more than two epochs.
        self.epoch_order = functools.lru_cache(maxsize=2)(self._epoch_order)
        self.window_order = functools.lru_cache(maxsize=2)(self._window_order)

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run.

        Raises DataError if a token id is outside the corpus's vocabulary.
        """
        tokens = np.empty((num_rows, seqlen), dtype=np.int64)
        labels = np.full((num_rows, seqlen), IGNORED_LABEL, dtype=np.int64)
        document_lengths = []
        for row in range(num_rows):
            position, filled = self._row_position(self.first_row + first_row + row, seqlen), 0
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
            raise DataError(
                f"{self.description}: token id {max(tokens.max(), labels.max())} is larger than "
                f"{self.corpus.vocab_size - 1}, so the files are damaged; create them again"
            )
        return Rows(tokens, labels, document_lengths)

    def _row_position(self, row: int, seqlen: int) -> int:
        """Returns the position of a row's first token in the endless stream."""
        epoch = row * seqlen // self.num_tokens
        # The rows first to end - 1 begin in this epoch. The last one may end in the next epoch.
        first = -(-epoch * self.num_tokens // seqlen)
        end = -(-(epoch + 1) * self.num_tokens // seqlen)
        window, index = divmod(row - first, WINDOW_ROWS)
        first += window * WINDOW_ROWS
        order = self.window_order(epoch, window, min(WINDOW_ROWS, end - first))
        return (first + int(order[index])) * seqlen

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's order of documents, and the position in the epoch where each ends."""
        order = permutation([self.seed, 0, epoch], len(self.lengths))
        ends = self.lengths.take(order)
        return order, np.cumsum(ends, out=ends)  # in place: allocation is as slow as the sum

    def _window_order(self, epoch: int, window: int, window_size: int) -> np.ndarray:
        """Returns the order in which the rows of a window are used."""
        return permutation([self.seed, 1, epoch, window], window_size)


def permutation(seed: list[int], size: int) -> np.ndarray:
    """Returns the numbers 0 to size - 1 in a random order, [size], int64.

    It sorts random numbers whose low bits are 0, 1, 2... The numbers of PCG64 are
    the same in every version of numpy. `Generator.permutation` is not, and it is slower.
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
    """Uniformly random tokens and labels, independent of each other, to measure speed."""

    vocab_size: int
    seed: int
    document_length: int  # tokens; 0: a row is one document
    first_row: int = 0

    @property
    def description(self) -> str:
        length = f"of {self.document_length:,} tokens" if self.document_length else "of a whole row"
        return f"random tokens and labels, documents {length}"

    def rows(self, first_row: int, num_rows: int, seqlen: int) -> Rows:
        """Returns the rows first_row to first_row + num_rows - 1 of the run."""
        tokens, labels = (np.empty((num_rows, seqlen), dtype=np.int64) for _ in range(2))
        for row in range(num_rows):
            rng = np.random.default_rng([self.seed, self.first_row + first_row + row])
            tokens[row] = rng.integers(self.vocab_size, size=seqlen)
            labels[row] = rng.integers(self.vocab_size, size=seqlen)
        length = min(self.document_length or seqlen, seqlen)
        rest = [seqlen % length] if seqlen % length else []
        return Rows(tokens, labels, ([length] * (seqlen // length) + rest) * num_rows)


Source = TokenSource | RandomSource


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
) -> Source:
    """Opens one split of the corpus in `data_config`. Equal arguments give equal rows.

    split: "train" or "validation". vocab_size: the model's. num_batches: batches for which the
    split must have enough tokens. (One of their rows can be the last one of the epoch, which ends
    with tokens of the next.) The other arguments are the keys of `data_config`.

    Every seed gives the same validation rows, so that runs can be compared.

    Raises ValueError if the corpus is unreadable or too small, or does not fit vocab_size, and
    DataError if a validation row is damaged.
    """
    key, name = "data_config.source", source
    if split == "validation" and validation_source:
        key, name = "data_config.validation_source", validation_source
    if name == "random":
        if validation_fraction or key != "data_config.source":
            raise ValueError(f"{key}='random' has no documents for evaluation; give another corpus")
        return RandomSource(vocab_size, seed, random_document_length)
    corpus = open_corpus(key, name, skip_undecodable, end_of_text_id)
    if corpus.vocab_size > vocab_size:
        raise ValueError(
            f"{key}={name!r} has token ids up to {corpus.vocab_size - 1}, but the model's "
            f"vocab_size is {vocab_size}; set model_config.overrides.vocab_size to at least "
            f"{corpus.vocab_size}, or use another tokenizer"
        )
    if key == "data_config.validation_source" and source != "random":
        trained_on = open_corpus("data_config.source", source, skip_undecodable, end_of_text_id)
        if len({corpus.tokenizer, trained_on.tokenizer} - {""}) > 1:
            raise ValueError(
                f"{key}={name!r} and data_config.source={source!r} have different tokenizers; "
                f"prepare both with the same one"
            )

    starts, lengths = corpus.starts[:-1], np.diff(corpus.starts)
    if validation_fraction:
        # floor(documents x fraction) documents, evenly spaced, are held out for every seed.
        held_out = np.diff(np.floor(np.arange(len(starts) + 1) * validation_fraction)) > 0
        if not 0 < held_out.sum() < len(starts):
            raise ValueError(
                f"data_config.validation_fraction={validation_fraction} holds out "
                f"{held_out.sum()} of {len(starts):,} documents, but each split needs one; change "
                f"the fraction, or set data_config.validation_source instead"
            )
        chosen = held_out if split == "validation" else ~held_out
        starts, lengths = starts[chosen], lengths[chosen]
    num_tokens, needed = int(lengths.sum()), num_batches * batch_size * seqlen
    if num_tokens < needed:
        batches = f"eval_iters {num_batches}" if split == "validation" else f"{num_batches} step"
        raise ValueError(
            f"{key}={name!r} has {num_tokens:,} tokens for {split}, but {batches} x batch_size "
            f"{batch_size} x seqlen {seqlen} = {needed:,} are needed; give a larger corpus, or "
            f"lower one of these numbers"
        )
    if lengths.max() < 2:
        raise ValueError(
            f"{key}={name!r} has no label for {split}: each of its {len(starts):,} documents "
            f"has only one token; give another corpus"
        )
    description = f"{name}, {len(starts):,} documents, {num_tokens:,} tokens{corpus.note}"
    if split == "train":
        return TokenSource(corpus, starts, lengths, seed, description)
    opened = TokenSource(corpus, starts, lengths, 0, description)
    for first_row in range(0, num_batches * batch_size, batch_size):
        opened.rows(first_row, batch_size, seqlen)  # damage ends the run before it trains
    return opened
