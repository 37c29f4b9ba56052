"""PyTorch's fused attention kernels, and the log-sum-exp that joins parts of an attention.

A softmax over many keys can be computed in parts: each part's kernel gives its output and, for
every query, the log of the sum of its exponentials; `join` weighs the outputs by them, and backward
runs the kernels of all parts with the joined output and log-sum-exp (FlashAttention-2,
https://arxiv.org/abs/2307.08691, section 3.1). `scaled_dot_product_attention` keeps the log-sum-exp
to itself; torch's operators below it, which its own context parallelism calls too, do not.

Shapes: `n` queries, `m` keys, `nh` heads, `nkv` key/value heads, `hd` head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

aten = torch.ops.aten
CUDNN_MIN_SIZE = 128  # queries; it refuses one, and does not pay off for a few
CUDNN_MAX_HEAD_DIM = 128  # on all GPUs
FLASH_TILE = 128  # to whose multiples its backward pads each problem's queries
EFFICIENT_TILE = 32  # to whose multiples that kernel pads the log-sum-exp


@dataclass(frozen=True, eq=False)
class Block:
    """Queries and keys that one kernel call takes: problems that follow each other.

    queries, keys: their rows among those of q, and of k and v. lengths_q, lengths_k: tokens of each
    problem. causal: query i of a problem sees its keys 0 to i, which needs as many keys as queries.
    recurs: whether blocks of the same sizes come again and again, as those of whole chunks do.

    Lengths may be of more tokens than there are rows: then zeros follow these. As queries they
    change nothing; as keys they would be seen, but for a causal mask.
    """

    queries: slice
    keys: slice
    lengths_q: list[int]
    lengths_k: list[int]
    causal: bool
    recurs: bool
    cu_seqlens_q: Tensor  # [problems + 1], int32, where problems begin; on the GPU if there is one
    cu_seqlens_k: Tensor


def make_block(
    queries: slice,
    keys: slice,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool,
    recurs: bool,
    device: str,
) -> Block:
    """Returns the block of these fields. device: where the attention will be computed."""
    cu_seqlens = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        for lengths in (lengths_q, lengths_k)
    )
    return Block(queries, keys, lengths_q, lengths_k, causal, recurs, *cu_seqlens)


def forward(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list]:
    """Returns the output of the block's queries, [n, nh, hd], their log-sum-exp, [nh, n], float32
    (float64 of float64), and what the kernels' backward wants besides.

    q: [tokens, nh, hd]; k, v: [tokens, nkv, hd], of which the block names its own.
    """
    kernel = _kernel(block, q)
    num_queries = len(q[block.queries])
    q = _rows(q, block.queries, block.lengths_q)
    k, v = (_rows(x, block.keys, block.lengths_k) for x in (k, v))
    if kernel == "flash":
        out, log_sum, *state = aten._flash_attention_forward(
            q, k, v, *_flash_sizes(block), 0.0, block.causal, False
        )
        return out[:num_queries], log_sum[:, :num_queries], state[:2]
    parts = [_forward(kernel, *part, block.causal) for part in _problems(block, (q,), (k, v))]
    outs, log_sums, states = zip(*parts, strict=True)
    out, log_sum = outs[0], log_sums[0]
    if len(parts) > 1:
        out, log_sum = torch.cat(outs), torch.cat(log_sums, dim=1)
    return out[:num_queries], log_sum[:, :num_queries], list(states)


def backward(
    block: Block,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    state: list,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the block's part of the gradients: of its q, [n, nh, hd], and of its k and v, [m,
    nkv, hd].

    grad, out: [tokens, nh, hd]; log_sum: [nh, tokens]: of the whole attention, all parts joined.
    state: what `forward` returned.
    """
    kernel = _kernel(block, q)
    sizes = len(q[block.queries]), len(k[block.keys]), len(k[block.keys])
    # Zeros that follow are queries whose output has no gradient: nothing else gets any from them.
    q, grad, out, log_sum = (
        _rows(x, block.queries, block.lengths_q) for x in (q, grad, out, log_sum.T)
    )
    k, v = (_rows(x, block.keys, block.lengths_k) for x in (k, v))
    if kernel == "flash":
        args = (*_flash_sizes(block), 0.0, block.causal, *state)
        gradients = aten._flash_attention_backward(
            grad, q, k, v, out, log_sum.T.contiguous(), *args
        )
    else:
        problems = _problems(block, (q, grad, out, log_sum), (k, v))
        parts = [
            _backward(kernel, *part, block.causal, part_state)
            for part, part_state in zip(problems, state, strict=True)
        ]
        gradients = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return tuple(x[:size] for x, size in zip(gradients, sizes, strict=True))


