"""The command line's overrides and the checks of the resolved config."""

import copy

import pytest

import llama_pretrain_config
from llama_pretrain_config import describe, flatten, resolve, sections


@pytest.fixture(autouse=True)
def untouched_config():
    """`resolve` writes into the module's dicts: put back what was there."""
    before = copy.deepcopy(sections())
    yield
    for name, section in sections().items():
        section.clear()
        section.update(before[name])


def test_overrides_take_the_type_of_the_default():
    resolve(
        [
            "data_config.seqlen=4_096",
            "data_config.source=a=b.txt",
            "data_config.skip_undecodable=true",
            "train_config.optimizer_config.learning_rate=1",
            "train_config.optimizer_config.betas=[0.8, 0.9]",
            'model_config.overrides={"tie_word_embeddings": false}',
            "model_config.overrides.num_hidden_layers=2",
        ],
        world_size=8,
    )
    assert llama_pretrain_config.data_config["seqlen"] == 4096
    assert llama_pretrain_config.data_config["source"] == "a=b.txt"
    assert llama_pretrain_config.data_config["skip_undecodable"] is True
    optimizer_config = llama_pretrain_config.train_config["optimizer_config"]
    assert optimizer_config["learning_rate"] == 1.0
    assert type(optimizer_config["learning_rate"]) is float
    assert optimizer_config["betas"] == (0.8, 0.9)
    overrides = llama_pretrain_config.model_config["overrides"]
    assert overrides == {"tie_word_embeddings": False, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("data_config.seqln=1", "unknown key 'data_config.seqln'; the nearest is 'data_config.seq"),
        ("seqlen=1", "unknown key 'seqlen'"),
        ("optimizer_config.betas=1", "the nearest is 'train_config.optimizer_config.betas'"),
        ("--seqlen", "'--seqlen' is not of the form SECTION.KEY=VALUE"),
        ("data_config.seqlen=long", "data_config.seqlen='long' must be of type int"),
        ("data_config.seqlen=1.5", "data_config.seqlen='1.5' must be of type int"),
        ("data_config.seqlen=true", "data_config.seqlen='true' must be of type int"),
        ("data_config.skip_undecodable=1", "must be of type bool"),
        ("model_config.overrides=2", "model_config.overrides='2' must be of type dict"),
        ("data_config.seqlen=0", "data_config.seqlen=0 must be a number of at least 1"),
        ("train_config.optimizer_config.learning_rate=-1", "must be a number of at least 0"),
        ("train_config.optimizer_config.learning_rate=NaN", "must be a number of at least 0"),
        ("train_config.optimizer_config.betas=[0.9]", "must be two numbers from 0 to below 1"),
        ("train_config.dtype=float16", "must be one of bfloat16, float32"),
        ("parallel_config.context_parallel_backend=ring", "must be one of auto, magi_attention"),
        ("parallel_config.context_parallel_size=3", "must divide the world size, 8 processes; "),
        ("data_config.batch_size=6", "data_config.batch_size=6 must be a multiple of 4, which is"),
        ("train_config.gradient_accumulation_steps=4", "batch_size=8 must be a multiple of 16"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as error:
        resolve([argument], world_size=8)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_on_one_process_cp_becomes_1_and_says_so():
    assert resolve([], world_size=1) == ["one process: context_parallel_size 2 -> 1"]
    assert llama_pretrain_config.parallel_config["context_parallel_size"] == 1
    assert resolve([], world_size=1) == []


def test_the_defaults_fit_eight_gpus_and_one():
    resolve([], world_size=8)
    assert llama_pretrain_config.parallel_config["context_parallel_size"] == 2
    resolve([], world_size=1)


def test_help_lists_every_key_with_its_comment():
    text = describe()
    for name in flatten(sections()):
        line = text[text.index(f"  {name}=") :].split("\n")
        assert line[1].strip(), name
