"""The token stream: a batch is a pure function of (seed, step).

    python -m data prepare INPUT... --tokenizer T --output DIR    # tokenizes a corpus
    python -m data verify DIR                                     # compares it with its checksums

The stream is endless: every epoch deals out all documents of a corpus (corpus.py) once, in an order
of its own, one after the other. It is cut into rows of `seqlen` tokens, so that long documents are
cut and short ones packed. The rows that begin in an epoch are shuffled, so that a batch does not
hold neighbours. Each row is taken once: no token is dropped or repeated, and any rank can build any
row without having built another. Step n takes the rows from n x batch_size on.
"""

import functools
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus, open_corpus

IGNORED_LABEL = -100
WINDOW_ROWS = 2**20  # rows are shuffled within windows of so many, however long the epoch


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
