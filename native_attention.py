"""`native`: the calls of `magi_attention.api` that we make, in plain PyTorch, wherever torch runs.

The functions take the arguments that we use, with the same meaning, so that a caller can hold
either module (`context_parallel.load_api`). K and V of all ranks are gathered (before any
repetition for grouped-query attention) while a rank's queries attend to its own keys, then to the
others'; in backward the gradients of K and V are reduce-scattered, in the compute type: the way of
Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2).

Shapes: `S` tokens of the padded sequence, `s` = S / cp local tokens, `nh` heads, `nkv` key/value
heads, `hd` head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

import fused_attention
from blocks import plan_blocks
from chunks import balanced_partitions, chunk_areas
from fused_attention import Block

# torch 2.13 renamed the two collectives; up to 2.12 only the second name is there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class DispatchConfig:
    """chunk_size: tokens per chunk at the most; every rank gets at least one chunk."""

    chunk_size: int = 512


@dataclass(frozen=True)
class DistAttnConfig:
    dispatch_config: DispatchConfig = DispatchConfig()


@dataclass(frozen=True, eq=False)
class DistAttnRuntimeKey:
    """What the cp ranks agreed on for one packed sequence, and this rank's share of the work."""

    cp_group: dist.ProcessGroup
    total_seqlen: int  # tokens without padding
    pad_size: int
    chunk_size: int
    partitions: list[list[int]]  # for each cp rank, its chunks, ascending
    order: Tensor  # [S], stream positions in the order in which the ranks hold them
    inverse_order: Tensor  # [S], where each stream position is in that order
    local_blocks: list[Block]  # each piece of a document that this rank has, with itself
    stream_blocks: list[Block]  # and with the other parts of its document, slices of the stream
    gathers: bool  # whether any rank has stream blocks, so that K and V have to be gathered


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

    total_seqlen = int(cu_seqlens_q[-1])
    chunk_size = min(dist_attn_config.dispatch_config.chunk_size, -(-total_seqlen // cp_size))
    pad_size = -total_seqlen % (chunk_size * cp_size)
    partitions = balanced_partitions(
        chunk_areas(cu_seqlens_q, chunk_size, causal, cp_size), cp_size
    )
    chunks = torch.tensor(partitions).flatten()
    order = (chunks[:, None] * chunk_size + torch.arange(chunk_size)).flatten()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    local_blocks, stream_blocks, gathers = plan_blocks(
        cu_seqlens_q, chunk_size, partitions, dist.get_rank(cp_group), causal, device
    )
    return DistAttnRuntimeKey(
        cp_group=cp_group,
        total_seqlen=total_seqlen,
        pad_size=pad_size,
        chunk_size=chunk_size,
        partitions=partitions,
        order=order.to(device),
        inverse_order=torch.argsort(order).to(device),
        local_blocks=local_blocks,
        stream_blocks=stream_blocks,
        gathers=gathers,
    )


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
    gathered = _Gather.apply(x, key.cp_group)
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
    """Forward: all-gather along the first dimension. Backward: this rank's slice."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _local_slice(grad, ctx.group).contiguous(), None


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, None]:
    """q: [s, nh, hd]; k, v: [s, nkv, hd]. Returns the attention's output, [s, nh, hd], zero at
    padding, and None where magi_attention has its log-sum-exp.
    """
    return _NativeAttention.apply(q, k, v, key), None


class _NativeAttention(torch.autograd.Function):
    """The local blocks while K and V are gathered, then the blocks on the stream.

    Gathered keys are not kept for backward, which gathers them again: they are of all ranks.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        wait_for_kv = _start_gather(k, v, key)
        out, log_sums, ctx.states = None, [], []
        for block in key.local_blocks:
            part, log_sum, state = fused_attention.forward(block, q, k, v)
            out = _put(part, block.queries, out, len(q))
            log_sums.append(log_sum)
            ctx.states.append(state)
        out = torch.zeros_like(q) if out is None else out  # this rank has nothing but padding
        log_sum = torch.cat(log_sums, dim=1) if log_sums else None
        if wait_for_kv is not None:
            k_stream, v_stream = wait_for_kv()
            del wait_for_kv  # and with it what was gathered, in the ranks' order
            # A query can have several blocks: rounded once, not with each of them.
            out = out.to(torch.promote_types(q.dtype, torch.float32))
            for block in key.stream_blocks:
                rows = block.queries
                *part, state = fused_attention.forward(block, q, k_stream, v_stream)
                fused_attention.join(out[rows], log_sum[:, rows], *part)
                ctx.states.append(state)
            out = out.to(q.dtype)
        ctx.key = key
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        key, states = ctx.key, iter(ctx.states)
        q, k, v, out, log_sum = ctx.saved_tensors
        saved = (grad.contiguous(), q, k, v, out, log_sum)
        wait_for_kv = _start_gather(k, v, key)
        gradients = [None, None, None]
        for block in key.local_blocks:
            parts = fused_attention.backward(block, *saved, next(states))
            for i, part in enumerate(parts):
                gradients[i] = _put(part, block.queries, gradients[i], len(q))
        dq, dk, dv = (
            torch.zeros_like(x) if dx is None else dx
            for x, dx in zip((q, k, v), gradients, strict=True)
        )
        if wait_for_kv is None:
            return dq, dk, dv, None
        k_stream, v_stream = wait_for_kv()
        del wait_for_kv  # and with it what was gathered, in the ranks' order
        saved = (saved[0], q, k_stream, v_stream, out, log_sum)
        # Several blocks can see the same keys: their gradients add up in float32 at least. So do
        # those of queries that have several blocks here.
        dtype = torch.promote_types(k.dtype, torch.float32)
        dkv = k.new_zeros(len(k_stream), 2, *k.shape[1:], dtype=dtype)
        if len({block.queries.start for block in key.stream_blocks}) < len(key.stream_blocks):
            dq = dq.to(dtype)
        for block in key.stream_blocks:
            part_q, part_k, part_v = fused_attention.backward(block, *saved, next(states))
            dq[block.queries] += part_q
            dkv[block.keys, 0] += part_k
            dkv[block.keys, 1] += part_v
        del k_stream, v_stream, saved
        dkv = dkv.to(k.dtype).index_select(0, key.order)
        local = dkv.new_empty(len(k), *dkv.shape[1:])
        reduce_scatter_single(local, dkv, group=key.cp_group)
        return dq.to(q.dtype), dk + local[:, 0], dv + local[:, 1], None


def _put(part: Tensor, rows: slice, total: Tensor | None, num_rows: int) -> Tensor:
    """Returns total, which it makes if there is none, with the part as its rows. A part that is all
    of them is returned as it is.
    """
    if len(part) == num_rows:
        return part
    if total is None:
        total = part.new_zeros(num_rows, *part.shape[1:])
    total[rows] = part
    return total


def _start_gather(
    k: Tensor, v: Tensor, key: DistAttnRuntimeKey
) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """Starts to gather K and V. Returns what waits for it and gives both in the stream's order,
    [S, nkv, hd] each; None where no rank needs them.
    """
    if not key.gathers:
        return None
    kv = torch.stack([k, v], dim=1)  # one collective for both
    gathered = kv.new_empty(len(key.order), *kv.shape[1:])
    work = all_gather_single(gathered, kv, group=key.cp_group, async_op=True)

    def wait() -> tuple[Tensor, Tensor]:
        work.wait()
        return gathered.index_select(0, key.inverse_order).unbind(dim=1)

    return wait
