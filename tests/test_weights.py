"""Weights to and from transformers: the same tensors and the same logits."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import run
from safetensors.torch import load_file

from checkpoint import weights
from checkpoint.__main__ import export, main
from configuration_llama import LlamaConfig
from context_parallel.native import magi_attn_varlen_key
from modeling_llama import LlamaForCausalLM
from support.process import ERROR_CODE


def hf_logits(folder, tokens):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def our_logits(folder, tokens, cp_group):
    config = weights.read_config(folder, {})
    model = LlamaForCausalLM(config)
    weights.load_weights(model, folder)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, *heads, 0, cp_group, causal=True)
    with torch.no_grad():
        return model(tokens, torch.arange(len(tokens)), key)


def test_an_exported_run_is_the_same_model_in_transformers(undisturbed, cp_group, tmp_path):
    folder = str(tmp_path / "hf")
    command = ["python", "-m", "checkpoint", "export", undisturbed[2], folder]
    said = run(*command, "--max-shard-gib", "0.00005").stdout
    assert "step-00000012" in said
    assert len(list(Path(folder).glob("model-*-of-*.safetensors"))) > 2
    tokens = torch.arange(40) * 7 % 257
    theirs, ours = hf_logits(folder, tokens), our_logits(folder, tokens, cp_group)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.std() > 0.1, "trained, not zeros"
    with pytest.raises(ValueError, match="exists; give the name of a new folder"):
        export(str(undisturbed[2]), folder, "float32", 5.0)


@pytest.mark.parametrize("in_the_way", ["folder", "link"])
def test_an_export_leaves_what_it_did_not_write(in_the_way, undisturbed, tmp_path):
    mine = tmp_path / ("hf.tmp" if in_the_way == "folder" else "mine")
    mine.mkdir()
    (mine / "model.safetensors").write_text("mine")
    if in_the_way == "link":
        (tmp_path / "hf.tmp").symlink_to(mine)
    with pytest.raises(ValueError, match="hf.tmp' cannot be created .File exists.; remove it if "):
        export(str(undisturbed[1]), str(tmp_path / "hf"), "float32", 5.0)
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    assert not (tmp_path / "hf").exists()


def test_an_export_to_a_folder_that_cannot_be_written_is_one_sentence(undisturbed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/hf.tmp' cannot be created .Not a directory.; "):
        export(str(undisturbed[1]), str(tmp_path / "file" / "hf"), "float32", 5.0)


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1"])
def test_a_size_of_files_that_is_none_is_one_sentence(size, undisturbed, tmp_path):
    with pytest.raises(ValueError, match=f"--max-shard-gib {size} must be a number above 0"):
        export(str(undisturbed[1]), str(tmp_path / "hf"), "float32", float(size))


def test_a_tilde_in_a_command_is_the_home_folder(undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(undisturbed[1].parent)
    (tmp_path / "run").symlink_to(undisturbed[1])
    for arguments in (["export", "~/run", "~/hf"], ["inspect", "~/run"]):
        monkeypatch.setattr("sys.argv", ["checkpoint", *arguments])
        main()
        assert f"{tmp_path}/run/step-" in capsys.readouterr().out
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"hidden_size": "64"}'])
def test_a_config_json_that_is_none_is_one_sentence(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"model_config.init_from='{tmp_path}': ") as error:
        weights.read_config(str(tmp_path), {})
    assert "\n" not in str(error.value)


def test_a_folder_is_needed_at_the_start_alone(tmp_path):
    shape = LlamaConfig.from_preset("tiny", {})
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    assert weights.read_config(str(tmp_path), {}) == shape
    (tmp_path / "config.json").unlink()
    assert weights.read_config(str(tmp_path), {"num_hidden_layers": 3}).num_hidden_layers == 3


@pytest.mark.parametrize("tied", [True, False])
def test_init_from_starts_with_the_weights_of_transformers(tied, start, tmp_path):
    """Saved in several bfloat16 files; two ranks read their shards, and at a learning rate of 0
    what they save is what was there.
    """
    torch.manual_seed(0)
    overrides = {"num_hidden_layers": 2, "hidden_size": 32, "tie_word_embeddings": tied}
    shape = LlamaConfig.from_preset("tiny", overrides).to_hf()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    arguments = [
        f"model_config.init_from={tmp_path / 'theirs'}",
        "model_config.overrides={}",
        "model_config.check_tokenizer=false",
        "train_config.train_iters=1",
        "train_config.optimizer_config.learning_rate=0",
    ]
    started = start(*arguments, processes=2)
    assert started.exit_codes() == [0, 0], started.said
    export(str(tmp_path / "run"), str(tmp_path / "ours"), "bfloat16", 5.0)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    expected = {n: p for n, p in theirs.named_parameters()}  # without the tied head
    assert ours.keys() == expected.keys() and ("lm_head.weight" in ours) is not tied
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight), name

    refused = start(*arguments[:1], "model_config.overrides.intermediate_size=64")
    assert refused.exit_codes() == [ERROR_CODE]
    assert "the shape of model.layers.0.mlp.down_proj.weight in its *.safetensors is" in (
        refused.said
    )
