"""A run's tokenizer: its files, the ids of its special tokens, and whether it fits the data.

A tokenizer is named by its folder, by `bytes` (ids 0 to 255, and 256 ends a text), or by "" if it
is unknown.
"""

import fnmatch
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from typing import Any

from data.corpus import END_OF_DOCUMENT, Corpus, open_corpus

from . import weights
from .format import checkpoints, read_manifest
from .weights import SPECIAL_TOKENS

# Files that can be a whole tokenizer, and files beside them. None of them is code.
WHOLE = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
CHAT = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
END_OF_TEXT = "<|endoftext|>"  # the name of token 256


def describe(corpus: Corpus | None, init_from: str, vocab_size: int) -> dict[str, Any]:
    """Returns what a checkpoint records: `sha256`, as in `Corpus.tokenizer`, and SPECIAL_TOKENS.

    An id is None if it is unknown. eos_token_id may be a list. corpus: None for random data.
    """
    name, ids = corpus.tokenizer if corpus else "", {}
    if init_from and name != "bytes":
        ids = weights.special_tokens(init_from)
    if corpus and (name or not init_from):
        ids |= {key: value for key, value in corpus.special_tokens.items() if value is not None}
    return {"sha256": name, **{key: _valid(ids.get(key), vocab_size) for key in SPECIAL_TOKENS}}


def _valid(ids: Any, vocab_size: int) -> int | list[int] | None:
    """Returns None for ids that are none of the model's; old files have a pad_token_id of -1."""
    found = ids if isinstance(ids, list) else [ids]
    is_valid = found and all(type(i) is int and 0 <= i < vocab_size for i in found)
    return ids if is_valid else None


def of_config(config: dict[str, Any]) -> str:
    """Returns the tokenizer of a run with this config, as `preflight.run_config` returns it."""
    if config["tokenizer"]["sha256"] == "bytes":
        return "bytes"
    prepared = os.path.join(config["data_config"]["source"], "tokenizer")
    if os.path.isdir(prepared):
        return prepared
    folders = [config["model_config"].get("init_from", "")]
    for key in ("continue_from", "resume"):  # an earlier run keeps its tokenizer
        if path := config["train_config"].get(key, ""):
            folders += [os.path.join(path, "tokenizer"), os.path.join(path, "../tokenizer")]
    return next((folder for folder in folders if files(folder)), "")


def of_checkpoint(path: str) -> tuple[str, dict[str, Any]]:
    """Returns the tokenizer of a checkpoint, and its SPECIAL_TOKENS.

    Checkpoints of older versions record neither, but their data may still be there.
    """
    config = read_manifest(path)["config"]
    if "tokenizer" not in config:
        data_config, corpus = config["data_config"], None
        data_config["source"] = os.path.expanduser(data_config["source"])
        init_from = config["model_config"].get("init_from", "")
        vocab_size = config["llama_config"]["vocab_size"]
        try:
            if data_config["source"] != "random":
                skip_undecodable = data_config.get("skip_undecodable", False)
                end_of_text_id = data_config.get("end_of_text_id", 50256)
                source = "data_config.source", data_config["source"]
                corpus = open_corpus(*source, skip_undecodable, end_of_text_id)
            config["tokenizer"] = describe(corpus, init_from, vocab_size)
        except ValueError as error:
            print(f"warning: the end-of-text token is unknown: {error}", file=sys.stderr)
            config["tokenizer"] = describe(None, "", vocab_size)
    ids = {key: config["tokenizer"][key] for key in SPECIAL_TOKENS}
    return tokenizer_folder(path) or of_config(config), ids


def tokenizer_folder(path: str) -> str | None:
    """Returns the folder, for transformers' AutoTokenizer, that a run keeps beside its checkpoint
    `path`; None if it has none.
    """
    folder = os.path.join(os.path.dirname(os.path.realpath(path)), "tokenizer")
    return folder if os.path.isdir(folder) else None


def keep(config: dict[str, Any]) -> None:
    """Copies the tokenizer of a run that starts or resumes into its output_dir, once.

    A new run renames a folder of that name. Raises OSError on a full disk.
    """
    output_dir, name = config["train_config"]["output_dir"], of_config(config)
    folder, temporary = os.path.join(output_dir, "tokenizer"), ""
    exists = os.path.lexists(folder)
    if exists and (checkpoints(output_dir) or os.path.realpath(folder) == os.path.realpath(name)):
        return
    try:
        if name:
            temporary = tempfile.mkdtemp(prefix="tokenizer.", dir=output_dir)
            os.chmod(temporary, 0o755)
            copy(name, temporary)
        if exists:
            number = next(n for n in itertools.count(1) if not os.path.lexists(f"{folder}.{n}"))
            os.rename(folder, f"{folder}.{number}")
        if name:
            os.rename(temporary, folder)
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none


