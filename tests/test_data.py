"""The token stream: what is in a batch, that it is a pure function, and what is refused."""

import json
import os
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import open_data

import data
import main
from data import IGNORED_LABEL, corpus
from data.corpus import END_OF_DOCUMENT, sha256, token_dtype

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


def test_sources_without_text_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="names no file"):
        open_data(str(tmp_path / "nowhere" / "*.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"'a/\*' names no file; .* \(looked in {tmp_path}\)$"):
        open_data("a/*")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"has no text \(1 of its 2 files are empty, 1 are not U"):
        open_data(str(tmp_path), skip_undecodable=True)


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "books [2024]*"
    folder.mkdir()
    (folder / "any name [1]*").write_text("text")
    assert open_data(folder).num_tokens == 5


def test_a_folder_gives_linked_folders_once_and_no_hidden_files(tmp_path):
    for path in ("corpus/a.txt", "corpus/part/b.txt", "disk2/c.txt", "corpus/.cache/d.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "corpus" / ".hidden.txt").write_text("text")
    (tmp_path / "corpus" / "part2").symlink_to(tmp_path / "disk2")
    (tmp_path / "corpus" / "part" / "up").symlink_to(tmp_path / "corpus")  # a cycle
    (tmp_path / "disk2" / "again").symlink_to(tmp_path / "corpus" / "part")
    source = open_data(tmp_path / "corpus")
    texts = {
        bytes(source.corpus.read(start, length)[:-1].astype(np.uint8)).decode()
        for start, length in zip(source.starts, source.lengths, strict=True)
    }
    assert texts == {"corpus/a.txt", "corpus/part/b.txt", "disk2/c.txt"}
    assert len(source.starts) == 3
    (tmp_path / "corpus" / "README.md").write_text("the documents")
    assert len(open_data(tmp_path / "corpus").starts) == 4
    (tmp_path / "corpus" / ".gitattributes").write_text("")  # a repository of the hub
    assert len(open_data(tmp_path / "corpus").starts) == 3


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "text.txt").write_text("text", encoding="utf-8-sig")
    tokens = open_data(tmp_path / "text.txt").corpus.files[0]
    assert tokens.tolist() == [*b"text", END_OF_DOCUMENT]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.json", "a.parquet", "a.csv", "a.npy",
     "a.txt.gz", "a.txt.zst", "a.bin.gz"],
)  # fmt: skip
def test_a_file_that_is_not_text_names_the_command_that_reads_it(tmp_path, name):
    """Whatever it contains: as text it would train on the syntax of its format."""
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / name).write_text('{"text": "alpha"}\n' * 9)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} is neither text .* `python -m data prepare`"):
            open_data(source)


