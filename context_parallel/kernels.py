"""The attention kernels of `native`, behind one call, and the choice among them."""

import functools
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.torch_version import TorchVersion

OLDEST_FLASH_ATTENTION_4 = "4.0.0b36"  # that was run here; up to b15 gradients can race
MANY_TOKENS = 65_536  # queries, or a quarter of the keys, above which backward goes head by head


class Pieces:
    """The queries of a piece see the keys of that piece. A causal mask is aligned bottom right."""

    def __init__(self, lengths_q: Tensor, lengths_k: Tensor, causal: bool, device: str) -> None:
        """lengths_q, lengths_k: [pieces], tokens in q, and in k and v. device: of q, k and v."""
        self.lengths = lengths_q.tolist(), lengths_k.tolist(), lengths_k.tolist()
        self.causal = causal
        bounds = (
            F.pad(x.cumsum(0), (1, 0)).to(device, torch.int32) for x in (lengths_q, lengths_k)
        )
        longest = int(lengths_q.max()), int(lengths_k.max())
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        self.varlen = dict(zip(names, (*bounds, *longest), strict=True))


@functools.cache
def select_kernel(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, Callable]:
    """Returns the name of the kernel that runs, and its function: (q [s, nh, hd], k [n, nkv, hd],
    v [n, nkv, hd], pieces) -> [s, nh, hd]. device: "cpu" or "cuda".
    """
    if device == "cpu" or dtype != torch.bfloat16:
        return "scaled_dot_product_attention", _scaled_dot_product_attention
    if flash_attention_4_obstacle(head_dim):
        return "FlashAttention-2, part of torch", _flash_attention_2
    version = importlib.metadata.version("flash-attn-4")
    return f"FlashAttention-4 {version}", _FlashAttention4.apply


def flash_attention_4_obstacle(head_dim: int) -> str | None:
    """Returns what keeps FlashAttention-4 from running on this GPU, or None."""
    if torch.cuda.get_device_capability() < (9, 0) or head_dim not in (64, 128):
        return f"it needs Hopper or newer and head_dim 64 or 128, not {head_dim}"
    hint = "; `pip install -r requirements-gpu.txt`: almost twice as fast as FlashAttention-2"
    try:
        version = importlib.metadata.version("flash-attn-4")
        if TorchVersion(version) < OLDEST_FLASH_ATTENTION_4:
            return f"version {version} is older than {OLDEST_FLASH_ATTENTION_4}{hint}"
        importlib.import_module("flash_attn.cute.interface")
    except importlib.metadata.PackageNotFoundError:
        return f"it is not installed{hint}"
    except Exception as error:  # a broken installation can fail in any way
        return f"importing it failed: {error!r}{hint}"
    return None


class _FlashAttention4(torch.autograd.Function):
    """Backward holds float32 sums, twice as large as q, k and v. With many tokens it is called for
    one key/value head after the other, which only the library's private function allows.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
        from flash_attn.cute import flash_attn_varlen_func as attention

        ctx.options = {"causal": pieces.causal, **pieces.varlen}
        out, lse = attention(q, k, v, return_lse=True, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = ctx.saved_tensors
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        parts = k.shape[1] if max(len(q), len(k) // 4) > MANY_TOKENS else 1
        by_head = (x.chunk(parts, dim=1) for x in (q, k, v, out, grad, *gradients))
        for *inputs, dq, dk, dv, part in zip(*by_head, lse.chunk(parts), strict=True):
            _flash_attn_bwd(*inputs, part, dq=dq, dk=dk, dv=dv, **ctx.options)
        return *gradients, None


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    # The public `varlen_attn` may take cuDNN from torch 2.15 on, which aligns the mask top left.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *pieces.varlen.values(), 0.0, pieces.causal, return_debug_mask=False
    )[0]


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    if q.is_cuda:  # its float32 kernel takes as many heads of k and v as of q
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs = []
    for piece in zip(*map(Tensor.split, (q, k, v), pieces.lengths), strict=True):
        size = len(piece[0]), len(piece[1])
        is_square = size[0] == size[1]  # where torch's own causal mask is ours
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in piece),  # [1, heads, tokens, hd]
            attn_mask=causal_lower_right(*size) if pieces.causal and not is_square else None,
            is_causal=pieces.causal and is_square,
            enable_gqa=not q.is_cuda,
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
