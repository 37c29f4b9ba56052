"""Memory and speed of a run before it starts: `main.py --plan`, and a run's line `expected: ...`.

    python main.py --plan world_size=8 gpu=H100 model_config.preset=llama-8b

Memory is the sum of what the code allocates at the moments of a step that can be its peak. Speed is
work divided by a few measured rates. tests/test_plan.py compares both with docs/results.jsonl, and
docs/plan.md has the result.

Shapes in comments: `s` local tokens of a micro-batch, `S` = s x cp, `n` rows of K and V that
`native` copies, `h` hidden, `q` = heads x head_dim, `kv` = key/value heads x head_dim,
`i` intermediate, `v` vocabulary, `b` bytes of the compute dtype, `L` layers, `P` parameters,
`W` GPUs that share one copy of the weights.
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configuration_llama import LlamaConfig
from context_parallel.chunks import balanced_chunk_size, balanced_partitions, chunk_areas
from context_parallel.kernels import MANY_TOKENS, select_kernel
from context_parallel.native import find_pieces
from data import Source
from modeling_llama import LOSS_SLICE_SIZE

from .config import sections
from .flops import attention_area, training_flops
from .machine import GPUS, gpu_model
from .recompute import HOST_BLOCK_SIZE, MLP_SLICE_SIZE

ALLOCATOR_GIB = 0.07  # cuBLAS workspaces and rounding: the measured rest
BESIDE_GIB = 2.0  # CUDA's context and NCCL's buffers, assumed; 1.6 on two H100s
MARGIN = 1.05  # the estimate's error, and gaps between the allocator's blocks

# Rates of two H100s and two H200s, which are equally fast, torch 2.11.
MEASURED_GPUS = ("H100", "H200")
MATRIX_FLOPS = 660e12  # docs/benchmarks.md, 128k-full: 578e12 in 877 ms
MEMORY_RATE = 2.0e12  # bytes/s of element-wise kernels, 60 % of 3.35e12: fits the newest series
NVLINK_RATE = 160e9  # bytes/s that a GPU receives; the same page: 4.5e9 in 31 ms, 14.6e9 in 81 ms
NETWORK_RATE = 40e9  # between nodes; assumed: 80 % of a 400 Gbit/s adapter for each GPU
GPUS_PER_NODE = 8
# (FLOP/s, c) of attention, forward and all, by kernel and head_dim: seconds = FLOPs per pair x
# (pairs + c x queries) / rate, since tiles at the diagonal are partly unused. Least squares of the
# kernels' lines in docs/results.jsonl.
ATTENTION_RATES = {
    ("FlashAttention-4", 64): ((536e12, 722), (546e12, 866)),
    ("FlashAttention-4", 128): ((694e12, 621), (644e12, 790)),
    ("FlashAttention-2", 64): ((320e12, 633), (294e12, 600)),
    ("FlashAttention-2", 128): ((362e12, 346), (335e12, 517)),
    ("magi_attention", 64): ((545e12, 1213), (425e12, 866)),
    ("magi_attention", 128): ((682e12, 909), (595e12, 781)),
}
NUM_BATCHES = 9  # whose documents are read, where they have few tokens; the median step counts


@dataclass(frozen=True)
class Settings:
    """What an estimate depends on, besides documents."""

    llama: LlamaConfig
    gpu: str  # of GPUS
    kernel: str  # of attention
    world_size: int
    cp_size: int
    batch_size: int
    seqlen: int
    accumulation: int
    recomputation: str
    dtype: str
    compiled: bool
    replicas: int = 1  # copies of the sharded weights
    offloads: bool = False  # activation_offload

    @classmethod
    def of(cls, config: dict, llama: LlamaConfig, gpu: str, kernel: str, world_size: int):
        """config: the sections of llama_pretrain_config.py, resolved."""
        data, train, parallel = (config[f"{x}_config"] for x in ("data", "train", "parallel"))
        return cls(
            *(llama, gpu, kernel, world_size, parallel["context_parallel_size"]),
            *(data["batch_size"], data["seqlen"], train["gradient_accumulation_steps"]),
            *(train["activation_checkpointing"], train["dtype"], train["compile"]),
            parallel.get("data_parallel_replicate_size", 1),  # older results have neither
            train.get("activation_offload", False),
        )

    @property
    def dp_size(self) -> int:
        return self.world_size // self.cp_size

    @property
    def shards(self) -> int:
        return self.world_size // self.replicas

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """h, q, kv, i."""
        c = self.llama
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return c.hidden_size, q, kv, c.intermediate_size

    @property
    def parameters(self) -> tuple[int, int, int]:
        """Those of a layer, of the head's FSDP group (0 if it is tied), and of the root's."""
        (h, q, kv, i), embedding = self.widths, self.llama.vocab_size * self.llama.hidden_size
        layer = 2 * h * q + 2 * h * kv + 3 * h * i + 2 * h
        tied = self.llama.tie_word_embeddings
        return (layer, 0, embedding + h) if tied else (layer, embedding + h, embedding)


class Share(NamedTuple):
    """A micro-batch, as seen by the rank that has the most of each."""

    tokens: int  # s, with padding
    pairs: float  # (query, key) pairs of the mask
    keys: int  # n, or 0 where no document is cut, so nothing is gathered
    area: float  # pairs of all cp ranks


class Dealt(NamedTuple):
    """A packed sequence as `native.magi_attn_varlen_key` deals it out to the cp ranks."""

    chunk_size: int
    padded: int  # tokens of the padded sequence
    gathers: bool  # whether a document is cut
    areas: list[int]  # (query, key) pairs of each rank
    pieces: list[Tensor]  # of each rank, as `find_pieces` returns them


class Estimate(NamedTuple):
    host: float  # GiB of pinned host memory for each GPU
    moments: dict[str, dict[str, float]]  # GiB on each GPU by part, at each moment
    seconds: dict[str, float]  # of a step, by part; empty where rates are not measured
    tokens_per_s: float
    mfu: float

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> float:
        return sum(self.moments[self.moment].values())

    def fits(self, gpu: str) -> str:
        free = GPUS[gpu].memory_gib - BESIDE_GIB
        return "yes" if self.peak * MARGIN <= free else "barely" if self.peak <= free else "no"

    def __str__(self) -> str:
        speed = f", {self.tokens_per_s:,.0f} tokens/s, MFU {self.mfu:.0%}" if self.seconds else ""
        return f"{self.peak:.1f} GiB{speed}"


def estimate(settings: Settings, lengths: Callable[[int], list[int]]) -> Estimate:
    """lengths: the number of a row -> the tokens of each of its documents (`row_lengths`)."""
    rows, tokens = settings.batch_size, settings.batch_size * settings.seqlen
    num_rows = rows // settings.dp_size // settings.accumulation
    steps = []  # (seconds by part, area)
    largest = Share(0, 0, 0, 0)
    for first in range(0, rows * max(1, min(NUM_BATCHES, 2**23 // tokens)), rows):
        shares = []
        for start in range(first, first + rows, num_rows):
            documents = tuple(x for row in range(start, start + num_rows) for x in lengths(row))
            shares.append(share(documents, settings.llama.is_causal, settings.cp_size))
        # FSDP lets the dp ranks wait for the slowest one in every layer.
        parallel = (shares[k :: settings.accumulation] for k in range(settings.accumulation))
        slowest = [Share(*map(max, *ranks, ranks[0])) for ranks in parallel]
        largest = Share(*map(max, *slowest, largest))
        steps.append((step_seconds(settings, slowest), sum(x.area for x in shares)))
    steps.sort(key=lambda step: sum(step[0].values()))
    parts, area = steps[len(steps) // 2]
    seconds, moments = sum(parts.values()), memory(settings, largest)
    host = host_bytes(settings, largest.tokens, bool(largest.keys)) / 2**30
    if not parts:
        return Estimate(host, moments, {}, 0.0, 0.0)
    flops = training_flops(settings.llama, tokens, area) / settings.world_size
    mfu = flops / seconds / GPUS[settings.gpu].peak_flops
    return Estimate(host, moments, parts, tokens / seconds, mfu)


@functools.lru_cache(maxsize=1024)
def share(documents: tuple[int, ...], causal: bool, cp_size: int) -> Share:
    """documents: tokens of each in a micro-batch."""
    bounds = torch.tensor([0, *documents]).cumsum(0)
    dealt = deal(bounds, causal, cp_size)
    keys = max(int((x[3] - x[2]).sum()) for x in dealt.pieces) if dealt.gathers else 0
    area = attention_area(bounds, causal)
    return Share(dealt.padded // cp_size, max(dealt.areas), keys, area)


def deal(cu_seqlens: Tensor, causal: bool, cp_size: int) -> Dealt:
    """cu_seqlens: [documents + 1], on the CPU."""
    chunk_size = balanced_chunk_size(cu_seqlens, causal, cp_size)
    areas = chunk_areas(cu_seqlens, chunk_size, causal, cp_size)
    ranks, padded = balanced_partitions(areas, cp_size), len(areas) * chunk_size
    bounds = F.pad(cu_seqlens.long(), (0, 1), value=padded)
    pieces = [find_pieces(bounds, chunk_size, torch.tensor(chunks), causal) for chunks in ranks]
    gathers = any(bool((x[:2] != x[2:]).any()) for x in pieces)
    rank_areas = [sum(areas[chunk] for chunk in chunks) for chunks in ranks]
    return Dealt(chunk_size, padded, gathers, rank_areas, pieces)


def memory(settings: Settings, share: Share) -> dict[str, dict[str, float]]:
    """Returns {moment: {part: GiB}}, for each moment of a step that can be its peak.

    "the loss": all layers keep their activations, and a slice's logits exist. "the last layer":
    backward begins; what this layer recomputes exists too. "the first layer": the gradients of all
    others exist. "the embedding": its gradient exists, before it is sharded.
    """
    (h, q, kv, i), c, W = settings.widths, settings.llama, settings.shards
    (layer, head, root), kernel = settings.parameters, settings.kernel
    L, v, b = c.num_hidden_layers, c.vocab_size, 2 if settings.dtype == "bfloat16" else 4
    P, s, n, gathers = L * layer + head + root, share.tokens, share.keys or share.tokens, share.keys
    recomputes, is_full = settings.recomputation != "none", settings.recomputation == "full"

    kept = sum(kept_sizes(settings, bool(gathers)))

    # The loss: logits and their gradient, beside the gradient of the slice before, and the weight's
    # gradient in float32. Without compile: also logits and exponentials in float32.
    copies = 2 if settings.compiled else 5
    before = min(s, LOSS_SLICE_SIZE)
    now = min(s - before, LOSS_SLICE_SIZE)
    logits = max(v * b * copies * before, v * b * before + 4 * v * h)
    if now:
        logits = max(logits, v * b * (before + copies * now) + 4 * v * h)

    # Backward of attention: recomputed q, k, v and out; gathered keys; gradients of out, q, k, v;
    # float32 sums of the kernel.
    qkv = b * s * (q + 2 * kv) if recomputes else 0
    again = qkv + b * s * q if is_full else qkv
    if kernel == "FlashAttention-4":
        calls = c.num_key_value_heads if max(s, n // 4) > MANY_TOKENS else 1
        sums = 4 * (q * s + 2 * kv * n) / calls
    elif kernel == "magi_attention":
        sums = 4 * (q * s + 2 * kv * n)
    else:  # K's and V's gradients are repeated for each query head
        sums = 4 * q * s + b * 2 * q * n
    copied = b * 2 * kv * n if gathers else 0
    gradients = b * (2 * q * s + 2 * kv * n)
    attention = again + copied + gradients + sums
    if gathers:  # then the exchange, `_GatherKeys.backward`, without out and gathered keys
        exchange = (4 + b) * 2 * kv * s * settings.cp_size
        attention = max(attention, qkv + gradients + exchange)
    # Then backward of the projections: gradients of q, k, v after and before RoPE, the input, which
    # was recomputed, and two gradients of it. Measured with a snapshot.
    attention = max(attention, b * s * ((q + 2 * kv) + (q + kv) + 3 * h))
    # Backward of the MLP: its input and the gradients of both ends; of a slice gate, up, product
    # and their gradients. Without recomputation these gradients of all tokens.
    slice_size = min(s, MLP_SLICE_SIZE)
    mlp = b * (3 * h * s + (6 * i + 4 * h) * slice_size) if recomputes else b * s * (3 * i + 2 * h)

    def moment(layers_kept, sharded, whole, gathered, *, attention=0.0, hidden=0.0, logits=0.0):
        """layers_kept: whose kept tensors are on the GPU. sharded: parameters that have a gradient.
        whole: bytes of gradients not yet sharded. gathered: parameters. The rest: bytes.
        """
        sharded = P if settings.accumulation > 1 else sharded
        # FSDP keeps the buffer of its last all-gather in forward.
        buffer = b * (head or layer) if W > 1 else 0
        parts = {
            "weights": 4 * P / W,
            "gradients": 4 * sharded / W + whole,
            "optimizer": 8 * P / W,
            "gathered weights": b * gathered + buffer,
            "kept by layers": layers_kept * kept * s + 4 * c.head_dim * s,  # RoPE's cos and sin
            "attention": attention,
            "MLP, hidden states": hidden,
            "logits": logits,
            "allocator": ALLOCATOR_GIB * 2**30,
        }
        return {part: size / 2**30 for part, size in parts.items()}

    x = b * h * s
    tied = 0 if head else b * v * h  # a tied head's gradient waits for the embedding's
    pair = 2 * layer  # a layer, and the one that FSDP gathers ahead
    layers = pair if recomputes else L * layer
    # With offload the GPU holds what a layer and the one before keep, in backward.
    held, first, ahead = (1, "second", 2) if settings.offloads and L > 1 else (L, "first", 1)
    at_last = ahead if settings.offloads else L, head, 4 * head + tied + b * layer, root + layers
    at_first = ahead, P - root - ahead * layer, 4 * layer + tied + b * layer, root + pair
    in_loss = head + root + (0 if recomputes else layers)
    return {
        "the loss": moment(held, 0, 0, in_loss, hidden=3 * x, logits=logits),
        "the last layer's attention": moment(*at_last, attention=attention, hidden=x),
        "the last layer's MLP": moment(*at_last, attention=again, hidden=mlp),
        f"the {first} layer's attention": moment(*at_first, attention=attention, hidden=x),
        f"the {first} layer's MLP": moment(*at_first, attention=again, hidden=mlp),
        "the embedding": moment(0, P - root, 4 * root + b * v * h + tied, root, hidden=x),
    }


def kept_sizes(settings: Settings, gathers: bool) -> list[int]:
    """Returns the bytes for each token of what a layer keeps, from forward to backward.

    That is the input; attention's output and float32 log-sum-exp; for "none" the inputs of norms
    and products: x, normed, x, normed; q, k, v, out; gate, up, their product.
    """
    (h, q, kv, i), b = settings.widths, 2 if settings.dtype == "bfloat16" else 4
    log_sum_exp = 4 * settings.llama.num_attention_heads
    if settings.recomputation == "full":
        return [b * h]
    if settings.recomputation == "selective":
        copied = settings.kernel == "magi_attention" and gathers  # its own copy of K and V
        return [b * h, b * q, log_sum_exp, *([b * kv, b * kv] if copied else [])]
    products = 3 if settings.compiled else 4  # without compile also silu(gate)
    return [b * (4 * h + 2 * q + 2 * kv + products * i), log_sum_exp]


def host_bytes(settings: Settings, tokens: int, gathers: bool) -> int:
    """Returns the pinned host memory that `activation_offload` needs for each GPU. tokens: of
    a micro-batch, on one rank. gathers: whether a document may be cut.
    """
    sizes = kept_sizes(settings, gathers)
    blocks = sum(-(-size * tokens // HOST_BLOCK_SIZE) for size in sizes)
    layers = settings.llama.num_hidden_layers - 1  # what the last one keeps stays on the GPU
    return settings.offloads * layers * blocks * HOST_BLOCK_SIZE


def step_seconds(settings: Settings, shares: list[Share]) -> dict[str, float]:
    """Returns a step's seconds by part, or {} where rates are not measured. shares: the slowest
    rank's, one for each micro-batch.
    """
    (h, q, kv, i), c, W = settings.widths, settings.llama, settings.shards
    (layer, head, root), mode, b = settings.parameters, settings.recomputation, 2
    rates = ATTENTION_RATES.get((settings.kernel, c.head_dim))
    if settings.gpu not in MEASURED_GPUS or rates is None or not settings.compiled:
        return {}
    L, v, again = c.num_hidden_layers, c.vocab_size, int(mode != "none")
    P, gathers = L * layer + head + root, 3 if mode == "full" else 2  # of K and V

    def link_rate(ranks: int) -> float:
        return NVLINK_RATE if ranks <= GPUS_PER_NODE else NETWORK_RATE

    def attention(share: Share, flops: int, rate: tuple[float, int]) -> float:
        return flops * L * q * (share.pairs + rate[1] * share.tokens) / rate[0]

    parts = ("matrix products", "attention", "element-wise", "communication", "optimizer")
    seconds = dict.fromkeys(parts, 0.0)
    for share in shares:
        s, n, S = share.tokens, share.keys, share.tokens * settings.cp_size
        # 2 FLOPs per weight and token, 6 with backward. All but down_proj is computed again.
        flops = 6 * s * (L * layer + v * h) + again * 2 * s * L * (layer - h * i)
        # 4 FLOPs per pair and dimension of q, and in backward 10.
        pairs = attention(share, 14, rates[1])
        pairs += attention(share, 4, rates[0]) if mode == "full" else 0
        # Reads and writes of norms, residuals, RoPE and SwiGLU, twice as many in backward; of
        # logits; of FSDP's copies of gathered weights, and of gradients to float32.
        moved = b * s * (L * (3 + again) * (9 * h + 2 * q + 4 * kv + 3 * i) + 3 * v)
        moved += P * (2 * b * (1 + again) + b + 4)
        if n:  # gathers and copies; the sums of the gradients, rounded and put in order
            moved += L * 2 * kv * (gathers * 2 * b * (n + S) + 2 * b * n + (8 + 3 * b) * S)
        computed = flops / MATRIX_FLOPS, pairs, moved / MEMORY_RATE
        # FSDP communicates while the GPU computes. Attention waits for K and V.
        fsdp = P * (b * (1 + again) + 4) * (W - 1) / W / link_rate(W)
        # Then replicas add up their shards of the gradients, in an all-reduce.
        between = 2 * (settings.replicas - 1) / settings.replicas * 4 * P / W
        fsdp += between / link_rate(settings.world_size)
        exchange = L * 2 * kv * b * (gathers + 1) * (S - s) if n else 0
        waits = max(0, fsdp - sum(computed)) + exchange / link_rate(settings.cp_size)
        for part, value in zip(parts, (*computed, waits), strict=False):
            seconds[part] += value
    # AdamW reads gradients, and reads and writes weights and moments; the norm reads gradients.
    seconds["optimizer"] = 32 * P / W / MEMORY_RATE
    return seconds


def row_lengths(source: Source, seqlen: int) -> Callable[[int], list[int]]:
    """Returns a function: the number of a row -> the tokens of each of its documents."""
    return functools.cache(lambda row: source.rows(row, 1, seqlen).document_lengths)


def log_expected(llama: LlamaConfig, source: Source, log: Callable[[str], None]) -> None:
    """Logs what a run on this machine's GPUs is expected to need and do; nothing on a CPU."""
    gpu = gpu_model()
    if gpu is None or os.environ["RANK"] != "0":
        return
    config = sections()
    kernel = config["parallel_config"]["context_parallel_backend"]
    if kernel == "native":
        dtype = getattr(torch, config["train_config"]["dtype"])
        kernel = re.split("[ ,]", select_kernel("cuda", dtype, llama.head_dim)[0])[0]
    settings = Settings.of(config, llama, gpu, kernel, int(os.environ["WORLD_SIZE"]))
    log(f"expected: {estimate(settings, row_lengths(source, settings.seqlen))}")
