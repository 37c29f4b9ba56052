"""`native`: the functions of `magi_attention.api` that we call, in plain PyTorch.

Where a document is cut, each rank gathers K and V of all ranks before its attention, and backward
reduce-scatters their gradients, as in Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2).

Shapes: `S` tokens of the padded sequence, `s` = S / cp local tokens, `n` rows of K and V that are
copied for the local pieces, `nh` heads, `nkv` key/value heads, `hd` head_dim.
"""

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .chunks import balanced_partitions, chunk_areas
from .kernels import Pieces, select_kernel

# torch 2.13 renamed the two collectives; up to 2.12 only the second name is there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# x -> a function that returns x in backward. It holds a detached x: x and its graph, which holds
# the function, would be a cycle.
KEEP = ContextVar("KEEP", default=lambda x: x.detach().detach)


@dataclass(frozen=True)
class DispatchConfig:
    chunk_size: int = 512  # tokens per chunk at the most; every rank gets at least one chunk


@dataclass(frozen=True)
class DistAttnConfig:
    dispatch_config: DispatchConfig = DispatchConfig()


@dataclass(frozen=True, eq=False)
class DistAttnRuntimeKey:
    """A *piece* is a part of a document that a rank holds without a gap."""

    cp_group: dist.ProcessGroup
    pad_size: int  # tokens behind the last document
    order: Tensor  # [S], stream positions in the order in which the ranks hold them
    pieces: Pieces  # of this rank
    gathers: bool  # whether any rank has a piece that sees more than itself
    key_slices: list[slice]  # what this rank's pieces see, in the stream
    key_rows: Tensor  # [n], the same, in `order`


