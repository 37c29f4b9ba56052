"""Run by torchrun: a backend's attention and dispatch against dense attention in float64.

Arguments: the backend, the device type, the dtype that the backend computes in, and the cp sizes.
In float64 and float32 the backend has to be exact. In bfloat16 its errors may be twice those that
PyTorch's own kernels (cuDNN or flash) make on the same documents, on a CPU, where every run is the
same, 1.4 times; rank 0 prints both.
"""

import os
import sys

import reference
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import blocks
import process
from context_parallel import calc_attn, load_api

NH, NKV, HD = 4, 2, 64
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


def check(backend, mesh, dtype, lengths: list[int], causal: bool, chunk_size: int) -> None:
    api, group = load_api(backend), mesh.get_group("cp")
    torch.manual_seed(len(lengths))  # the same on all ranks
    total = sum(lengths)
    q, k, v, grad = (
        torch.randn(total, heads, HD).to(mesh.device_type, dtype) for heads in (NH, NKV, NKV, NH)
    )
    in_float64 = [x.double() for x in (q, k, v, grad)]
    expected = by_document(reference.attention, in_float64, lengths, causal)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    local_q, key = api.magi_attn_varlen_dispatch(
        q,
        cu_seqlens,
        cu_seqlens,
        num_heads_q=NH,
        num_heads_kv=NKV,
        head_dim=HD,
        pad_size=0,
        cp_group_or_mesh=group,
        causal=causal,
        dist_attn_config=api.DistAttnConfig(
            dispatch_config=api.DispatchConfig(chunk_size=chunk_size)
        ),
    )
    local_q.requires_grad_()
    local_k, local_v = (api.dispatch(x, key).requires_grad_() for x in (k, v))
    out, _ = calc_attn(local_q, local_k, local_v, key)
    out.backward(api.dispatch(grad, key))
    local = (out.detach(), local_q.grad, local_k.grad, local_v.grad)
    found = errors([api.undispatch(x, key) for x in local], expected)
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
            print(f"{backend} cp {dist.get_world_size(group)} {mask} {lengths}: {figures}")
    assert all(found[name] <= limit[name] for name in NAMES), (found, limit, lengths, causal)

    # Dispatch is what the position ids say, padding included, and undispatch takes it back.
    stream = torch.arange(total, device=mesh.device_type)
    local = api.dispatch(stream, key, pad_value=-100)
    is_padding = local == -100
    padding = is_padding.sum()
    dist.all_reduce(padding, group=group)
    assert padding == key.pad_size
    positions = api.get_position_ids(key)
    assert torch.equal(positions, local.where(~is_padding, total - 1))
    assert torch.equal(api.undispatch(local, key), stream)
    assert (out[is_padding] == 0).all()

    # Their gradients: each is the other's transpose, for a loss that every cp rank computes whole.
    x = torch.randn(total, 3, dtype=torch.float64).to(mesh.device_type).requires_grad_()
    weight = torch.randn(total, 3, dtype=torch.float64).to(mesh.device_type)
    (api.undispatch(api.dispatch(x, key) * 2, key) * weight).sum().backward()
    assert torch.equal(x.grad, 2 * weight)


def main() -> None:
    backend, device_type, dtype, *cp_sizes = sys.argv[1:]
    dtype = getattr(torch, dtype)
    if device_type == "cpu":  # so that pieces of documents as short as these are large
        blocks.MIN_PIECE, blocks.MIN_QUERIES, blocks.MIN_KEYS = 64, 16, 32
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    for cp_size in map(int, cp_sizes):
        shape = (dist.get_world_size() // cp_size, cp_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))
        for causal in (True, False):
            check(backend, mesh, dtype, [1, 30, 2, 1, 95, 17], causal, chunk_size=8)
            check(backend, mesh, dtype, [1] * 7, causal, chunk_size=512)  # one token per document
            check(backend, mesh, dtype, [131], causal, chunk_size=512)
            check(backend, mesh, dtype, [700, 1, 900, 447], causal, chunk_size=128)
            check(backend, mesh, dtype, [3], causal, chunk_size=512)  # too short for chunks
            check(backend, mesh, dtype, [64, 64], causal, chunk_size=16)  # nothing to pad
            check(backend, mesh, dtype, [1024], causal, chunk_size=256)  # whole chunks alone
            check(backend, mesh, dtype, [256] * 8, causal, chunk_size=1024)  # whole documents
            if device_type == "cuda" and backend == "native":  # large pieces
                check(backend, mesh, dtype, [4200, 9001, 5, 300, 9701], causal, chunk_size=4096)
    dist.barrier()  # no rank ends while another's threads still wait for it
    dist.destroy_process_group()
    process.leave()


if __name__ == "__main__":
    main()
