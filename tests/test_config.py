"""The command line's overrides and the checks of the resolved config."""

import copy
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT

import llama_pretrain_config
import main
from configuration_llama import LlamaConfig
from support import preflight
from support.config import describe, flatten, resolve, sections

pytestmark = pytest.mark.usefixtures("config")


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
        ("data_config.seqlen=long", "data_config.seqlen='long' must be an integer of at least 1"),
        ("data_config.seqlen=1.5", "data_config.seqlen=1.5 must be an integer"),
        ("data_config.seqlen=true", "data_config.seqlen=True must be an integer"),
        ("data_config.skip_undecodable=1", "must be true or false"),
        ("model_config.overrides={[1]:2}", "must be a dict"),
        ("model_config.overrides=2", "model_config.overrides=2 must be a dict"),
        ("train_config.train_iters=100000000", "must be an integer from 1 to 99999999"),
        ("data_config.seqlen=0", "data_config.seqlen=0 must be an integer of at least 1"),
        ("train_config.optimizer_config.learning_rate=-1", "must be a number of at least 0"),
        ("train_config.optimizer_config.learning_rate=NaN", "must be a number of at least 0"),
        ("train_config.step_timeout=1" + "0" * 400, "must be a number above 0"),
        ("train_config.optimizer_config.max_clip_grad_norm=0", "must be a number above 0"),
        ("train_config.optimizer_config.eps=0", "must be a number above 0"),
        ("train_config.optimizer_config.min_learning_rate_ratio=3", "must be a number from 0 to 1"),
        ("train_config.seed=100000000000000000000", "must be an integer from 0 to 2^32 - 1"),
        ("train_config.optimizer_config.betas=[0.9]", "must be two numbers from 0 to below 1"),
        ("train_config.dtype=float16", "must be one of bfloat16, float32"),
        ("parallel_config.context_parallel_backend=ring", "must be one of auto, magi_attention"),
        ("parallel_config.context_parallel_size=3", "must divide the world size, 8 processes; "),
        ("data_config.batch_size=6", "data_config.batch_size=6 must be a multiple of 4, which is"),
        (
            "data_config.validation_fraction=1",
            "validation_fraction=1.0 must be a number from 0 to below 1",
        ),
        (
            "train_config.eval_interval=9",
            "train_config.eval_interval=9 needs documents to evaluate",
        ),
        ("train_config.gradient_accumulation_steps=4", "batch_size=4 must be a multiple of 16"),
        (
            "train_config.activation_offload=true",
            "activation_offload=True needs activation_checkpointing 'selective' or 'full', not 'n",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as error:
        resolve([argument], world_size=8)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "section, key, value, sentence",
    [
        ("data_config", "seqlen", 8192.5, "data_config.seqlen=8192.5 must be an integer"),
        ("data_config", "seqlen", "8192", "data_config.seqlen='8192' must be an integer"),
        ("data_config", "source", 5, "data_config.source=5 must be text"),
        ("data_config", "skip_undecodable", "no", "must be true or false"),
        ("model_config", "overrides", None, "model_config.overrides=None must be a dict"),
        ("train_config", "gradient_accumulation_steps", 2.0, "must be an integer"),
        ("train_config", "optimizer_config", None, "unknown key 'train_config.optimizer_config'"),
        ("train_config", "warmup_steps", 3, "unknown key 'train_config.warmup_steps'; the near"),
    ],
)
def test_a_slip_in_the_edited_file_is_one_sentence_too(section, key, value, sentence):
    sections()[section][key] = value
    with pytest.raises(ValueError, match=sentence):
        resolve([], world_size=8)


def test_a_key_deleted_from_the_file_is_named():
    del llama_pretrain_config.data_config["seqlen"]
    with pytest.raises(ValueError, match="'seqlen' is missing from llama_pretrain_config.py"):
        resolve([], world_size=8)


def test_overrides_of_what_is_broken_are_one_sentence_too():
    with pytest.raises(ValueError, match="model_config.overrides=2 must be a dict"):
        resolve(["model_config.overrides=2", "model_config.overrides.vocab_size=300"], world_size=8)


def test_there_is_one_set_to_evaluate_on():
    arguments = ["train_config.eval_interval=9", "data_config.validation_fraction=0.1"]
    resolve(arguments, world_size=8)
    with pytest.raises(ValueError, match="and validation_source='a.txt' exclude each other"):
        resolve([*arguments, "data_config.validation_source=a.txt"], world_size=8)


