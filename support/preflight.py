"""Before a run: resolves its config, chooses the backend, opens the data, and reports errors."""

import fnmatch
import glob
import importlib
import json
import os
import shutil
import sys
from dataclasses import asdict

import torch

import checkpoint
import context_parallel
import llama_pretrain_config
from checkpoint import weights
from configuration_llama import LlamaConfig
from data import RandomSource, TokenSource, open_source
from llama_pretrain_config import data_config, model_config, parallel_config, train_config
from modeling_llama import LlamaForCausalLM

from . import metrics
from .process import log, restarts, take_output_dir


def build_llama_config() -> LlamaConfig:
    """Returns the model's shape: that of `init_from`, or the preset, with the overrides."""
    if model_config["init_from"]:
        return weights.read_config(model_config["init_from"], model_config["overrides"])
    return LlamaConfig.from_preset(model_config["preset"], model_config["overrides"])


def open_token_source(split: str) -> TokenSource | RandomSource:
    """Returns the opened "train" or "validation" split; the first call reads it."""
    num_batches = train_config["eval_iters"] if split == "validation" else 1
    return open_source(split, build_llama_config().vocab_size, num_batches, **data_config)


def run_config() -> dict:
    """Returns what describes the run: what `config.json` and the checkpoints say of it."""
    data, sections = open_token_source("train").description, llama_pretrain_config.sections()
    return metrics.run_config(sections, build_llama_config(), data)


def check_compiler(on_gpu: bool) -> None:
    """Raises ValueError if what torch.compile calls is missing: on a GPU Triton's C compiler."""
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    wanted = [os.environ.get("CC", "gcc"), "clang"] if on_gpu else [cxx]
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"train_config.compile=True needs a compiler, and {' or '.join(wanted)} is not in "
            f"PATH; install one, or set train_config.compile=false"
        )


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


def set_up(arguments: list[str]) -> None:
    """Resolves the config, chooses the backend, opens the data, and logs what will run.

    All that can be wrong with what a person asked for comes to light here, as a ValueError of one
    sentence, before any process group exists. `--help` is answered here, and ends the process.
    """
    if "LOCAL_RANK" not in os.environ:
        # No torchrun: RANK and WORLD_SIZE, if they are set, are a scheduler's and count nodes.
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    if "--help" in arguments or "-h" in arguments:
        if os.environ["LOCAL_RANK"] == "0":
            print(llama_pretrain_config.describe())
        sys.exit()
    world_size = int(os.environ["WORLD_SIZE"])
    notes = llama_pretrain_config.resolve(arguments, world_size)
    on_gpu = torch.cuda.is_available()
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if on_gpu and processes > gpus:
        raise ValueError(f"{processes} processes on a node with {gpus} GPUs; start at most {gpus}")
    if train_config["compile"]:
        check_compiler(on_gpu)
    config = build_llama_config()
    backend, reasons = context_parallel.select_backend(
        parallel_config["context_parallel_backend"],
        config.head_dim,
        train_config["dtype"],
        "cuda" if on_gpu else "cpu",
    )
    parallel_config["context_parallel_backend"] = backend
    sources = {"data": open_token_source("train")}
    if train_config["eval_interval"]:
        sources["validation"] = open_token_source("validation")
    if model_config["init_from"]:
        with torch.device("meta"):
            weights.check_weights(LlamaForCausalLM(config), model_config["init_from"])
    take_output_dir(train_config["output_dir"])
    checkpoint.check_resume(run_config(), restarts())

    for line in notes:
        log(line)
    log(f"machine: {', '.join(f'{k} {v}' for k, v in metrics.describe_machine().items())}")
    cp_size = parallel_config["context_parallel_size"]
    log(f"mesh: dp {world_size // cp_size} x cp {cp_size}, {world_size} processes")
    for reason in reasons:
        log(f"attention: {reason}")
    if train_config["compile"]:
        log("kernels: compiled in the first step, which takes about half a minute")
    if backend == "magi_attention" and (n := missing_magi_kernels(config.head_dim, cp_size)):
        log(f"kernels: magi_attention compiles {n} more, silently, for about {2.5 * n:g} minutes")
    for name, source in sources.items():
        log(f"{name}: {source.description}")
    log(f"config: {json.dumps(llama_pretrain_config.sections())}")
    log(f"model: {json.dumps(asdict(config))}")
