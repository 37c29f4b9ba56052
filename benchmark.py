"""Measures training steps: tokens/s, MFU, memory, and the share of what the kernels allow.

    torchrun --nproc-per-node 2 benchmark.py                      # all cases
    torchrun --nproc-per-node 2 benchmark.py 8k 128k-documents    # some of them
    torchrun --nproc-per-node 2 benchmark.py 8k parallel_config.context_parallel_backend=native
    python benchmark.py data_config.seqlen=512 model_config.preset=tiny train_config.compile=false
    python benchmark.py --report                                  # table and plot of results.jsonl

Every step is a real one, of main.py's own `train`: data, runtime key, forward, backward, clipping,
AdamW and the log, on random tokens, but in the `stdlib` cases. Each case appends one line to
results.jsonl, and the report shows the newest of each case, backend, kind and number of GPUs.
"""

import argparse
import copy
import functools
import gc
import itertools
import json
import math
import statistics
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor

import context_parallel
import llama_pretrain_config
import main
import metrics
from process import exit_with, leave, rank

WARMUP_STEPS = 2  # compilation, FSDP's and NCCL's first time, and one to fill the queue
# The GPUs whose kernel-bound limit is known, and what they are called here. Its matrix products
# count at what cuBLAS reaches in bfloat16 on the shapes of llama-1b, on either of them.
GPUS = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}
MATMUL_FLOPS = 695e12

# llama-1b with a head of its own: 1.498 B parameters. Tokens per row, rows; the tokens are random
# and each row one document (0) or documents of so many tokens, or a corpus of unequal ones; what is
# recomputed; how many steps are measured.
CASES = {
    "8k": (8192, 2, 0, "none", 20),
    "32k": (32_768, 1, 0, "none", 10),
    "128k": (131_072, 1, 0, "none", 4),
    "128k-full": (131_072, 1, 0, "full", 4),
    "128k-documents": (131_072, 1, 4096, "none", 8),
    "128k-documents-selective": (131_072, 1, 4096, "selective", 8),
    "128k-documents-full": (131_072, 1, 4096, "full", 8),
    "64k-documents": (65_536, 1, 2048, "none", 10),
    "512k-documents-full": (524_288, 1, 8192, "full", 4),
    "1m-documents-full": (1_048_576, 1, 8192, "full", 2),
    "2m-documents-full": (2_097_152, 1, 8192, "full", 2),
    "1m-selective": (1_048_576, 1, 0, "selective", 1),
    "64k-stdlib": (65_536, 1, "python-stdlib", "none", 10),
    "128k-stdlib-full": (131_072, 1, "python-stdlib", "full", 8),
}
# Global tokens/s of others on two GPUs at cp 2, the same shapes, torch 2.11, compiled; torchtitan's
# attention is FlexAttention where there are documents. On H200s torchtitan of May 2026 and the
# torch_native example of MagiAttention 1.1, all on one machine in one series; on H100s torchtitan
# a2a0d99 (2026-05-14), in one series with the lines of 211ea55 in results.jsonl, but 8k with those
# of 4ed4a8b and 128k-stdlib-full with those of 4f0f0b3.
TORCHTITAN = {
    "H200": {
        "8k": 80_293,
        "32k": 57_794,
        "128k": 23_905,
        "128k-full": 19_002,
        "128k-documents": 103_318,
        "128k-documents-full": 82_742,
        "64k-documents": 109_111,
    },
    "H100": {
        "8k": 72_469,
        "32k": 56_028,
        "128k-full": 18_739,
        "128k-documents-full": 79_197,
        "64k-documents": 103_380,
        "64k-stdlib": 40_837,
        "128k-stdlib-full": 33_839,
    },
}
MAGI_EXAMPLE = {"H200": {"8k": 11_704}}


