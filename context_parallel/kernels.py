"""The attention kernels of `native`, behind one call, and the choice among them."""

import functools
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

FLASH_ATTENTION_4 = (4, 0, 0, 36)  # 4.0.0b36, the oldest that was run; up to b15 gradients can race


@dataclass(frozen=True, eq=False)
class Pieces:
    """The queries of a piece see the keys of the same piece; pieces follow one another.

    causal: a piece's last query sees all its keys, the query before it all but the last, ...
    """

    lengths_q: list[int]  # tokens of each piece in q
    lengths_k: list[int]  # and in k and v
    causal: bool
    cu_seqlens_q: Tensor  # [pieces + 1], int32, where pieces begin; on the GPU if there is one
    cu_seqlens_k: Tensor

    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Returns cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
        return self.cu_seqlens_q, self.cu_seqlens_k, max(self.lengths_q), max(self.lengths_k)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    """q: [s, nh, hd]; k, v: [n, nkv, hd]; returns [s, nh, hd]."""
    _, kernel = select_kernel(q.device.type, q.dtype, q.shape[-1])
    return kernel(q, k, v, pieces)


@functools.cache
def select_kernel(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, Callable]:
    """Returns the name and the function of the kernel that runs. device: "cpu" or "cuda"."""
    if device == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return "scaled_dot_product_attention", _scaled_dot_product_attention
    if flash_attention_4_obstacle(head_dim):
        return "FlashAttention-2, part of torch", _flash_attention_2
    return f"FlashAttention-4 {importlib.metadata.version('flash-attn-4')}", _flash_attention_4


def flash_attention_4_obstacle(head_dim: int) -> str | None:
    """Returns what keeps FlashAttention-4 from running on this GPU, or None."""
    if torch.cuda.get_device_capability() < (9, 0):
        return "it needs a GPU of capability 9.0 or newer"
    if head_dim not in (64, 128):
        return f"it was tested with head_dim 64 and 128, and the model's is {head_dim}"
    try:
        version = importlib.metadata.version("flash-attn-4")
        # "b999" makes 4.0.0 newer than its betas.
        if tuple(map(int, re.findall(r"\d+", version + "b999"))) < FLASH_ATTENTION_4:
            return f"version {version} is too old"
        importlib.import_module("flash_attn.cute")
    except importlib.metadata.PackageNotFoundError:
        return "it is not installed"
    except Exception as error:  # a broken installation can fail in any way
        return f"importing it failed: {error!r}"
    return None


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, None, *pieces.bounds(), causal=pieces.causal)[0]


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    # Not the public `varlen_attn`: from torch 2.15 on it may take cuDNN's kernel, whose causal mask
    # is aligned top left.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *pieces.bounds(), 0.0, pieces.causal, return_debug_mask=False
    )[0]


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    if q.is_cuda:  # its float32 kernel takes as many heads of k and v as of q
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs = []
    for piece in zip(
        q.split(pieces.lengths_q), k.split(pieces.lengths_k), v.split(pieces.lengths_k), strict=True
    ):
        num_queries, num_keys = len(piece[0]), len(piece[1])
        is_square = num_queries == num_keys  # where torch's own causal mask is ours
        mask = None
        if pieces.causal and not is_square:
            mask = causal_lower_right(num_queries, num_keys)
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in piece),  # [1, heads, tokens, hd]
            attn_mask=mask,
            is_causal=pieces.causal and is_square,
            enable_gqa=not q.is_cuda,
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
