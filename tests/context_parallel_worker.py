"""Run by torchrun from test_context_parallel.py: `native` against dense attention in float64.

Arguments: the device type and the cp sizes. On a CPU native computes in float64 too and is exact;
on GPUs it computes in bfloat16.
"""

import os
import sys

import reference
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from context_parallel import (
    DispatchConfig,
    DistAttnConfig,
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_dispatch,
    undispatch,
)

NH, NKV, HD = 4, 2, 64


def check(mesh, lengths: list[int], causal: bool, chunk_size: int) -> None:
    group = mesh.get_group("cp")
    torch.manual_seed(len(lengths))  # the same on all ranks
    on_gpu = mesh.device_type == "cuda"
    dtype, tolerance = (torch.bfloat16, 1e-2) if on_gpu else (torch.float64, 1e-12)
    total = sum(lengths)
    q, k, v, grad = (
        torch.randn(total, heads, HD).to(mesh.device_type, dtype).double().requires_grad_()
        for heads in (NH, NKV, NKV, NH)
    )

    expected = torch.cat(
        [
            reference.attention(*document, causal)
            for document in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
    )
    expected.backward(grad)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    local_q, key = magi_attn_varlen_dispatch(
        q.detach().to(dtype),
        cu_seqlens,
        cu_seqlens,
        num_heads_q=NH,
        num_heads_kv=NKV,
        head_dim=HD,
        pad_size=0,
        cp_group_or_mesh=group,
        causal=causal,
        dist_attn_config=DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=chunk_size)),
    )
    local_q.requires_grad_()
    local_k, local_v = (dispatch(x.detach().to(dtype), key).requires_grad_() for x in (k, v))
    out, _ = calc_attn(local_q, local_k, local_v, key)
    out.backward(dispatch(grad.to(dtype), key))
    local = (out, local_q.grad, local_k.grad, local_v.grad)
    for name, mine, full in zip(
        ("out", "dq", "dk", "dv"), local, (expected, q.grad, k.grad, v.grad), strict=True
    ):
        difference = (undispatch(mine.detach(), key).double() - full).norm()
        error = (difference / full.norm().clamp(min=1)).item()  # dq and dk of one token are zero
        assert error < tolerance, (name, error, lengths, causal)

    # Dispatch is what the position ids say, padding included, and undispatch takes it back.
    positions = get_position_ids(key)
    stream = torch.arange(total, device=mesh.device_type)
    padded = torch.nn.functional.pad(stream, (0, key.pad_size), value=-100)
    assert torch.equal(dispatch(stream, key, pad_value=-100), padded[positions])
    assert torch.equal(undispatch(padded[positions], key), stream)
    assert (out[positions >= total] == 0).all()

    # Their gradients: each is the other's transpose, for a loss that every cp rank computes whole.
    x = torch.randn(total, 3, dtype=torch.float64).to(mesh.device_type).requires_grad_()
    weight = torch.randn(total, 3, dtype=torch.float64).to(mesh.device_type)
    (undispatch(dispatch(x, key) * 2, key) * weight).sum().backward()
    assert torch.equal(x.grad, 2 * weight)


def main() -> None:
    device_type, *cp_sizes = sys.argv[1:]
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    for cp_size in map(int, cp_sizes):
        shape = (dist.get_world_size() // cp_size, cp_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))
        for causal in (True, False):
            check(mesh, [1, 30, 2, 1, 95, 17], causal, chunk_size=8)
            check(mesh, [1] * 7, causal, chunk_size=512)  # one token per document
            check(mesh, [131], causal, chunk_size=512)
            check(mesh, [700, 1, 900, 447], causal, chunk_size=128)
            check(mesh, [3], causal, chunk_size=512)  # fewer tokens than 8 chunks per rank
            check(mesh, [64, 64], causal, chunk_size=16)  # nothing to pad
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
