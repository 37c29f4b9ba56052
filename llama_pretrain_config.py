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
    source="python-stdlib",  # that, `random`, a prepared folder, or text or .bin files
    random_document_length=0,  # of `random`: tokens per document; 0: a row is one
    skip_undecodable=False,  # skip files that are not UTF-8, else stop; python-stdlib always skips
    end_of_text_id=50256,  # ends a document in .bin files: GPT-2's, or 128000 in llm.c's Llama 3
    validation_fraction=0.0,  # of the documents, held out of training to evaluate on
    validation_source="",  # or a corpus of its own to evaluate on, named like source
    seqlen=8192,  # tokens per row
    batch_size=8,  # rows per global batch: one step, all ranks together
    seed=42,  # of the data order
)

model_config = dict(
    preset="llama-1b",  # `tiny`, `llama-1b`, `llama-3b` or `llama-8b` (configuration_llama.py)
    init_from="",  # a Hugging Face folder: its weights, and its config.json for the preset
    overrides={},  # fields that replace the preset's, such as {"num_hidden_layers": 2}
)

train_config = dict(
    train_iters=1000,  # steps in the whole run
    gradient_accumulation_steps=1,  # micro-batches per step: a rank splits its rows into so many
    dtype="bfloat16",  # of the computation, or `float32`; weights and optimizer are float32
    activation_checkpointing="full",  # recompute `none`, `full`, or `selective`: not attention
    compile=True,  # torch.compile around the attention; the first step takes longer
    eval_interval=0,  # steps between evaluations on the held-out documents, and at the end; 0: none
    eval_iters=20,  # batches per evaluation, the same each time
    seed=42,  # of the weights
    output_dir="runs/llama",  # gets config.json, metrics.jsonl, checkpoints, TensorBoard events
    resume="auto",  # from the newest checkpoint in output_dir; `never`; or a path to one
    checkpoint_interval=250,  # steps between checkpoints; 0: none but the last step's
    keep_last=2,  # newest checkpoints that are kept; 0: all
    on_checkpoint_failure="continue",  # after a save that failed (a full disk), or `stop`
    step_timeout=1800.0,  # seconds after which a step that hangs ends the run
    profile_steps=(),  # first and last step of a trace for Perfetto, such as (5, 8); (): none
    optimizer_config=dict(
        learning_rate=3e-4,  # at the end of the warm-up
        min_learning_rate_ratio=0.1,  # of learning_rate, where the cosine decay ends
        warmup_iters=50,  # steps of linear warm-up
        weight_decay=0.1,  # on matrices; norms have none
        betas=(0.9, 0.95),  # of AdamW
        eps=1e-8,  # of AdamW
        max_clip_grad_norm=1.0,  # larger gradients are scaled down to this norm; inf: never
    ),
)

parallel_config = dict(
    context_parallel_size=2,  # cp: ranks that share a sequence; dp is world size / cp
    context_parallel_backend="auto",  # `auto`, `magi_attention` or `native`
)

RULES = {
    "at least 0": lambda value: 0 <= value < math.inf,
    "at least 1": lambda value: value >= 1,
    "above 0": lambda value: 0 < value < math.inf,
    "above 0, or inf for no clipping": lambda value: value > 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "from 0 to 2^32 - 1": lambda value: 0 <= value < 2**32,
    "() or the first and the last step, from 2 on": lambda value: (
        value == ()
        or (len(value) == 2 and all(type(v) is int for v in value) and 2 <= value[0] <= value[1])
    ),
    "two numbers from 0 to below 1": lambda value: (
        len(value) == 2 and all(type(v) in (int, float) and 0 <= v < 1 for v in value)
    ),
}
# The type of every key, and what its value must be: a rule from above, or its choices.
SCHEMA = {
    "data_config.source": (str, None),
    "data_config.random_document_length": (int, "at least 0"),
    "data_config.skip_undecodable": (bool, None),
    "data_config.end_of_text_id": (int, "at least 0"),
    "data_config.validation_fraction": (float, "from 0 to below 1"),
    "data_config.validation_source": (str, None),
    "data_config.seqlen": (int, "at least 1"),
    "data_config.batch_size": (int, "at least 1"),
    "data_config.seed": (int, "from 0 to 2^32 - 1"),
    "model_config.preset": (str, None),
    "model_config.init_from": (str, None),
    "model_config.overrides": (dict, None),
    "train_config.train_iters": (int, "at least 1"),
    "train_config.gradient_accumulation_steps": (int, "at least 1"),
    "train_config.dtype": (str, ("bfloat16", "float32")),
    "train_config.activation_checkpointing": (str, ("none", "selective", "full")),
    "train_config.compile": (bool, None),
    "train_config.eval_interval": (int, "at least 0"),
    "train_config.eval_iters": (int, "at least 1"),
    "train_config.seed": (int, "from 0 to 2^32 - 1"),
    "train_config.output_dir": (str, None),
    "train_config.resume": (str, None),
    "train_config.checkpoint_interval": (int, "at least 0"),
    "train_config.keep_last": (int, "at least 0"),
    "train_config.on_checkpoint_failure": (str, ("continue", "stop")),
    "train_config.step_timeout": (float, "above 0"),
    "train_config.profile_steps": (tuple, "() or the first and the last step, from 2 on"),
    "train_config.optimizer_config.learning_rate": (float, "at least 0"),
    "train_config.optimizer_config.min_learning_rate_ratio": (float, "from 0 to 1"),
    "train_config.optimizer_config.warmup_iters": (int, "at least 0"),
    "train_config.optimizer_config.weight_decay": (float, "at least 0"),
    "train_config.optimizer_config.betas": (tuple, "two numbers from 0 to below 1"),
    "train_config.optimizer_config.eps": (float, "above 0"),
    "train_config.optimizer_config.max_clip_grad_norm": (float, "above 0, or inf for no clipping"),
    "parallel_config.context_parallel_size": (int, "at least 1"),
    "parallel_config.context_parallel_backend": (str, ("auto", "magi_attention", "native")),
}


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
        is_section = key.endswith("_config") and isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def resolve(arguments: list[str], world_size: int) -> list[str]:
    """Writes the command line's overrides into the dicts above and checks the result.

    It is called once, before anything reads the dicts. arguments: `SECTION.KEY=VALUE` each.
    Returns lines for the log: what was changed for this world size. Raises ValueError, one
    sentence, for whatever cannot be trained as it stands, in the file or on the command line.
    """
    _check_schema(flatten(sections()))
    for argument in arguments:
        _override(argument)
        _check_schema(flatten(sections()))
    notes = []
    if world_size == 1 and parallel_config["context_parallel_size"] > 1:
        notes.append(
            f"one process: context_parallel_size {parallel_config['context_parallel_size']} -> 1"
        )
        parallel_config["context_parallel_size"] = 1
    _check_layout(world_size)
    _check_validation()
    return notes


