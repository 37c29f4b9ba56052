"""The kernel calls that `native` plans: which pieces and keys, in which sizes.

That they compute the attention is shown in test_native_attention.py.
"""

import torch
import torch.nn.functional as F

from blocks import _stream_blocks, plan_blocks
from chunks import balanced_chunk_size, balanced_partitions, chunk_areas


def test_what_is_large_gets_sizes_that_recur():
    """For cuDNN's kernel: pieces of documents are padded, what they see of other ranks' keys is cut
    into powers of two.
    """

    def local_blocks(lengths, causal=True):  # lengths, and whether they recur
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        all_chunks = list(range(-(-sum(lengths) // 512)))
        blocks, _, _ = plan_blocks(cu_seqlens, 512, [all_chunks], 0, causal, "cpu")
        assert all(block.lengths_q == block.lengths_k for block in blocks)
        rows = [row for b in blocks for row in (b.queries.start, b.queries.stop)]
        assert rows[0] == 0 and rows[1:-1:2] == rows[2::2] and rows[-1] == sum(lengths)
        return [(block.lengths_q, block.recurs) for block in blocks]

    lengths = [5000, 300, 40, 4096, 4096, 9000]
    short, whole = ([300, 40], False), ([4096, 4096], True)
    assert local_blocks(lengths) == [([5120], True), short, whole, ([9216], True)]
    # Without a causal mask queries would see the keys that are padded with them.
    assert local_blocks([5000, 300], causal=False) == [([5000], False), ([300], False)]

    def stream_blocks(*pieces):  # queries, keys, the length of these queries, whether it recurs
        blocks = _stream_blocks(list(pieces), True, 2048, "cpu")
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
        partitions = balanced_partitions(chunk_areas(cu_seqlens, chunk_size, True, 2), 2)
        local, stream, _ = plan_blocks(cu_seqlens, chunk_size, partitions, 0, True, "cpu")
        for block in local + stream:
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
