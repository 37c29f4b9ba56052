"""Chunks of a packed sequence: their size for either backend, and `native`'s partition.

Each rank gets equally many chunks and about equally many (query, key) pairs. Each cut costs time,
so chunks are as large as balance allows.
"""

import heapq

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_IMBALANCE = 1.03  # largest over mean area of the ranks; such a balance ends the search
MIN_CHUNK_SIZE = 16  # tokens; chunks of this size, or less, end it too


def balanced_chunk_size(cu_seqlens: Tensor, causal: bool, cp_size: int) -> int:
    """Returns the largest chunk size, in tokens, that balances the ranks to MAX_IMBALANCE, or else
    the one that balances them best. It tries 1, 2, 4, ... chunks per rank. One causal document
    needs two (first and last). cu_seqlens: [documents + 1], on the CPU.
    """
    total_seqlen = int(cu_seqlens[-1])
    best = (float("inf"), 0)  # imbalance, and minus the chunk size: of equals the larger
    chunks_per_rank = 1
    while True:
        chunk_size = -(-total_seqlen // (chunks_per_rank * cp_size))
        areas = chunk_areas(cu_seqlens, chunk_size, causal, cp_size)
        loads = [sum(areas[c] for c in chunks) for chunks in balanced_partitions(areas, cp_size)]
        imbalance = max(loads) * cp_size / sum(loads)
        best = min(best, (imbalance, -chunk_size))
        if imbalance <= MAX_IMBALANCE or chunk_size <= MIN_CHUNK_SIZE:
            return -best[1]
        chunks_per_rank *= 2


def chunk_areas(cu_seqlens: Tensor, chunk_size: int, causal: bool, cp_size: int) -> list[int]:
    """Returns how many (query, key) pairs of the mask each chunk has, padding chunks none."""
    total_seqlen = int(cu_seqlens[-1])
    num_chunks = -(-total_seqlen // (chunk_size * cp_size)) * cp_size
    lengths = cu_seqlens.long().diff()
    areas = lengths * (lengths + 1) // 2 if causal else lengths * lengths
    before = F.pad(areas.cumsum(0), (1, 0))  # the area of all documents before each
    bounds = (torch.arange(num_chunks + 1) * chunk_size).clamp(max=total_seqlen)
    document = torch.searchsorted(cu_seqlens[1:-1].long(), bounds, right=True)
    into = bounds - cu_seqlens[document]
    part = into * (into + 1) // 2 if causal else into * lengths[document]
    return (before[document] + part).diff().tolist()


def balanced_partitions(areas: list[int], cp_size: int) -> list[list[int]]:
    """Returns each rank's chunks, equally many, with about equal sums of areas.

    The largest chunk left goes to the rank with the least area that has room (longest processing
    time first). `len(areas)` is a multiple of cp_size.
    """
    room = len(areas) // cp_size
    partitions: list[list[int]] = [[] for _ in range(cp_size)]
    heap = [(0, rank) for rank in range(cp_size)]
    for chunk in sorted(range(len(areas)), key=areas.__getitem__, reverse=True):
        area, rank = heapq.heappop(heap)
        partitions[rank].append(chunk)
        if len(partitions[rank]) < room:
            heapq.heappush(heap, (area + areas[chunk], rank))
    return [sorted(chunks) for chunks in partitions]
