"""The model's shape: presets, overrides, Hugging Face's config.json and back."""

import copy
import dataclasses
import math

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from configuration_llama import (
    LLAMA_32_ROPE,
    PRESETS,
    LlamaConfig,
    rope_attention_factor,
    rope_frequencies,
)
from modeling_llama import LlamaForCausalLM


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("tiny", 2_976_000),
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_transformers_and_its_config_json(preset, tmp_path):
    ours = dataclasses.replace(PRESETS[preset], rms_norm_eps=3e-6)
    theirs = transformers.LlamaConfig(**ours.to_hf())
    theirs.save_pretrained(tmp_path)
    loaded = transformers.LlamaConfig.from_pretrained(tmp_path)
    assert LlamaConfig.from_hf(loaded.to_dict()) == ours
    assert LlamaConfig.from_hf(ours.to_hf()) == ours


def test_config_json_of_transformers_4_is_read():
    """The content of the config.json that meta-llama/Llama-3.2-1B was published with, in part."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    }
    assert LlamaConfig.from_hf(published) == PRESETS["llama-1b"]


THETA = {"rope_theta": 500_000.0}
LLAMA3 = {key: value for key, value in LLAMA_32_ROPE.items() if key != "rope_type"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        THETA,
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", **THETA}},
        {"rope_parameters": THETA},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}, **THETA},
        {"rope_scaling": {**LLAMA3, "type": "llama3", "rope_type": "llama3"}, **THETA},
        {"rope_scaling": {**LLAMA3, "type": "linear", "rope_type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3", **THETA}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "linear", "factor": 3}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": YARN},
        {"rope_scaling": YARN},
        {
            "rope_scaling": {"type": "yarn", "factor": 2.0}
        },  # the original is max_position_embeddings
        {"rope_scaling": {**YARN, "factor": None}},
        {"rope_scaling": {**YARN, "attention_factor": 1.7, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": 16, "beta_slow": 2}},
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": {**YARN, "mscale": 0.7}},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0, "beta_fast": 0}},
        {"rope_scaling": {**YARN, "truncate": False}, **THETA},
        {"rope_scaling": {**YARN, "factor": 0.5}},
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_rope_is_what_transformers_reads_and_reads_again(fields):
    hf_config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 512,
    }
    hf_config |= fields
    ours = LlamaConfig.from_hf(copy.deepcopy(hf_config))
    frequencies = rope_frequencies(ours, torch.device("cpu"))
    for written in (hf_config, ours.to_hf()):
        theirs = transformers.LlamaConfig.from_dict(copy.deepcopy(written))
        theirs = modeling_llama.LlamaRotaryEmbedding(theirs)
        torch.testing.assert_close(
            frequencies.float(), theirs.inv_freq, rtol=1e-6, atol=0, msg=str(written)
        )
        assert rope_attention_factor(ours) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert LlamaConfig.from_hf(ours.to_hf()) == ours


def test_a_mistral_has_the_defaults_of_mistral():
    given = {
        "model_type": "mistral",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
    }
    ours = LlamaConfig.from_hf({**given, "sliding_window": None})
    theirs = transformers.MistralConfig(**given)
    names = "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings"
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_key_value_heads, ours.max_position_embeddings) == (8, 131_072)
    # Positions beyond the window would see tokens that a Mistral does not.
    assert LlamaConfig.from_hf(given).max_position_embeddings == theirs.sliding_window == 4096


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="model_type='qwen2' must be 'llama'"):
        LlamaConfig.from_hf({**PRESETS["tiny"].to_hf(), "model_type": "qwen2"})
    for key, value in (
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("sliding_window", "wide"),
        ("hidden_size", 64.0),
        ("num_attention_heads", "4"),
        ("max_position_embeddings", []),
    ):
        hf_config = {**PRESETS["tiny"].to_hf(), "model_type": "mistral", key: value}
        with pytest.raises(ValueError, match=f"config.json: {key}="):
            LlamaConfig.from_hf(hf_config)
    with pytest.raises(ValueError, match="vocab_size is missing"):
        LlamaConfig.from_hf({"model_type": "llama", "hidden_size": 64})


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            {"num_hiden_layers": 2},
            "no field 'num_hiden_layers'; the nearest is 'num_hidden_layers'",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of .*heads=3"),
        ({"head_dim": 31}, "head_dim=31 must be even"),
        ({"hidden_size": "big"}, "hidden_size='big' must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"rope_theta": 0}, "rope_theta=0.0 must be a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta=1000.* must be of type float"),
        ({"vocab_size": 10**30}, "vocab_size=1000.* must be at least 1, and below 2.31"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be None or a dict"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling=.* must be None or a dict"),
        ({"rope_scaling": {"factor": 2.0}}, "with a rope_type of linear, llama3, yarn"),
        ({"rope_scaling": {"type": ["linear"]}}, "with a rope_type of linear, llama3, yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "a rope_type of linear, llama3, yarn"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "numbers above 0 for factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "facter": 2}}, "numbers above 0 for fac"),
        (
            {"rope_scaling": {**LLAMA_32_ROPE, "high_freq_factor": 1}},
            "a high_freq_factor above its low_freq_factor",
        ),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta=1.0 must be above 1 with yarn"),
    ],
)
def test_a_shape_that_is_no_model_is_one_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        LlamaConfig.from_preset("tiny", overrides)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="'llama-2b' must be one of tiny, llama-1b"):
        LlamaConfig.from_preset("llama-2b", {})
