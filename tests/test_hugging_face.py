"""Hugging Face folders: which files are read, which tokens fit, and how an export is used."""

import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, run_model
from safetensors.torch import load_file, save_file
from test_prepare_corpus import prepare

from checkpoint import tokenizer, weights
from checkpoint.__main__ import export
from configuration_llama import LlamaConfig
from data.corpus import open_corpus, read_prepared
from llama_pretrain_config import data_config, model_config, train_config
from modeling_llama import LlamaForCausalLM
from support import preflight
from support.process import ERROR_CODE

SHAPE = dict(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def change(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def load(folder, **overrides):
    """Returns our model with the folder's weights, as a run starts with them."""
    model = LlamaForCausalLM(weights.read_config(str(folder), overrides))
    weights.check_weights(model, str(folder))
    weights.load_weights(model, str(folder))
    return model


def change_weights(folder, change):
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, {"format": "pt"})


def add_another_file(folder):
    tensors = {name: tensor + 7 for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / "model.fp32.safetensors", {"format": "pt"})


def add_an_index(folder):
    add_another_file(folder)
    weight_map = dict.fromkeys(load_file(folder / SINGLE), "model.fp32.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def store_the_tied_head(folder):
    change_weights(
        folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )


def drop_the_prefix(folder):
    change_weights(folder, lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    change(folder / "config.json", architectures=["LlamaModel"])


@pytest.mark.parametrize(
    "rewrite", [add_another_file, add_an_index, store_the_tied_head, drop_the_prefix]
)
def test_init_from_takes_the_weights_that_transformers_takes(rewrite, folder):
    rewrite(folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    ours = load(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_init_from_takes_the_files_of_the_index(sharded):
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 2
    shutil.copy(files[0], sharded / "older.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, sharded / "zeros.safetensors")
    theirs = transformers.LlamaForCausalLM.from_pretrained(sharded).state_dict()
    assert all(torch.equal(theirs[n], x) for n, x in load(sharded).state_dict().items())


def point_to_lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n")


def to_dtype(name, dtype):
    return lambda f: change_weights(f, lambda t: {**t, name: t[name].to(dtype)})


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda f: point_to_lfs(f / SINGLE), "it is a pointer of Git LFS; get the file with"),
        (lambda f: point_to_lfs(f / "config.json"), "it is a pointer of Git LFS; get the file"),
        (lambda f: os.truncate(f / SINGLE, 5000), "cannot be read: .* incomplete"),
        (lambda f: os.truncate(f / SINGLE, 0), "cannot be read: .* incomplete"),
        (lambda f: (f / SINGLE).unlink(), "neither model.safetensors nor model.safetensors.index"),
        (
            lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
            "convert its pytorch_model.bin with transformers",
        ),
        (
            to_dtype("model.norm.weight", torch.int8),
            "model.norm.weight is stored as I8, but must be one of F64, F32, F16, BF16",
        ),
        (to_dtype("model.norm.weight", torch.float8_e4m3fn), "is stored as F8_E4M3"),
        (
            lambda f: change_weights(f, lambda t: {**t, "model.norm.bias": torch.zeros(32)}),
            r"the shape of model.norm.bias in its \*.safetensors is \[32\], in the model none",
        ),
        (
            lambda f: change_weights(f, lambda t: {**t, "norm.weight": torch.zeros(32)}),
            "both hold model.norm.weight",
        ),
        (
            lambda f: change_weights(f, lambda t: {**t, "lm_head.weight": torch.zeros(400, 32)}),
            "its lm_head.weight differs from its embedding",
        ),
        (
            lambda f: change(f / "config.json", tie_word_embeddings=False),
            r"the shape of lm_head.weight .* none, in the model \[400, 32\]",
        ),
        (lambda f: change(f / "config.json", quantization_config={"bits": 4}), "quantization"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_sentence(damage, sentence, folder):
    damage(folder)
    with pytest.raises(ValueError, match=f"model_config.init_from='{folder}': .*{sentence}") as e:
        load(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("[]", "must hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        (
            '{"weight_map": {"a": "../hf/model.safetensors"}}',
            "names '../hf/model.safetensors', whi",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', which is not a file of the"),
        ('{"weight_map": {"a": 3}}', "names 3, which is not a file of the folder"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "model-9.safetensors, which is missing"),
        ("[" * 100_000, "cannot be read: maximum recursion"),
        ('{"weight_map"', "cannot be read: Expecting"),
    ],
)
def test_an_index_that_is_none_is_one_sentence(content, sentence, folder):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"model_config.init_from='{folder}': .*{sentence}") as e:
        load(folder)
    assert "\n" not in str(e.value)


def test_a_mistral_without_a_sliding_window_is_read_as_a_llama(cp_group, config, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.MistralConfig(**SHAPE, sliding_window=None)
    theirs = transformers.MistralForCausalLM(theirs).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(60) * 7 % 400
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        found = run_model(load(tmp_path), tokens, [60], cp_group)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    model_config["init_from"] = str(tmp_path)
    data_config["seqlen"] = 600
    assert preflight.check_rows() == []
    change(tmp_path / "config.json", sliding_window=512)
    weights._configs.cache_clear()
    with pytest.raises(ValueError, match="seqlen=600 is longer than the sliding window .* to 512"):
        preflight.check_rows()
    data_config["seqlen"] = 512
    assert preflight.check_rows() == []
    assert weights.read_config(str(tmp_path), {}).max_position_embeddings == 512


def test_rows_beyond_max_position_embeddings_are_a_warning(config, folder):
    model_config["init_from"] = str(folder)
    data_config["seqlen"] = 2048
    assert preflight.check_rows() == []
    data_config["seqlen"] = 2049
    (warning,) = preflight.check_rows()
    assert warning.startswith("warning: data_config.seqlen=2049 is longer than the model's max_po")
    model_config["overrides"] = {
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 2048},
    }
    assert preflight.check_rows() == []
    assert preflight.build_llama_config().rope_scaling["rope_type"] == "yarn"


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------


def train_tokenizer(folder, vocab_size, text="LICENSE", **special):
    """Saves a byte-level BPE tokenizer as transformers does."""
    tokens = tokenizers.ByteLevelBPETokenizer()
    names = list(special.values())
    tokens.train([str(ROOT / text)], vocab_size, special_tokens=names, show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, **special)
    fast.save_pretrained(folder)
    return fast


SPECIAL = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def corpus(folder, tmp_path):
    """A corpus that was prepared with the folder's tokenizer."""
    train_tokenizer(folder, 400, **SPECIAL)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    prepare([ROOT / "LICENSE"], tmp_path / "corpus", folder)
    return tmp_path / "corpus"


def check(source, folder, **keys):
    data_config["source"], model_config["init_from"] = str(source), str(folder)
    preflight.check_init_from()


def test_an_evaluation_of_the_folder_may_have_a_run_in_output_dir(config, folder, corpus, tmp_path):
    """Training would overwrite it."""
    (tmp_path / "metrics.jsonl").touch()
    train_config.update(resume="never", output_dir=str(tmp_path))
    data_config["source"], model_config["init_from"] = str(corpus), str(folder)
    with pytest.raises(ValueError, match="resume='never', but .* holds a run"):
        preflight.check_init_from()
    preflight.check_init_from(only_evaluates=True)


def test_data_with_other_tokens_than_the_folder_s_is_refused(config, folder, corpus, tmp_path):
    how = f"python -m data prepare INPUT... --tokenizer {folder} --output DIR"
    train_config["output_dir"] = str(tmp_path / "none")
    check("random", folder)
    check(corpus, folder)
    for text in (ROOT / "LICENSE", ROOT / "checkpoint"):
        with pytest.raises(ValueError, match="is read as bytes, but .* has another tokenizer") as e:
            check(text, folder)
        assert how in str(e.value)
    for name, size, text in (("smaller", 350, "LICENSE"), ("other", 400, "README.md")):
        train_tokenizer(tmp_path / name, size, text, **SPECIAL)
        prepare([ROOT / "LICENSE"], tmp_path / f"{name}-corpus", tmp_path / name)
        with pytest.raises(ValueError, match="is a corpus of another tokenizer, but ") as e:
            check(tmp_path / f"{name}-corpus", folder)
        assert how in str(e.value)
    model_config["check_tokenizer"] = False
    check(ROOT / "LICENSE", folder)
    check(tmp_path / "other-corpus", folder)


def test_an_added_token_and_another_kind_of_file_are_the_same_tokenizer(
    config, folder, corpus, tmp_path
):
    train_config["output_dir"] = str(tmp_path / "none")
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    fast.add_tokens(["<tool>"], special_tokens=True)
    fast.save_pretrained(folder)
    check(corpus, folder)
    prepare([ROOT / "LICENSE"], tmp_path / "file", folder / "tokenizer.json", end_of_text="</s>")
    check(tmp_path / "file", folder)
    shutil.rmtree(tmp_path / "file" / "tokenizer")  # the checksum of the vocabulary is left
    check(tmp_path / "file", folder)
    shutil.rmtree(corpus / "tokenizer")
    with pytest.raises(ValueError, match="is a corpus of another tokenizer"):
        check(corpus, folder)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        check(tmp_path / "file", folder)


def test_a_folder_without_a_tokenizer_takes_a_prepared_corpus_but_no_bytes(
    config, folder, corpus, tmp_path
):
    train_config["output_dir"] = str(tmp_path / "none")
    for name in tokenizer.files(str(folder)):
        (folder / name).unlink()
    check(corpus, folder)
    with pytest.raises(ValueError, match="is read as bytes, but .* has no tokenizer; put it there"):
        check(ROOT / "LICENSE", folder)


def test_meta_json_has_the_ids_of_the_special_tokens(corpus, folder):
    meta = json.loads((corpus / "meta.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert meta["end_of_text_id"] == theirs.eos_token_id == 1
    assert (meta["bos_token_id"], meta["pad_token_id"]) == (0, 2)
    assert read_prepared(str(corpus), 0).special_tokens == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    # Older folders have only end_of_text_id.
    for key in ("bos_token_id", "pad_token_id"):
        del meta[key]
    (corpus / "meta.json").write_text(json.dumps(meta))
    assert read_prepared(str(corpus), 0).special_tokens["eos_token_id"] == 1


def test_token_files_give_an_end_of_text_only_if_they_have_one(tmp_path):
    np.array([5, 6, 9, 7, 8], dtype=np.uint16).tofile(tmp_path / "a.bin")
    for end_of_text_id, expected in ((9, 9), (50, None)):
        corpus = open_corpus("data_config.source", str(tmp_path / "a.bin"), False, end_of_text_id)
        assert tokenizer.describe(corpus, "", 100)["eos_token_id"] == expected


# ---------------------------------------------------------------------------------------------
# Exports
# ---------------------------------------------------------------------------------------------


def assert_it_stops(folder, prompt, eos):
    """transformers' pipeline completes a prompt, and ends where the end of a text is likely."""
    pipeline = transformers.pipeline("text-generation", str(folder))
    config, generation = pipeline.model.config, pipeline.model.generation_config
    assert config.eos_token_id == generation.eos_token_id == eos
    first = eos[0] if isinstance(eos, list) else eos
    force = transformers.LogitsProcessorList([ForceToken(first)])
    (completed,) = pipeline(prompt, max_new_tokens=20, logits_processor=force)
    assert completed["generated_text"] == prompt
    return config, pipeline.tokenizer


class ForceToken(transformers.LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([self.token]), 0)


def finish(started):
    assert started.exit_codes() == [0] * len(started.ranks), started.said
    return started.said


def test_an_export_of_a_prepared_corpus_ends_where_its_texts_end(start, corpus, tmp_path):
    arguments = [
        f"data_config.source={corpus}",
        "model_config.overrides.vocab_size=400",
        "model_config.overrides.max_position_embeddings=16",
        "train_config.train_iters=2",
    ]
    said = finish(start(*arguments))
    assert (
        "warning: data_config.seqlen=24 is longer than the model's max_position_embeddings" in said
    )
    shutil.rmtree(corpus)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "float32", 5.0)
    config, _ = assert_it_stops(tmp_path / "out", "The license", 1)
    assert (config.bos_token_id, config.pad_token_id) == (0, 2)
    assert config.max_position_embeddings == 24
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_export_of_bytes_is_completed_as_text(undisturbed, start, tmp_path):
    export(str(undisturbed[1]), str(tmp_path / "out"), "float32", 5.0)
    config, tokens = assert_it_stops(tmp_path / "out", "Größe: 語\n", 256)
    assert (config.bos_token_id, config.pad_token_id) == (None, None)
    text = "".join(map(chr, range(300))) + "語 🦙\r\n  x"
    assert tokens(text)["input_ids"] == list(text.encode())
    assert tokens.decode(list(text.encode())) == text
    # It is taken further on bytes, whose tokens are its own.
    finish(
        start(
            f"model_config.init_from={tmp_path / 'out'}",
            "model_config.overrides={}",
            "train_config.train_iters=1",
        )
    )


def test_an_export_of_an_older_checkpoint_finds_what_its_data_says(
    undisturbed, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(undisturbed[1], tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    manifest = tokenizer.read_manifest(str(run / "step-00000012"))
    del manifest["config"]["tokenizer"]
    monkeypatch.setattr(tokenizer, "read_manifest", lambda path: manifest)
    monkeypatch.chdir(ROOT)
    export(str(run), str(tmp_path / "out"), "float32", 5.0)
    assert_it_stops(tmp_path / "out", "text", 256)
    monkeypatch.chdir(tmp_path)  # LICENSE is gone
    open_corpus.cache_clear()
    del manifest["config"]["tokenizer"]
    export(str(run), str(tmp_path / "unknown"), "float32", 5.0)
    written = json.loads((tmp_path / "unknown" / "config.json").read_text())
    assert written["eos_token_id"] is None
    assert "warning: the end-of-text token is unknown: " in capsys.readouterr().err


def test_an_export_has_the_tokenizer_and_the_ids_of_init_from(start, folder, corpus, tmp_path):
    change(folder / "config.json", eos_token_id=3, pad_token_id=-1)
    change(folder / "generation_config.json", eos_token_id=[1, 3, 5])
    said = finish(
        start(
            "data_config.source=random",
            f"model_config.init_from={folder}",
            "model_config.overrides={}",
            "train_config.train_iters=1",
        )
    )
    assert "warning" not in said
    shutil.rmtree(folder)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "float32", 5.0)
    config, tokens = assert_it_stops(tmp_path / "out", "The license", [1, 3, 5])
    assert config.pad_token_id is None and tokens.pad_token == "<pad>"
    checkpoint = tmp_path / "run" / "step-00000001"
    assert tokenizer.tokenizer_folder(str(checkpoint)) == str(tmp_path / "run" / "tokenizer")


def test_a_run_on_bytes_from_a_folder_resumes_and_a_new_one_is_refused(start, folder, tmp_path):
    arguments = [f"model_config.init_from={folder}", "model_config.overrides={}"]
    finish(start(*arguments, "model_config.check_tokenizer=false", "train_config.train_iters=1"))
    said = finish(start(*arguments, "train_config.train_iters=2"))
    assert "resume: " in said
    refused = start(*arguments, output_dir=tmp_path / "new")
    assert refused.exit_codes() == [ERROR_CODE]
    assert "error: data_config.source='LICENSE' is read as bytes, but " in refused.said
    assert not (tmp_path / "new" / "tokenizer").exists()


def test_a_full_disk_leaves_no_part_of_a_tokenizer_and_another_folder_is_kept(
    folder, corpus, tmp_path, monkeypatch
):
    def fail(source, destination):
        raise OSError(28, "No space left on device", destination)

    monkeypatch.setattr(shutil, "copyfile", fail)
    config = {
        "tokenizer": {"sha256": "known"},
        "data_config": {"source": str(corpus)},
        "model_config": {"init_from": ""},
        "train_config": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.keep(config)
    assert os.listdir(tmp_path / "run") == ["tokenizer"]
    monkeypatch.undo()
    (tmp_path / "run" / "tokenizer" / "mine").touch()
    tokenizer.keep(config)
    assert os.listdir(tmp_path / "run" / "tokenizer.1") == ["mine"]
    assert set(os.listdir(tmp_path / "run" / "tokenizer")) == set(os.listdir(corpus / "tokenizer"))


def test_a_tokenizer_is_copied_without_code_and_weights(tmp_path):
    names = ["tokenizer.model", "tokenizer_config.json", "additional_chat_templates/a.jinja"]
    others = ["model.safetensors", "config.json", "tokenization_x.py", "README.md", "a.jinja"]
    for name in names + others:
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    (tmp_path / "to").mkdir()
    tokenizer.copy(str(tmp_path / "from"), str(tmp_path / "to"))
    copied = [p.relative_to(tmp_path / "to") for p in (tmp_path / "to").rglob("*") if p.is_file()]
    assert sorted(map(str, copied)) == sorted(names)
    (tmp_path / "from" / "tokenizer.model").unlink()  # the rest is no tokenizer
    assert tokenizer.files(str(tmp_path / "from")) == []


def test_a_yarn_model_survives_its_export(folder):
    config = LlamaConfig(
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "attention_factor": None,
            "truncate": False,
        }
    )
    theirs = transformers.LlamaConfig.from_dict(config.to_hf())
    assert LlamaConfig.from_hf(theirs.to_dict()) == config
    assert config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    }