def test_a_pointer_of_git_lfs_is_not_text(tmp_path):
    """A clone without Git LFS has it in place of a large file."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n"
    (tmp_path / "text.txt").write_text(pointer)
    with pytest.raises(ValueError, match="text.txt is a pointer of Git LFS; get the file with"):
        open_data(tmp_path)


def test_a_folder_or_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "x.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"x.bin cannot be read \(No such file or directory\); ma"):
        open_data(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # left out: reading it would wait
    (tmp_path / "x.bin").rename(tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"x.txt cannot be read \(No such file or directory\); ma"):
        open_data(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read all
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read .Permission denied.; make"):
        open_data(tmp_path)


def write_prepared(folder: Path, tokens: np.ndarray, starts: np.ndarray, vocab_size: int) -> Path:
    """A folder as the README describes it."""
    folder.mkdir()
    tokens.astype(token_dtype(vocab_size)).tofile(folder / "tokens.bin")
    starts.astype(np.int64).tofile(folder / "offsets.bin")
    meta = {
        "tokenizer": "numbers",
        "tokenizer_sha256": "numbers",
        "vocab_size": vocab_size,
        "dtype": str(token_dtype(vocab_size)),
        "num_tokens": len(tokens),
        "num_documents": len(starts) - 1,
        "sha256": {name: sha256(folder / name) for name in ("tokens.bin", "offsets.bin")},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def numbers(tmp_path):
    """1,000 tokens that are all different, in 40 documents of 1 to 180."""
    cuts = np.random.default_rng(5).choice(np.arange(1, 1000), 39, replace=False)
    starts = np.array([0, *sorted(cuts), 1000])
    assert np.diff(starts).min() == 1 and np.diff(starts).max() > 64
    return write_prepared(tmp_path / "numbers", np.arange(1000), starts, 1000)


def batches(monkeypatch, dp: int, accumulation: int, steps: int, **keys) -> np.ndarray:
    """The tokens that all dp ranks get in some steps, by main.prepare_data."""
    keys = {"seqlen": 64, "batch_size": 4, **keys}
    for key, value in keys.items():
        monkeypatch.setitem(main.data_config, key, value)
    monkeypatch.setitem(main.train_config, "gradient_accumulation_steps", accumulation)
    source, found = open_data(vocab_size=1000, **keys), []
    for step in range(steps):
        for rank in range(dp):
            dim = SimpleNamespace(size=lambda: dp, get_local_rank=lambda rank=rank: rank)
            micro_batches = main.prepare_data(source, {"dp": dim}, step)
            assert len(micro_batches) == accumulation
            found += [input_ids.numpy() for input_ids, _, _ in micro_batches]
    return np.concatenate(found)


@pytest.mark.parametrize("dp, accumulation", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_no_token_is_dropped_or_seen_twice_whatever_the_layout(
    dp, accumulation, numbers, monkeypatch
):
    tokens = batches(monkeypatch, dp, accumulation, steps=125, source=str(numbers))
    assert len(tokens) == 125 * 4 * 64 == 32 * 1000
    assert (np.bincount(tokens) == 32).all()  # 32 epochs
    first_epoch = tokens[: 16 * 64]  # the rows that begin in it, the last reaching over its end
    assert set(first_epoch) == set(range(1000))
    assert np.array_equal(tokens, batches(monkeypatch, 1, 1, 125, source=str(numbers)))


def test_ten_billion_tokens_are_opened_and_jumped_in(tmp_path):
    """On a sparse file. How long it takes is shown by `pytest -s -k ten_billion`."""
    folder = tmp_path / "large"
    starts = np.arange(10_000_001) * 1000
    write_prepared(folder, np.zeros(0), starts, 50_000)
    os.truncate(folder / "tokens.bin", 2 * starts[-1])
    with open(folder / "tokens.bin", "r+b") as file:  # the last document is not empty
        file.seek(2 * starts[-2])
        file.write(np.arange(1000, dtype=np.uint16).tobytes())
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "num_tokens": int(starts[-1])}))
    assert (folder / "tokens.bin").stat().st_size == 20e9

    # The last row of epoch 8 reaches into epoch 9, and comes somewhere in its epoch's last window.
    epoch_rows = 10**10 // 8192
    window = epoch_rows // data.WINDOW_ROWS
    first, end = -(-8 * 10**10 // 8192) + window * data.WINDOW_ROWS, -(-9 * 10**10 // 8192)
    order = open_data(folder, vocab_size=50_000).window_order(8, window, end - first)
    for name, row in (
        ("the first step", 0),
        ("a step of epoch 7", 7 * epoch_rows + 1000),
        ("a step where an epoch ends", first + int(order.argmax()) - 4),
    ):
        begin = time.perf_counter()
        source = open_data(folder, vocab_size=50_000)
        rows = source.rows(row, 8, 8192)
        print(f"ten billion tokens, opened and at {name}: {time.perf_counter() - begin:.2f} s")
        assert max(rows.document_lengths) == 1000 and sum(rows.document_lengths) == 8 * 8192
    assert source.epoch_order.cache_info().misses == 2
    assert np.array_equal(source.corpus.read(starts[-2], 1000), np.arange(1000))


def test_a_permutation_is_one_and_depends_on_every_part_of_the_seed():
    for size in (1, 2, 3, 4, 7, 8, 1000):
        assert sorted(data.permutation([1, 2], size)) == list(range(size))
    orders = {tuple(data.permutation(seed, 8)) for seed in ([1, 2], [1, 3], [2, 2], [1, 2, 1])}
    assert len(orders) == 4
    firsts = np.bincount([data.permutation([seed], 5)[0] for seed in range(5000)])
    assert len(firsts) == 5 and abs(firsts - 1000).max() < 150  # five standard deviations
    # The same with every version of numpy: a run that goes on elsewhere sees the same data.
    assert data.permutation([1, 2], 8).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def llm_c_file(path: Path, tokens: np.ndarray, magic: int) -> None:
    """As dev/data/data_common.py of llm.c writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def test_token_files_of_nanogpt_and_llm_c_are_read_as_they_are(tmp_path):
    documents = [
        [5, 6, 7, 0],
        [0],
        [8, 9, 0],
        [10, 11],
    ]  # nanoGPT ends documents, the last has none
    tokens = np.array(sum(documents, []))
    tokens.astype(np.uint16).tofile(tmp_path / "train.bin")
    begun = np.array([0, 300, 301, 0, 302])  # llm.c begins documents with it
    llm_c_file(tmp_path / "gpt2_000000.bin", begun.astype(np.uint16), 20240520)
    llm_c_file(tmp_path / "gpt2_000001.bin", begun.astype(np.uint16) + 5, 20240520)
    llm_c_file(tmp_path / "llama3.bin", begun.astype(np.uint32) + 2**17, 20240801)

    def read(pattern, end_of_text_id):
        source = open_data(tmp_path / pattern, vocab_size=2**18, end_of_text_id=end_of_text_id)
        pairs = zip(source.starts, source.lengths, strict=True)
        return [source.corpus.read(start, length).tolist() for start, length in pairs]

    assert read("train.bin", 0) == documents
    assert read("gpt2_000000.bin", 0) == [[0], [300, 301, 0], [302]]
    shards = [[0], [300, 301, 0], [302], [5, 305, 306, 5, 307]]
    assert read("gpt2_*.bin", 0) == shards
    assert read("llama3.bin", 2**17 + 301) == [
        [2**17, 2**17 + 300, 2**17 + 301],
        [2**17, 2**17 + 302],
    ]
    rows = open_data(tmp_path / "gpt2_*.bin", vocab_size=2**18, end_of_text_id=0).rows(0, 1, 11)
    found = [piece.tolist() for piece, _ in pieces(rows)]
    assert sorted(found[:4]) == sorted(shards)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "x.bin has 0 bytes, but must hold whole tokens as uint16"),
        (b"abc", "x.bin has 3 bytes, but must hold whole tokens as uint16; create"),
        ("header", "x.bin has 1,028 bytes, but must hold the 5 tokens of its header as"),
    ],
)
def test_token_files_of_another_size_are_refused(tmp_path, content, sentence):
    if content == "header":
        llm_c_file(tmp_path / "x.bin", np.arange(5, dtype=np.uint16), 20240520)
        content = (tmp_path / "x.bin").read_bytes()[:1028]
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        open_data(tmp_path / "x.bin", vocab_size=50_257)


