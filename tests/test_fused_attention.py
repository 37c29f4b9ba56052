"""PyTorch's kernels in parts that are joined, against dense attention in float64.

The kernels for GPUs are compared by `pytest -m gpu tests/test_native_attention.py`; here they get
tensors without memory, to see that this torch has them with the arguments that we give.
"""

import pytest
import reference
import torch
from conftest import relative_error
from context_parallel_worker import by_document

import fused_attention
from fused_attention import backward, forward, join, make_block

NH, NKV, HD = 4, 2, 16


def tensors(tokens: int) -> list[torch.Tensor]:
    """Returns q, k, v and the gradient of the output, float64."""
    torch.manual_seed(tokens)
    return [torch.randn(tokens, heads, HD, dtype=torch.float64) for heads in (NH, NKV, NKV, NH)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[8, 8, 8], [1, 13, 10], [24]])
def test_problems_that_follow_each_other_stay_apart(lengths, causal):
    q, k, v, grad = tensors(24)
    expected = by_document(reference.attention, (q, k, v, grad), lengths, causal)
    whole = make_block(slice(24), slice(24), lengths, lengths, causal, True, "cpu")
    out, log_sum, state = forward(whole, q, k, v)
    found = (out, *backward(whole, grad, q, k, v, out, log_sum, state))
    for part, other in zip(found, expected, strict=True):
        assert relative_error(part, other) < 1e-13


@pytest.mark.parametrize("padding", [0, 5])
def test_parts_of_the_keys_joined_are_the_attention_to_all_of_them(padding):
    """Queries 10 to 23 of a causal document: with themselves, and with what is before them; also
    with kernels that take five more, which change nothing.
    """
    q, k, v, grad = tensors(24)
    grad[:10] = 0
    expected = by_document(reference.attention, (q, k, v, grad), [24], True)
    length = 14 + padding
    own = make_block(slice(10, 24), slice(10, 24), [length], [length], True, True, "cpu")
    before = make_block(slice(10, 24), slice(10), [length], [10], False, True, "cpu")
    (out, log_sum, own_state), (more, more_sum, state) = (
        forward(part, q, k, v) for part in (own, before)
    )
    join(out, log_sum, more, more_sum)
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.bfloat16, 4e-3)])
def test_joining_writes_into_the_rows_that_it_is_given(dtype, tolerance):
    torch.manual_seed(0)
    scores, values = torch.randn(NH, 6, 20, dtype=torch.float64), torch.randn(20, NH, HD).double()
    whole, log_sums = torch.zeros(10, NH, HD).double(), torch.zeros(NH, 10).double()

    def part(keys):
        out = torch.einsum("hqk,khd->qhd", scores[..., keys].softmax(-1), values[keys])
        return out.to(dtype), scores[..., keys].logsumexp(-1)

    whole[2:8], log_sums[:, 2:8] = part(slice(12))
    join(whole[2:8], log_sums[:, 2:8], *part(slice(12, 20)))
    expected, expected_sum = part(slice(20))
    assert relative_error(whole[2:8], expected) < tolerance
    assert relative_error(log_sums[:, 2:8], expected_sum) < 1e-13
    assert (whole[:2] == 0).all() and (whole[8:] == 0).all()


@pytest.mark.parametrize("lengths", [[256, 256, 256], [130, 300, 338], [768]])
@pytest.mark.parametrize(
    "kernel, dtype, recurs",
    [
        ("cudnn", torch.bfloat16, True),
        ("flash", torch.bfloat16, False),
        ("efficient", torch.float32, True),
    ],
)
def test_kernels_for_gpus_take_our_arguments_in_this_torch(
    kernel, dtype, recurs, lengths, monkeypatch
):
    """With as many tokens as there are rows, or, in the second block, with more queries."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    causal = make_block(slice(0, 768), slice(0, 768), lengths, lengths, True, recurs, "meta")
    full = make_block(slice(0, 500), slice(100, 700), [512], [600], False, recurs, "meta")
    q, grad, whole_out = torch.empty(3, 768, 8, 64, dtype=dtype, device="meta")
    k, v = torch.empty(2, 768, 2, 64, dtype=dtype, device="meta")
    whole_sum = torch.empty(8, 768, device="meta")
    for block in (causal, full):
        assert fused_attention._kernel(block, q) == kernel
        out, log_sum, state = forward(block, q, k, v)
        gradients = backward(block, grad, q, k, v, whole_out, whole_sum, state)
        queries, keys = (rows.stop - rows.start for rows in (block.queries, block.keys))
        assert out.shape == gradients[0].shape == (queries, 8, 64)
        assert [x.shape for x in gradients[1:]] == [(keys, 2, 64)] * 2
        assert {x.dtype for x in (out, *gradients)} == {dtype}
        assert log_sum.shape == (8, queries) and log_sum.dtype == torch.float32


@pytest.mark.parametrize(
    "capability, head_dim, queries, kernel",
    [
        ((9, 0), 128, 128, "cudnn"),
        ((10, 0), 64, 4096, "cudnn"),
        ((8, 0), 64, 4096, "flash"),
        ((9, 0), 256, 4096, "flash"),
        ((9, 0), 64, 127, "flash"),
    ],
)
def test_cudnn_s_kernel_is_for_what_is_large_on_hopper(
    capability, head_dim, queries, kernel, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    block = make_block(slice(queries), slice(600), [queries], [600], False, True, "meta")
    q = torch.empty(4096, 8, head_dim, dtype=torch.bfloat16, device="meta")
    assert fused_attention._kernel(block, q) == kernel
