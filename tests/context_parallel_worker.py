"""Run on several ranks: a backend's attention and dispatch against dense attention in float64.

Arguments: the backend, the device type, the dtype that the backend computes in, how the name of
`native`'s kernel begins, and the cp sizes. In float64 and float32 the backend has to be exact. In
bfloat16 its errors may be twice those that PyTorch's own kernels (cuDNN or flash) make on the same
documents, on a CPU, where every run is the same, 1.4 times; rank 0 prints both.
"""

import contextlib
import functools
import itertools
import os
import sys
from unittest import mock

import reference
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from context_parallel import calc_attn, kernels, load_api, native
from support import process

NH, NKV = 4, 2
NAMES = ("out", "dq", "dk", "dv")


def pytorch_attention(q, k, v, causal):
    """The same as `reference.attention`, by PyTorch's kernels for bfloat16 on a GPU."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out[0].transpose(0, 1)


def by_document(attention, tensors, lengths, causal):
    """Returns out, dq, dk, dv of `attention` on one document after the other."""
    q, k, v, grad = (x.detach().requires_grad_() for x in tensors)
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    out = torch.cat([attention(*document, causal) for document in documents])
    out.backward(grad)
    return out.detach(), q.grad, k.grad, v.grad


def errors(found, expected) -> dict[str, float]:
    """Relative in the 2-norm; dq and dk of documents of one token are zero, so absolute there."""
    return {
        name: ((x.double() - y).norm() / y.norm().clamp(min=1)).item()
        for name, x, y in zip(NAMES, found, expected, strict=True)
    }


def check(backend, mesh, dtype, head_dim, lengths: list[int], causal, chunk_size: int) -> None:
    api, group = load_api(backend), mesh.get_group("cp")
    torch.manual_seed(len(lengths))  # the same on all ranks
    total = sum(lengths)
    q, k, v, grad = (
        torch.randn(total, heads, head_dim).to(mesh.device_type, dtype)
        for heads in (NH, NKV, NKV, NH)
    )
    in_float64 = [x.double() for x in (q, k, v, grad)]
    expected = by_document(reference.attention, in_float64, lengths, causal)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    key = api.magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        num_heads_q=NH,
        num_heads_kv=NKV,
        head_dim=head_dim,
        pad_size=0,
        cp_group_or_mesh=group,
        causal=causal,
        dist_attn_config=api.DistAttnConfig(
            dispatch_config=api.DispatchConfig(chunk_size=chunk_size)
        ),
    )
    local_q, local_k, local_v = (api.dispatch(x, key).detach().requires_grad_() for x in (q, k, v))
    with gathered_keys() as gathered:
        out = calc_attn(local_q, local_k, local_v, key)
        assert all(keys.expired() for keys in gathered), "backward gathers them again"
        out.backward(api.dispatch(grad, key))
    if backend == "native":
        assert len(gathered) == (4 if key.gathers else 0)  # K and V, forward and backward
    local = (out.detach(), local_q.grad, local_k.grad, local_v.grad)
    found = errors([whole(api, x, key) for x in local], expected)
    limit = dict.fromkeys(NAMES, 1e-12 if dtype == torch.float64 else 5e-5)
    if dtype == torch.bfloat16:
        pytorch = errors(by_document(pytorch_attention, (q, k, v, grad), lengths, causal), expected)
        factor = 1.4 if mesh.device_type == "cpu" else 2
        # Of a handful of tokens one rounding decides, so there the figure is bfloat16's own.
        least = 2**-8 if total < 100 else 0
        limit = {name: max(factor * error, least) for name, error in pytorch.items()}
        if dist.get_rank() == 0:
            mask = "causal" if causal else "full"
            figures = "  ".join(f"{n} {found[n]:.1e} ({pytorch[n]:.1e})" for n in NAMES)
            print(
                f"{backend} cp {dist.get_world_size(group)} {mask} {head_dim} {lengths}: {figures}"
            )
    assert all(found[name] <= limit[name] for name in NAMES), (found, limit, lengths, causal)

    # Dispatch pads at the end of the stream, and deals out each token once.
    stream = torch.arange(total, device=mesh.device_type)
    local = api.dispatch(stream, key, pad_value=-100)
    padding = (local == -100).sum()
    dist.all_reduce(padding, group=group)
    assert padding == key.pad_size
    assert torch.equal(whole(api, local, key), stream)
    assert out.isfinite().all()


def whole(api, x: torch.Tensor, key) -> torch.Tensor:
    """Returns the sequence, without padding, of which x is this rank's shard."""
    if hasattr(api, "undispatch"):
        return api.undispatch(x, key)
    shards = [torch.empty_like(x) for _ in range(key.cp_group.size())]
    dist.all_gather(shards, x.contiguous(), group=key.cp_group)
    return torch.cat(shards)[key.order.argsort()][: len(key.order) - key.pad_size]


@contextlib.contextmanager
def gathered_keys():
    """Yields a list of references to the K and V that `native` gathers meanwhile."""
    found, gather = [], native._gather_keys

    def noted(*args):
        q, k, v = gather(*args)
        found.extend(StorageWeakRef(x.untyped_storage()) for x in (k, v))
        return q, k, v

    with mock.patch.object(native, "_gather_keys", noted):
        yield found


def main() -> None:
    backend, device_type, dtype, kernel, *cp_sizes = sys.argv[1:]
    dtype = getattr(torch, dtype)
    head_dims = (64, 128) if device_type == "cuda" else (64,)  # one kernel on a CPU
    kernels.MANY_TOKENS = 10_000  # so that the largest case below is computed head by head
    if kernel != "FlashAttention-4":
        kernels.flash_attention_4_obstacle = lambda head_dim: "another kernel is tested"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    for cp_size in map(int, cp_sizes):
        shape = (dist.get_world_size() // cp_size, cp_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))
        for causal, head_dim in itertools.product((True, False), head_dims):
            name, _ = kernels.select_kernel(device_type, dtype, head_dim)
            assert name.startswith(kernel), name
            case = functools.partial(check, backend, mesh, dtype, head_dim, causal=causal)
            case([1, 30, 2, 1, 95, 17], chunk_size=8)
            case([1] * 7, chunk_size=512)  # one token per document
            case([131], chunk_size=512)
            case([700, 1, 900, 447], chunk_size=128)
            case([3], chunk_size=512)  # too short for chunks
            case([64, 64], chunk_size=16)  # nothing to pad
            case([1024], chunk_size=16)  # many pieces that see the same keys
            case([256] * 8, chunk_size=1024)  # no document is cut
            if device_type == "cuda" and backend == "native":
                case([4200, 9001, 5, 300, 9701], chunk_size=4096)
    process.end_process()


if __name__ == "__main__":
    main()