def _override(argument: str) -> None:
    name, equals, text = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r} is not of the form SECTION.KEY=VALUE; see --help")
    parent, _, key = name.rpartition(".")
    is_field = parent == "model_config.overrides"  # model_config.overrides.num_hidden_layers=2
    if not is_field:
        _check_known(name)
    target = sections()
    for part in parent.split("."):
        target = target[part]
    wanted = None if is_field else SCHEMA[name][0]
    value = text if wanted is str else _parse(text)
    if (wanted, type(value)) in ((float, int), (tuple, list)):
        value = wanted(value)
    target[key] = value


def _parse(text: str) -> Any:
    """Reads a literal as JSON has it (true) or as Python has it (True); other text stays text."""
    for read in (json.loads, ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return text


def _check_known(name: str) -> None:
    if name not in SCHEMA:
        nearest = difflib.get_close_matches(name, SCHEMA, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown key {name!r}; the nearest is {nearest!r}; see --help")


def _check_schema(flat: dict[str, Any]) -> None:
    for name in flat:
        _check_known(name)
    for name, (wanted, rule) in SCHEMA.items():
        if name not in flat:
            raise ValueError(f"{name} is missing from llama_pretrain_config.py")
        value = flat[name]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{name}={value!r} must be of type {wanted.__name__}")
        if type(rule) is tuple and value not in rule:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(rule)}")
        if type(rule) is str and not RULES[rule](value):
            raise ValueError(f"{name}={value!r} must be {rule}")


def _check_layout(world_size: int) -> None:
    cp_size = parallel_config["context_parallel_size"]
    if world_size % cp_size:
        divisors = [str(d) for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"parallel_config.context_parallel_size={cp_size} must divide the world size, "
            f"{world_size} processes; choose one of {', '.join(divisors)}"
        )
    dp_size, batch_size = world_size // cp_size, data_config["batch_size"]
    accumulation = train_config["gradient_accumulation_steps"]
    parts = dp_size * accumulation
    if batch_size % parts:
        raise ValueError(
            f"data_config.batch_size={batch_size} must be a multiple of {parts}, which is dp "
            f"{dp_size} (world size {world_size} / cp {cp_size}) x gradient_accumulation_steps "
            f"{accumulation}; the next is {-(-batch_size // parts) * parts}"
        )


def _check_validation() -> None:
    fraction, source = data_config["validation_fraction"], data_config["validation_source"]
    if fraction and source:
        raise ValueError(
            f"data_config.validation_fraction={fraction} and validation_source={source!r} exclude "
            f"each other; set one"
        )
    if train_config["eval_interval"] and not (fraction or source):
        raise ValueError(
            f"train_config.eval_interval={train_config['eval_interval']} needs documents to "
            f"evaluate on; set data_config.validation_fraction or validation_source"
        )


def describe() -> str:
    """Returns the text of `--help`: every key with its value, and the comment that stands there."""
    comments, path = {}, []
    for line in inspect.getsource(sys.modules[__name__]).splitlines():
        if match := re.match(r" *(\w+) ?= ?dict\($", line):
            path.append(match[1])
        elif re.match(r" *\),?$", line) and path:
            path.pop()
        elif match := re.match(r" *(\w+)=.*,  # (.*)$", line):
            comments[".".join([*path, match[1]])] = match[2]
    lines = [__doc__.strip(), ""]
    for name, value in flatten(sections()).items():
        lines += [f"  {name}={value}", f"      {comments.get(name, '')}"]
    return "\n".join(lines)
