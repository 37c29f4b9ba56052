"""`native` context parallelism against dense attention."""

import pytest
import torch
from conftest import ROOT, gpus, torchrun
from ranks import run_ranks

from context_parallel.native import magi_attn_varlen_key

WORKER = ROOT / "tests/context_parallel_worker.py"
SDPA = "scaled_dot_product_attention"


@pytest.mark.parametrize("processes, cp_sizes", [(1, [1]), (3, [3]), (4, [4])])
def test_attention_and_its_gradients_equal_dense_attention(processes, cp_sizes):
    """Also: dispatch deals out each token once, and gathered keys are not kept for backward."""
    run_ranks(processes, WORKER, "native", "cpu", "float64", SDPA, *cp_sizes)


def test_gradients_of_shared_keys_are_added_before_they_are_rounded():
    """In bfloat16: errors are at most 1.4 times those of a kernel that takes a document whole."""
    run_ranks(2, WORKER, "native", "cpu", "bfloat16", SDPA, 2)


def test_what_native_cannot_do_is_refused(cp_group):
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="pad_size=0"):
        magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 3, cp_group)
    with pytest.raises(ValueError, match="cu_seqlens_q equal to cu_seqlens_k"):
        magi_attn_varlen_key(cu_seqlens, cu_seqlens + 1, 4, 2, 64, 0, cp_group)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "dtype, kernel",
    [("bfloat16", "FlashAttention-4"), ("bfloat16", "FlashAttention-2"), ("float32", SDPA)],
)
def test_native_on_a_gpu_is_as_exact_as_pytorch_s_kernels(processes, dtype, kernel):
    """bfloat16: out, dq, dk, dv within twice the errors of cuDNN or flash against float64. float32:
    within 5e-5. head_dim 64 and 128.
    """
    arguments = (WORKER, "native", "cuda", dtype, kernel, processes)
    print(torchrun(processes, *arguments, CUDA_VISIBLE_DEVICES=gpus(processes)).stdout)
