"""`python -m data prepare`: what the folder holds, for every kind of input, and what is refused."""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from conftest import ROOT, environment, open_data, run

from data import documents
from data import prepare as prepare_corpus
from data.corpus import END_OF_DOCUMENT, read_prepared
from data.documents import cut, read_texts

TEXTS = ["The first.\n", "", "Zwei: ü, 語, 🦙", "x" * 300, "a\r\nb\x00", "<|endoftext|> is text"]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE tokenizer of 400 tokens, trained on the license."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    files = [str(ROOT / "LICENSE")]
    tokenizer.train(files, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(path))
    return path


def write_corpus(folder, lines_end="\n"):
    """The same documents as text, jsonl, two kinds of json, and parquet with groups of two rows."""
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i}.txt").write_bytes(text.encode())
    objects = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(o, ensure_ascii=o["id"] % 2 == 0) + lines_end for o in objects)
    (folder / "a.jsonl").write_text("\n" + lines)  # a blank line is no document
    (folder / "lines.json").write_text(lines.rstrip())
    (folder / "list.json").write_text(json.dumps(objects, indent=1))
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)


def save_word_tokenizer(path, words: dict[str, int], unknown: str) -> None:
    """Its tokens are the words between spaces."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))


def prepare(inputs, output, tokenizer="bytes", **options) -> None:
    defaults = dict(field="text", end_of_text=None, skip_undecodable=False, processes=1)
    defaults["allow_lossy_tokenizer"] = False
    inputs, output = [str(path) for path in inputs], str(output)
    prepare_corpus.prepare(inputs, str(tokenizer), output, **{**defaults, **options})


def prepared_documents(folder) -> list[list[int]]:
    tokens = read_prepared(str(folder), checked_bytes=np.inf).files[0]
    starts = np.fromfile(os.path.join(folder, "offsets.bin"), dtype=np.int64)
    return [tokens[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


BYTES = [[*text.encode(), END_OF_DOCUMENT] for text in TEXTS]


@pytest.mark.parametrize(
    "names",
    [["texts"], ["a.jsonl"], ["lines.json"], ["list.json"], ["a.parquet"], ["*.*", "texts"]],
)
def test_every_kind_of_input_gives_the_same_documents(tmp_path, names):
    write_corpus(tmp_path)
    prepare([tmp_path / name for name in names], tmp_path / "out")
    copies = 5 if len(names) > 1 else 1
    assert prepared_documents(tmp_path / "out") == BYTES * copies
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "offsets.bin", "tokens.bin"]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    num_bytes = copies * sum(len(text.encode()) for text in TEXTS)
    assert meta["num_documents"] == copies * len(TEXTS)
    assert meta["num_bytes"] == num_bytes == meta["num_tokens"] - meta["num_documents"]


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def marked(content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


OTHER_NAMES = {
    "a.ndjson": ("a.jsonl", bytes),
    "a.JSONL": ("a.jsonl", bytes),
    "a.jsonlines": ("a.jsonl", bytes),
    "a.Parquet": ("a.parquet", bytes),
    "a.jsonl.gz": ("a.jsonl", gzip.compress),
    "members.jsonl.gz": ("a.jsonl", lambda c: gzip.compress(c[:99]) + gzip.compress(c[99:])),
    "a.jsonl.zst": ("a.jsonl", zst),
    "list.json.GZ": ("list.json", gzip.compress),
    "a.parquet.gz": ("a.parquet", gzip.compress),
    "marked.jsonl": ("a.jsonl", marked),
    "marked.ndjson.gz": ("a.jsonl", lambda content: gzip.compress(marked(content))),
    "marked_list.json": ("list.json", marked),
    "marked_lines.json": ("lines.json", marked),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_file_is_read_as_what_it_contains(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    (tmp_path / "usual").mkdir()
    write_corpus(tmp_path / "usual")
    usual_name, write = OTHER_NAMES[name]
    (tmp_path / name).write_bytes(write((tmp_path / "usual" / usual_name).read_bytes()))
    prepare([tmp_path / name], tmp_path / "out")
    assert prepared_documents(tmp_path / "out") == BYTES


@pytest.mark.parametrize(
    "name, write", [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.zst", zst)]
)
def test_a_text_is_read_without_its_byte_order_mark(tmp_path, name, write):
    (tmp_path / name).write_bytes(write(marked("text: ü".encode())))
    prepare([tmp_path / name], tmp_path / "out")
    assert prepared_documents(tmp_path / "out") == [[*"text: ü".encode(), END_OF_DOCUMENT]]


def test_a_data_set_downloaded_from_the_hub_gives_its_data_files(tmp_path, capfd):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "data" / "a.parquet")
    (folder / ".cache" / "huggingface" / "a.parquet.metadata").write_text("1.0")
    for name in ("README.md", ".gitattributes", "LICENSE", "b.csv"):
        (folder / name).write_text("not a document")
    prepare([folder], tmp_path / "out")
    assert prepared_documents(tmp_path / "out") == BYTES
    said = f"INPUT='{folder}' gives its .parquet files (1), without others (2: LICENSE, b.csv)\n"
    assert f"warning: {said}" in capfd.readouterr().err


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 30, 100, 1000])
def test_files_are_cut_without_losing_or_doubling_a_document(tmp_path, monkeypatch, piece_bytes):
    write_corpus(tmp_path, lines_end="\r\n")
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(documents, "BATCH_ROWS", 1)
    files = [
        str(tmp_path / name) for name in ("a.jsonl", "a.parquet", "texts/2.txt", "texts/3.txt")
    ]
    pieces = list(cut(files, "text"))
    found = [text for piece in pieces for part in piece for text in read_texts(*part, "text", None)]
    assert found == [*TEXTS, *TEXTS, TEXTS[2], TEXTS[3]]


def test_any_number_of_processes_writes_the_same(tmp_path, monkeypatch, tokenizer_json):
    write_corpus(tmp_path)
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    monkeypatch.setattr(prepare_corpus, "ENCODED_DOCUMENTS", 2)
    for processes in (1, 3):
        inputs = [tmp_path / "a.jsonl", tmp_path / "texts"]
        prepare(inputs, tmp_path / str(processes), tokenizer_json, end_of_text="<|endoftext|>",
                processes=processes)  # fmt: skip
    for name in ("tokens.bin", "offsets.bin", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_bytes_train_like_the_text_they_are(tmp_path):
    write_corpus(tmp_path)
    prepare([tmp_path / "texts"], tmp_path / "out")
    for split in ("train", "validation"):
        keys = dict(split=split, validation_fraction=0.5)
        rows, expected = (
            open_data(tmp_path / name, **keys).rows(0, 20, 50) for name in ("out", "texts")
        )
        assert np.array_equal(rows.tokens, expected.tokens)
        assert np.array_equal(rows.labels, expected.labels)
        assert rows.document_lengths == expected.document_lengths


def test_a_tokenizer_is_used_and_kept(tmp_path, tokenizer_json):
    """Against the library itself; and a special token that a text spells out is not one."""
    write_corpus(tmp_path)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer_json, end_of_text="<|endoftext|>")
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    end = reference.token_to_id("<|endoftext|>")
    found = prepared_documents(tmp_path / "out")
    assert [tokens[-1] for tokens in found] == [end] * len(TEXTS)
    assert [end in tokens[:-1] for tokens in found] == [False] * len(TEXTS)
    for text, tokens in zip(TEXTS[:-1], found[:-1], strict=True):
        assert tokens[:-1] == reference.encode(text, add_special_tokens=False).ids
        assert len(tokens) <= len(text.encode()) + 1
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert [kept.decode(tokens[:-1]) for tokens in found] == TEXTS
    assert kept.eos_token_id == end

    prepare([tmp_path / "texts"], tmp_path / "again", tmp_path / "out" / "tokenizer")
    assert prepared_documents(tmp_path / "again") == found
    keys = dict(vocab_size=400, validation_source=str(tmp_path / "again"))
    assert open_data(tmp_path / "out", "validation", **keys).num_tokens == sum(map(len, found))
    prepare([tmp_path / "texts"], tmp_path / "bytes")
    with pytest.raises(ValueError, match="have different tokenizers"):
        open_data(tmp_path / "bytes", "validation", **keys)


@pytest.mark.parametrize("vocab_size, dtype", [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_tokens_take_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    words = {str(i): i for i in range(vocab_size)}
    save_word_tokenizer(tmp_path / "tokenizer.json", words, unknown="0")
    (tmp_path / "text.txt").write_text(f"1 {vocab_size - 1} 7")
    prepare([tmp_path / "text.txt"], tmp_path / "out", tmp_path / "tokenizer.json", end_of_text="2")
    tokens = np.fromfile(tmp_path / "out" / "tokens.bin", dtype=dtype)
    assert tokens.tolist() == [1, vocab_size - 1, 7, 2]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["dtype"] == dtype


BAD_INPUT = {
    "empty.txt": (b"", "INPUT='{path}' has only empty files (1); give others"),
    "blank.jsonl": (b"\n\n", "the INPUTs {path} have no text"),
    "missing.jsonl": (None, "INPUT='{path}' names no file"),
    "latin.txt": (b"na\xefve", "{path} is not UTF-8 (byte 2)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "na\xefve"}\n', "{path}, line 2: not UTF-8 (invalid"),
    "surrogate.jsonl": (b'{"text": "\\ud83d"}\n', "{path}, line 1: not UTF-8 (surrogates not all"),
    "invalid.jsonl": (b'\n{"text": "a"}\n{"text": \n', "{path}, line 3: invalid JSON (Expecting v"),
    "field.jsonl": (b'{"text": "a"}\n' * 9 + b'{"body": 1, "id": 2}',
                    "{path}, line 10: --field 'text' is not one of its fields (body, id); correct"),
    "number.jsonl": (b'{"text": 5}\n', "{path}, line 1: field 'text' is of type int, not a str"),
    "null.jsonl": (b'{"text": null}\n', "or leave out such documents with --skip-undecodable"),
    "deep.jsonl": (b"[" * 10**5, "{path}, line 1: JSON nested too deeply; correct it, or leave"),
    "digits.jsonl": (b"1" * 5000, "{path}, line 1: invalid JSON (Exceeds the limit"),
    "list.jsonl": (b"[1]\n", "{path}, line 1: it is a list, not an object with a field 'text'"),
    "invalid.json": (b'[{"text": "a"},\n 5', "{path}: invalid JSON (Expecting ',' delimiter at li"),
    "field.json": (b'[{"text": "a"}, {"t": 1}]', "{path}, element 2: --field 'text' is not one of"),
    "no.parquet": (b"no", "{path} is not a readable parquet file ("),
    "a.csv": (b"text\nalpha\n", "{path} is neither text nor one of .jsonl, "),
    "a.bin": (b"a\0b\0", "{path} is neither text nor one of .jsonl, "),
    "five.jsonl.gz": (gzip.compress(b'{"text": "a"}\n5'), "error: {path}, line 2: it is a int, no"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-9], "{path} cannot be unpacked (Truncated"),
    "cut.txt.zst": (zst(b"text" * 99)[:-9], "{path} cannot be unpacked ("),
    "latin.txt.gz": (gzip.compress(b"na\xefve"), "error: {path} is not UTF-8 (byte 2)"),
    "long.txt.gz": (gzip.compress(b"t" * 501), "{path} has 501 bytes, but may have 500; cut it"),
    "long.jsonl": (b" " * 501, "{path}, line 1: a line may have 500 bytes; cut it"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, processes",
    [*((name, 1) for name in BAD_INPUT), ("invalid.jsonl", 2), ("latin.txt", 2)],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name, processes):
    """Also if it comes to light in one of several processes."""
    content, sentence = BAD_INPUT[name]
    monkeypatch.setattr(documents, "PIECE_BYTES", 20)
    if name.startswith("long"):
        monkeypatch.setattr(documents, "LARGEST_READ", 500)
    (tmp_path / "good.txt").write_text("good " * 20)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    inputs = [path] if processes == 1 else [path, tmp_path / "good.txt"]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError) as error:
        prepare(inputs, tmp_path / "out", processes=processes)
    assert sentence.format(path=path) in f"error: {error.value}"
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(tokenizer="nowhere.json"), "--tokenizer nowhere.json cannot be loaded: "),
        (dict(tokenizer="text.json"), "--tokenizer text.json cannot be loaded: "),
        (
            dict(tokenizer="{json}"),
            "has no end-of-text token; choose one of its tokens with --end",
        ),
        (
            dict(tokenizer="{json}", end_of_text="<eos>"),
            "no end-of-text token '<eos>'; choose one of",
        ),
        (dict(processes=0), "--processes 0 must be at least 1"),
        (dict(output="there"), "/there already exists; remove it or give another"),
        (
            dict(inputs=["text.txt", "nowhere/*.txt"]),
            "INPUT='nowhere/*.txt' names no file; it must",
        ),
        (dict(inputs=["nowhere/set"]), "INPUT='nowhere/set' is neither a file nor a dataset: "),
    ],
)
def test_what_cannot_be_prepared_is_said_before_anything_is_written(
    tmp_path, monkeypatch, tokenizer_json, options, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "there").mkdir()
    options = {"inputs": ["text.txt"], "output": "out", **options}
    if options.get("tokenizer") == "{json}":
        options["tokenizer"] = tokenizer_json
    with pytest.raises(ValueError) as error:
        prepare(**options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["text.json", "text.txt", "there"]


def test_a_tokenizer_beyond_its_own_vocabulary_is_refused(tmp_path, monkeypatch, tokenizer_json):
    (tmp_path / "text.txt").write_text("text")
    whole = transformers.PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast,
        "get_vocab",
        lambda self: {token: i for token, i in whole(self).items() if i < 50},
    )
    with pytest.raises(ValueError, match=r"token id \d+, but its vocabulary has ids 0 to 49;"):
        prepare([tmp_path / "text.txt"], tmp_path / "out", tokenizer_json, end_of_text="!")


def test_a_tokenizer_that_loses_text_is_noticed_and_can_be_accepted(tmp_path, monkeypatch):
    words = {"known": 0, "words": 1, "<unk>": 2, "<end>": 3}
    save_word_tokenizer(tmp_path / "tokenizer.json", words, unknown="<unk>")
    (tmp_path / "text.txt").write_text("known words and others")
    arguments = [[tmp_path / "text.txt"], tmp_path / "out", tmp_path / "tokenizer.json"]
    with pytest.raises(ValueError) as error:
        prepare(*arguments, end_of_text="<end>")
    assert "'known words and others' becomes 'known words <unk> <unk>'; use" in str(error.value)
    assert "--allow-lossy-tokenizer" in str(error.value)
    prepare(*arguments, end_of_text="<end>", allow_lossy_tokenizer=True)
    assert prepared_documents(tmp_path / "out") == [[0, 1, 2, 2, 3]]
    (tmp_path / "text.txt").write_text("known words")
    prepare(arguments[0], tmp_path / "known", arguments[2], end_of_text="<end>")
    assert prepared_documents(tmp_path / "known") == [[0, 1, 3]]


def test_an_end_of_text_token_inside_a_text_is_noticed_and_can_be_accepted(tmp_path):
    """As by SentencePiece's Unigram: here the model's own vocabulary has the token too."""
    words = {"known": 0, "words": 1, "<unk>": 2, "<end>": 3}
    save_word_tokenizer(tmp_path / "tokenizer.json", words, unknown="<unk>")
    (tmp_path / "text.txt").write_text("known <end> words")
    arguments = [[tmp_path / "text.txt"], tmp_path / "out", tmp_path / "tokenizer.json"]
    with pytest.raises(ValueError, match="encodes '<end>' inside a document as the end-of-text"):
        prepare(*arguments, end_of_text="<end>")
    prepare(*arguments, end_of_text="<end>", allow_lossy_tokenizer=True)
    assert prepared_documents(tmp_path / "out") == [[0, 3, 1, 3]]


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / "text.txt").write_text("text")
    prepare([tmp_path / "text.txt"], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


def test_code_that_comes_with_a_tokenizer_never_runs(tmp_path):
    """Nor is the user asked, whose `y` would run it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "text.txt").write_text("text")
    command = [sys.executable, "-m", "data", "prepare", tmp_path / "text.txt", "--tokenizer"]
    result = subprocess.run(
        [*command, folder, "--output", tmp_path / "out"],
        cwd=ROOT, env=environment(), input="y\n", capture_output=True, text=True,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert result.stderr == (
        f"error: --tokenizer {folder} cannot be loaded: it needs code of its own, which never "
        f"runs; give a tokenizer.json\n"
    )


def test_a_full_disk_is_named_where_the_tokenizer_is_kept(tmp_path, monkeypatch, tokenizer_json):
    """The package tokenizers raises a plain Exception there."""
    (tmp_path / "text.txt").write_text("text")

    def fail(*_):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(ValueError, match="--output .*out cannot be written: No space left on dev"):
        prepare([tmp_path / "text.txt"], tmp_path / "out", tokenizer_json, end_of_text="!")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_data_set_of_the_hub_is_read_with_its_config(tmp_path, monkeypatch):
    """The hub itself is the one thing that a test cannot count on."""
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "body": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "text.txt").write_text("a file comes first")
    inputs = ["owner/name:config", tmp_path / "text.txt"]
    prepare(inputs, tmp_path / "out", field="body")
    assert asked == [("owner/name", "config", "train")]
    file = [*b"a file comes first", END_OF_DOCUMENT]
    assert prepared_documents(tmp_path / "out") == [file, *BYTES]
    with pytest.raises(ValueError, match="'text' in owner/name; choose --field from id, body"):
        prepare(["owner/name"], tmp_path / "again")
    hole = datasets.Dataset.from_dict({"text": ["a", None]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: hole)
    with pytest.raises(ValueError, match="owner/name: field 'text' is null, not a string"):
        prepare(["owner/name"], tmp_path / "again")
    prepare(["owner/name"], tmp_path / "again", skip_undecodable=True)
    assert prepared_documents(tmp_path / "again") == [[*b"a", END_OF_DOCUMENT]]


def test_the_folder_is_read_by_the_code_of_its_page(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    prepare([tmp_path / "texts"], tmp_path / "DIR")
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"d": 2}
    exec(code, names)
    assert names["document"].tolist() == BYTES[2]


def test_files_that_are_not_utf_8_can_be_left_out(tmp_path, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "a" / "text.txt").write_text("text")
    prepare([tmp_path / "a"], tmp_path / "out", skip_undecodable=True)
    assert prepared_documents(tmp_path / "out") == [[*b"text", END_OF_DOCUMENT]]
    assert f"{tmp_path / 'a' / 'latin.txt'} is not UTF-8 and skipped" in capfd.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_documents_without_text_can_be_left_out_and_are_counted(
    tmp_path, monkeypatch, capfd, processes
):
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    rows = ["a", None, "b", "", "c", None]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    lines = ['{"text": "d"}', '{"text": "\\ud83d"}', '{"text": null}', '{"text": ""}', '{"text"',
             '{"body": "x"}', '{"text": 5}', "[" * 10**5, "[1]", '{"text": "e"}']  # fmt: skip
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.json").write_text('[{"text": "f"}, {"text": null}, {"text": "g"}]')
    (tmp_path / "d.json").write_text('[{"text": "lost"}')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty.txt").touch()
    (tmp_path / "texts" / "h.txt").write_text("h")
    inputs = [tmp_path / name for name in ("a.parquet", "b.jsonl", "c.json", "d.json", "texts")]
    prepare(inputs, tmp_path / "out", skip_undecodable=True, processes=processes)
    expected = [[ord(letter), END_OF_DOCUMENT] for letter in "abcdefgh"]
    assert prepared_documents(tmp_path / "out") == expected
    output, warnings = capfd.readouterr()
    assert f"{tmp_path / 'd.json'} is invalid JSON and skipped" in warnings
    summary, kinds = output.strip().split("; left out: ")
    assert "8 documents, 16 tokens, 0.50 bytes per token" in summary
    assert sorted(kinds.split(", ")) == [
        "1 JSON nested too deeply", "1 not UTF-8", "1 not a string", "1 not an object",
        "1 without field 'text'", "2 invalid JSON", "3 empty", "4 null",
    ]  # fmt: skip


def test_python_stdlib_as_one_input_skips_none_of_the_others(tmp_path, monkeypatch, capfd):
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    (stdlib / "a.py").write_text("a = 1")
    (stdlib / "latin.py").write_bytes(b"na\xefve")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(stdlib))
    (tmp_path / "own.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match="own.txt is not UTF-8"):
        prepare(["python-stdlib", tmp_path / "own.txt"], tmp_path / "out")
    (tmp_path / "own.txt").write_text("own")
    prepare(["python-stdlib", tmp_path / "own.txt"], tmp_path / "out")
    expected = [[*text, END_OF_DOCUMENT] for text in (b"a = 1", b"own")]
    assert prepared_documents(tmp_path / "out") == expected
    assert "its .py files (1), without others (1: latin.py)" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_folder_and_the_next_one_starts_clean(tmp_path, number):
    """Ended while two processes tokenize some 30 MB."""
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    tmp_path = tmp_path / "corpora"
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data", "prepare", tmp_path.parent / "latin.txt"]
    command += ["python-stdlib", "--skip-undecodable", "--tokenizer", "bytes"]
    command += ["--output", output, "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while b"latin.txt is" not in process.stderr.readline():  # a worker's word from its midst
            assert process.poll() is None
        process.send_signal(number)
        if number == signal.SIGTERM:
            stderr = process.communicate(timeout=60)[1]
            assert b"terminated: nothing was written" in stderr
            assert process.returncode == 1
            assert os.listdir(tmp_path) == []
        else:
            assert process.wait(timeout=60) == -number
            assert os.listdir(tmp_path) == ["out.partial"]
        text = tmp_path / "text.txt"
        text.write_text("text")
        prepare([text], output)
        assert prepared_documents(output) == [[*b"text", END_OF_DOCUMENT]]
        assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # idle workers of a killed process stay


def test_two_at_the_same_time_do_not_mix(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "out.partial").mkdir()
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / "out.partial" / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="another process writes .*out.partial; give another"):
            prepare([tmp_path / "text.txt"], tmp_path / "out")
        other.communicate(b"\n")
    prepare([tmp_path / "text.txt"], tmp_path / "out")


def own_files(partial):
    partial.mkdir()
    (partial / "mine.txt").write_text("text")


def own_files_and_a_lock(partial):
    own_files(partial)
    (partial / "lock").touch()


def own_cache(partial):
    (partial / "cache").mkdir(parents=True)


def a_link(partial):
    own_files_and_a_lock(partial.parent / "elsewhere")
    (partial.parent / "elsewhere" / "mine.txt").rename(partial.parent / "elsewhere" / "meta.json")
    partial.symlink_to(partial.parent / "elsewhere")


def a_linked_lock(partial):
    own_cache(partial)
    (partial.parent / "mine.txt").write_text("text")
    (partial / "lock").symlink_to(partial.parent / "mine.txt")


def a_file(partial):
    partial.write_text("text")


@pytest.mark.parametrize(
    "make", [own_files, own_files_and_a_lock, own_cache, a_link, a_linked_lock, a_file]
)
def test_only_what_prepare_made_is_emptied(tmp_path, make):
    def everything():
        return [
            (path, path.is_symlink(), path.read_text() if path.is_file() else "")
            for path in sorted(tmp_path.rglob("*"))
        ]

    (tmp_path / "text.txt").write_text("text")
    make(tmp_path / "out.partial")
    before = everything()
    with pytest.raises(ValueError, match="out.partial is not a folder that an interrupted `prepar"):
        prepare([tmp_path / "text.txt"], tmp_path / "out")
    assert everything() == before


def test_a_second_prepare_cannot_empty_a_complete_folder(tmp_path, monkeypatch):
    """Neither just before the first one renames it, nor with the lock that it opened before."""
    (tmp_path / "text.txt").write_text("text")
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    rename, lockf = os.rename, fcntl.lockf

    def rename_while_another_starts(old, new):
        if new == str(tmp_path / "out"):
            command = [sys.executable, "-c", take, os.path.join(old, "lock")]
            assert b"BlockingIOError" in subprocess.run(command, capture_output=True).stderr
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_while_another_starts)
    prepare([tmp_path / "text.txt"], tmp_path / "out")
    assert "lock" not in os.listdir(tmp_path / "out")

    def lock_after_another_is_done(file, flags):
        rename(tmp_path / "out2.partial", tmp_path / "out2")
        (tmp_path / "out2.partial").mkdir()  # of a third one
        (tmp_path / "out2.partial" / "lock").touch()
        lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", lock_after_another_is_done)
    with pytest.raises(ValueError, match="another process writes .*out2.partial; give another"):
        prepare([tmp_path / "text.txt"], tmp_path / "out2")
    assert os.listdir(tmp_path / "out2.partial") == ["lock"]


