"""Scaling on paper: a step of llama-8b on 8 to 1,024 GPUs, and how much of it is communication.

    python -m support.scaling > docs/scaling_table.md    # and draws docs/scaling.png

*Simulated*: each rank's chunks, (query, key) pairs and rows of keys, by the planner that trains.
*Measured*: the planner's time, on this CPU; and the rates, lines of docs/results.jsonl, on H100s.
*Assumed*: the links between GPUs.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configuration_llama import PRESETS
from context_parallel import native
from context_parallel.chunks import balanced_chunk_size
from data import open_source
from llama_pretrain_config import data_config

from .flops import training_flops
from .machine import describe_machine
from .plan import Dealt, deal
from .plot import import_pyplot
from .report import by_case, newest_series

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODEL = PRESETS["llama-8b"]
CP_SIZES, SEQLENS = (8, 64, 256, 1024), (2**17, 2**20, 2**22, 2**24)
KINDS = {  # of documents: the mask in docs/results.jsonl whose kernel rates are taken
    "one document": "131,072 causal",
    "log-normal": "131,072, random documents, mean 4,096",
    "standard library": "131,072, random documents, mean 4,096",
}
WITHIN_NODE, BETWEEN_NODES = 450e9, 50e9  # bytes/s that a rank receives
GPUS_PER_NODE = 8
ROW_BYTES = 2 * MODEL.num_key_value_heads * MODEL.head_dim * 2  # a token's K and V in bfloat16
EXCHANGES = 3  # of a layer: K and V in forward, again in backward, and their gradients


class Rates(NamedTuple):
    """FLOP/s of one H100."""

    products: float  # matrix products, with all of a step except attention
    native: dict[str, float]  # {mask: FlashAttention-4, forward and backward}
    magi_attention: dict[str, float]


class Point(NamedTuple):
    """A row of the table: the slowest rank's time, the bytes of the rank that needs most."""

    documents: str
    tokens: int
    cp: int
    chunk: int  # tokens
    imbalance: float  # largest over mean area of the ranks
    gathered: float  # bytes that `native` brings to a rank in one exchange
    needed: float  # bytes that the neediest rank needs at least
    memory: float  # bytes of `native` for all ranks' rows, at their peak in backward
    products: float  # seconds of one layer, forward and backward, as the next
    attention: float  # of the slowest rank
    native: float  # seconds of a step
    native_400: float  # the same, where a node receives each row once, over eight links
    aware: float  # the same with MagiAttention's kernel, and `needed` in place of `gathered`
    native_share: float  # of communication in the step
    aware_share: float
    planning: float  # seconds


def document_lengths(kind: str, seqlen: int) -> list[int]:
    """Returns the lengths of the documents of one row, the same each time; their sum is seqlen."""
    if kind == "one document":
        return [seqlen]
    if kind == "standard library":
        row = {**data_config, "source": "python-stdlib", "seqlen": seqlen, "batch_size": 1}
        return open_source("train", 257, 1, **row).rows(0, 1, seqlen).document_lengths
    sigma, rng, ends = 1.5, np.random.default_rng(0), [0]  # mean 8,192, median 2,660
    while ends[-1] < seqlen:
        length = 1 + int(rng.lognormal(np.log(8192) - sigma**2 / 2, sigma))
        ends.append(min(seqlen, ends[-1] + length))
    return np.diff(ends).tolist()


def needed_rows(dealt: Dealt, num_tokens: int) -> list[int]:
    """Returns for each rank the rows of K and V that its queries see and that another rank holds.

    num_tokens: without padding.
    """
    needed = []
    for pieces in dealt.pieces:
        first, last, first_key, last_key = pieces[:, pieces[0] < num_tokens]
        # A document's last piece sees all keys that its other pieces see.
        is_last = torch.ones_like(first, dtype=torch.bool)
        is_last[:-1] = first_key[1:] != first_key[:-1]
        needed.append(int((last_key - first_key)[is_last].sum() - (last - first).sum()))
    return needed