def join(out: Tensor, log_sum: Tensor, more_out: Tensor, more_log_sum: Tensor) -> None:
    """Adds the keys of another part to out and log_sum, in place, for the same queries.

    out: [n, nh, hd]; log_sum: [nh, n]. Each part counts by its share of the summed exponentials:
    exp(b) / (exp(a) + exp(b)) = sigmoid(b - a). `out` has the type of log_sum.
    """
    share = torch.sigmoid(more_log_sum - log_sum).T[..., None]
    out.lerp_(more_out.to(out.dtype), share)
    log_sum.copy_(torch.logaddexp(log_sum, more_log_sum))


def _kernel(block: Block, q: Tensor) -> str:
    """Returns the kernel: "cpu", "efficient" (of float32 on a GPU), "flash" or "cudnn".

    cuDNN's is the fastest on Hopper and later, but prepares itself for each new size (some 70 ms).
    """
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    is_hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
    fits = block.lengths_q[0] >= CUDNN_MIN_SIZE and q.shape[-1] <= CUDNN_MAX_HEAD_DIM
    return "cudnn" if block.recurs and fits and is_hopper else "flash"


def _flash_sizes(block: Block) -> tuple[Tensor, Tensor, int, int]:
    return block.cu_seqlens_q, block.cu_seqlens_k, max(block.lengths_q), max(block.lengths_k)


def _rows(x: Tensor, rows: slice, lengths: list[int]) -> Tensor:
    """Returns these rows of x, and zeros behind them where the lengths are of more."""
    x = x[rows]
    padding = sum(lengths) - len(x)
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding)) if padding else x


def _problems(block: Block, of_queries: tuple, of_keys: tuple) -> Iterator[list[Tensor]]:
    """Yields the tensors' problems, [batch, tokens, ...]: all at once if they are of one size."""
    if len(set(block.lengths_q)) == 1 and len(set(block.lengths_k)) == 1:
        batch = len(block.lengths_q)
        yield [rearrange(x, "(b n) ... -> b n ...", b=batch) for x in (*of_queries, *of_keys)]
        return
    parts = [x.split(block.lengths_q) for x in of_queries]
    parts += [x.split(block.lengths_k) for x in of_keys]
    for problem in zip(*parts, strict=True):
        yield [x[None] for x in problem]


def _forward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `forward`, of a batch: q: [b, n, nh, hd]; k, v: [b, m, nkv, hd]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    state = []
    if kernel == "cudnn":
        out, log_sum, _, _, _, _, *state = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False
        )
    elif kernel == "efficient":
        out, log_sum, *state = aten._scaled_dot_product_efficient_attention(
            q, _for_each_head(k, q), _for_each_head(v, q), None, True, 0.0, causal
        )
        log_sum = log_sum[..., : q.shape[2]]
    else:
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    log_sum = rearrange(log_sum.reshape(out.shape[:3]), "b heads n -> heads (b n)")
    return _packed(out), log_sum, state[:2]


def _backward(
    kernel: str,
    q: Tensor,
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, of a batch: q, grad, out: [b, n, nh, hd]; log_sum: [b, n, nh]."""
    q, grad, out, log_sum, k, v = (x.transpose(1, 2) for x in (q, grad, out, log_sum, k, v))
    log_sum = log_sum.contiguous()
    if kernel == "cudnn":
        seed, offset = state
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, q, k, v, out, log_sum[..., None], seed, offset, None, None, None),
            *(q.shape[2], k.shape[2], 0.0, causal),
        )
    elif kernel == "efficient":
        log_sum = F.pad(log_sum, (0, -q.shape[2] % EFFICIENT_TILE))
        dq, *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
            *(grad, q, _for_each_head(k, q), _for_each_head(v, q), None, out, log_sum, *state),
            *(0.0, [True, True, True, False], causal),
        )
        grouped = "b (nkv group) m hd -> b nkv m hd"
        dk, dv = (reduce(x, grouped, "sum", nkv=k.shape[1]) for x in gradients)
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal
        )
    return _packed(dq), _packed(dk), _packed(dv)


def _packed(x: Tensor) -> Tensor:
    return rearrange(x, "b heads n hd -> (b n) heads hd")


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    return repeat(x, "b nkv m hd -> b (nkv group) m hd", group=q.shape[1] // x.shape[1])
