"""`native` context parallelism against dense attention."""

import pytest
import torch
from conftest import ROOT, gpus, torchrun

import native_attention
from native_attention import magi_attn_varlen_key

WORKER = ROOT / "tests/context_parallel_worker.py"


@pytest.mark.parametrize("processes, cp_sizes", [(1, [1]), (3, [3]), (4, [2, 4])])
def test_attention_and_its_gradients_equal_dense_attention(processes, cp_sizes):
    """Also: dispatch then undispatch is the identity, and padding comes out as zero."""
    torchrun(processes, WORKER, "native", "cpu", "float64", *cp_sizes)


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
        monkeypatch.setattr(native_attention, "MAX_BLOCK_SIZE", max_block_size)
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 16, 0, cp_group, causal=True)
        out, _ = native_attention.calc_attn(*inputs, key)
        return key.local_blocks, [out, *torch.autograd.grad(out.square().sum(), inputs)]

    (whole,), expected = attend(65_536)
    blocks, found = attend(400)
    assert [block.lengths_q for block in blocks] == [[128, 128], [480], [16, 272]]
    assert [block.recurs for block in blocks] == [True, False, False] and not whole.recurs
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_what_is_large_gets_sizes_that_recur(cp_group):
    """For cuDNN's kernel: pieces of documents are padded, what they see of other ranks' keys is cut
    into powers of two.
    """

    def local_blocks(lengths, causal=True):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 16, 0, cp_group, causal=causal)
        blocks = key.local_blocks
        return [(block.lengths_q, block.recurs, block.padding) for block in blocks]

    lengths = [5000, 300, 40, 4096, 4096, 9000]
    short, whole = ([300, 40], False, 0), ([4096, 4096], True, 0)
    assert local_blocks(lengths) == [([5000], True, 120), short, whole, ([9000], True, 216)]
    # Without a causal mask queries would see the keys that are padded with them.
    assert local_blocks([5000, 300], causal=False) == [([5000], False, 0), ([300], False, 0)]

    def stream_blocks(*piece):  # queries, keys, whether the size recurs, padding
        blocks = native_attention._stream_blocks([list(piece)], True, 2048, "cpu")
        slices = [(b.queries.start, b.queries.stop, b.keys.start, b.keys.stop) for b in blocks]
        return [(*x, b.recurs, b.padding) for x, b in zip(slices, blocks, strict=True)]

    # Whole chunks of a document that is made of whole chunks.
    assert stream_blocks(6144, 12_288, 0, 16_384) == [(0, 6144, 0, 6144, True, 0)]
    # 10,100 + 140 queries, 13,192 keys: those are 8192 and 2048, these the rest, 8192 and 4096.
    assert stream_blocks(13_292, 23_392, 100, 30_000) == [
        (0, 10_100, 100, 1004, False, 0),
        (0, 8192, 1004, 9196, True, 0),
        (8192, 10_100, 1004, 9196, True, 140),
        (0, 8192, 9196, 13_292, True, 0),
        (8192, 10_100, 9196, 13_292, True, 140),
    ]
    # Too few queries, too few keys.
    assert stream_blocks(8192, 9000, 100, 9000) == [(0, 808, 100, 8192, False, 0)]
    assert stream_blocks(8192, 10_240, 5000, 11_000) == [(0, 2048, 5000, 8192, False, 0)]


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
