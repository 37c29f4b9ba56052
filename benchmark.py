"""Measures training steps: tokens/s, MFU and memory; and the attention kernels by themselves.

    torchrun --nproc-per-node 2 benchmark.py                      # all cases that fit 80 GB
    torchrun --nproc-per-node 2 benchmark.py 8k 128k-selective    # some of them
    torchrun --nproc-per-node 2 benchmark.py 8k parallel_config.context_parallel_backend=native
    python benchmark.py --results cpu.jsonl data_config.seqlen=512 model_config.preset=tiny
    python benchmark.py --kernels                                 # on one GPU
    python benchmark.py --report                                  # tables and plot, no measurement

Every step is a real one, of main.py's own `train`: data, runtime key, forward, backward, clipping,
AdamW and the log. Each case appends one line to docs/results.jsonl, and the report shows the newest
series in there: what was measured on one machine, one after the other.
"""

import argparse
import copy
import datetime
import gc
import hashlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import main
from context_parallel import calc_attn, kernels, load_api, native, select_backend
from support import config, machine, report
from support.flops import attention_area
from support.process import end_process, exit_with, rank

BACKEND = "parallel_config.context_parallel_backend="
IN_FILE = copy.deepcopy(config.sections())
WARMUP_STEPS = 2  # compilation, FSDP's and NCCL's first time


class Case(NamedTuple):
    """A model with untied embeddings, on random tokens unless documents name a corpus."""

    seqlen: int  # tokens per row
    documents: int | str = 0  # tokens in each; 0: a row is one; or a corpus, or RANDOM_DOCUMENTS
    recomputation: str = "none"
    steps: int = 4  # that are measured
    batch_size: int = 1
    preset: str = "llama-1b"  # 1.498 B parameters
    layers: int = 16
    offload: bool = False


RANDOM_DOCUMENTS = "random-documents"  # of unequal lengths, 4,096 tokens in the mean
CASES = {
    "8k": Case(8192, steps=20, batch_size=2),
    "32k": Case(32_768, steps=10),
    "32k-8b": Case(32_768, steps=10, preset="llama-8b", layers=4),  # head_dim 128
    "128k": Case(131_072),
    "128k-selective": Case(131_072, 0, "selective"),
    "128k-selective-offload": Case(131_072, 0, "selective", offload=True),
    "128k-full": Case(131_072, 0, "full"),
    "64k-documents": Case(65_536, 2048, steps=10),
    "64k-random-documents": Case(65_536, RANDOM_DOCUMENTS, steps=10),
    "64k-stdlib": Case(65_536, "python-stdlib", steps=10),
    "128k-stdlib-full": Case(131_072, "python-stdlib", "full", 8),
    "128k-documents": Case(131_072, 4096, steps=8),
    "128k-documents-selective": Case(131_072, 4096, "selective", 8),
    "128k-documents-full": Case(131_072, 4096, "full", 8),
    "512k-documents-full": Case(524_288, 8192, "full"),
    "1m-documents-full": Case(1_048_576, 8192, "full", 2),
    "1m-documents-full-offload": Case(1_048_576, 8192, "full", 2, offload=True),
    "2m-documents-full": Case(2_097_152, 8192, "full", 2),
    "2m-documents-full-offload": Case(2_097_152, 8192, "full", 2, offload=True),
    "1m-full-offload": Case(1_048_576, 0, "full", 1, offload=True),
    "1m-selective": Case(1_048_576, 0, "selective", 1),
}
LARGE = "128k", "128k-documents", "1m-selective", "2m-documents-full"  # which need more than 80 GB


def random_lengths(total: int, mean: int) -> list[int]:
    """Returns lengths of documents, exponentially distributed around a mean, the same each time."""
    rng, ends = np.random.default_rng(0), [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + 1 + int(rng.exponential(mean))))
    return np.diff(ends).tolist()


HEADS = 32, 8  # query, and key and value heads, of the table of kernels
MASKS = {  # lengths of the documents, whether causal
    "2 x 8,192 causal": ([8192] * 2, True),
    "32,768 causal": ([32_768], True),
    "131,072 causal": ([131_072], True),
    "131,072, documents of 4,096": ([4096] * 32, True),
    "131,072, random documents, mean 4,096": (random_lengths(131_072, 4096), True),
    "65,536, random documents, mean 1,200": (random_lengths(65_536, 1200), True),
    "16,384 full": ([16_384], False),
}


