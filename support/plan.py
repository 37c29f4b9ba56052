"""Memory and speed of a run before it starts: `main.py --plan`, and a run's line `expected: ...`.

    python main.py --plan world_size=8 gpu=H100 model_config.preset=llama-8b

Memory is derived from what the code allocates; docs/plan.md has the moments of a step. Speed is
work divided by a few measured rates. tests/test_plan.py compares both with docs/results.jsonl.

Shapes in comments: `s` local tokens of a micro-batch, `S` of all its cp ranks, `n` rows of K and V
that `native` copies; `h` hidden, `q` = heads x head_dim, `kv` = key/value heads x head_dim,
`i` intermediate, `v` vocabulary, `P` parameters, `b` bytes of the compute type.
"""

import functools
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configuration_llama import LlamaConfig
from context_parallel.chunks import balanced_chunk_size, balanced_partitions, chunk_areas
from context_parallel.kernels import MANY_TOKENS, select_kernel
from context_parallel.native import held_pieces
from data import Source
from llama_pretrain_config import data_config, parallel_config, train_config
from modeling_llama import LOSS_SLICE_SIZE

from .config import CHOICES
from .metrics import PEAK_FLOPS, training_flops
from .recompute import MLP_SLICE_SIZE

GIB = 2**30
# Memory that PyTorch can use, in GiB. The names are those of PEAK_FLOPS.
MEMORY_GIB = {
    "H100 PCIe": 79.2,
    "H100 NVL": 93.1,
    "H100": 79.2,
    "H200 NVL": 139.8,
    "H200": 139.8,
    "B200": 178.4,
    "A100": 79.2,
}
ALLOCATOR_GIB = 0.07  # cuBLAS workspaces and rounding: measured minus derived, in every case
BESIDE_GIB = 2.0  # CUDA's context and NCCL's buffers, outside of PyTorch's allocator; assumed
MARGIN = 1.05  # the largest error of the estimate; between blocks, the allocator needs some too

GPUS_PER_NODE = 8
# The rates of two H100s, docs/results.jsonl and docs/benchmarks.md. An H200 is as fast.
MEASURED_GPUS = ("H100", "H200")
MATRIX_FLOPS = 660e12  # 128k-full: 578e12 FLOPs of matrix products in 877 ms
MEMORY_RATE = 2.0e12  # bytes/s of element-wise kernels, of 3.35e12: fits the newest series best
NVLINK_RATE = 160e9  # bytes/s that a GPU receives: 4.5 GB in 31 ms (8k), 14.6 in 81 (128k-full)
NETWORK_RATE = 40e9  # between nodes: not measured, 80 % of one 400 Gbit/s adapter per GPU
# FLOP/s and overhead c of attention, forward, and forward and backward, by kernel and head_dim:
# seconds = FLOPs per pair x (pairs + c x queries) / rate. c: a tile at the diagonal is half unused,
# so short documents are slow. Least squares of the kernels' lines in docs/results.jsonl.
ATTENTION_RATES = {
    ("FlashAttention-4", 64): ((536e12, 722), (546e12, 866)),
    ("FlashAttention-4", 128): ((694e12, 621), (644e12, 790)),
    ("FlashAttention-2", 64): ((320e12, 633), (294e12, 600)),
    ("FlashAttention-2", 128): ((362e12, 346), (335e12, 517)),
    ("magi_attention", 64): ((545e12, 1213), (425e12, 866)),
    ("magi_attention", 128): ((682e12, 909), (595e12, 781)),
}
NUM_BATCHES = 10  # whose documents are read; speed is that of the median


class Share(NamedTuple):
    """One micro-batch, as the rank with the most of each has it."""

    tokens: int  # s, with padding
    pairs: float  # (query, key) pairs of the mask
    keys: int  # n; 0 where no document is cut, and so nothing is gathered


@dataclass(frozen=True)
class Settings:
    """What the estimate depends on; `rows` is data_config.batch_size."""

    llama: LlamaConfig
    gpu: str
    kernel: str
    world_size: int
    cp_size: int
    rows: int
    seqlen: int
    accumulation: int
    recomputation: str
    dtype: str
    compiled: bool

    @property
    def parameters(self) -> tuple[int, int, int]:
        """Those of one layer, of the head's FSDP group (0 if tied) and of the root's."""
        c, (h, q, kv, i) = self.llama, self.sizes
        layer = 2 * h * q + 2 * h * kv + 3 * h * i + 2 * h
        embedding, norm = c.vocab_size * h, h
        tied = c.tie_word_embeddings
        return layer, 0 if tied else embedding + norm, embedding + (norm if tied else 0)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """h, q, kv, i."""
        c = self.llama
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return c.hidden_size, q, kv, c.intermediate_size


