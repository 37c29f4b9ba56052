"""Context parallelism: the choice of a backend, and `native`, the backend in plain PyTorch.

A packed sequence of S tokens is cut into chunks, and each rank of the cp group gets equally many of
them, chosen so that every rank has about the same number of (query, key) pairs to work on. The
*runtime key* remembers who has what; it is built once per step and goes wherever the tokens go.

    stream    | doc 0    | doc 1                  |doc 2| doc 3     |pad|
    chunks    |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9  |
    cp rank 0                2                 5     6           8     9
    cp rank 1    0     1           3     4                 7

(Few, large chunks for the picture; a rank has at least `MIN_CHUNKS_PER_RANK`.)

The functions below that carry the names of `magi_attention.api` take the arguments that we use,
with the same meaning, so that a caller can hold either (`load_api`). `native` gathers K and V of
all ranks (before any repetition for grouped-query attention), computes its own queries' attention,
and in backward reduce-scatters the gradients of K and V, in the compute type: the way of Llama 3
(https://arxiv.org/abs/2407.21783, section 3.3.2).

Shapes: `S` tokens of the padded sequence, `s` = S / cp local tokens, `nh` heads, `nkv` key/value
heads, `hd` head_dim.
"""

import functools
import heapq
import importlib
import importlib.machinery
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# torch 2.13 renamed the two collectives; up to 2.12 only the second name is there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

MIN_CHUNKS_PER_RANK = 4  # of shorter sequences the chunks are smaller
FLEX_BLOCK_SIZE = 128  # FlexAttention's tile, in tokens
# Where magi_attention's own default is slower; what is set in the environment stays.
MAGI_ATTENTION_ENVIRONMENT = {
    "MAGI_ATTENTION_MIN_CHUNKS_PER_RANK": str(MIN_CHUNKS_PER_RANK),
    "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN": "0",  # multiprocessors left to communication
    "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN": "0",
}


# ---------------------------------------------------------------------------------------------
# The choice of a backend
# ---------------------------------------------------------------------------------------------


def select_backend(requested: str, head_dim: int, dtype: str, device: str) -> tuple[str, str]:
    """Returns the backend's name ("magi_attention" or "native") and the reason, one line.

    requested: "auto", "magi_attention" or "native". dtype: the compute type, "bfloat16" or
    "float32". device: the type of the device that will compute, "cuda" or "cpu".
    Raises ValueError if the backend asked for by name cannot run, or none can.
    """
    reason = "as configured"
    if requested != "native":
        obstacle = _magi_attention_obstacle(head_dim, dtype, device)
        if obstacle is None:
            for name, value in MAGI_ATTENTION_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            version = importlib.import_module("magi_attention").__version__ or "unknown"
            return "magi_attention", f"version {version}, {requested}"
        if requested == "magi_attention":
            raise ValueError(
                f"parallel_config.context_parallel_backend='magi_attention' cannot run: "
                f"{obstacle}. Mend that, or choose 'native' or 'auto'"
            )
        reason = f"magi_attention cannot run: {obstacle}"
    if device == "cuda" and head_dim < 16:
        raise ValueError(
            f"FlexAttention, native on a GPU, takes a head_dim of 16 and more, not {head_dim}"
        )
    return "native", reason


def _magi_attention_obstacle(head_dim: int, dtype: str, device: str) -> str | None:
    """Returns what keeps magi_attention 1.1 from running here, or None."""
    if dtype != "bfloat16":
        return f"its kernels compute in bfloat16, and train_config.dtype is {dtype!r}"
    if head_dim not in (64, 128):
        return f"its kernels take a head_dim of 64 or 128, and the model's is {head_dim}"
    package = importlib.util.find_spec("magi_attention")
    if package is None:
        return "it is not installed; it is built from source, see the README"
    places = package.submodule_search_locations
    if importlib.machinery.PathFinder.find_spec("magi_attention.api", places) is None:
        return (
            "the installed package is the empty placeholder of that name from PyPI, without "
            "`magi_attention.api`; uninstall it and build the real one from source, see the README"
        )
    if device != "cuda":
        return "it needs an NVIDIA GPU, and none is here"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        name = torch.cuda.get_device_name()
        return f"its kernels are for Hopper, capability 9.0, and {name} has {major}.{minor}"
    try:
        importlib.import_module("magi_attention.api")
    except ModuleNotFoundError as error:
        if error.name == "debugpy":
            return "it imports 'debugpy' without declaring it; `pip install debugpy`"
        return f"it needs the module {error.name!r}, which is missing; see the README"
    except Exception as error:  # a broken build can fail in any way, and `auto` goes on without it
        return f"importing it failed: {error!r}"
    return None