def overrides(case: str) -> list[str]:
    """Returns the config of a case."""
    seqlen, batch_size, documents, recomputation, _ = CASES[case]
    source, length = (documents, 0) if isinstance(documents, str) else ("random", documents)
    return [
        f"data_config.seqlen={seqlen}",
        f"data_config.batch_size={batch_size}",
        f"data_config.source={source}",
        f"data_config.random_document_length={length}",
        f"train_config.activation_checkpointing={recomputation}",
        "model_config.overrides.tie_word_embeddings=false",
    ]


def measure(arguments: list[str], warmup: int, steps: int) -> dict:
    """Trains `steps` steps after `warmup` others; returns what they took. A collective."""
    with tempfile.TemporaryDirectory() as folder:
        # One step more than are trained: the last of a run saves a checkpoint.
        train_iters = warmup + steps
        fixed = {"train_config.train_iters": train_iters + 1, "train_config.output_dir": folder}
        fixed |= {"train_config.checkpoint_interval": 0}
        main.set_up([*(f"{name}={value}" for name, value in fixed.items()), *arguments])
        if not dist.is_initialized():
            main.init_env()
        device_mesh = main.build_mesh()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        model = main.parallelize_model(main.build_llama_model(), device_mesh)
        optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
        main.train(model, optimizer, lr_scheduler, device_mesh, train_iters)
        records = [[]]
        if rank() == 0:
            with open(f"{folder}/metrics.jsonl") as file:
                records = [[json.loads(line) for line in file][warmup:]]
        dist.broadcast_object_list(records)
    (records,) = records
    times = sorted(record["step_ms"] / 1e3 for record in records)
    tokens = main.data_config["seqlen"] * main.data_config["batch_size"]
    limit = kernel_seconds(model.config, device_mesh, range(warmup, train_iters))
    return {
        "tokens_per_s": tokens / statistics.median(times),
        "tokens_per_s_range": [tokens / times[-1], tokens / times[0]],
        "step_ms": statistics.median(times) * 1e3,
        "steps": steps,
        "mfu": statistics.median(r["mfu"] for r in records) if records[0]["mfu"] else None,
        "kernel_bound_tokens_per_s": tokens / limit if limit else None,
        "peak_memory_gib": max(record["peak_memory_gib"] for record in records),
        "plan_ms": statistics.median(record["plan_ms"] for record in records),
        "loss": records[-1]["loss"],
        "world_size": dist.get_world_size(),
        "machine": metrics.describe_machine(),
        "config": copy.deepcopy(llama_pretrain_config.sections()),
    }


def kernel_seconds(config, device_mesh, steps: range) -> float | None:
    """Returns the seconds of a step in which a GPU runs nothing but its kernels, the median of the
    given steps, whose masks can differ; None off `GPUS`.

    The attention's kernel is timed here, forward and backward, on one GPU with the whole mask, and
    divided by cp; the matrix products count at MATMUL_FLOPS.
    """
    if torch_device_name() not in GPUS:
        return None
    alone = device_mesh.get_group("alone")
    timed = functools.cache(functools.partial(mask_milliseconds, config, alone))  # equal masks once
    attention_ms = statistics.median(
        sum(timed(tuple(cu_seqlens.tolist())) for _, _, cu_seqlens in micro_batches)
        for micro_batches in (main.prepare_data(device_mesh, step) for step in steps)
    )
    attention_seconds = config.num_hidden_layers * attention_ms / 1e3 / device_mesh["cp"].size()
    tokens = main.data_config["seqlen"] * main.data_config["batch_size"]
    matmul_flops = metrics.training_flops(config, tokens, area=0) / device_mesh.size()
    return attention_seconds + matmul_flops / MATMUL_FLOPS


