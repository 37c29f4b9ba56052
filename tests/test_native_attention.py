"""`native` context parallelism against dense attention."""

import pytest
import torch
from conftest import ROOT, gpus, torchrun

import blocks
import native_attention
from native_attention import magi_attn_varlen_key

WORKER = ROOT / "tests/context_parallel_worker.py"


@pytest.mark.parametrize("processes, cp_sizes", [(1, [1]), (3, [3]), (4, [2, 4])])
def test_attention_and_its_gradients_equal_dense_attention(processes, cp_sizes):
    """Also: dispatch then undispatch is the identity, and padding comes out as zero."""
    torchrun(processes, WORKER, "native", "cpu", "float64", *cp_sizes)


def test_parts_of_the_attention_are_added_before_they_are_rounded():
    """In bfloat16: errors are at most 1.4 times those of a kernel that takes a document whole."""
    torchrun(2, WORKER, "native", "cpu", "bfloat16", 2)


def test_blocks_are_limited_in_size_and_change_nothing(monkeypatch, cp_group):
    """Of whole documents, one at least, short ones counted as 128 tokens. Only sizes that come
    again are said to recur.
    """
    lengths = [128, 128, 480, 16, 272]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    torch.manual_seed(0)
    inputs = [
        torch.randn(1024, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]

    def attend(max_block_size):
        monkeypatch.setattr(blocks, "MAX_BLOCK_SIZE", max_block_size)
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 16, 0, cp_group, causal=True)
        out, _ = native_attention.calc_attn(*inputs, key)
        return key.local_blocks, [out, *torch.autograd.grad(out.square().sum(), inputs)]

    (whole,), expected = attend(65_536)
    small, found = attend(400)
    assert [block.lengths_q for block in small] == [[128, 128], [480], [16, 272]]
    assert [block.recurs for block in small] == [True, False, False] and not whole.recurs
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_what_native_cannot_do_is_refused(cp_group):
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="window_size"):
        magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, window_size=(128, 0))
    with pytest.raises(ValueError, match="cu_seqlens_q must equal cu_seqlens_k"):
        magi_attn_varlen_key(cu_seqlens, cu_seqlens + 1, 4, 2, 64, 0, cp_group)


@pytest.mark.gpu
@pytest.mark.parametrize("processes, dtype", [(1, "bfloat16"), (2, "bfloat16"), (2, "float32")])
def test_native_on_a_gpu_is_as_exact_as_pytorch_s_kernels(processes, dtype):
    """bfloat16: out, dq, dk, dv within twice the errors of cuDNN or flash against float64, with
    blocks for cuDNN's kernel and for flash. float32: within 5e-5.
    """
    arguments = (WORKER, "native", "cuda", dtype, processes)
    print(torchrun(processes, *arguments, CUDA_VISIBLE_DEVICES=gpus(processes)).stdout)