@pytest.mark.parametrize("vocab_size", [20, 300, 50_257, 200_000])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_token_files_of_32_or_64_bits_are_not_read_as_16(tmp_path, vocab_size, dtype):
    tokens = np.random.default_rng(0).integers(vocab_size, size=1000)
    tokens.astype(dtype).tofile(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin looks like tokens of 32 bits, but without llm.c's"):
        open_data(tmp_path / "x.bin", vocab_size=2**18)


@pytest.mark.parametrize("vocab_size", [2, 4, 16, 20, 65, 50_257])
def test_token_files_of_any_vocabulary_are_read(tmp_path, vocab_size):
    tokens = np.random.default_rng(0).integers(vocab_size, size=1000).astype(np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    source = open_data(tmp_path / "x.bin", vocab_size=2**18)
    assert np.array_equal(source.corpus.files[0], tokens)


def test_token_files_of_megatron_are_refused(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\x00\x00")
    with pytest.raises(
        ValueError, match="x.bin has an .idx file beside it, as Megatron writes, bu"
    ):
        open_data(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"has .bin files \(1\) and others \(1: x.idx\); give"):
        open_data(tmp_path)


def test_token_files_beyond_the_vocabulary_are_refused(tmp_path):
    np.array([1, 2, 500], dtype=np.uint16).tofile(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="token ids up to 500, but the model's vocab_size is 500;"):
        open_data(tmp_path / "x.bin", vocab_size=500)
    assert open_data(tmp_path / "x.bin", vocab_size=501).num_tokens == 3


def test_held_out_documents_are_in_no_training_batch(numbers):
    starts = np.fromfile(numbers / "offsets.bin", dtype=np.int64)
    splits = {}
    for seed in (0, 1):
        for split in ("train", "validation"):
            keys = dict(validation_fraction=0.3, vocab_size=1000, seed=seed)
            source = open_data(numbers, split, **keys)
            tokens = source.rows(0, source.num_tokens, 1).tokens.flatten()
            assert len(tokens) == len(set(tokens)) == source.num_tokens
            splits[split, seed] = tokens
    train, validation = splits["train", 0], splits["validation", 0]
    assert sorted([*train, *validation]) == list(range(1000))
    held_out = {int(np.searchsorted(starts, token, side="right")) for token in validation}
    assert len(held_out) == 12  # of 40 documents
    assert held_out.isdisjoint(np.searchsorted(starts, train, side="right"))
    assert np.array_equal(validation, splits["validation", 1]), "the same whatever the seed"
    assert not np.array_equal(train, splits["train", 1])


def test_a_validation_source_is_evaluated_on_and_not_trained_on(numbers, folder):
    keys = dict(validation_source=str(numbers), vocab_size=1000)
    folder = f"{folder}/?.txt"
    assert open_data("random", "validation", **keys).num_tokens == 1000
    assert open_data(numbers, "train", vocab_size=1000, validation_source=folder).num_tokens == 1000
    with pytest.raises(ValueError, match="have different tokenizers"):
        open_data(folder, "validation", **keys)


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (
            dict(vocab_size=999),
            "token ids up to 999, but the model's vocab_size is 999; set model_",
        ),
        (dict(validation_fraction=0.01), "0.01 holds out 0 of 40 documents, but each split needs"),
        (
            dict(seqlen=251, batch_size=4),
            "has 1,000 tokens for train, but 1 step x batch_size 4",
        ),
        (
            dict(split="validation", validation_fraction=0.5, num_batches=9, seqlen=64),
            "= 576 are n",
        ),
    ],
)
def test_a_corpus_that_does_not_fit_the_run_is_refused(numbers, keys, sentence):
    with pytest.raises(ValueError) as error:
        open_data(numbers, **{"vocab_size": 1000, **keys})
    assert sentence in str(error.value)


def test_documents_without_any_label_are_refused(tmp_path):
    """All documents that are held out are empty."""
    starts = np.array([0, *range(11, 61)])
    folder = write_prepared(tmp_path / "empty", np.zeros(60), starts, 257)
    assert open_data(folder, "train", validation_fraction=0.1).lengths.max() == 11
    with pytest.raises(ValueError, match="has no label for validation: each of its 5 documents"):
        open_data(folder, "validation", validation_fraction=0.1)


def test_random_tokens_cannot_be_held_out():
    with pytest.raises(ValueError, match="'random' has no documents for evaluation"):
        open_data("random", validation_fraction=0.1)


def change_meta(folder: Path, **keys) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **keys}))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[17] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda d: os.remove(d / "meta.json"), "meta.json cannot be read (No such file"),
        (lambda d: (d / "meta.json").write_text('{"vocab'), "meta.json is invalid (JSONDecode"),
        (lambda d: (d / "meta.json").write_text("[" * 100_000), "meta.json is invalid (Recursion"),
        (lambda d: (d / "meta.json").write_text("{}"), "meta.json is invalid (KeyError('vocab"),
        (
            lambda d: change_meta(d, dtype="uint32"),
            "meta.json has dtype uint32, but 1,000 ids need uint16",
        ),
        (lambda d: change_meta(d, dtype="words"), "meta.json is invalid (TypeError"),
        (
            lambda d: change_meta(d, num_tokens=999),
            "tokens.bin has 2,000 bytes, but meta.json gives 999 x 2",
        ),
        (
            lambda d: os.truncate(d / "tokens.bin", 1998),
            "tokens.bin has 1,998 bytes, but meta.json gives 1,000 x 2",
        ),
        (
            lambda d: os.remove(d / "tokens.bin"),
            "tokens.bin has 0 bytes, but meta.json gives 1,000 x 2",
        ),
        (
            lambda d: os.truncate(d / "offsets.bin", 8),
            "offsets.bin has 8 bytes, but meta.json gives 41 x 8",
        ),
        (lambda d: flip_a_byte(d / "tokens.bin"), "tokens.bin does not match its checksum in"),
        (lambda d: flip_a_byte(d / "offsets.bin"), "offsets.bin does not match its checksum in"),
    ],
)
def test_a_damaged_folder_is_refused(numbers, damage, sentence):
    assert open_data(numbers, vocab_size=1000).num_tokens == 1000
    damage(numbers)
    with pytest.raises(ValueError) as error:
        open_data(numbers, vocab_size=1000)
    assert sentence in str(error.value)
    assert str(error.value).startswith(str(numbers))
    assert "prepare the corpus again" in str(error.value)


