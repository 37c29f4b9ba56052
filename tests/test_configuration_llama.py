"""The model's shape: presets, overrides, Hugging Face's config.json and back."""

import dataclasses

import pytest
import torch
import transformers

from configuration_llama import PRESETS, LlamaConfig
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


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="model_type='qwen2' must be 'llama'"):
        LlamaConfig.from_hf({**PRESETS["tiny"].to_hf(), "model_type": "qwen2"})
    for scaled in ({"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}):
        with pytest.raises(ValueError, match="rope_scaling"):
            LlamaConfig.from_hf({**PRESETS["tiny"].to_hf(), "rope_scaling": scaled})
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
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling=.* must be None or a dict"),
    ],
)
def test_a_shape_that_is_no_model_is_one_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        LlamaConfig.from_preset("tiny", overrides)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="'llama-2b' must be one of tiny, llama-1b"):
        LlamaConfig.from_preset("llama-2b", {})