def mask_milliseconds(config, alone: dist.ProcessGroup, bounds: tuple[int, ...]) -> float:
    """Returns how long a layer's attention takes on one GPU, forward and backward, where documents
    begin and end at `bounds`. alone: a group of this process.
    """
    api = context_parallel.load_api(main.parallel_config["context_parallel_backend"])
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    # One GPU, so nothing to balance: the kernel of the whole mask, without a cut.
    dispatch_config = api.DispatchConfig(chunk_size=bounds[-1])
    key = api.magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        *heads,
        pad_size=0,
        cp_group_or_mesh=alone,
        causal=config.is_causal,
        dist_attn_config=api.DistAttnConfig(dispatch_config=dispatch_config),
    )
    num_tokens = len(api.dispatch(torch.empty(bounds[-1], device="cuda"), key))
    q, k, v = (
        torch.randn(num_tokens, n, config.head_dim, device="cuda", dtype=torch.bfloat16)
        for n in (heads[0], heads[1], heads[1])
    )
    _, *times = attention_milliseconds(q, k, v, key, repeats=2)  # the first prepares kernels
    if times[0] < 1000:
        times = attention_milliseconds(q, k, v, key, repeats=5)
    return statistics.median(times)


def attention_milliseconds(
    q: Tensor, k: Tensor, v: Tensor, key: object, repeats: int
) -> list[float]:
    """Returns how long the attention of one GPU takes, forward and backward, each time."""
    # Other work first, so that the host is ahead and the kernels follow each other.
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(40):
        torch.mm(matrix, matrix)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        context_parallel.calc_attn(*qkv, key)[0].backward(q)
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def torch_device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def table(results: list[dict]) -> str:
    """Returns the newest results in Markdown."""
    lines = [
        "| case | backend, GPUs | tokens/s (range) | MFU | of the kernels' limit | memory "
        "| torchtitan | ratio | MagiAttention's example |",
        "| --- " * 9 + "|",
    ]
    for result in newest(results):
        speed, limit = result["tokens_per_s"], result["kernel_bound_tokens_per_s"]
        low, high = result["tokens_per_s_range"]
        titan, example = peer(TORCHTITAN, result), peer(MAGI_EXAMPLE, result)
        cells = [
            result["case"],
            f"{result['backend']}, {result['world_size']} x {gpu(result)}",
            f"{speed:,.0f} ({low:,.0f} to {high:,.0f})",
            f"{result['mfu']:.1%}" if result["mfu"] else "",
            f"{speed / limit:.0%}" if limit else "",
            f"{result['peak_memory_gib']:.1f} GiB",
            f"{titan:,}" if titan else "",
            f"{speed / titan:.2f}" if titan else "",
            f"{example:,}" if example else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def newest(results: list[dict]) -> list[dict]:
    """Returns the last of each case, backend, kind and number of GPUs, by kind and case."""
    order = [*CASES, "custom"]
    latest = {(gpu(r), order.index(r["case"]), r["world_size"], r["backend"]): r for r in results}
    return [latest[key] for key in sorted(latest)]


def gpu(result: dict) -> str:
    """Returns the kind of GPU, "H100" or the like, or the CPU."""
    device = result["machine"]["device"].split(" x ")[-1]
    return GPUS.get(device, device)


def shape(config: dict) -> tuple:
    """Returns the tokens per row, the rows, the documents and the recomputation, as in CASES."""
    data = config["data_config"]
    is_random = data["source"] == "random"
    documents = data["random_document_length"] if is_random else data["source"]
    recomputation = config["train_config"]["activation_checkpointing"]
    return data["seqlen"], data["batch_size"], documents, recomputation


def peer(figures: dict[str, dict[str, int]], result: dict) -> int | None:
    """Returns another's figure for the same case on the same two GPUs at cp 2; None where it is not
    known, or where a key on the command line made the case another.
    """
    case, config = result["case"], result["config"]
    cp_size = config["parallel_config"]["context_parallel_size"]
    if shape(config) != CASES.get(case, ())[:4] or not cp_size == result["world_size"] == 2:
        return None
    return figures.get(gpu(result), {}).get(case)


def draw(results: list[dict], plot: str) -> None:
    """Draws tokens/s and MFU over the sequence's length, a line for each backend and mask, for each
    kind of GPU. Crosses in a line's color are torchtitan's figures for its cases.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, dict[str, list[tuple]]] = {}  # by GPU and label
    for result in newest(results):
        seqlen, _, documents, recomputation = shape(result["config"])
        mask = "causal" if documents == 0 else "documents"
        mask += f" of {documents}" if isinstance(documents, str) else ""
        count = "1 GPU" if result["world_size"] == 1 else f"{result['world_size']} GPUs"
        label = f"{result['backend']}, {count}, {mask}, recomputation {recomputation}"
        mfu = 100 * (result["mfu"] or math.nan)
        point = seqlen, result["tokens_per_s"], mfu, peer(TORCHTITAN, result) or math.nan
        points.setdefault(gpu(result), {}).setdefault(label, []).append(point)
    labels = list(dict.fromkeys(label for lines in points.values() for label in lines))
    colors = dict(zip(labels, itertools.cycle(plt.get_cmap("tab20").colors)))
    lengths = sorted({p[0] for lines in points.values() for line in lines.values() for p in line})

    size = (9, 1.2 + 2.9 * len(points))
    figure, rows = plt.subplots(len(points), 2, figsize=size, layout="constrained", squeeze=False)
    for (name, lines), (left, right) in zip(points.items(), rows, strict=True):
        for label, line in lines.items():
            seqlens, speeds, mfus, peers = zip(*sorted(line), strict=True)
            style = {"color": colors[label], "linewidth": 1.2}
            left.plot(seqlens, speeds, "o-", **style)
            left.plot(seqlens, peers, "x", color=colors[label], markersize=9)
            right.plot(seqlens, mfus, "o-", **style)
        left.set_ylabel("tokens/s, all GPUs (x: torchtitan)")
        right.set_ylabel("MFU, %")
        for axes in (left, right):
            axes.set(title=name, xscale="log", ylim=(0, 1.08 * axes.get_ylim()[1]))
            axes.set_xlim(lengths[0] / 1.3, 1.3 * lengths[-1])
            axes.set_xticks(lengths, [shown(n) for n in lengths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in rows[-1]:
        axes.set_xlabel("tokens per row")
    handles = [plt.Line2D([], [], color=colors[label], marker="o", label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(plot, dpi=150)


def shown(tokens: int) -> str:
    """Returns 512, 8k, 1.5M and the like."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


def run(options: argparse.Namespace) -> None:
    """Measures the cases one after the other."""
    names = [argument for argument in options.arguments if "=" not in argument]
    changes = [argument for argument in options.arguments if "=" in argument]
    for name in names:
        if name not in CASES:
            raise ValueError(f"unknown case {name!r}; choose from {', '.join(CASES)}, or KEY=VALUE")
    if not options.arguments:
        names = list(CASES)
    before = copy.deepcopy(llama_pretrain_config.sections())
    for name in names or ["custom"]:
        for section, values in llama_pretrain_config.sections().items():
            values.update(copy.deepcopy(before[section]))
        case_arguments, steps = ["data_config.source=random"], 10
        if names:
            case_arguments, steps = overrides(name), CASES[name][-1]
        result = measure([*case_arguments, *changes], options.warmup, options.steps or steps)
        result |= {"case": name, "backend": main.parallel_config["context_parallel_backend"]}
        if rank() == 0:
            with open(options.results, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(table([result]), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"cases: {', '.join(CASES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="CASE or SECTION.KEY=VALUE")
    parser.add_argument("--steps", type=int, help="measured steps, instead of each case's own")
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="steps before them")
    parser.add_argument("--results", default="results.jsonl")
    parser.add_argument("--plot", default="docs/benchmark.png")
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    options = parser.parse_intermixed_args()
    try:
        if not options.report:
            run(options)
            leave()
        elif rank() == 0:
            with open(options.results) as file:
                results = [json.loads(line) for line in file]
            print(table(results))
            draw(results, options.plot)
    except (ValueError, OSError) as error:
        exit_with(error)