def planning_seconds(cu_seqlens: Tensor, cp_size: int, repeats: int = 3) -> float:
    """Returns the CPU time of `balanced_chunk_size` and the key of `native`, the median."""
    dist.init_process_group("fake", rank=0, world_size=cp_size)  # collectives that send nothing
    heads, times = (MODEL.num_attention_heads, MODEL.num_key_value_heads, MODEL.head_dim), []
    for _ in range(repeats):
        start = time.process_time()
        chunks = native.DispatchConfig(balanced_chunk_size(cu_seqlens, True, cp_size))
        config = native.DistAttnConfig(chunks)
        bounds = cu_seqlens, cu_seqlens
        native.magi_attn_varlen_key(*bounds, *heads, 0, dist.group.WORLD, True, config)
        times.append(time.process_time() - start)
    dist.destroy_process_group()
    return statistics.median(times)


def measured_rates(results: list[dict]) -> Rates:
    """results: the lines of docs/results.jsonl. The products' rate is that of case 32k-8b (four
    layers of the model) without the time of its attention. Raises ValueError if a line is missing.
    """
    kernels = newest_series([r for r in results if r.get("head_dim") == 128], "kernel", None)
    native_rates, magi_attention = (
        {r["mask"]: r["both_tflops"] * 1e12 for r in kernels if r["kernel"].startswith(name)}
        for name in ("FlashAttention-4", "magi_attention")
    )
    cases = newest_series([r for r in results if r.get("case") == "32k-8b"], "case", None)
    step = by_case(cases)["32k-8b"]["native"]
    seqlen, world_size = step["config"]["data_config"]["seqlen"], step["world_size"]
    shape = MODEL.override({"num_hidden_layers": 4})
    # Kernels count 3.5 products of forward for forward and backward, `training_flops` 3.
    attention = training_flops(shape, 0, seqlen**2 / 2 / world_size) * 3.5 / 3
    attention /= native_rates["32,768 causal"]
    products = training_flops(shape, seqlen / world_size, 0)
    return Rates(products / (step["step_ms"] / 1e3 - attention), native_rates, magi_attention)


def predict(kind: str, seqlen: int, cp_size: int, rates: Rates) -> Point:
    """`selective` recomputation: matrix products run forward twice, attention once."""
    cu_seqlens = torch.tensor([0, *document_lengths(kind, seqlen)]).cumsum(0, dtype=torch.int32)
    work = deal(cu_seqlens, True, cp_size)
    layers, head = MODEL.num_hidden_layers, MODEL.hidden_size * MODEL.vocab_size
    layer = (training_flops(MODEL, 1, 0) / 6 - head) / layers  # weights
    token_seconds = work.padded / cp_size / rates.products  # of a FLOP per token
    products, area = 8 * layer * token_seconds, max(work.areas)
    flops = 3.5 * 4 * MODEL.num_attention_heads * MODEL.head_dim * area
    attention = flops / rates.native[KINDS[kind]]
    rest = layers * products + 6 * head * token_seconds
    compute = rest + layers * attention
    aware_compute = rest + layers * flops / rates.magi_attention[KINDS[kind]]

    link = WITHIN_NODE if cp_size <= GPUS_PER_NODE else BETWEEN_NODES
    others = (cp_size - 1) / cp_size
    gathered = ROW_BYTES * work.padded * others * work.gathers
    needed = ROW_BYTES * max(needed_rows(work, seqlen))
    # FSDP, while the GPU computes: weights in bfloat16 twice, then gradients in float32.
    fsdp = (layers * layer + 2 * head) * (2 + 2 + 4) * others / link
    exchange = layers * EXCHANGES * gathered
    native_step = exchange / link + max(compute, fsdp)
    native_400 = exchange / min(WITHIN_NODE, GPUS_PER_NODE * link) + max(compute, fsdp)
    aware = layers * EXCHANGES * needed / link + max(aware_compute, fsdp)
    # Sums of the gradients in float32, in bfloat16, and those in the ranks' order.
    memory = (2 + 1 + 1) * ROW_BYTES * work.padded * work.gathers
    return Point(
        *(kind, seqlen, cp_size, work.chunk_size, area * cp_size / sum(work.areas)),
        *(gathered, needed, memory, products, attention, native_step, native_400, aware),
        *(1 - compute / native_step, 1 - aware_compute / aware),
        planning_seconds(cu_seqlens, cp_size),
    )