def load_api(backend: str) -> ModuleType:
    """Returns the module that holds the calls: `magi_attention.api`, or this one for `native`."""
    modules = {"magi_attention": "magi_attention.api", "native": __name__}
    return importlib.import_module(modules[backend])


# ---------------------------------------------------------------------------------------------
# The runtime key
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DispatchConfig:
    """chunk_size: tokens per chunk at the most (on a GPU rounded up to whole tiles of 128)."""

    chunk_size: int = 512


@dataclass(frozen=True)
class DistAttnConfig:
    dispatch_config: DispatchConfig = DispatchConfig()


@dataclass(frozen=True, eq=False)
class DistAttnRuntimeKey:
    """What the cp ranks agreed on for one packed sequence.

    What a query sees is one interval of the stream, whatever the mask: from its document's first
    token to itself (causal) or to its document's last (full). A padding token sees nothing.
    """

    cp_group: dist.ProcessGroup
    total_seqlen: int  # tokens without padding
    pad_size: int
    chunk_size: int
    partitions: list[list[int]]  # for each cp rank, its chunks, ascending
    order: Tensor  # [S], stream positions in the order in which the ranks hold them
    inverse_order: Tensor  # [S], where each stream position is in that order
    seen_from: Tensor  # [S], by stream position: the first key a query sees
    seen_to: Tensor  # [S], by stream position: one past the last
    block_mask: BlockMask | None  # for FlexAttention, on a GPU