def test_the_command_line_says_what_it_did_and_what_is_missing(tmp_path):
    (tmp_path / "text.txt").write_text("text " * 100)
    data = [sys.executable, "-m", "data"]
    arguments = ["prepare", tmp_path / "text.txt", "--tokenizer", "bytes", "--output"]
    without = "import sys; sys.modules['datasets'] = None; from data import prepare as p; "
    result = run(
        sys.executable,
        "-c",
        without + "p.main(sys.argv[1:])",
        *arguments,
        tmp_path / "a",
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "`pip install datasets transformers`" in result.stderr
    arguments[1], home = "~/text.txt", {"HOME": str(tmp_path)}
    result = run(*data, *arguments, "~/out", **home)
    said = f"{tmp_path / 'out'}: 1 documents, 501 tokens, 1.00 bytes per token, "
    assert result.stdout.startswith(said) and result.stdout.endswith(" tokens/s\n")
    assert "Tokenizing" in result.stderr  # the progress bar
    assert "complete, and all checksums match" in run(*data, "verify", "~/out", **home).stdout
    with open(tmp_path / "out" / "tokens.bin", "r+b") as file:
        file.write(b"\x01")
    result = run(*data, "verify", "out", check=False)
    assert f"DIR='out' is not a prepared folder: there is no {ROOT}/out/meta.json" in result.stderr
    result = run(*data, "verify", tmp_path / "out", check=False)
    assert result.returncode == 1
    assert "tokens.bin does not match its checksum in meta.json" in result.stderr
