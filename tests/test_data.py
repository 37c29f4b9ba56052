"""The token stream: what is in a batch, that it is a pure function, and what is refused."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data import END_OF_DOCUMENT, IGNORED_LABEL, open_source

SIZES = [0, 1, 2, 5, 13, 40, 100, 333]  # bytes per document; a row below has 64 tokens


@pytest.fixture
def folder(tmp_path):
    """Documents that name themselves: document i is made of the letter chr(ord('a') + i)."""
    for i, size in enumerate(SIZES):
        (tmp_path / f"{i}.txt").write_text(chr(ord("a") + i) * size)
    return str(tmp_path)


def opened(source, seed=0, vocab_size=257, skip_undecodable=False):
    return open_source.__wrapped__(source, vocab_size, seed, skip_undecodable)


def test_an_epoch_holds_every_token_of_every_document_once(folder):
    source = opened(folder)
    epoch_tokens = sum(SIZES) + len(SIZES)  # with one end-of-document each
    seqlen = epoch_tokens // 2
    assert epoch_tokens % 2 == 0
    orders = []
    for epoch in range(3):
        stream = source.rows(2 * epoch, 2, seqlen).tokens.flatten()
        documents = bytes(stream[stream != END_OF_DOCUMENT].astype(np.uint8)).decode()
        expected = "".join(chr(ord("a") + i) * size for i, size in enumerate(SIZES))
        assert sorted(documents) == sorted(expected)
        assert (stream == END_OF_DOCUMENT).sum() == len(SIZES)
        orders.append("".join(dict.fromkeys(documents)))  # letters in the order of their documents
        assert documents == "".join(c * SIZES[ord(c) - ord("a")] for c in orders[-1])  # whole
    assert len(set(orders)) == 3, "every epoch has an order of its own"


def test_a_label_is_the_next_token_of_the_same_document(folder):
    rows = opened(folder).rows(0, 20, 64)
    stream = opened(folder).rows(0, 1, 20 * 64 + 1).tokens[0]  # the same tokens as one long row
    assert np.array_equal(rows.tokens.flatten(), stream[:-1])
    following = np.where(stream[:-1] == END_OF_DOCUMENT, IGNORED_LABEL, stream[1:])
    assert np.array_equal(rows.labels.flatten(), following)


def test_documents_end_where_a_document_or_a_row_ends(folder):
    rows = opened(folder).rows(3, 20, 64)
    ends = np.zeros((20, 64), dtype=bool)
    ends[rows.tokens == END_OF_DOCUMENT] = True
    ends[:, -1] = True
    lengths = np.diff(np.flatnonzero(ends.flatten()), prepend=-1)
    assert rows.document_lengths == lengths.tolist()
    assert sum(rows.document_lengths) == 20 * 64


@pytest.mark.parametrize("source", ["folder", "random"])
def test_a_row_does_not_depend_on_what_was_read_before(source, folder):
    source = folder if source == "folder" else source
    together = opened(source).rows(0, 40, 64)  # several epochs of the folder
    one_source = opened(source)
    for row in (39, 0, 17, 16, 39):  # in any order, from one source
        alone = one_source.rows(row, 1, 64)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        assert np.array_equal(alone.labels[0], together.labels[row])
    parts = [opened(source).rows(first, 10, 64) for first in (0, 10, 20, 30)]
    assert sum((p.document_lengths for p in parts), []) == together.document_lengths


def test_the_seed_decides_the_order(folder):
    first, again, other = (opened(folder, seed).rows(0, 4, 64).tokens for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_tokens_and_labels_are_new_in_each_step():
    rows = opened("random", vocab_size=1000).rows(0, 50, 64)
    assert len({row.tobytes() for row in rows.tokens}) == 50
    assert len({row.tobytes() for row in rows.labels}) == 50
    assert not np.array_equal(rows.tokens[:, 1:], rows.labels[:, :-1])
    assert rows.tokens.min() >= 0
    assert 990 < rows.tokens.max() < 1000
    assert rows.document_lengths == [64] * 50


def test_python_stdlib_holds_every_source_file_of_the_standard_library():
    source = opened("python-stdlib")
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & {*p.parts}]
    texts, broken = [], 0
    for path in paths:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            broken += 1
            assert path.name in source.description
    documents = len(source.starts) - 1
    assert documents == len(paths) - broken
    assert len(source.tokens) == sum(len(text.encode()) + 1 for text in texts)
    decoded = {
        bytes(source.tokens[a : b - 1].astype(np.uint8)).decode()
        for a, b in zip(source.starts[:-1], source.starts[1:], strict=True)
    }
    assert decoded == set(texts)


def test_a_glob_and_a_path_take_just_those_files(folder):
    assert len(opened(f"{folder}/[67].txt").starts) - 1 == 2
    assert len(opened(f"{folder}/7.txt").tokens) == 334
    assert len(opened(folder).starts) - 1 == len(SIZES)


def test_a_file_that_is_not_utf_8_is_named_or_skipped_with_a_word(folder):
    with open(os.path.join(folder, "latin.txt"), "wb") as file:
        file.write("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 \(byte 2\)"):
        opened(folder)
    source = opened(folder, skip_undecodable=True)
    assert "without 1 files that are not UTF-8: latin.txt" in source.description
    assert len(source.starts) - 1 == len(SIZES)


def test_sources_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no file"):
        opened(str(tmp_path / "nowhere" / "*.txt"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match="holds no text: 1 of its 2 files are empty, 1 are not U"):
        opened(str(tmp_path), skip_undecodable=True)


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "books [2024]*"
    folder.mkdir()
    (folder / ".hidden.txt").write_text("text")
    assert len(opened(str(folder)).tokens) == 5


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    with pytest.raises(ValueError, match="token ids up to 256 .* vocab_size is 256"):
        opened(folder, vocab_size=256)
