"""The config: overrides from the command line, checks, and the text of `--help`."""

import ast
import copy
import difflib
import inspect
import json
import math
import os
import re
from typing import Any

import llama_pretrain_config
from llama_pretrain_config import data_config, model_config, parallel_config, train_config

CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "activation_checkpointing": ("none", "selective", "full"),
    "on_checkpoint_failure": ("continue", "stop"),
    "context_parallel_backend": ("auto", "magi_attention", "native"),
}


def _is_int(value: Any, low: int, high: int = 2**62) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    """A float, or an integer that fits one."""
    return type(value) in (int, float) and (value == math.inf or abs(value) < 1e300)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_pair(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2


# `~` is expanded in these.
PATHS = ("source", "validation_source", "init_from", "output_dir", "resume", "continue_from")

# What a value must be, the test, and the keys.
RULES = [
    (
        "text",
        lambda v: type(v) is str,
        " ".join(["preset", "wandb_project", *PATHS]),
    ),
    (
        "true or false",
        lambda v: type(v) is bool,
        "skip_undecodable compile check_tokenizer activation_offload",
    ),
    ("a dict of fields", lambda v: type(v) is dict and all(type(k) is str for k in v), "overrides"),
    (
        "an integer of at least 1, and up to 2^62",
        lambda v: _is_int(v, 1),
        "seqlen batch_size gradient_accumulation_steps eval_iters"
        " log_interval context_parallel_size data_parallel_replicate_size",
    ),
    (
        "an integer of at least 0, and up to 2^62",
        lambda v: _is_int(v, 0),
        "random_document_length end_of_text_id eval_interval checkpoint_interval keep_last"
        " warmup_iters",
    ),
    ("an integer from 0 to 2^32 - 1", lambda v: _is_int(v, 0, 2**32 - 1), "seed"),
    # A checkpoint's name has eight digits.
    ("an integer from 1 to 99999999", lambda v: _is_int(v, 1, 99_999_999), "train_iters"),
    (
        "a number of at least 0",
        lambda v: _is_number(v) and 0 <= v < math.inf,
        "learning_rate weight_decay",
    ),
    ("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf, "eps"),
    ("a number above 0 and up to 1e7", lambda v: _is_number(v) and 0 < v <= 1e7, "step_timeout"),
    (
        "a number above 0, or inf for no clipping",
        lambda v: _is_number(v) and v > 0,
        "max_clip_grad_norm",
    ),
    ("a number from 0 to 1", lambda v: _is_fraction(v) or v == 1, "min_learning_rate_ratio"),
    ("a number from 0 to below 1", _is_fraction, "validation_fraction"),
    (
        "two numbers from 0 to below 1",
        lambda v: _is_pair(v) and all(map(_is_fraction, v)),
        "betas",
    ),
    (
        "() or the first and the last step, from 2 on",
        lambda v: v == () or (_is_pair(v) and all(_is_int(x, 2) for x in v) and v[0] <= v[1]),
        "profile_steps",
    ),
    *(
        (f"one of {', '.join(choices)}", lambda v, choices=choices: v in choices, key)
        for key, choices in CHOICES.items()
    ),
]


def sections() -> dict[str, dict[str, Any]]:
    """Returns the four dicts themselves, by name."""
    return dict(
        data_config=data_config,
        model_config=model_config,
        train_config=train_config,
        parallel_config=parallel_config,
    )


def restore(saved: dict[str, dict[str, Any]]) -> None:
    """Writes a deep copy of `sections`, made before, back into the dicts."""
    for name, section in sections().items():
        section.clear()
        section.update(copy.deepcopy(saved[name]))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"section.key": value}. A dict whose name ends in `_config` is a section of keys."""
    flat = {}
    for key, value in config.items():
        is_section = key.endswith("_config") and isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def resolve(arguments: list[str], world_size: int, only_evaluates: bool = False) -> list[str]:
    """Writes the overrides into the dicts of llama_pretrain_config.py and checks the result.

    arguments: `SECTION.KEY=VALUE` each. A value is parsed as the type of the default.
    only_evaluates: whether the run only evaluates.

    Returns lines for the log: what differs from the file. Raises ValueError, one
    sentence, for a value that cannot be trained, whether in the file or on the command line.
    """
    _check(in_file := flatten(sections()))
    for argument in arguments:
        _override(argument)
        _check(flatten(sections()))
    changed = {k: value for k, value in flatten(sections()).items() if value != in_file[k]}
    notes = [f"config: {name} {in_file[name]!r} -> {value!r}" for name, value in changed.items()]
    for key in ("context_parallel_size", "data_parallel_replicate_size"):
        if world_size == 1 and parallel_config[key] > 1:
            notes.append(f"one process: {key} {parallel_config[key]} -> 1")
            parallel_config[key] = 1
    _check_layout(world_size)
    _check_offload()
    _check_validation(only_evaluates)
    for section in sections().values():
        section |= {key: os.path.expanduser(section[key]) for key in PATHS if key in section}
    return notes


def _override(argument: str) -> None:
    name, equals, text = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r} is not of the form SECTION.KEY=VALUE; see --help")
    parent, _, key = name.rpartition(".")
    is_field = parent == "model_config.overrides"  # model_config.overrides.num_hidden_layers=2
    defaults = flatten(sections())
    if not is_field and name not in defaults:
        raise _unknown(name, list(defaults))
    wanted = None if is_field else type(defaults[name])
    value = text if wanted is str else _parse(text)
    if (wanted, type(value)) == (tuple, list) or (wanted is float and _is_number(value)):
        value = wanted(value)
    section = sections()
    for part in parent.split("."):
        section = section[part]
    section[key] = value


def _parse(text: str) -> Any:
    """Reads a literal of JSON (true) or of Python (True); other text stays text."""
    for read in (json.loads, ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return text


def _unknown(name: str, known: list[str]) -> ValueError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ValueError(f"unknown key {name!r}; the nearest is {nearest!r}; see --help")


def _check(flat: dict[str, Any]) -> None:
    rules = {key: rule for *rule, keys in RULES for key in keys.split()}
    found = {name.rpartition(".")[2] for name in flat}
    for name, value in flat.items():
        key = name.rpartition(".")[2]
        if key not in rules:
            raise _unknown(name, [n for n in flat if n != name] + [*(rules.keys() - found)])
        wanted, is_right = rules[key]
        if not is_right(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")
    for key in rules:
        if key not in found:
            raise ValueError(
                f"the key {key!r} is missing from llama_pretrain_config.py; restore it"
            )


def _check_layout(world_size: int) -> None:
    cp_size = parallel_config["context_parallel_size"]
    if world_size % cp_size:
        divisors = [str(d) for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"parallel_config.context_parallel_size={cp_size} must divide the world size, "
            f"{world_size} processes; choose one of {', '.join(divisors)}"
        )
    dp_size, batch_size = world_size // cp_size, data_config["batch_size"]
    replicas = parallel_config["data_parallel_replicate_size"]
    if dp_size % replicas:
        raise ValueError(
            f"parallel_config.data_parallel_replicate_size={replicas} must divide dp {dp_size}, "
            f"which is world size {world_size} / cp {cp_size}"
        )
    accumulation = train_config["gradient_accumulation_steps"]
    parts = dp_size * accumulation
    if batch_size % parts:
        raise ValueError(
            f"data_config.batch_size={batch_size} must be a multiple of {parts}, which is dp "
            f"{dp_size} (world size {world_size} / cp {cp_size}) x gradient_accumulation_steps "
            f"{accumulation}; the next is {-(-batch_size // parts) * parts}"
        )
    seqlen, most = data_config["seqlen"], 2**31 - 1  # cu_seqlens is int32
    if batch_size // parts * seqlen > most:
        raise ValueError(
            f"data_config.seqlen={seqlen} x {batch_size // parts} rows of a micro-batch must "
            f"be at most {most}; lower seqlen, or raise gradient_accumulation_steps"
        )


def _check_offload() -> None:
    mode = train_config["activation_checkpointing"]
    if train_config["activation_offload"] and mode == "none":
        raise ValueError(
            "train_config.activation_offload=True needs activation_checkpointing 'selective' or "
            "'full', not 'none'"
        )


def _check_validation(only_evaluates: bool) -> None:
    fraction, source = data_config["validation_fraction"], data_config["validation_source"]
    if fraction and source:
        raise ValueError(
            f"data_config.validation_fraction={fraction} and validation_source={source!r} exclude "
            f"each other; set one"
        )
    interval = train_config["eval_interval"]
    if (interval or only_evaluates) and not (fraction or source):
        name = "--evaluate" if only_evaluates else f"train_config.eval_interval={interval}"
        raise ValueError(
            f"{name} needs documents to evaluate on; set data_config.validation_fraction or "
            f"validation_source"
        )


def describe() -> str:
    """Returns the text of `--help`: every key with its value and its comment in the file."""
    comments, path = {}, []
    for line in inspect.getsource(llama_pretrain_config).splitlines():
        if match := re.match(r" *(\w+) ?= ?dict\($", line):
            path.append(match[1])
        elif re.match(r" *\),?$", line) and path:
            path.pop()
        elif match := re.match(r" *(\w+)=.*,  # (.*)$", line):
            comments[".".join([*path, match[1]])] = match[2]
    lines = [llama_pretrain_config.__doc__.strip(), ""]
    lines += ["`--evaluate` prints the held-out loss of a checkpoint or of init_from.", ""]
    for name, value in flatten(sections()).items():
        lines += [f"  {name}={value}", f"      {comments.get(name, '')}"]
    return "\n".join(lines)