class Estimate(NamedTuple):
    parts: dict[str, float]  # GiB on one GPU at the step's peak
    moments: dict[str, float]  # GiB at each moment that can be the peak
    seconds: dict[str, float]  # of a step, by its parts; empty where rates are not known
    tokens_per_s: float
    mfu: float

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    def fits(self, gpu: str) -> str:
        """Returns "yes", "tight" or "no"."""
        free = MEMORY_GIB[gpu] - BESIDE_GIB
        return "yes" if self.peak * MARGIN <= free else "tight" if self.peak <= free else "no"

    def __str__(self) -> str:
        speed = f", {self.tokens_per_s:,.0f} tokens/s, MFU {self.mfu:.0%}" if self.seconds else ""
        return f"{self.peak:.1f} GiB{speed}"


def estimate(settings: Settings, lengths: Callable[[int], list[int]]) -> Estimate:
    """lengths: a row's number -> the tokens of each document in it."""
    dp_size = settings.world_size // settings.cp_size
    num_rows = settings.rows // dp_size // settings.accumulation
    steps = []  # [step][micro-batch]
    for step in range(num_batches(settings.rows * settings.seqlen)):
        shares = [
            share(
                tuple(x for row in range(first, first + num_rows) for x in lengths(row)),
                settings.llama.is_causal,
                settings.cp_size,
            )
            for first in range(step * settings.rows, (step + 1) * settings.rows, num_rows)
        ]
        # FSDP lets the dp ranks wait for each other in every layer: the slowest one counts.
        ranks = [shares[i :: settings.accumulation] for i in range(settings.accumulation)]
        steps.append([Share(*map(max, zip(*rank, strict=True))) for rank in ranks])
    largest = Share(*map(max, zip(*(x for step in steps for x in step), strict=True)))
    moments = memory(settings, largest)
    sums = {moment: sum(parts.values()) / GIB for moment, parts in moments.items()}
    parts = {k: v / GIB for k, v in moments[max(sums, key=sums.get)].items()}
    times = [step_seconds(settings, step) for step in steps]
    if not times[0]:
        return Estimate(parts, sums, {}, 0.0, 0.0)
    order = sorted(range(len(times)), key=lambda k: sum(times[k].values()))
    seconds = statistics.median(sum(time.values()) for time in times)
    rows = [
        row for k in range(len(steps)) for row in range(k * settings.rows, (k + 1) * settings.rows)
    ]
    half = 2 if settings.llama.is_causal else 1
    area = sum(x * x / half for row in rows for x in lengths(row)) / len(steps)
    tokens = settings.rows * settings.seqlen
    flops = training_flops(settings.llama, tokens, area) / settings.world_size
    mfu = flops / seconds / PEAK_FLOPS[settings.gpu]
    return Estimate(parts, sums, times[order[len(order) // 2]], tokens / seconds, mfu)


def num_batches(tokens: int) -> int:
    return max(1, min(NUM_BATCHES, 2**23 // tokens))


@functools.lru_cache(maxsize=1024)
def share(lengths: tuple[int, ...], causal: bool, cp_size: int) -> Share:
    """lengths: tokens of the micro-batch's documents. As `native.magi_attn_varlen_key` deals."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    chunk_size = balanced_chunk_size(bounds, causal, cp_size)
    areas = chunk_areas(bounds, chunk_size, causal, cp_size)
    ranks = balanced_partitions(areas, cp_size)
    bounds = F.pad(bounds, (0, 1), value=len(areas) * chunk_size)
    pieces = [held_pieces(bounds, chunk_size, chunks, causal) for chunks in ranks]
    keys = max(int((x[3] - x[2]).sum()) for x in pieces)
    gathers = any((x[:2] != x[2:]).any() for x in pieces)
    pairs = max(sum(areas[chunk] for chunk in chunks) for chunks in ranks)
    return Share(len(areas) // cp_size * chunk_size, pairs, keys if gathers else 0)


def memory(settings: Settings, share: Share) -> dict[str, dict[str, float]]:
    """Returns {moment: {part: bytes}} of the moments of a step that can be its peak.

    The loss: every layer keeps its activations, and the logits of a slice exist. The backward of
    the last layer: activations are still kept, its own are recomputed. The backward of the first
    layer: all other gradients exist. The embedding: so do all, and its own before it is sharded.
    """
    (h, q, kv, i), c, W = settings.sizes, settings.llama, settings.world_size
    layer, head, root = settings.parameters
    L, v, b = c.num_hidden_layers, c.vocab_size, 2 if settings.dtype == "bfloat16" else 4
    P, s, S = L * layer + head + root, share.tokens, share.tokens * settings.cp_size
    recomputes, kernel = settings.recomputation != "none", settings.kernel
    gathers, n = share.keys > 0, share.keys or s
    lse = 4 * c.num_attention_heads  # float32
    kept = {  # bytes per token and layer, from forward to backward
        # Inputs of norms and products: x, normed, x, normed; q, out; k, v; gate, up, their product.
        "none": b * (4 * h + 2 * q + 2 * kv + (3 if settings.compiled else 4) * i) + lse,
        "selective": b * (h + q) + lse,
        "full": b * h,
    }[settings.recomputation]
    if kernel == "magi_attention" and settings.recomputation == "selective" and gathers:
        kept += b * 2 * kv  # it keeps local k and v for its own backward

    # Logits and their gradient, and of the slice before its gradient; the weight's in float32.
    # Without torch.compile, logits in float32 and their exponentials.
    slice_, rest = min(s, LOSS_SLICE_SIZE), min(max(0, s - LOSS_SLICE_SIZE), LOSS_SLICE_SIZE)
    copies = 2 if settings.compiled else 5
    logits = v * b * max(copies * slice_, (slice_ + copies * rest) if rest else 0)
    logits = max(logits + (4 * v * h if rest else 0), v * b * slice_ + 4 * v * h)

    # Backward of attention: q, k, v, unless the layer kept them; the gradients of out, q, k and v;
    # float32 sums of the kernel, or of the exchange of gradients (`native._GatherKeys.backward`).
    own = b * s * (q + 2 * kv) if recomputes else 0  # q, k, v
    own += b * s * q if settings.recomputation == "full" else 0  # out
    copied = b * 2 * kv * n if gathers else 0
    if kernel == "FlashAttention-4":
        heads = c.num_key_value_heads if max(s, n // 4) > MANY_TOKENS else 1
        workspace = 4 * (q * s + 2 * kv * n) / heads
    elif kernel == "magi_attention":
        workspace = 4 * (q * s + 2 * kv * n)
    else:  # it repeats K's and V's gradients for each query head
        workspace = 4 * q * s + b * 2 * q * n
    exchange = (4 + 2 * b) * 2 * kv * S if gathers else 0
    attention = own + copied + b * (2 * q * s + 2 * kv * n) + max(workspace, exchange)
    # Backward of the MLP: gate, up, product and their gradients of a slice, or these of all tokens.
    slice_ = min(s, MLP_SLICE_SIZE)
    mlp = b * (6 * i + 4 * h) * slice_ + 3 * b * h * s if recomputes else b * (3 * i + 2 * h) * s
    residual = b * h * s  # the gradient of the residual stream
    whole = 4 * P / W if settings.accumulation > 1 else 0  # of the micro-batches before
    # FSDP keeps the buffer of forward's last all-gather, and of the newest reduce-scatter.
    buffer = b * (head or layer) if W > 1 else 0
    all_layers = 0 if recomputes else (L * layer)

    def moment(gradients, gathered, num_layers, attention=0.0, mlp=0.0, logits=0.0):
        return {
            "weights": 4 * P / W,
            "gradients": max(whole, 4 * gradients[0] / W) + gradients[1],
            "optimizer": 8 * P / W,
            "gathered weights": b * gathered + buffer,
            "kept by the layers": num_layers * kept * s + 4 * c.head_dim * s,  # RoPE's cos and sin
            "attention": attention,
            "hidden states and MLP": mlp,
            "logits": logits,
            "allocator": ALLOCATOR_GIB * GIB,
        }

    tied = 0 if head else b * v * h  # the head's gradient, until the embedding's is added
    moments = {
        "the loss": moment((0, 0), head + root + all_layers, L, 0, 3 * residual, logits),
        "the embedding": moment((P - root, 4 * root + b * v * h + tied), root, 0, 0, residual),
    }
    # Gradients: parameters that have theirs, and bytes that are not sharded yet.
    now = 2 * layer if recomputes else layer  # gathered: a layer, and the next one
    for name, num_layers, gradients, gathered in (
        ("last", L, (head, 4 * head), root + (all_layers or now)),
        ("first", 1, (P - root - layer, 4 * layer), root + now),
    ):
        gradients = gradients[0], gradients[1] + tied + b * layer
        common = gradients, gathered, num_layers
        moments[f"the {name} layer's MLP"] = moment(*common, own, mlp)
        moments[f"the {name} layer's attention"] = moment(*common, attention, residual)
    return moments


def step_seconds(settings: Settings, shares: list[Share]) -> dict[str, float]:
    """Returns a step's seconds by part, or {} where the rates are not measured."""
    (h, q, kv, i), c, W = settings.sizes, settings.llama, settings.world_size
    layer, head, root = settings.parameters
    rates = ATTENTION_RATES.get((settings.kernel, c.head_dim))
    if settings.gpu not in MEASURED_GPUS or rates is None or not settings.compiled:
        return {}
    L, v, b = c.num_hidden_layers, c.vocab_size, 2
    P, mode, cp_size = L * layer + head + root, settings.recomputation, settings.cp_size
    recomputes = mode != "none"
    gathers = {"none": 2, "selective": 2, "full": 3}[
        mode
    ]  # of K and V; backward has one of its own

    def rate(ranks: int) -> float:
        return NVLINK_RATE if ranks <= GPUS_PER_NODE else NETWORK_RATE

    def attention(share: Share, flops: float, rate: tuple[float, float]) -> float:
        return flops * L * q * (share.pairs + rate[1] * share.tokens) / rate[0]

    seconds = dict.fromkeys(("matrix products", "attention", "element-wise", "communication"), 0.0)
    for share in shares:
        s, n, S = share.tokens, share.keys, share.tokens * cp_size
        # 2 FLOPs per weight and token, threefold with backward. Recomputed: all but down_proj.
        flops = 6 * s * (L * layer + v * h) + (2 * s * L * (layer - h * i) if recomputes else 0)
        # QK^T and PV, 4 per pair and head_dim; backward has five such products, 10.
        scores = attention(share, 14, rates[1])
        scores += attention(share, 4, rates[0]) if mode == "full" else 0
        # Reads and writes: two norms and residuals, RoPE, SwiGLU; twice as many in backward. Logits
        # thrice. FSDP's copies: gathered weights, read and written, and float32 gradients.
        passes = 4 if recomputes else 3
        moved = passes * b * s * L * (9 * h + 2 * (q + 2 * kv) + 3 * i) + 3 * b * v * s
        moved += P * (2 * b * (2 if recomputes else 1) + b + 4)
        if n:  # gathered, copied; the sums of their gradients in float32, rounded and sorted
            moved += L * 2 * kv * (gathers * 2 * b * (n + S) + 2 * b * n + (8 + 3 * b) * S)
        computed = flops / MATRIX_FLOPS, scores, moved / MEMORY_RATE
        # FSDP's communication overlaps with computation. That of K and V does not.
        fsdp = P * (b * (2 if recomputes else 1) + 4) * (W - 1) / W / rate(W)
        exchange = L * 2 * kv * b * (gathers + 1) * (S - s) / rate(cp_size) if n else 0
        waits = max(0, fsdp - sum(computed)) + exchange
        for part, value in zip(seconds, (*computed, waits), strict=True):
            seconds[part] += value
    # AdamW reads and writes weight and two moments, and reads the gradient, as the norm does.
    seconds["optimizer"] = 32 * P / W / MEMORY_RATE
    return seconds


def neighbours(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yields what is worth trying: one key changed."""
    yield "as asked", settings
    for mode in CHOICES["activation_checkpointing"]:
        if mode != settings.recomputation:
            yield f"activation_checkpointing={mode}", replace(settings, recomputation=mode)
    for cp_size in (settings.cp_size // 2, settings.cp_size * 2):
        if cp_size and settings.world_size % cp_size == 0:
            dp_size = settings.world_size // cp_size
            if settings.rows % (dp_size * settings.accumulation) == 0:
                yield f"context_parallel_size={cp_size}", replace(settings, cp_size=cp_size)
    dp_size = settings.world_size // settings.cp_size
    for rows in (settings.rows // 2, settings.rows * 2):
        if rows and rows % (dp_size * settings.accumulation) == 0:
            yield f"batch_size={rows}", replace(settings, rows=rows)


def settings_of(llama: LlamaConfig, gpu: str, kernel: str, world_size: int) -> Settings:
    """Returns those of the resolved config."""
    return Settings(
        llama,
        gpu,
        kernel,
        world_size,
        parallel_config["context_parallel_size"],
        data_config["batch_size"],
        data_config["seqlen"],
        train_config["gradient_accumulation_steps"],
        train_config["activation_checkpointing"],
        train_config["dtype"],
        train_config["compile"],
    )


def row_lengths(source: Source, seqlen: int) -> Callable[[int], list[int]]:
    """Returns: row's number -> its document lengths."""
    return functools.cache(lambda row: source.rows(row, 1, seqlen).document_lengths)


def choose_kernel(gpu: str, head_dim: int) -> str:
    """Returns the attention kernel of a GPU that is not here, if what it needs is installed.

    Raises ValueError if the configured backend cannot run on it.
    """
    requested, dtype = parallel_config["context_parallel_backend"], train_config["dtype"]
    is_fast = gpu != "A100" and dtype == "bfloat16" and head_dim in (64, 128)
    if requested == "magi_attention":
        if not is_fast or gpu == "B200":
            raise ValueError(
                f"parallel_config.context_parallel_backend={requested!r}: magi_attention cannot "
                f"run: it needs Hopper, bfloat16, head_dim 64 or 128, not {gpu}, {dtype}, "
                f"{head_dim}. Mend that, or choose 'native' or 'auto'"
            )
        return requested
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"native on a GPU takes a head_dim that is a multiple of 8, 256 at the most, not "
            f"head_dim {head_dim}"
        )
    if is_fast:
        return "FlashAttention-4"
    return "FlashAttention-2" if dtype == "bfloat16" else "scaled_dot_product_attention"


def parse(arguments: list[str]) -> tuple[int, str, list[str]]:
    """Returns --plan's world_size and gpu, and the other arguments. Raises ValueError."""
    given, rest = {"world_size": "8", "gpu": "H100"}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in given:
            given[name] = value
        else:
            rest.append(argument)
    if given["gpu"] not in MEMORY_GIB:
        raise ValueError(f"gpu={given['gpu']!r} must be one of {', '.join(MEMORY_GIB)}")
    if not re.fullmatch("[1-9][0-9]{0,5}", given["world_size"]):
        raise ValueError(f"world_size={given['world_size']!r} must be an integer from 1 to 999999")
    return int(given["world_size"]), given["gpu"], rest


def report(settings: Settings, lengths: Callable[[int], list[int]]) -> str:
    """Returns the text of `--plan`."""
    found = {name: estimate(s, lengths) for name, s in neighbours(settings)}
    asked, gpu = found["as asked"], settings.gpu
    dp_size = settings.world_size // settings.cp_size
    moment = max(asked.moments, key=asked.moments.get)
    lines = [
        f"plan: {settings.world_size} x {gpu}, dp {dp_size} x cp {settings.cp_size}, attention by "
        f"{settings.kernel}; keys with two values have the GPU's",
        "",
        f"GiB on each GPU at the step's peak, which is {moment}:",
        *(f"  {value:7.2f}  {part}" for part, value in asked.parts.items()),
        f"  {asked.peak:7.2f}  peak; {BESIDE_GIB:g} more for CUDA and NCCL; of {MEMORY_GIB[gpu]}: "
        + {
            "yes": "it fits",
            "tight": "it may fit: the estimate's error is larger than what is left",
            "no": "it does not fit",
        }[asked.fits(gpu)],
        "  other moments: "
        + ", ".join(f"{k} {v:.1f}" for k, v in asked.moments.items() if k != moment),
        "",
    ]
    if asked.seconds:
        parts = ", ".join(f"{part} {value * 1e3:,.0f}" for part, value in asked.seconds.items())
        lines += [f"milliseconds of a step: {parts}"]
    else:
        lines += [f"speed: not measured for {gpu}, {settings.kernel} and this config"]
    lines += [f"expected: {asked}", "", f"  {'change':34}  GiB     fits   tokens/s     MFU"]
    for name, x in found.items():
        speed = f"{x.tokens_per_s:10,.0f}  {x.mfu:6.1%}" if x.seconds else ""
        lines.append(f"  {name:34}  {x.peak:6.1f}  {x.fits(gpu):5}{speed}")
    return "\n".join(lines)


def expected(llama: LlamaConfig, source: Source) -> str:
    """Returns a run's line of the log, or "" where this GPU is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = next((gpu for gpu in MEMORY_GIB if re.search(rf"\b{gpu}\b", name)), None)
    if gpu is None:
        return ""
    kernel = parallel_config["context_parallel_backend"]
    if kernel == "native":
        dtype = getattr(torch, train_config["dtype"])
        kernel = select_kernel("cuda", dtype, llama.head_dim)[0].split()[0].rstrip(",")
    settings = settings_of(llama, gpu, kernel, int(os.environ["WORLD_SIZE"]))
    return f"expected: {estimate(settings, row_lengths(source, settings.seqlen))}"