def test_a_tilde_in_any_path_is_the_home_folder(monkeypatch):
    """Behind `KEY=` the shell leaves it as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        "data_config.source",
        "data_config.validation_source",
        "model_config.init_from",
        "train_config.output_dir",
        "train_config.resume",
    ]
    resolve([f"{path}=~/x" for path in paths], world_size=8)
    assert {flatten(sections())[path] for path in paths} == {"/home/me/x"}


def test_clipping_can_be_switched_off():
    resolve(["train_config.optimizer_config.max_clip_grad_norm=inf"], world_size=8)
    optimizer_config = llama_pretrain_config.train_config["optimizer_config"]
    assert optimizer_config["max_clip_grad_norm"] == float("inf")


def readme_commands() -> list[tuple[int, list[str]]]:
    """The world size, 8 or fewer that `--plan` is given, and the overrides of every command of the
    README and its pages that starts main.py or run.sh.
    """
    commands = []
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for block in re.findall(r"```bash\n(.*?)```", pages, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "main.py" in line or "run.sh" in line:
                words = shlex.split(line, comments=True)
                sizes = [int(w.split("=")[1]) for w in words if w.startswith("world_size=")]
                overrides = [word for word in words if "_config." in word]
                commands.append((min([8, *sizes]), overrides))
    return commands


@pytest.mark.parametrize("world_size, overrides", readme_commands())
def test_the_commands_of_the_readme_suit_eight_gpus(world_size, overrides):
    resolve(overrides, world_size)
    model_config = llama_pretrain_config.model_config
    LlamaConfig.from_preset(model_config["preset"], model_config["overrides"])


def test_the_readme_has_commands():
    assert len(readme_commands()) >= 5
    assert sum(len(overrides) for _, overrides in readme_commands()) >= 8


def test_on_one_process_cp_becomes_1_and_says_so():
    assert resolve([], world_size=1) == ["one process: context_parallel_size 2 -> 1"]
    assert llama_pretrain_config.parallel_config["context_parallel_size"] == 1
    assert resolve([], world_size=1) == []


def test_on_one_process_replicas_become_1_and_more_than_dp_are_an_error():
    replicas = ["parallel_config.data_parallel_replicate_size=2"]
    lines = resolve(replicas, world_size=1)
    assert "one process: data_parallel_replicate_size 2 -> 1" in lines
    assert llama_pretrain_config.parallel_config["data_parallel_replicate_size"] == 1
    with pytest.raises(ValueError, match="replicate_size=2 must divide dp 1, which is world size"):
        resolve([*replicas, "parallel_config.context_parallel_size=8"], world_size=8)


def test_the_defaults_fit_eight_gpus_and_one():
    resolve([], world_size=8)
    assert llama_pretrain_config.parallel_config["context_parallel_size"] == 2
    resolve([], world_size=1)


def test_help_lists_every_key_with_its_comment():
    text = describe()
    for name in flatten(sections()):
        line = text[text.index(f"  {name}=") :].split("\n")
        assert line[1].strip(), name


TEXTS = """
    0 1 2 -1 3.5 1e10 1e-400 1e400 nan inf -inf true True false None null
    [] () {} [0,0] [1,2] (0.5,) [0.5,0.5] [true,false] [[],[]] {1:2} {"a":1} {"head_dim":[]}
    {"vocab_size":"x"} 'x' "x" b'x' 0x10 1_000 --help = == ,, * [ [[ {{ \x00 \ud800 é
    . .. ./ ~ ~nobody / /proc/hf /dev/null README.md step-00000001
    random python-stdlib none auto native tiny
"""
VALUES = TEXTS.split() + ["", " ", "9" * 400, "-" + "9" * 400, "[" * 3000, "x" * 5000]


@pytest.mark.parametrize("key", flatten(sections()))
def test_no_value_of_any_key_ends_in_a_traceback(key, config, tmp_path, monkeypatch):
    """It is accepted, and the optimizer and the schedule can be built, or it is one sentence."""
    monkeypatch.chdir(tmp_path)
    small = ["model_config.preset=tiny", f"data_config.source={ROOT}/LICENSE"]
    small += ["data_config.seqlen=16", "data_config.batch_size=2"]
    before = copy.deepcopy(sections())
    for value in VALUES:
        for section, values in sections().items():
            values.clear()
            values.update(copy.deepcopy(before[section]))
        try:
            main.set_up([*small, f"{key}={value}"])
        except ValueError as error:
            assert "\n" not in str(error), value
            continue
        main.build_optimizer(torch.nn.Linear(2, 2), main.train_config["optimizer_config"])
        main.group_timeout()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_has_expandable_segments_unless_the_user_sets_it(name, monkeypatch):
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # so that monkeypatch removes it at the end
        monkeypatch.delenv(variable)
    preflight.set_environment()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv(name, "max_split_size_mb:128")
    preflight.set_environment()
    assert os.environ[name] == "max_split_size_mb:128"
    assert "expandable" not in os.environ.get("PYTORCH_ALLOC_CONF", "")
