"""Blocks: the kernel calls in which a rank of `native` computes its share of a packed sequence.

A rank's chunks are pieces of documents. Each sees its own keys, in a local block, and where its
document is cut, the parts of it that are in other chunks, in stream blocks. Of one causal document
in four chunks, the rank that has the first and the last of them:

                 keys of chunk   0       1       2       3
    queries of chunk 0         local
    queries of chunk 3         stream  stream  stream  local
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention import FLASH_TILE, Block, make_block

MAX_BLOCK_SIZE = 65_536  # tokens of several documents that one kernel call takes at the most
# What is large gets one of few sizes, which recur, so that cuDNN's kernel, the fastest, takes it.
# (Where it is not the fastest, before Hopper, this gains nothing, and costs a little.)
MIN_PIECE = 4096  # tokens from which on a causal piece is padded, by an eighth at the most
MIN_QUERIES, MIN_KEYS = 1024, 4096  # the least of the powers of two into which a rectangle is cut


def plan_blocks(
    cu_seqlens: Tensor,
    chunk_size: int,
    partitions: list[list[int]],
    rank: int,
    causal: bool,
    device: str,
) -> tuple[list[Block], list[Block], bool]:
    """Returns the blocks of this rank's pieces with their own keys, those with other parts of their
    documents, slices of the stream, and whether any rank has such, so that K and V are gathered.

    cu_seqlens: [documents + 1], int32, on the CPU. partitions: for each rank its chunks, ascending.
    device: where the attention will be computed.
    """
    pieces = [_pieces(cu_seqlens, chunk_size, chunks) for chunks in partitions]
    gathers = any(_other_keys(piece, causal) for of_rank in pieces for piece in of_rank)
    own = pieces[rank], causal, chunk_size, device
    return _local_blocks(*own), _stream_blocks(*own), gathers


def _pieces(cu_seqlens: Tensor, chunk_size: int, chunks: list[int]) -> list[list[int]]:
    """Returns what a rank has of each document in one piece, in the order in which it holds them.

    Each is [where it begins and ends in the stream, where its document does]. Neighbouring chunks
    join, but not in a document that begins before the first of them, and so on another rank: of one
    causal document all ranks then have as much to do while the keys are gathered, of several about
    as much. Padding is no piece; it stands behind all of them.
    """
    cu_seqlens = cu_seqlens.long()
    begin = torch.tensor(chunks) * chunk_size
    end = (begin + chunk_size).clamp(max=int(cu_seqlens[-1]))
    follows = F.pad(begin[1:] == end[:-1], (1, 0))
    first_neighbour = begin.where(~follows, 0).cummax(0).values
    document_begin = cu_seqlens[torch.searchsorted(cu_seqlens, begin, right=True) - 1]
    joins = follows & (document_begin >= first_neighbour)
    begin, end = begin[~joins], end[~F.pad(joins[1:], (0, 1))]
    begin, end = begin[begin < end], end[begin < end]
    if len(begin) == 0:
        return []
    bounds = torch.cat([begin, end, cu_seqlens]).unique()
    first, last = bounds[:-1], bounds[1:]
    run = torch.searchsorted(begin, first, right=True) - 1  # of chunks, that begins before
    is_held = (run >= 0) & (first < end[run])
    first, last = first[is_held], last[is_held]
    document = torch.searchsorted(cu_seqlens[1:], first, right=True)
    ends = cu_seqlens[document], cu_seqlens[document + 1]
    return torch.stack([first, last, *ends], dim=1).tolist()


def _other_keys(piece: list[int], causal: bool) -> list[slice]:
    """Returns what a piece sees of its document beside itself, slices of the stream: what is before
    it, and without a causal mask also what is behind it.
    """
    first, last, document_first, document_last = piece
    slices = [slice(document_first, first)]
    slices += [] if causal else [slice(last, document_last)]
    return [keys for keys in slices if keys.start < keys.stop]


def _local_blocks(
    pieces: list[list[int]], causal: bool, chunk_size: int, device: str
) -> list[Block]:
    """Returns the pieces of documents that a rank has, each with its own keys.

    As many in a block as MAX_BLOCK_SIZE allows, but at least one: beside its results a kernel's
    backward holds float32 sums and other copies, together about four times as large as q; short
    pieces count as FLASH_TILE tokens, which they cost there. A piece of MIN_PIECE tokens or more
    shares a block only with others of its length; alone and causal, it is padded.
    """
    groups, room = [], 0
    for begin, end, _, _ in pieces:
        length = end - begin
        last = groups[-1][-1] if groups else 0
        if length > room or (length != last and max(length, last) >= MIN_PIECE):
            groups.append([])
            room = MAX_BLOCK_SIZE
        groups[-1].append(length)
        room -= max(length, FLASH_TILE)
    blocks, row = [], 0
    for lengths in groups:
        rows = slice(row, row + sum(lengths))
        # One length of several documents is no accident; one document's alone can be any.
        recurs = len(set(lengths)) == 1 and (len(lengths) > 1 or lengths[0] % chunk_size == 0)
        if causal and not recurs and lengths[0] >= MIN_PIECE:
            (length,) = lengths
            step = 2 ** (length.bit_length() - 4)  # an eighth of the power of two below it
            lengths, recurs = [-(-length // step) * step], True
        blocks.append(make_block(rows, rows, lengths, lengths, causal, recurs, device))
        row = rows.stop
    return blocks


def _stream_blocks(
    pieces: list[list[int]], causal: bool, chunk_size: int, device: str
) -> list[Block]:
    """Returns the pieces whose documents are cut, each with the other parts that it sees.

    Of a document that is made of whole chunks, all of one part in a block. Of others the queries,
    padded, and the keys are cut into powers of two; keys that are too few for that make a block of
    their own, and so do all if the queries are.
    """
    blocks, row = [], 0
    for piece in pieces:
        length = piece[1] - piece[0]
        is_whole = all(bound % chunk_size == 0 for bound in piece)
        for keys in _other_keys(piece, causal):
            cut = keys.stop  # where the keys begin that are cut into powers of two
            if length >= MIN_QUERIES and not is_whole:
                cut -= (keys.stop - keys.start) // MIN_KEYS * MIN_KEYS
            parts = [(slice(0, length), slice(keys.start, cut))] if keys.start < cut else []
            padded_length = -(-length // MIN_QUERIES) * MIN_QUERIES
            powers = _powers_of_two(0, padded_length), _powers_of_two(cut, keys.stop)
            for queries, part in [*parts, *itertools.product(*powers)]:
                recurs = is_whole or part.start >= cut
                rows = slice(row + queries.start, row + min(queries.stop, length))
                sizes = [queries.stop - queries.start], [part.stop - part.start]
                blocks.append(make_block(rows, part, *sizes, False, recurs, device))
        row += length
    return blocks


def _powers_of_two(begin: int, end: int) -> Iterator[slice]:
    """Yields slices from begin to end whose sizes are powers of two, the largest first."""
    while begin < end:
        size = 2 ** ((end - begin).bit_length() - 1)
        yield slice(begin, begin + size)
        begin += size
