"""The token stream: what is in a batch, that it is a pure function, and what is refused."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import open_data

import data
from data import END_OF_DOCUMENT, IGNORED_LABEL

SIZES = [0, 1, 2, 5, 13, 40, 100, 333]  # bytes per document; a row below has 64 tokens
# Document i is made of its own four letters, at random.
TEXTS = [
    "".join(
        np.random.default_rng(i).choice(list("abcdefghijklmnopqrstuvwxyzABCDEF"[4 * i :][:4]), n)
    )
    for i, n in enumerate(SIZES)
]


@pytest.fixture
def folder(tmp_path):
    """Documents that can be told apart: document i has no letter of another."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return str(tmp_path)


def pieces(rows):
    """(tokens, labels) of each piece of a document."""
    splits = np.cumsum(rows.document_lengths)[:-1]
    return zip(
        np.split(rows.tokens.flatten(), splits),
        np.split(rows.labels.flatten(), splits),
        strict=True,
    )


def test_an_epoch_holds_every_token_of_every_document_once(folder):
    source = open_data(folder)
    epoch_tokens = sum(SIZES) + len(SIZES)  # with one end-of-document each
    seqlen = epoch_tokens // 2
    assert epoch_tokens % 2 == 0
    expected = sorted([*"".join(TEXTS).encode(), *[END_OF_DOCUMENT] * len(SIZES)])
    epochs = [source.rows(2 * epoch, 2, seqlen).tokens for epoch in range(5)]
    for tokens in epochs:
        assert sorted(tokens.flatten().tolist()) == expected
    assert len({tokens.tobytes() for tokens in epochs}) == 5, "every epoch has its own order"


def test_rows_that_do_not_divide_an_epoch_drop_and_repeat_nothing(folder, monkeypatch):
    """Rows reach over the ends of epochs; counted where a row and an epoch end together."""
    seqlen, epoch_tokens = 70, sum(SIZES) + len(SIZES)
    epochs = int(np.lcm(seqlen, epoch_tokens)) // epoch_tokens
    assert epochs == 35
    stream = [*"".join(TEXTS).encode(), *[END_OF_DOCUMENT] * len(SIZES)]
    orders = []
    for window_rows in (data.WINDOW_ROWS, 3):  # an epoch has 7 or 8 rows
        monkeypatch.setattr(data, "WINDOW_ROWS", window_rows)
        rows = open_data(folder).rows(0, epochs * epoch_tokens // seqlen, seqlen).tokens
        tokens, counts = np.unique(rows, return_counts=True)
        assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == {
            token: epochs * stream.count(token) for token in set(stream)
        }
        orders.append(rows)
    assert not np.array_equal(*orders)


def test_a_label_is_the_next_token_of_the_same_document(folder):
    """Every piece with its labels is an excerpt of a document with its continuation."""
    documents = [[*text.encode(), END_OF_DOCUMENT] for text in TEXTS]
    excerpts = {
        (tuple(tokens[a:b]), tuple([*tokens[1:], IGNORED_LABEL][a:b]))
        for tokens in documents
        for a in range(len(tokens))
        for b in range(a + 1, min(a + 64, len(tokens)) + 1)
    }
    for tokens, labels in pieces(open_data(folder).rows(0, 100, 64)):
        assert (tuple(tokens.tolist()), tuple(labels.tolist())) in excerpts


def test_a_batch_does_not_hold_neighbours(folder):
    """The longest document fills five rows; they do not come one after the other."""
    rows = open_data(folder).rows(0, 7, 64).tokens
    long_rows = [i for i, row in enumerate(rows) if np.isin(row, [*TEXTS[7].encode()]).all()]
    assert len(long_rows) >= 3
    starts = [bytes(rows[i].astype(np.uint8)).decode() for i in long_rows]
    assert starts != sorted(starts, key=TEXTS[7].index)


def test_documents_end_where_a_document_or_a_row_ends(folder):
    rows = open_data(folder).rows(3, 20, 64)
    ends = np.zeros((20, 64), dtype=bool)
    ends[rows.tokens == END_OF_DOCUMENT] = True
    ends[:, -1] = True
    lengths = np.diff(np.flatnonzero(ends.flatten()), prepend=-1)
    assert rows.document_lengths == lengths.tolist()
    assert sum(rows.document_lengths) == 20 * 64


@pytest.mark.parametrize("source", ["folder", "random"])
def test_a_row_does_not_depend_on_what_was_read_before(source, folder):
    source = folder if source == "folder" else source
    together = open_data(source).rows(0, 40, 64)  # several epochs of the folder
    one_source = open_data(source)
    for row in (39, 0, 17, 16, 39):  # in any order, from one source
        alone = one_source.rows(row, 1, 64)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        assert np.array_equal(alone.labels[0], together.labels[row])
    parts = [open_data(source).rows(first, 10, 64) for first in (0, 10, 20, 30)]
    assert sum((p.document_lengths for p in parts), []) == together.document_lengths


def test_the_seed_decides_the_order(folder):
    first, again, other = (open_data(folder, seed=seed).rows(0, 4, 64).tokens for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_tokens_and_labels_are_new_in_each_step():
    rows = open_data("random", vocab_size=1000).rows(0, 50, 64)
    assert len({row.tobytes() for row in rows.tokens}) == 50
    assert len({row.tobytes() for row in rows.labels}) == 50
    assert not np.array_equal(rows.tokens[:, 1:], rows.labels[:, :-1])
    assert rows.tokens.min() >= 0
    assert 990 < rows.tokens.max() < 1000
    assert rows.document_lengths == [64] * 50


def test_python_stdlib_holds_every_source_file_of_the_standard_library():
    source = open_data("python-stdlib")
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & {*p.parts}]
    texts, broken = [], 0
    for path in paths:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            broken += 1
            assert path.name in source.description
    assert len(source.starts) == len(paths) - broken
    assert source.num_tokens == sum(len(text.encode()) + 1 for text in texts)
    decoded = {
        bytes(source.corpus.read(start, length)[:-1].astype(np.uint8)).decode()
        for start, length in zip(source.starts, source.lengths, strict=True)
    }
    assert decoded == set(texts)


def test_a_glob_and_a_path_take_just_those_files(folder):
    assert len(open_data(f"{folder}/[67].txt").starts) == 2
    assert open_data(f"{folder}/7.txt").num_tokens == 334
    assert len(open_data(folder).starts) == len(SIZES)


def test_a_file_that_is_not_utf_8_is_named_or_skipped_with_a_word(folder):
    with open(os.path.join(folder, "latin.txt"), "wb") as file:
        file.write("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 \(byte 2\)"):
        open_data(folder)
    source = open_data(folder, skip_undecodable=True)
    assert "without 1 files that are not UTF-8: latin.txt" in source.description
    assert len(source.starts) == len(SIZES)


def test_sources_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no file"):
        open_data(str(tmp_path / "nowhere" / "*.txt"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match="holds no text: 1 of its 2 files are empty, 1 are not U"):
        open_data(str(tmp_path), skip_undecodable=True)


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "books [2024]*"
    folder.mkdir()
    (folder / ".hidden.txt").write_text("text")
    assert open_data(folder).num_tokens == 5


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    with pytest.raises(ValueError, match="token ids up to 256, .* vocab_size is 256"):
        open_data(folder, vocab_size=256)
