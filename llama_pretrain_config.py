"""What to train, on what, and how. Edit the dicts, or override a key on the command line:

    torchrun main.py data_config.seqlen=4096 train_config.optimizer_config.learning_rate=1e-4

The defaults make sense on one node of 8 GPUs, and train on one 80 GB GPU too.
"""

import ast
import difflib
import inspect
import json
import math
import re
import sys
from typing import Any

data_config = dict(
    source="python-stdlib",  # `python-stdlib`, `random`, or a path or glob of text files
    skip_undecodable=False,  # a file that is not UTF-8: False stops with its name, True skips it
    seqlen=8192,  # tokens per row
    batch_size=8,  # rows per global batch: one step, all ranks together
    seed=42,  # of the data order
)

model_config = dict(
    preset="llama-1b",  # `tiny`, `llama-1b`, `llama-3b` or `llama-8b` (configuration_llama.py)
    overrides={},  # fields that replace the preset's, such as {"num_hidden_layers": 2}
)

train_config = dict(
    train_iters=1000,  # steps in the whole run
    gradient_accumulation_steps=1,  # parts in which a rank works off its rows of one step
    dtype="bfloat16",  # of the computation, or `float32`; weights and reductions are float32
    activation_checkpointing="full",  # `none`, or `full`: recompute each layer in backward
    seed=42,  # of the weights
    output_dir="runs/llama",  # gets config.json, metrics.jsonl and TensorBoard events
    optimizer_config=dict(
        learning_rate=3e-4,  # at the end of the warm-up
        min_learning_rate_ratio=0.1,  # of learning_rate, where the cosine decay ends
        warmup_iters=50,  # steps of linear warm-up
        weight_decay=0.1,  # on matrices; norms have none
        betas=(0.9, 0.95),  # of AdamW
        eps=1e-8,  # of AdamW
        max_clip_grad_norm=1.0,  # larger gradients are scaled down to this norm
    ),
)

parallel_config = dict(
    context_parallel_size=2,  # cp: ranks that share a sequence; dp is world size / cp
    context_parallel_backend="auto",  # `auto`, `magi_attention` or `native`
    chunk_size=512,  # tokens per chunk at the most: the granularity of the cp load balance
)

CHOICES = {
    "train_config.dtype": ("bfloat16", "float32"),
    "train_config.activation_checkpointing": ("none", "full"),
    "parallel_config.context_parallel_backend": ("auto", "magi_attention", "native"),
}
AT_LEAST_1 = (
    "data_config.seqlen",
    "data_config.batch_size",
    "train_config.train_iters",
    "train_config.gradient_accumulation_steps",
    "parallel_config.context_parallel_size",
    "parallel_config.chunk_size",
)
AT_LEAST_0 = (
    "data_config.seed",
    "train_config.seed",
    "train_config.optimizer_config.learning_rate",
    "train_config.optimizer_config.min_learning_rate_ratio",
    "train_config.optimizer_config.warmup_iters",
    "train_config.optimizer_config.weight_decay",
    "train_config.optimizer_config.eps",
    "train_config.optimizer_config.max_clip_grad_norm",
)


def sections() -> dict[str, dict[str, Any]]:
    """Returns the four dicts themselves, by name."""
    return dict(
        data_config=data_config,
        model_config=model_config,
        train_config=train_config,
        parallel_config=parallel_config,
    )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"section.key": value}. A dict whose name ends in `_config` is a section of keys."""
    flat = {}
    for key, value in config.items():
        is_section = key.endswith("_config")
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def resolve(arguments: list[str], world_size: int) -> list[str]:
    """Writes the command line's overrides into the dicts above and checks the result.

    It is called once, before anything reads the dicts. arguments: `SECTION.KEY=VALUE` each.
    Returns lines for the log: what was changed for this world size. Raises ValueError, one
    sentence, for whatever cannot be trained as it stands.
    """
    for argument in arguments:
        _override(argument)
    notes = []
    if world_size == 1 and parallel_config["context_parallel_size"] > 1:
        notes.append(
            f"one process: context_parallel_size {parallel_config['context_parallel_size']} -> 1"
        )
        parallel_config["context_parallel_size"] = 1
    _check(flatten(sections()), world_size)
    return notes


def _override(argument: str) -> None:
    name, equals, text = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r} is not of the form SECTION.KEY=VALUE; see --help")
    flat = flatten(sections())
    parent, _, key = name.rpartition(".")
    if isinstance(flat.get(parent), dict):  # model_config.overrides.num_hidden_layers=2
        flat[parent][key] = _parse(text)
        return
    if name not in flat:
        nearest = difflib.get_close_matches(name, flat, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown key {name!r}; the nearest is {nearest!r}; see --help")
    target = sections()
    for part in parent.split("."):
        target = target[part]
    target[key] = _parse_as(type(flat[name]), name, text)


def _parse_as(wanted: type, name: str, text: str) -> Any:
    value = text if wanted is str else _parse(text)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not wanted:
        raise ValueError(f"{name}={text!r} must be of type {wanted.__name__}")
    return value


def _parse(text: str) -> Any:
    """Reads a literal as JSON has it (true) or as Python has it (True); other text stays text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def _check(flat: dict[str, Any], world_size: int) -> None:
    for name, choices in CHOICES.items():
        if flat[name] not in choices:
            raise ValueError(f"{name}={flat[name]!r} must be one of {', '.join(choices)}")
    for names, smallest in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for name in names:
            value = flat[name]
            if not (type(value) in (int, float) and smallest <= value < math.inf):
                raise ValueError(f"{name}={value!r} must be a number of at least {smallest}")
    betas = flat["train_config.optimizer_config.betas"]
    if len(betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in betas):
        raise ValueError(
            f"train_config.optimizer_config.betas={betas!r} must be two numbers from 0 to below 1"
        )

    cp_size = flat["parallel_config.context_parallel_size"]
    if world_size % cp_size:
        raise ValueError(
            f"parallel_config.context_parallel_size={cp_size} must divide the world size, "
            f"{world_size} processes; choose one of {_divisors(world_size)}"
        )
    batch_size = flat["data_config.batch_size"]
    accumulation = flat["train_config.gradient_accumulation_steps"]
    parts = world_size // cp_size * accumulation
    if batch_size % parts:
        raise ValueError(
            f"data_config.batch_size={batch_size} must be a multiple of {parts}, which is dp "
            f"{world_size // cp_size} (world size {world_size} / cp {cp_size}) x "
            f"gradient_accumulation_steps {accumulation}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def describe() -> str:
    """Returns the text of `--help`: every key with its value and the comment that stands there."""
    lines, path = [__doc__.strip(), ""], []
    for line in inspect.getsource(sys.modules[__name__]).split("\n\nCHOICES")[0].splitlines():
        if match := re.match(r"\s*(\w+) ?= ?dict\($", line):
            path.append(match[1])
        elif re.match(r"\s*\),?$", line) and path:
            path.pop()
        elif (match := re.match(r"\s*(\w+)=(.*),  # (.*)$", line)) and path:
            lines.append(f"  {'.'.join([*path, match[1]])}={match[2]}\n      {match[3]}")
    return "\n".join(lines)