def test_a_folder_that_cannot_be_read_is_one_sentence(numbers, monkeypatch):
    def refuse(path):  # root, as whom tests may run, can read all files
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(corpus, "sha256", refuse)
    with pytest.raises(
        ValueError, match=r"tokens.bin cannot be read \(Permission denied\); make it"
    ):
        open_data(numbers, vocab_size=1000)


def test_what_a_start_leaves_unchecked_is_found_by_verify_or_when_it_is_read(numbers, monkeypatch):
    """Large files are not read whole at the start; a token beyond the vocabulary is seen anyway."""
    monkeypatch.setattr(corpus, "CHECKED_BYTES", 100)
    tokens = np.fromfile(numbers / "tokens.bin", dtype=np.uint16)
    tokens[500] = 1000
    tokens.tofile(numbers / "tokens.bin")
    source = open_data(numbers, vocab_size=1000)
    with pytest.raises(data.DataError, match="token id 1000 is larger than 999, so the files"):
        source.rows(0, 16, 64)
    with pytest.raises(data.DataError, match="token id 1000 is larger than 999"):
        open_data(numbers, "validation", 1000, 20, validation_source=str(numbers), seqlen=50)
    with pytest.raises(ValueError, match="tokens.bin does not match its checksum"):
        corpus.read_prepared(str(numbers), checked_bytes=float("inf"))
