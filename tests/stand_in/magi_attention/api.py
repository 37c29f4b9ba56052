"""The calls of MagiAttention 1.1.1 that we make, with its signatures, computed by `native`.

It is stricter than the real library: what that warns of, or computes wrongly without a word, fails
here. What the real one does was read in its sources at the tag v1.1.1 (magi_attention/api and
config.py): the arguments and defaults, which arguments are deprecated, that an instance of its
runtime key holds a field declared with init=False and so cannot be copied by `dataclasses.replace`,
and that `dispatch` pads with 0 unless told otherwise. `pytest -m gpu` compares the signatures.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from context_parallel import native


@dataclass(frozen=True)
class DispatchConfig:
    chunk_size: int | None = None
    uneven_shard: bool = False
    alg: object = None


@dataclass(frozen=True)
class OverlapConfig:
    mode: object = None
    degree: int | None = 1
    dynamic_max_degree: int | None = 8
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: object = None
    calc_cost_factor: float = 1.0
    comm_cost_factor: float = 1.0
    _no_overlap: bool = field(init=False, repr=False, compare=False, default=False)


@dataclass(frozen=True)
class DistAttnConfig:
    dispatch_config: DispatchConfig = DispatchConfig()
    overlap_config: OverlapConfig = OverlapConfig()
    grpcoll_config: object = None


@dataclass(frozen=True, eq=False)
class DistAttnRuntimeKey:
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    pad_size: int
    cp_group: dist.ProcessGroup
    dist_attn_config: DistAttnConfig
    native_key: native.DistAttnRuntimeKey


@dataclass
class AttnForwardMeta:
    lse: torch.Tensor | None
    max_logits: torch.Tensor | None = None


def magi_attn_varlen_key(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: dist.ProcessGroup | DeviceMesh,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    chunk_size: int | None = None,
) -> DistAttnRuntimeKey:
    assert pad_size == 0, "deprecated: the key computes it"
    assert chunk_size is None, "deprecated: it belongs into DispatchConfig"
    assert window_size == (-1, -1), "main.py gives none"
    for cu_seqlens in (cu_seqlens_q, cu_seqlens_k):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.device.type == "cpu", "reading it on the GPU would wait for the device"
    native_key = native.magi_attn_varlen_key(
        cu_seqlens_q,
        cu_seqlens_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        0,
        cp_group_or_mesh,
        causal,
        native.DistAttnConfig(native.DispatchConfig(dist_attn_config.dispatch_config.chunk_size)),
    )
    return DistAttnRuntimeKey(
        num_heads_q,
        num_heads_kv,
        head_dim,
        native_key.pad_size,
        native_key.cp_group,
        dist_attn_config,
        native_key,
    )


def dispatch(x: torch.Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> torch.Tensor:
    return native.dispatch(x, key.native_key, pad_value)


def calc_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key: DistAttnRuntimeKey,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, AttnForwardMeta]:
    assert (sink, softmax_scale, softcap, return_max_logits) == (None, None, 0.0, False)
    for x, heads in ((q, key.num_heads_q), (k, key.num_heads_kv), (v, key.num_heads_kv)):
        assert x.is_contiguous(), "strided inputs can give NaN gradients"
        assert x.shape[1:] == (heads, key.head_dim)
    out = native.calc_attn(q, k, v, key.native_key)
    return out, AttnForwardMeta(lse=None)
