"""Before a run: resolves the config, checks it, opens the data, and logs what will run."""

import fnmatch
import glob
import importlib
import os
import shutil
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import context_parallel
from checkpoint import resume, tokenizer, weights
from configuration_llama import LlamaConfig
from data import RandomSource, TokenSource, open_source
from data.corpus import open_corpus
from llama_pretrain_config import data_config, model_config, parallel_config, train_config
from modeling_llama import LlamaForCausalLM

from . import config as run_settings
from . import plan, plan_report, wandb_run
from .machine import describe_machine, free_host_memory
from .process import lock_output_dir, rank, restarts
from .stop import log

Sources = dict[str, TokenSource | RandomSource]
EVALUATE, PLAN = "--evaluate", "--plan"


def set_up(arguments: list[str]) -> Sources:
    """Resolves and checks the config, and logs what will run; returns the opened data.

    arguments: `SECTION.KEY=VALUE` each; `--evaluate`, which opens only the validation data; or
    `--help` or `--plan`, which end the process.

    Raises ValueError, one sentence, for a mistake of the user, before the process group exists.
    """
    set_environment()
    if "--help" in arguments or "-h" in arguments or PLAN in arguments:
        if os.environ["LOCAL_RANK"] == "0":
            print(describe_plan(arguments) if PLAN in arguments else run_settings.describe())
        sys.exit()
    only_evaluates = EVALUATE in arguments
    overrides = [argument for argument in arguments if argument != EVALUATE]
    notes = run_settings.resolve(overrides, int(os.environ["WORLD_SIZE"]), only_evaluates)
    notes += [f"attention: {line}" for line in choose_backend()]
    notes += check_rows()
    check_machine()
    notes += [] if only_evaluates else check_host_memory()
    check_init_from(only_evaluates)
    if train_config["wandb_project"] and not only_evaluates and rank() == 0:
        wandb_run.check(train_config["wandb_project"])
    sources = open_sources(only_evaluates)
    check_files(sources)
    log_run(sources, notes)
    return sources


def describe_plan(arguments: list[str]) -> str:
    """Returns the text of `--plan`, with the errors of a run. No GPU is needed, nothing written."""
    overrides = [argument for argument in arguments if argument != PLAN]
    world_size, gpu, overrides = plan_report.parse(overrides)
    notes = run_settings.resolve(overrides, world_size)
    notes = [note for note in notes if not note.startswith("config: ")]  # as asked
    notes += check_rows()
    llama, dtype = build_llama_config(), train_config["dtype"]
    backend = parallel_config["context_parallel_backend"]
    kernel = plan_report.choose_kernel(gpu, llama.head_dim, backend, dtype)
    source = open_sources()["train"]
    check_init_from()
    settings = plan.Settings.of(run_settings.sections(), llama, gpu, kernel, world_size)
    lengths = plan.row_lengths(source, settings.seqlen)
    return "\n".join([*notes, f"data: {source.description}", plan_report.report(settings, lengths)])


def set_environment() -> None:
    """Sets torchrun's variables where it did not start this process, and PyTorch's allocator.

    A scheduler may have set RANK and WORLD_SIZE, but it counts nodes.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the earlier name
        # Without it, 11 of 75 GiB lay between blocks in a row of 3,932,160 tokens.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def build_llama_config() -> LlamaConfig:
    """Returns the model's shape: from `init_from` or the preset, with the overrides."""
    if model_config["init_from"]:
        return weights.read_config(model_config["init_from"], model_config["overrides"])
    return LlamaConfig.from_preset(model_config["preset"], model_config["overrides"])


def group_timeout() -> timedelta:
    """Returns the timeout of collectives, longer than the watchdog's, which names the step."""
    return timedelta(seconds=2 * train_config["step_timeout"])


