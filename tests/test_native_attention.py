"""`native` context parallelism against dense attention."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, gpus, torchrun

import native_attention
from chunks import balanced_chunk_size, balanced_partitions, chunk_areas
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

    def local_blocks(lengths, causal=True):  # lengths, and whether they recur
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 16, 0, cp_group, causal=causal)
        assert all(block.lengths_q == block.lengths_k for block in key.local_blocks)
        rows = [row for b in key.local_blocks for row in (b.queries.start, b.queries.stop)]
        assert rows[0] == 0 and rows[1:-1:2] == rows[2::2] and rows[-1] == sum(lengths)
        return [(block.lengths_q, block.recurs) for block in key.local_blocks]

    lengths = [5000, 300, 40, 4096, 4096, 9000]
    short, whole = ([300, 40], False), ([4096, 4096], True)
    assert local_blocks(lengths) == [([5120], True), short, whole, ([9216], True)]
    # Without a causal mask queries would see the keys that are padded with them.
    assert local_blocks([5000, 300], causal=False) == [([5000], False), ([300], False)]

    def stream_blocks(*pieces):  # queries, keys, the length of these queries, whether it recurs
        blocks = native_attention._stream_blocks(list(pieces), True, 2048, "cpu")
        slices = [(b.queries.start, b.queries.stop, b.keys.start, b.keys.stop) for b in blocks]
        assert all(b.lengths_k == [x[3] - x[2]] for x, b in zip(slices, blocks, strict=True))
        return [(*x, *b.lengths_q, b.recurs) for x, b in zip(slices, blocks, strict=True)]

    # Whole chunks of a document that is made of whole chunks; of another, 6,144 keys are cut.
    assert stream_blocks((6144, 12_288, 0, 16_384)) == [(0, 6144, 0, 6144, 6144, True)]
    assert stream_blocks((6144, 8192, 0, 10_000)) == [
        (0, 2048, 0, 2048, 2048, False),
        (0, 2048, 2048, 6144, 2048, True),
    ]
    # Too few queries, too few keys; then 10,100 + 140 queries, which are 8192 and 2048, and 13,192
    # keys, which are some, 8192 and 4096.
    assert stream_blocks(
        (8192, 9000, 100, 9000), (8192, 10_240, 5000, 11_000), (13_292, 23_392, 100, 30_000)
    ) == [
        (0, 808, 100, 8192, 808, False),
        (808, 2856, 5000, 8192, 2048, False),
        (2856, 12_956, 100, 1004, 10_100, False),
        (2856, 11_048, 1004, 9196, 8192, True),
        (2856, 11_048, 9196, 13_292, 8192, True),
        (11_048, 12_956, 1004, 9196, 2048, True),
        (11_048, 12_956, 9196, 13_292, 2048, True),
    ]


def test_the_sizes_that_recur_are_few():
    """Of rows that are packed with documents of any length, one rank of two."""
    torch.manual_seed(0)
    sizes, area, total_area = set(), 0, 0
    for _ in range(100):
        lengths = torch.empty(100).log_normal_(8, 1.5).long().clamp(min=1).cumsum(0)
        cu_seqlens = F.pad(lengths.clamp(max=65_536).unique(), (1, 0)).int()
        chunk_size = balanced_chunk_size(cu_seqlens, True, 2)
        chunks, _ = balanced_partitions(chunk_areas(cu_seqlens, chunk_size, True, 2), 2)
        pieces = native_attention._pieces(cu_seqlens, chunk_size, chunks)
        for plan in (native_attention._local_blocks, native_attention._stream_blocks):
            for block in plan(pieces, True, chunk_size, "cpu"):
                pairs = zip(block.lengths_q, block.lengths_k, strict=True)
                block_area = sum(n * m for n, m in pairs) / (2 if block.causal else 1)
                total_area += block_area
                area += block_area * block.recurs
                if block.recurs:
                    sizes.add((*block.lengths_q, *block.lengths_k, block.causal))
    squares, rectangles = (
        [size for size in sizes if size[-1] == causal and len(size) == 3]
        for causal in (True, False)
    )
    assert len(squares) <= 8 * 4 + 1 and len(rectangles) <= 7 * 5
    assert len(sizes) - len(squares) - len(rectangles) < 20  # several pieces of one length
    assert area / total_area > 0.85


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
