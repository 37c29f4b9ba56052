"""PyTorch's kernels in parts that are joined, against dense attention in float64.

The kernels for GPUs are compared by `pytest -m gpu tests/test_native_attention.py`.
"""

import pytest
import reference
import torch
from conftest import relative_error

from fused_attention import Block, backward, forward, join

NH, NKV, HD = 4, 2, 16


def block(queries, keys, lengths_q, lengths_k, causal) -> Block:
    cu_seqlens = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    return Block(slice(*queries), slice(*keys), lengths_q, lengths_k, causal, True, *cu_seqlens)


def tensors(tokens: int) -> list[torch.Tensor]:
    """Returns q, k, v and the gradient of the output, float64."""
    torch.manual_seed(tokens)
    return [torch.randn(tokens, heads, HD, dtype=torch.float64) for heads in (NH, NKV, NKV, NH)]


def dense(q, k, v, grad, lengths, causal):
    """Returns output and gradients of `reference.attention`, one document after the other."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    out = torch.cat([reference.attention(*document, causal) for document in documents])
    out.backward(grad)
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[8, 8, 8], [1, 13, 10], [24]])
def test_problems_that_follow_each_other_stay_apart(lengths, causal):
    q, k, v, grad = tensors(24)
    expected = dense(q, k, v, grad, lengths, causal)
    whole = block((0, 24), (0, 24), lengths, lengths, causal)
    out, log_sum, state = forward(whole, q, k, v)
    found = (out, *backward(whole, grad, q, k, v, out, log_sum, state))
    for part, other in zip(found, expected, strict=True):
        assert relative_error(part, other) < 1e-13


def test_parts_of_the_keys_joined_are_the_attention_to_all_of_them():
    """Queries 10 to 23 of a causal document: with themselves, and with what is before them."""
    q, k, v, grad = tensors(24)
    grad[:10] = 0
    expected = dense(q, k, v, grad, [24], True)
    own = block((10, 24), (10, 24), [14], [14], True)
    before = block((10, 24), (0, 10), [14], [10], False)
    (out, log_sum, own_state), (more, more_sum, state) = (
        forward(part, q, k, v) for part in (own, before)
    )
    out, log_sum = join(out, log_sum, more, more_sum)
    assert relative_error(out, expected[0][10:]) < 1e-13

    out = torch.cat([torch.zeros(10, NH, HD, dtype=q.dtype), out])
    log_sum = torch.cat([torch.zeros(NH, 10, dtype=q.dtype), log_sum], dim=1)
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for part, part_state in ((own, own_state), (before, state)):
        for total, rows, x in zip(
            gradients,
            (part.queries, part.keys, part.keys),
            backward(part, grad, q, k, v, out, log_sum, part_state),
            strict=True,
        ):
            total[rows] += x
    for total, other in zip(gradients, expected[1:], strict=True):
        assert relative_error(total, other) < 1e-13