def markdown(rows: list[list[str]]) -> str:
    """Returns a table; the first row is its header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(points: list[Point]) -> str:
    """Returns two tables: the shares of communication, and all points."""
    shares = [["documents", "tokens", *(f"cp {cp:,}" for cp in CP_SIZES)]]
    whole = [
        "documents, tokens, cp, chunk, imbalance, gathered GB, needed GB, memory GiB".split(", ")
    ]
    whole[0] += "products ms, attention ms, native s, native_400 s, aware s, planning ms".split(
        ", "
    )
    for p in points:
        if p.cp == CP_SIZES[0]:
            shares.append([p.documents, f"{p.tokens:,}"])
        cell = f"{p.native_share:.0%} / {p.aware_share:.0%}"
        shares[-1].append(f"**{cell}**" if p.aware < p.native else cell)
        whole.append([p.documents, *(f"{n:,}" for n in p[1:4]), f"{p.imbalance:.3f}"])
        values = p.gathered / 1e9, p.needed / 1e9, p.memory / 2**30
        values += p.products * 1e3, p.attention * 1e3, p.native, p.native_400, p.aware
        whole[-1] += [f"{n:,.0f}" if n >= 10 else f"{n:.2g}" for n in values]
        share = p.planning / min(p.native, p.aware)
        whole[-1].append(f"{p.planning * 1e3:.1f} ({share:.1%})")
    return f"{markdown(shares)}\n\n{markdown(whole)}"


def draw(points: list[Point], output: Path, tokens: int) -> None:
    """Draws bytes and shares over cp, for rows of one length."""
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    def line(axes, values: list[float], label: str, color: str, style: str = "o-") -> None:
        axes.plot(CP_SIZES, values, style, color=color)
        axes.text(CP_SIZES[-1] * 1.2, values[-1], label, color=color, va="center")

    for kind, color in zip(KINDS, ("#1b6ca8", "#c0562b", "#4b8b3b"), strict=True):
        found = [p for p in points if (p.documents, p.tokens) == (kind, tokens)]
        if kind == "one document":  # every backend needs all keys
            line(left, [p.gathered / 1e9 for p in found], "native; one document", color, "s--")
            line(right, [p.native_share for p in found], "native; one document", color, "s--")
            continue
        line(left, [p.needed / 1e9 for p in found], f"{kind}, at least", color)
        if kind == "log-normal":  # the standard library is close to it
            line(right, [p.native_share for p in found], f"native; {kind}", color, "s--")
            line(right, [p.aware_share for p in found], f"{kind}, at least", color)
    left.set(yscale="log", ylabel="GB per rank, layer and exchange")
    right.set(ylim=(0, 1), ylabel="communication, share of a step")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="cp")
        axes.set_xticks(CP_SIZES, [f"{cp:,}" for cp in CP_SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(wspace=0.1)
    figure.suptitle(f"simulated: llama-8b, rows of {tokens:,} tokens")
    figure.savefig(output, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    with open(DOCS / "results.jsonl") as file:
        rates = measured_rates([json.loads(line) for line in file])
    points = [predict(k, n, cp, rates) for k in KINDS for n in SEQLENS for cp in CP_SIZES]
    machine = describe_machine()
    print("# Scaling: all points of `python -m support.scaling`\n")
    print(
        "[Scaling](scaling.md#on-paper-8-to-1024-gpus) explains the columns and the assumptions.\n"
    )
    print("**Simulated**: everything except two things. **Measured**: `planning` (one thread of a")
    print(
        f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}), and the rates"
    )
    print("on H100s behind the times, such as matrix products at")
    print(f"{rates.products / 1e12:.0f} TFLOP/s.\n\n{tables(points)}")
    draw(points, DOCS / "scaling.png", tokens=2**22)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