def files(folder: str) -> list[str]:
    """Returns the tokenizer's files in a folder, relative to it; none if it has no tokenizer."""
    found = []
    for below in ("", "additional_chat_templates"):
        path = os.path.join(folder, below)
        names = sorted(os.listdir(path)) if folder and os.path.isdir(path) else []
        found += [os.path.join(below, name) for name in names]
    whole, others = (
        [name for name in found if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        for patterns in (WHOLE, BESIDE + CHAT)
    )
    return whole + others if whole else []


def copy(name: str, destination: str) -> None:
    """Copies a tokenizer into the folder `destination`, for transformers' AutoTokenizer."""
    if name == "bytes":
        for file, content in _byte_tokenizer().items():
            with open(os.path.join(destination, file), "w") as out:
                json.dump(content, out, indent=2)
        return
    for file in files(name):
        os.makedirs(os.path.join(destination, os.path.dirname(file)), exist_ok=True)
        shutil.copyfile(os.path.join(name, file), os.path.join(destination, file))


def _byte_tokenizer() -> dict[str, dict[str, Any]]:
    """Returns {file: content} of a tokenizer that has each byte as its id.

    tokenizers' ByteLevel writes a byte as a printable character, as GPT-2 did: 33 to 126, 161 to
    172 and 174 to 255 as themselves, and the others, in order, as those from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + i): byte for i, byte in enumerate(others)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {"id": END_OF_DOCUMENT, "content": END_OF_TEXT, **flags, "special": True}
            ],
            "pre_tokenizer": {**level, "use_regex": False},
            "decoder": {**level, "use_regex": False},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    }


def check(corpus: Corpus, source: str, folder: str) -> None:
    """Raises ValueError if the corpus has other tokens than the model in `folder`.

    source: data_config.source. A corpus or a folder with an unknown tokenizer is accepted, except
    for bytes.
    """
    has_tokenizer, prepared = bool(files(folder)), os.path.join(source, "tokenizer")
    if corpus.tokenizer == "bytes":
        fault = "is read as bytes"
        is_same = os.path.exists(os.path.join(folder, "tokenizer.json")) and _agree(
            _vocabulary(_byte_tokenizer()["tokenizer.json"]), _read_vocabulary(folder)
        )
    else:
        fault = "is a corpus of another tokenizer"
        if not (has_tokenizer and corpus.tokenizer):
            return
        theirs = _read_vocabulary(folder)
        if files(prepared):
            is_same = _agree(_read_vocabulary(prepared), theirs)
        else:
            merged = sorted({**theirs[0], **theirs[1]}.items())
            is_same = hashlib.sha256(json.dumps(merged).encode()).hexdigest() == corpus.tokenizer
    if is_same:
        return
    other = "has another tokenizer" if has_tokenizer else "has no tokenizer; put it there"
    raise ValueError(
        f"data_config.source={source!r} {fault}, but model_config.init_from={folder!r} {other}; "
        f"tokenize the corpus with it: `python -m data prepare INPUT... --tokenizer {folder} "
        f"--output DIR`, or set model_config.check_tokenizer=false"
    )


Vocabulary = tuple[dict[str, int], dict[str, int]]  # ids of the tokens, and of those added


def _agree(ours: Vocabulary, theirs: Vocabulary) -> bool:
    """Returns whether two vocabularies are equal, except for added tokens that only one has."""
    a, b = {**ours[0], **ours[1]}, {**theirs[0], **theirs[1]}
    return (
        all(b.get(token, a[token]) == a[token] for token in a)
        and not (set(a) - set(b) - set(ours[1]))
        and not (set(b) - set(a) - set(theirs[1]))
        and not ({a[t] for t in set(a) - set(b)} & set(b.values()))
        and not ({b[t] for t in set(b) - set(a)} & set(a.values()))
    )


def _read_vocabulary(folder: str) -> Vocabulary:
    """Reads a folder's vocabulary: from tokenizer.json, or else with transformers."""
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        try:
            return _vocabulary(weights.read_json(folder, "tokenizer.json"))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{folder}/tokenizer.json cannot be read: {error}") from None
    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        added = tokenizer.get_added_vocab()
        return {t: i for t, i in tokenizer.get_vocab().items() if t not in added}, added
    except Exception as error:  # of many types: no transformers, a damaged file, code of its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the tokenizer in {folder!r} cannot be compared with the corpus's ({reason}); "
            f"save it as tokenizer.json, or set model_config.check_tokenizer=false"
        ) from None


def _vocabulary(tokenizer: dict[str, Any]) -> Vocabulary:
    """tokenizer: the content of a tokenizer.json. Unigram has a list of (token, score)."""
    tokens = tokenizer["model"]["vocab"]
    if isinstance(tokens, list):
        tokens = {token: i for i, (token, _) in enumerate(tokens)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return {t: int(i) for t, i in tokens.items()}, {t: int(i) for t, i in added.items()}
