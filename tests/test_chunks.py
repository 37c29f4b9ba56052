"""The balance of the ranks."""

import pytest
import torch

import native_attention
from chunks import balanced_chunk_size, balanced_partitions, own_documents
from native_attention import DispatchConfig, DistAttnConfig, magi_attn_varlen_key


def imbalance(partitions: list[list[int]], chunk_size: int, lengths: list[int]) -> float:
    """Largest over mean area of the ranks, counted pair by pair from the documents."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])  # keys of each query
    areas = []
    for chunks in partitions:
        areas.append(sum(seen[c * chunk_size : (c + 1) * chunk_size].sum().item() for c in chunks))
    return max(areas) / (sum(areas) / len(areas))


@pytest.mark.parametrize("seed", range(5))
def test_load_of_64_random_documents_is_balanced_at_cp_8(seed, monkeypatch, cp_group):
    lengths = torch.randint(1, 4096, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
    partitions, chunk_size = plan(lengths, 8, monkeypatch, cp_group)
    assert imbalance(partitions, chunk_size, lengths) <= 1.03
    assert sorted(sum(partitions, [])) == list(range(len(partitions[0]) * 8))
    assert len({len(chunks) for chunks in partitions}) == 1  # equally many tokens each


def test_load_of_one_causal_document_is_balanced_at_cp_8(monkeypatch, cp_group):
    partitions, chunk_size = plan([65_536], 8, monkeypatch, cp_group)
    assert imbalance(partitions, chunk_size, [65_536]) <= 1.001
    assert chunk_size == 4096  # two per rank: the first with the last, the second with ...
    halves = [[2 * rank, 2 * rank + 1] for rank in range(8)]  # what contiguous gives
    assert imbalance(halves, chunk_size, [65_536]) > 1.8


def test_of_chunk_sizes_that_balance_alike_the_largest_is_taken():
    """9, 18 and 36 tokens per chunk leave cp 7 equally far from balance under a full mask."""
    cu_seqlens = torch.tensor([0, 252], dtype=torch.int32)
    assert balanced_chunk_size(cu_seqlens, False, 7) == 36


def test_documents_that_balance_as_they_are_stay_whole_and_need_no_other_rank(
    monkeypatch, cp_group
):
    key = key_of([128] * 16, 4, monkeypatch, cp_group)
    assert key.chunk_size == 512 and sorted(key.partitions) == [[0], [1], [2], [3]]
    assert not key.gathers and key.stream_blocks == []


@pytest.mark.parametrize(
    "lengths, chunk_size, cp_size, expected",
    [
        ([5], 5, 1, [[0, 5]]),
        ([2, 3, 5], 5, 2, [[0, 2, 5], [0, 5]]),
        ([5, 2, 3], 5, 2, [[0, 5], [0, 2, 5]]),
        ([4, 6], 5, 2, None),  # a document is cut
        ([10], 5, 2, None),
        ([2, 3, 4], 5, 2, None),  # the last rank has padding
        ([2] * 8, 4, 2, None),  # two chunks per rank
    ],
)
def test_ranks_have_documents_of_their_own_if_no_chunk_cuts_one(
    lengths, chunk_size, cp_size, expected
):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    for rank in range(cp_size):
        found = own_documents(cu_seqlens, chunk_size, cp_size, rank)
        if expected is None:
            assert found is None
            continue
        part, own = found
        assert part == slice(rank * chunk_size, (rank + 1) * chunk_size)
        assert own.tolist() == expected[rank] and own.dtype == torch.int32


def test_ranks_have_equally_much_of_one_document_to_do_with_their_own_keys(monkeypatch, cp_group):
    """And so with the others': no rank waits for those, though one has neighbouring chunks."""
    areas = set()
    for rank in range(4):
        monkeypatch.setattr(native_attention.dist, "get_rank", lambda group=None, rank=rank: rank)
        key = key_of([4096], 4, monkeypatch, cp_group)
        own = sum(n * (n + 1) // 2 for block in key.local_blocks for n in block.lengths_q)
        areas.add((own, sum(b.lengths_q[0] * b.lengths_k[0] for b in key.stream_blocks)))
    assert areas == {(512 * 513, 7 * 512 * 512)}  # two chunks of 512 each, and 7 before them


def test_a_document_that_begins_on_a_rank_goes_on_over_its_neighbouring_chunks(cp_group):
    cu_seqlens = torch.tensor([0, 7, 47, 64], dtype=torch.int32)
    config = DistAttnConfig(DispatchConfig(16))
    key = magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True, dist_attn_config=config
    )
    assert key.partitions == [[0, 1, 2, 3]]
    assert [block.lengths_q for block in key.local_blocks] == [[7, 40, 17]]
    assert not key.gathers and key.stream_blocks == []


def plan(lengths, cp_size, monkeypatch, cp_group) -> tuple[list[list[int]], int]:
    """Returns the partitions and chunk size of a key."""
    key = key_of(lengths, cp_size, monkeypatch, cp_group)
    return key.partitions, key.chunk_size


def key_of(lengths, cp_size, monkeypatch, cp_group):
    """Returns a key as main.py makes it, on a group that says it has cp_size ranks."""
    monkeypatch.setattr(native_attention.dist, "get_world_size", lambda group=None: cp_size)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    config = DistAttnConfig(DispatchConfig(balanced_chunk_size(cu_seqlens, True, cp_size)))
    return magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True, dist_attn_config=config
    )


def test_a_rank_that_has_its_share_of_chunks_gets_no_more():
    assert balanced_partitions([1, 2, 3, 4], 2) == [[0, 3], [1, 2]]
    assert balanced_partitions([9, 0, 0, 0], 2) == [[0, 3], [1, 2]]