def magi_attn_varlen_key(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: dist.ProcessGroup | DeviceMesh,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
) -> DistAttnRuntimeKey:
    """Plans one packed sequence: who holds which chunk, and what each query sees.

    cu_seqlens_q, cu_seqlens_k: [documents + 1], int32, on the CPU: where documents begin and end.
    num_heads_q, num_heads_kv, head_dim: unused here, part of the shared signature.
    pad_size: 0; the key finds its own padding, as magi_attention does.
    Raises ValueError for what `native` does not do: cross attention, windows, a given padding.
    """
    if not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError("native attends within one sequence: cu_seqlens_q must equal cu_seqlens_k")
    if window_size != (-1, -1) or pad_size != 0:
        raise ValueError(
            f"native takes window_size=(-1, -1) and pad_size=0, not {window_size} and {pad_size}"
        )
    mesh = cp_group_or_mesh
    cp_group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    cp_size = dist.get_world_size(cp_group)

    on_gpu = torch.cuda.is_available()
    total_seqlen = int(cu_seqlens_q[-1])
    auto_chunk_size = -(-total_seqlen // (MIN_CHUNKS_PER_RANK * cp_size))
    chunk_size = min(dist_attn_config.dispatch_config.chunk_size, auto_chunk_size)
    if on_gpu:  # whole tiles
        chunk_size = -(-chunk_size // FLEX_BLOCK_SIZE) * FLEX_BLOCK_SIZE
    pad_size = -total_seqlen % (chunk_size * cp_size)

    positions = torch.arange(total_seqlen)
    starts, ends = cu_seqlens_q[:-1].long(), cu_seqlens_q[1:].long()
    documents = torch.searchsorted(ends, positions, right=True)
    seen_from = F.pad(starts[documents], (0, pad_size))
    seen_to = F.pad(positions + 1 if causal else ends[documents], (0, pad_size))

    chunk_areas = (seen_to - seen_from).view(-1, chunk_size).sum(dim=1)
    partitions = balanced_partitions(chunk_areas.tolist(), cp_size)
    chunks = torch.tensor(partitions).flatten()
    order = (chunks[:, None] * chunk_size + torch.arange(chunk_size)).flatten()

    block_mask = None
    if on_gpu:
        device = torch.device("cuda", torch.cuda.current_device())
        order, seen_from, seen_to = (x.to(device) for x in (order, seen_from, seen_to))
        local = order.chunk(cp_size)[dist.get_rank(cp_group)]
        block_mask = _block_mask(seen_from[local], seen_to[local], key_positions=order)
    return DistAttnRuntimeKey(
        cp_group=cp_group,
        total_seqlen=total_seqlen,
        pad_size=pad_size,
        chunk_size=chunk_size,
        partitions=partitions,
        order=order,
        inverse_order=torch.argsort(order),
        seen_from=seen_from,
        seen_to=seen_to,
        block_mask=block_mask,
    )


def balanced_partitions(areas: list[int], cp_size: int) -> list[list[int]]:
    """Deals chunks out to ranks: equally many each, their summed areas as equal as greed gets them.

    The largest chunk that is left goes to the rank with the least area that still has room
    (longest processing time first). `len(areas)` is a multiple of cp_size.
    """
    room = len(areas) // cp_size
    partitions: list[list[int]] = [[] for _ in range(cp_size)]
    heap = [(0, rank) for rank in range(cp_size)]
    for chunk in sorted(range(len(areas)), key=lambda chunk: -areas[chunk]):
        area, rank = heapq.heappop(heap)
        partitions[rank].append(chunk)
        if len(partitions[rank]) < room:
            heapq.heappush(heap, (area + areas[chunk], rank))
    return [sorted(chunks) for chunks in partitions]


def get_position_ids(key: DistAttnRuntimeKey) -> Tensor:
    """Returns the local tokens' positions in the packed stream (not in their documents), [s].

    Padding has the last token's, as in magi_attention.
    """
    return _local_slice(key.order, key.cp_group).clamp(max=key.total_seqlen - 1)


# ---------------------------------------------------------------------------------------------
# Dispatch and undispatch
# ---------------------------------------------------------------------------------------------


def magi_attn_varlen_dispatch(
    x: Tensor, *key_args, **key_kwargs
) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Returns the local shard of x, [s, ...], and the key of `magi_attn_varlen_key(...)`."""
    key = magi_attn_varlen_key(*key_args, **key_kwargs)
    return dispatch(x, key), key


def dispatch(x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> Tensor:
    """Returns this rank's shard, [s, ...], of x, [total_seqlen, ...], the same on every cp rank.

    The end of the sequence is padded with `pad_value`: give -100 for labels, since 0 is a token.
    """
    padding = (0, 0) * (x.ndim - 1) + (0, key.pad_size)
    padded = F.pad(x, padding, value=pad_value)
    return _KeepLocal.apply(padded.index_select(0, key.order), key.cp_group)


def undispatch(x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """Returns the whole sequence, [total_seqlen, ...], of which x, [s, ...], is this rank's shard.

    Every cp rank gets it, and in backward each takes its own rows of the gradient.
    """
    gathered = _Gather.apply(x, key.cp_group, False)
    return gathered.index_select(0, key.inverse_order)[: key.total_seqlen]


def _local_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x: [s, ...]; returns [S, ...], the ranks' shards one after the other."""
    gathered = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    all_gather_single(gathered, x.contiguous(), group=group)
    return gathered


class _KeepLocal(torch.autograd.Function):
    """Forward: this rank's slice of the first dimension. Backward: all-gather."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _local_slice(x, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _all_gather(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """Forward: all-gather along the first dimension.

    Backward: reduce-scatter where every rank used the whole tensor for queries of its own
    (`sum_gradients`), this rank's slice where all ranks did the same with it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, sum_gradients: bool) -> Tensor:
        ctx.group, ctx.sum_gradients = group, sum_gradients
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        local = _local_slice(grad, ctx.group).contiguous()
        if ctx.sum_gradients:
            local = torch.empty_like(local)
            reduce_scatter_single(local, grad.contiguous(), group=ctx.group)
        return local, None, None


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, object]:
    """Attention of the local queries to all keys that the mask lets them see.

    q: [s, nh, hd]; k, v: [s, nkv, hd]. key: of either backend; the key decides which one computes.
    Returns (out, meta): out is [s, nh, hd], zero at padding; meta is magi_attention's, None here.
    """
    if not isinstance(key, DistAttnRuntimeKey):
        # Strided inputs can give NaN gradients without a word in magi_attention 1.1.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return load_api("magi_attention").calc_attn(q, k, v, key)
    if dist.get_world_size(key.cp_group) > 1:
        kv = torch.stack([k, v], dim=1)  # one collective for both
        kv = _Gather.apply(kv, key.cp_group, True)  # [S, 2, nkv, hd], in the ranks' order
        k, v = kv.unbind(dim=1)
    if key.block_mask is not None:
        return _flex_attention(q, k, v, key.block_mask), None
    k, v = (x.index_select(0, key.inverse_order) for x in (k, v))
    return _sdpa_attention(q, k, v, key), None


def _sdpa_attention(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """Attention chunk by chunk against the keys in stream order that the chunk's queries see.

    q: [s, nh, hd]; k, v: [S, nkv, hd]; returns [s, nh, hd].
    """
    outs = []
    local_chunks = key.partitions[dist.get_rank(key.cp_group)]
    for chunk, q_chunk in zip(local_chunks, q.split(key.chunk_size), strict=True):
        # Padding is left out, at the end of a chunk or as a whole one. Even then the empty product
        # stands in the graph: this rank has to join the reduce-scatter of backward.
        start = min(chunk * key.chunk_size, key.total_seqlen)
        end = min(start + key.chunk_size, key.total_seqlen)
        seen_from, seen_to = key.seen_from[start:end], key.seen_to[start:end]
        # Both grow along the stream.
        first, last = (int(seen_from[0]), int(seen_to[-1])) if start < end else (0, 0)
        keys = torch.arange(first, last)
        mask = (keys >= seen_from[:, None]) & (keys < seen_to[:, None])
        out = F.scaled_dot_product_attention(
            q_chunk[: end - start].transpose(0, 1)[None],  # [1, nh, queries, hd]
            k[first:last].transpose(0, 1)[None],
            v[first:last].transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        out = out[0].transpose(0, 1)
        outs.append(F.pad(out, (0, 0, 0, 0, 0, len(q_chunk) - len(out))))
    return torch.cat(outs)


@functools.cache
def _compiled_flex_attention():
    # dynamic=False: for a second shape it would compile a kernel for all, half as fast.
    # fullgraph=True: past so many shapes it would go on uncompiled, with whole score matrices.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """q: [s, nh, hd]; k, v: [S, nkv, hd], in the ranks' order; returns [s, nh, hd]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, hd]
    out = _compiled_flex_attention()(q, k, v, block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def _block_mask(seen_from: Tensor, seen_to: Tensor, key_positions: Tensor) -> BlockMask:
    """Builds FlexAttention's block mask from the intervals, without the [s, S] mask itself.

    seen_from, seen_to: [s], the interval of the stream that each local query sees.
    key_positions: [S], the stream position of each gathered key.

    A tile of 128 queries x 128 keys is skipped if no query's interval can meet the tile's keys, is
    taken without a mask if every query sees every key, and masked element by element otherwise.
    """

    def visible(batch, head, q_index, kv_index):
        position = key_positions[kv_index]
        return (position >= seen_from[q_index]) & (position < seen_to[q_index])

    # An empty interval (padding) must neither widen its tile's hull nor pass for "sees all".
    far = torch.iinfo(torch.int64).max
    lower = torch.where(seen_from < seen_to, seen_from, far)
    (from_min, from_max), (to_min, to_max) = _tile_range(lower), _tile_range(seen_to)
    key_min, key_max = _tile_range(key_positions)
    meets = (key_max >= from_min[:, None]) & (key_min < to_max[:, None])
    covered = (key_min >= from_max[:, None]) & (key_max < to_min[:, None])

    def tiles(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns per query tile how many key tiles are chosen, and which, those first."""
        count = chosen.sum(dim=-1, dtype=torch.int32)
        index = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
        return count[None, None], index[None, None]

    return BlockMask.from_kv_blocks(
        *tiles(meets & ~covered),
        *tiles(covered),
        BLOCK_SIZE=FLEX_BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=(len(seen_from), len(key_positions)),
    )


def _tile_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value of each tile of 128."""
    tiles = x.view(-1, FLEX_BLOCK_SIZE)
    return tiles.amin(dim=1), tiles.amax(dim=1)


# ---------------------------------------------------------------------------------------------
# Attention whose inputs are computed again
# ---------------------------------------------------------------------------------------------


class SavedAttention:
    """The attention of a layer that recomputes q, k and v: its kernel runs once all the same.

    It keeps `out` and what else the backend saves for backward (the log-sum-exp; at cp > 1 k and v
    as the collectives left them), but not q, k and v: their memory is given back, and filled again
    for `gradients`. That goes past autograd, which sees the same tensors as before.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> None:
        """As `calc_attn`; `self.out` is its output, [s, nh, hd]. q, k and v become empty."""
        self._qkv = [_in_storage_of_its_own(x.detach()).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            self.out, _ = calc_attn(*self._qkv, key)
        for x in self._qkv:
            x.untyped_storage().resize_(0)

    def gradients(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of q, k and v, which have the values of the first time. Once."""
        for x, again in zip(self._qkv, (q, k, v), strict=True):
            again = _in_storage_of_its_own(again.detach())
            x.untyped_storage().resize_(again.untyped_storage().nbytes())
            x.untyped_storage().copy_(again.untyped_storage())
        return torch.autograd.grad(self.out, self._qkv, grad_out)


def _in_storage_of_its_own(x: Tensor) -> Tensor:
    """Returns x, contiguous, copied where its storage holds more than it."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