def magi_attn_varlen_key(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: dist.ProcessGroup,
    causal: bool = False,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
) -> DistAttnRuntimeKey:
    """cu_seqlens_q, cu_seqlens_k: [documents + 1], int32, on the CPU, equal: where documents begin
    and end. num_heads_q, num_heads_kv, head_dim: unused here. pad_size: 0; the key finds its own.
    """
    if not torch.equal(cu_seqlens_q, cu_seqlens_k) or pad_size:
        raise ValueError("native needs cu_seqlens_q equal to cu_seqlens_k, and pad_size=0")
    cp_size = dist.get_world_size(cp_group_or_mesh)
    bounds = cu_seqlens_q.long()
    chunk_size = min(dist_attn_config.dispatch_config.chunk_size, -(-int(bounds[-1]) // cp_size))
    pad_size = -int(bounds[-1]) % (chunk_size * cp_size)
    areas = chunk_areas(bounds, chunk_size, causal, cp_size)
    partitions = torch.tensor(balanced_partitions(areas, cp_size))
    bounds = F.pad(bounds, (0, 1), value=partitions.numel() * chunk_size)  # padding is a document
    slot = partitions.flatten().argsort()  # of each chunk in `order`
    cuts = ((slot // partitions.shape[1]).diff().nonzero() + 1) * chunk_size  # between two ranks
    gathers = not torch.isin(cuts, bounds).all()  # a cut lies inside a document
    chunks = partitions[dist.get_rank(cp_group_or_mesh)]
    first, last, first_key, last_key = find_pieces(bounds, chunk_size, chunks, causal)
    key_slices = list(map(slice, *(x.tolist() for x in _joined(first_key, last_key))))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    within = torch.arange(chunk_size, device=device)  # the host would take long to fill S rows
    order, place = (  # inverse permutations of the stream
        (x.to(device).view(-1, 1) * chunk_size + within).flatten() for x in (partitions, slot)
    )
    key_rows = torch.cat([place[keys] for keys in key_slices])
    own = Pieces(last - first, last_key - first_key, causal, device)
    return DistAttnRuntimeKey(cp_group_or_mesh, pad_size, order, own, gathers, key_slices, key_rows)


def find_pieces(bounds: Tensor, chunk_size: int, chunks: Tensor, causal: bool) -> Tensor:
    """Returns begin and end of a rank's pieces and of their keys, [4, pieces], in the stream.

    bounds: [documents + 1], where documents begin and end. chunks: those of the rank.
    """
    begin, end = _joined(chunks * chunk_size, (chunks + 1) * chunk_size)
    cuts = torch.cat([begin, end, bounds]).unique()
    first, last = cuts[:-1], cuts[1:]
    interval = torch.searchsorted(begin, first, right=True) - 1  # the last that begins before
    is_held = (interval >= 0) & (first < end[interval])
    first, last = first[is_held], last[is_held]
    document = torch.searchsorted(bounds, first, right=True) - 1
    return torch.stack([first, last, bounds[document], last if causal else bounds[document + 1]])


def _joined(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the intervals [begin, end) with those joined that follow one another."""
    is_gap = begin[1:] != end[:-1]
    return begin[F.pad(is_gap, (1, 0), value=True)], end[F.pad(is_gap, (0, 1), value=True)]


def dispatch(x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> Tensor:
    """Returns this rank's shard, [s, ...], of x, [S - pad_size, ...]; pad labels with -100."""
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, key.pad_size), value=pad_value)
    return x.index_select(0, key.order.chunk(key.cp_group.size())[key.cp_group.rank()])


def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """q: [s, nh, hd]; k, v: [s, nkv, hd]. Returns the output, [s, nh, hd], finite at padding."""
    _, attention = select_kernel(q.device.type, q.dtype, q.shape[-1])
    if not key.gathers:
        return attention(q, k, v, key.pieces)
    seen = _GatherKeys.apply(q, k, v, key)
    # Backward gathers again, from the local K and V: all ranks' copies are too large to keep.
    node = seen[1].grad_fn
    with not_saved(seen, functools.cache(lambda: _gather_keys(*node.saved_tensors, key))):
        return attention(*seen, key.pieces)


class _GatherKeys(torch.autograd.Function):
    """Forward: `_gather_keys`. Backward: the gradients of the local K and V, from all ranks."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey):
        ctx.key = key
        ctx.save_for_backward(q, k, v)  # for `calc_attn`, which gathers again
        return _gather_keys(q, k, v, key)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, *dkv: Tensor):
        key, x = ctx.key, dkv[0]
        # Pieces of one document see the same keys: their gradients add up in float32 at least.
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(len(key.order), 2, *x.shape[1:], dtype=dtype)
        sizes = [keys.stop - keys.start for keys in key.key_slices]
        for i, gradient in enumerate(dkv):
            for keys, part in zip(key.key_slices, gradient.split(sizes), strict=True):
                total[keys, i] += part
        total = total.to(x.dtype)  # a line of its own, so that the float32 sums are free next
        total = total.index_select(0, key.order)
        local = total.new_empty(len(dq), *total.shape[1:])
        reduce_scatter_single(local, total, group=key.cp_group)
        return dq, *local.unbind(dim=1), None


def _gather_keys(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, ...]:
    """Returns q, so that `not_saved` covers it, and the pieces' K and V, [n, nkv, hd] each."""
    kv = torch.stack([k, v], dim=1)  # one collective for both
    gathered = kv.new_empty(len(key.order), *kv.shape[1:])
    all_gather_single(gathered, kv, group=key.cp_group)
    return q.view_as(q), *(x.index_select(0, key.key_rows) for x in gathered.unbind(dim=1))


def not_saved(tensors: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]):
    """Returns a context in which autograd does not save these tensors, nor views of them. Backward
    calls `again`, which returns tensors of the same values, strides and offsets.
    """
    indices = {x.untyped_storage().data_ptr(): i for i, x in enumerate(tensors)}

    def pack(x: Tensor):
        i = indices.get(x.untyped_storage().data_ptr())
        return KEEP.get()(x) if i is None else (i, x.shape, x.stride(), x.storage_offset())

    def unpack(packed):
        return packed() if callable(packed) else again()[packed[0]].as_strided(*packed[1:])

    return saved_tensors_hooks(pack, unpack)