def with_timeout(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the mesh; its groups have `group_timeout`, not torch's default."""
    for group in mesh.get_all_groups():
        group.set_timeout(group_timeout())
    return mesh


def choose_backend() -> list[str]:
    """Writes the attention backend into the config; returns lines for the log."""
    backend, lines = context_parallel.select_backend(
        parallel_config["context_parallel_backend"],
        build_llama_config().head_dim,
        train_config["dtype"],
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    parallel_config["context_parallel_backend"] = backend
    return lines


def check_rows() -> list[str]:
    """Returns a warning of rows that are longer than the model's positions, as a list.

    Raises ValueError for rows that are longer than the sliding window of `init_from`.
    """
    seqlen, folder = data_config["seqlen"], model_config["init_from"]
    window = weights.sliding_window(folder) if folder else None
    if window and seqlen > window:
        raise ValueError(
            f"data_config.seqlen={seqlen} is longer than the sliding window of "
            f"model_config.init_from={folder!r}, and this model has none; lower it to {window}"
        )
    longest = build_llama_config().max_position_embeddings
    if seqlen <= longest:
        return []
    return [
        f"warning: data_config.seqlen={seqlen} is longer than the model's max_position_embeddings="
        f"{longest}; change rope_theta or rope_scaling in model_config.overrides"
    ]


def check_machine() -> None:
    """Raises ValueError for more processes than GPUs, or torch.compile without a C compiler."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus:
        raise ValueError(f"{processes} processes on a node with {gpus} GPUs; start at most {gpus}")
    if not train_config["compile"]:
        return
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    # Triton calls a C compiler, and Inductor on a CPU a C++ compiler.
    wanted = [os.environ.get("CC", "gcc"), "clang"] if torch.cuda.is_available() else [cxx]
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"train_config.compile=True needs a compiler, and {' or '.join(wanted)} is not in "
            f"PATH; install one, or set train_config.compile=false"
        )


def check_host_memory() -> list[str]:
    """Raises ValueError if `activation_offload` needs more than the node has; returns log lines."""
    if not train_config["activation_offload"]:
        return []
    if not torch.cuda.is_available():
        return ["activation_offload changes nothing on a CPU"]
    world_size = int(os.environ["WORLD_SIZE"])
    backend = parallel_config["context_parallel_backend"]
    config = run_settings.sections()
    settings = plan.Settings.of(config, build_llama_config(), "", backend, world_size)
    tokens = settings.batch_size * settings.seqlen // settings.accumulation // world_size
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes * plan.host_bytes(settings, tokens, gathers=settings.cp_size > 1) / 2**30
    free = free_host_memory() / 2**30
    if needed > free:
        raise ValueError(
            f"train_config.activation_offload=True needs {needed:.1f} GiB of host memory for "
            f"{processes} GPUs, and {free:.1f} GiB of this node are free; use more GPUs or a "
            f"lower data_config.seqlen or batch_size, or set activation_offload=false"
        )
    return [f"activation_offload: {needed:.1f} of {free:.1f} GiB of free host memory"]


def check_init_from(only_evaluates: bool = False) -> None:
    """Raises ValueError if `init_from` lacks weights, or has another tokenizer than the data."""
    key = "validation_source" if only_evaluates and data_config["validation_source"] else "source"
    folder, source = model_config["init_from"], data_config[key]
    if not folder:
        return
    with torch.device("meta"):
        weights.check_weights(LlamaForCausalLM(build_llama_config()), folder)
    if source == "random" or not model_config["check_tokenizer"]:
        return
    config = run_settings.sections()
    if only_evaluates:
        paths, resumes = resume.find_weights(config), True
    else:
        paths, resumes = resume.find(config, restarts())
    if not (paths and resumes):  # a run that resumes has started with the same corpus
        keys = data_config["skip_undecodable"], data_config["end_of_text_id"]
        tokenizer.check(open_corpus(f"data_config.{key}", source, *keys), source, folder)


def open_sources(only_evaluates: bool = False) -> Sources:
    """Opens the data: "train", and "validation" if the run evaluates."""
    vocab_size, sources = build_llama_config().vocab_size, {}
    if not only_evaluates:
        sources["train"] = open_source("train", vocab_size, 1, **data_config)
    if train_config["eval_interval"] or only_evaluates:
        num_batches = train_config["eval_iters"]
        keys = data_config
        if only_evaluates and data_config["validation_source"]:
            keys = {**data_config, "source": "random"}  # the corpus of training is not opened
        sources["validation"] = open_source("validation", vocab_size, num_batches, **keys)
    return sources


def run_config(sources: Sources) -> dict[str, Any]:
    """Returns what config.json and checkpoints record: the config, the shape, data and machine."""
    config, source = build_llama_config(), next(iter(sources.values()))
    corpus = source.corpus if isinstance(source, TokenSource) else None
    return {
        **run_settings.sections(),
        "llama_config": asdict(config),
        "tokenizer": tokenizer.describe(corpus, model_config["init_from"], config.vocab_size),
        "data": source.description,
        "fingerprints": {
            name: source.corpus.fingerprint if isinstance(source, TokenSource) else "random"
            for name, source in sources.items()
        },
        "machine": describe_machine(),
    }


def check_files(sources: Sources) -> None:
    """Checks that the run can resume from output_dir, and locks it.

    A run that only evaluates needs weights, and changes nothing in output_dir.
    """
    if "train" in sources:
        resume.check_resume(run_config(sources), restarts())  # before the folder is made
        lock_output_dir(train_config["output_dir"])
    elif not (model_config["init_from"] or resume.find_weights(run_config(sources))):
        raise ValueError(
            f"{EVALUATE} finds no weights: train_config.output_dir={train_config['output_dir']!r} "
            f"holds no checkpoint; give a run's, or a Hugging Face folder in model_config.init_from"
        )


def log_run(sources: Sources, notes: list[str]) -> None:
    """Logs what a result depends on. notes: lines of `set_up`."""
    config = build_llama_config()
    world_size, cp_size = int(os.environ["WORLD_SIZE"]), parallel_config["context_parallel_size"]
    log(f"machine: {', '.join(f'{k} {v}' for k, v in describe_machine().items())}")
    replicas = parallel_config["data_parallel_replicate_size"]
    sharded = f"; {replicas} replicas of the weights" if replicas > 1 else ""
    log(f"mesh: dp {world_size // cp_size} x cp {cp_size}, {world_size} processes{sharded}")
    if "train" in sources:
        log(f"config: all keys in {os.path.join(train_config['output_dir'], 'config.json')}")
    for line in notes:
        log(line)
    if train_config["compile"]:
        log("kernels: compiled in the first step, which takes about half a minute")
    if parallel_config["context_parallel_backend"] == "magi_attention":
        if missing := missing_magi_kernels(config.head_dim, cp_size):
            minutes = f"{2.5 * missing:g} minutes"
            log(f"kernels: magi_attention compiles {missing} more, silently, for about {minutes}")
    for name, source in sources.items():
        log(f"{'data' if name == 'train' else name}: {source.description}")
    log(
        f"model: {config.num_hidden_layers} layers, hidden_size {config.hidden_size}, "
        f"intermediate_size {config.intermediate_size}, {config.num_attention_heads} heads of "
        f"{config.head_dim}, {config.num_key_value_heads} key/value heads, "
        f"vocab_size {config.vocab_size}"
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    if "train" in sources:
        plan.log_expected(config, sources["train"], log)


def missing_magi_kernels(head_dim: int, cp_size: int) -> int:
    """Returns how many kernels magi_attention 1.1 has to compile for the first step.

    It needs one for forward, one for backward and, where ranks share a document, one more for
    forward. It looks for them in its package and in its cache.
    """
    package = importlib.import_module("magi_attention").__path__[0]
    base = os.environ.get("MAGI_ATTENTION_WORKSPACE_BASE", os.path.expanduser("~"))
    built = [
        os.path.basename(path)
        for folder in (f"{package}/lib", f"{base}/.cache/magi_attention/*/cached_ops")
        for path in glob.glob(f"{folder}/*_{head_dim}hd_compute_bfloat16_*/*.so")
    ]
    wanted = ["*_fwd_*_float32_m*", "*_bwd_*", *(["*_fwd_*_atomic_*"] if cp_size > 1 else [])]
    return sum(not fnmatch.filter(built, pattern) for pattern in wanted)