def write_random_documents(folder: Path, vocab_size: int) -> None:
    """Writes 4 million random tokens in documents of unequal lengths, as a prepared folder."""
    starts = np.cumsum([0, *random_lengths(2**22, 4096)])
    tokens = np.random.default_rng(1).integers(vocab_size, size=starts[-1], dtype=np.uint32)
    arrays = {"tokens.bin": tokens, "offsets.bin": starts}
    folder.mkdir()
    for name, array in arrays.items():
        array.tofile(folder / name)
    meta = {
        "vocab_size": vocab_size,
        "dtype": "uint32",
        "num_tokens": len(tokens),
        "num_documents": len(starts) - 1,
        "sha256": {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def overrides(case: Case, folder: str) -> list[str]:
    """Returns the config of a case. folder: where random documents are written."""
    source, length = "random", case.documents
    if isinstance(case.documents, str):
        source, length = case.documents, 0
    if source == RANDOM_DOCUMENTS:
        source = f"{folder}/{RANDOM_DOCUMENTS}"
    return [
        f"data_config.seqlen={case.seqlen}",
        f"data_config.batch_size={case.batch_size}",
        f"data_config.source={source}",
        f"data_config.random_document_length={length}",
        f"train_config.activation_checkpointing={case.recomputation}",
        f"train_config.activation_offload={case.offload}",
        f"model_config.preset={case.preset}",
        f"model_config.overrides.num_hidden_layers={case.layers}",
        "model_config.overrides.tie_word_embeddings=false",
    ]


def train(output_dir: str | Path, train_iters: int, arguments: list[str]) -> None:
    """Trains steps as main.py does, without a checkpoint. A collective.

    arguments: changes of llama_pretrain_config.py, whatever this process has trained before.
    """
    config.restore(IN_FILE)
    # One step more than are trained: the last of a run saves a checkpoint.
    fixed = [
        f"train_config.train_iters={train_iters + 1}",
        f"train_config.output_dir={output_dir}",
        "train_config.checkpoint_interval=0",
    ]
    sources = main.set_up([*fixed, *arguments])
    if not dist.is_initialized():
        main.init_env()
    device_mesh = main.build_mesh()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = main.parallelize_model(main.build_llama_model(), device_mesh)
    optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
    main.train(model, optimizer, lr_scheduler, device_mesh, sources, train_iters)


def measure(case: Case | None, arguments: list[str], warmup: int, steps: int) -> dict:
    """Trains `steps` steps after `warmup` others; returns what they took. A collective."""
    with tempfile.TemporaryDirectory() as folder:
        if case and case.documents == RANDOM_DOCUMENTS:
            write_random_documents(Path(folder) / RANDOM_DOCUMENTS, vocab_size=128_256)
        of_case = overrides(case, folder) if case else ["data_config.source=random"]
        train(f"{folder}/run", warmup + steps, [*of_case, *arguments])
        records = []
        if rank() == 0:
            with open(f"{folder}/run/metrics.jsonl") as file:
                records = [json.loads(line) for line in file][warmup:]
        dist.barrier()  # rank 0 has read
    if not records:
        return {}
    times = sorted(record["step_ms"] / 1e3 for record in records)
    tokens = main.data_config["seqlen"] * main.data_config["batch_size"]
    return {
        "tokens_per_s": tokens / statistics.median(times),
        "tokens_per_s_range": [tokens / times[-1], tokens / times[0]],
        "step_ms": statistics.median(times) * 1e3,
        "steps": steps,
        "mfu": statistics.median(r["mfu"] for r in records) if records[0]["mfu"] else None,
        "peak_memory_gib": max(record["peak_memory_gib"] for record in records),
        "plan_ms": statistics.median(record["plan_ms"] for record in records),
        "loss": records[-1]["loss"],
        "world_size": dist.get_world_size(),
        "machine": machine.describe_machine(),
        "config": copy.deepcopy(config.sections()),
    }


# ---------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------


def measure_kernels(write: Callable[[dict], None]) -> None:
    """Measures each kernel that this GPU can run, with every mask, forward and backward."""
    if not torch.cuda.is_available():
        raise ValueError("--kernels needs a GPU, and none is here")
    with tempfile.TemporaryDirectory() as folder:
        main.set_up([f"train_config.output_dir={folder}"])
    main.init_env()
    for head_dim, (mask, (lengths, causal)) in itertools.product((64, 128), MASKS.items()):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        q, k, v, grad = (
            torch.randn(sum(lengths), heads, head_dim, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        )
        flops = 4 * attention_area(cu_seqlens, causal) * HEADS[0] * head_dim
        for kernel, attend in attentions(cu_seqlens, causal, head_dim).items():
            result = {"kernel": kernel, "mask": mask, "head_dim": head_dim}
            forward, both = kernel_seconds(attend, q, k, v, grad)
            # Backward has five matrix products of this size, forward two.
            for name, work, times in (("forward", flops, forward), ("both", 3.5 * flops, both)):
                tflops = sorted(work / seconds / 1e12 for seconds in times)
                result[f"{name}_tflops"] = statistics.median(tflops)
                result[f"{name}_tflops_range"] = [tflops[0], tflops[-1]]
            write({**result, "machine": machine.describe_machine()})


def attentions(cu_seqlens: Tensor, causal: bool, head_dim: int) -> dict[str, Callable]:
    """Returns {name: attention(q, k, v)} of all kernels that run here, on one GPU."""

    def key_of(api):
        dispatch_config = api.DispatchConfig(chunk_size=int(cu_seqlens[-1]))
        return api.magi_attn_varlen_key(
            cu_seqlens,
            cu_seqlens,
            *HEADS,
            head_dim,
            pad_size=0,
            cp_group_or_mesh=dist.group.WORLD,
            causal=causal,
            dist_attn_config=api.DistAttnConfig(dispatch_config=dispatch_config),
        )

    pieces = key_of(native).pieces
    functions = [kernels.select_kernel("cuda", torch.bfloat16, head_dim)]
    functions.append(("FlashAttention-2, part of torch", kernels._flash_attention_2))
    found = {
        name: lambda q, k, v, kernel=kernel: kernel(q, k, v, pieces) for name, kernel in functions
    }
    backend, (name, *_) = select_backend("auto", head_dim, "bfloat16", "cuda")
    if backend == "magi_attention":
        key = key_of(load_api(backend))
        found[name] = lambda q, k, v: calc_attn(q, k, v, key)
    return found


def kernel_seconds(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, repeats: int = 5
) -> tuple[list[float], list[float]]:
    """Returns how long an attention takes, forward, and forward and backward, each time."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)]
    warm_up = [events[0]] * 2  # prepares the kernels
    for i, (start, middle, end) in enumerate([*warm_up, *events]):
        if i == len(warm_up):  # other work first, so that the host runs ahead of the GPU
            for _ in range(40):
                torch.mm(matrix, matrix)
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        start.record()
        out = attend(*qkv)
        middle.record()
        out.backward(grad)
        end.record()
    torch.cuda.synchronize()
    forward = [start.elapsed_time(middle) / 1e3 for start, middle, _ in events]
    return forward, [start.elapsed_time(end) / 1e3 for start, _, end in events]


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measures the cases, or the kernels, one after the other."""

    def write(result: dict) -> None:
        result = {"series": options.series or str(datetime.date.today()), **result}
        with open(options.results, "a") as file:
            file.write(json.dumps(result) + "\n")
        table = report.table if "case" in result else report.kernels_table
        print(table([result]), flush=True)

    if options.kernels:
        return measure_kernels(write)
    names = [argument for argument in options.arguments if "=" not in argument]
    changes = [argument for argument in options.arguments if "=" in argument]
    for name in names:
        if name not in CASES:
            raise ValueError(f"unknown case {name!r}; choose from {', '.join(CASES)}, or KEY=VALUE")
    if not options.arguments:
        names = [name for name in CASES if name not in LARGE]
    for name in names or ["custom"]:
        case = CASES.get(name)
        steps = options.steps or (case.steps if case else 10)
        result = measure(case, changes, options.warmup, steps)
        if rank() == 0:
            is_changed = any(not x.startswith(BACKEND) for x in changes)
            result["case"] = f"{name}, changed" if case and is_changed else name
            result["backend"] = main.parallel_config["context_parallel_backend"]
            write(result)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            # Pinned memory too: the next case's check would count it as used. (torch 2.11 has no
            # public name for this.)
            empty = getattr(torch.accelerator, "empty_host_cache", None)
            (empty or torch._C._host_emptyCache)()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"cases: {', '.join(CASES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="CASE or SECTION.KEY=VALUE")
    parser.add_argument("--steps", type=int, help="measured steps, instead of each case's own")
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="steps before them")
    parser.add_argument("--series", help="a name for lines measured together (default: the date)")
    parser.add_argument("--kernels", action="store_true", help="the attention kernels, on one GPU")
    parser.add_argument("--results", default="docs/results.jsonl")
    parser.add_argument("--plot", default="docs/benchmark.png")
    parser.add_argument("--report", action="store_true", help="only the tables and the plot")
    options = parser.parse_intermixed_args()
    try:
        if not options.report:
            run(options)
            end_process()
        elif rank() == 0:
            with open(Path(options.results).absolute()) as file:
                lines = [json.loads(line) for line in file]
            report.report(lines, options.plot, list(CASES), options.series)
    except (ValueError, OSError) as error:
        exit_with(error)
