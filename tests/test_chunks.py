"""The balance of the ranks."""

import pytest
import torch

from context_parallel.chunks import balanced_chunk_size, balanced_partitions, chunk_areas


def imbalance(partitions: list[list[int]], chunk_size: int, lengths: list[int]) -> float:
    """Largest over mean area of the ranks, counted pair by pair from the documents."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])  # keys of each query
    areas = []
    for chunks in partitions:
        areas.append(sum(seen[c * chunk_size : (c + 1) * chunk_size].sum().item() for c in chunks))
    return max(areas) / (sum(areas) / len(areas))


@pytest.mark.parametrize("seed", range(5))
def test_load_of_64_random_documents_is_balanced_at_cp_8(seed):
    lengths = torch.randint(1, 4096, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
    partitions, chunk_size = plan(lengths, 8)
    assert imbalance(partitions, chunk_size, lengths) <= 1.03
    assert sorted(sum(partitions, [])) == list(range(len(partitions[0]) * 8))
    assert len({len(chunks) for chunks in partitions}) == 1  # equally many tokens each


def test_load_of_one_causal_document_is_balanced_at_cp_8():
    partitions, chunk_size = plan([65_536], 8)
    assert imbalance(partitions, chunk_size, [65_536]) <= 1.001
    assert chunk_size == 4096  # two per rank: the first with the last, the second with ...
    halves = [[2 * rank, 2 * rank + 1] for rank in range(8)]  # what contiguous gives
    assert imbalance(halves, chunk_size, [65_536]) > 1.8


def test_of_chunk_sizes_that_balance_alike_the_largest_is_taken():
    """9, 18 and 36 tokens per chunk leave cp 7 equally far from balance under a full mask."""
    cu_seqlens = torch.tensor([0, 252], dtype=torch.int32)
    assert balanced_chunk_size(cu_seqlens, False, 7) == 36


def test_documents_that_balance_as_they_are_stay_whole():
    assert sorted(plan([128] * 16, 4)[0]) == [[0], [1], [2], [3]]


def plan(lengths: list[int], cp_size: int) -> tuple[list[list[int]], int]:
    """Returns each rank's chunks, and the chunk size, of causal documents."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    chunk_size = balanced_chunk_size(cu_seqlens, True, cp_size)
    areas = chunk_areas(cu_seqlens, chunk_size, True, cp_size)
    return balanced_partitions(areas, cp_size), chunk_size


@pytest.mark.parametrize("seed", range(20))
def test_each_chunk_goes_to_the_rank_with_the_least_work_that_has_room(seed):
    """Of equal chunks and of equal ranks the first; compared with a search of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    cp_size, room = 1 + seed % 7, 1 + seed % 5
    areas = torch.randint(0, 9, (cp_size * room,), generator=generator).tolist()
    ranks, loads = [[] for _ in range(cp_size)], [0] * cp_size
    for area, chunk in sorted((-area, chunk) for chunk, area in enumerate(areas)):
        free = [rank for rank in range(cp_size) if len(ranks[rank]) < room]
        rank = min(free, key=lambda rank: (loads[rank], rank))
        ranks[rank].append(chunk)
        loads[rank] -= area
    assert balanced_partitions(areas, cp_size) == [sorted(chunks) for chunks in ranks]
