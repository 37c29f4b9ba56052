"""Run by torchrun: FSDP's gradients with `GradientExchange`, against each rank's own, averaged."""

import copy
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import main
import process
from gradient_exchange import GradientExchange


def gradients(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    for x in batches:
        (model(x) ** 2).sum().backward()
    return [p.grad for p in model.parameters()]


def check(dtype: torch.dtype, compiles: bool, seed: int) -> None:
    torch.manual_seed(seed)  # 13 rows, which no number of ranks here divides
    model = nn.Sequential(nn.Linear(24, 13), nn.Linear(13, 40, bias=False))
    sharded, default = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1000 * seed + dist.get_rank())
    batches = [torch.randn(30, 24, dtype=dtype) for _ in range(2)]

    # What is to come out: the ranks' gradients of each batch in dtype, everything else in float64.
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for batch in batches:
        plain = copy.deepcopy(model).to(dtype)
        for total, gradient in zip(expected, gradients(plain, [batch]), strict=True):
            total += gradient.double() / dist.get_world_size()
    for total in expected:
        dist.all_reduce(total)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exchange = GradientExchange(dtype, compiles)
    sent = []
    all_to_all = dist.all_to_all_single

    def note_what_is_sent(received, x, **kwargs):
        sent.append(x.numel() * x.element_size())
        return all_to_all(received, x, **kwargs)

    for net in (sharded, default):
        for module in [*net, net]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
            if net is sharded:
                module.set_custom_reduce_scatter(exchange)
    with mock.patch.object(dist, "all_to_all_single", note_what_is_sent):
        found = gradients(sharded, batches)
    for gradient, total in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        error = (gradient.full_tensor() - total).norm() / total.norm()
        assert error < 1e-6, error
    if dist.get_world_size() == 2:
        for gradient, other in zip(found, gradients(default, batches), strict=True):
            assert torch.equal(gradient.to_local(), other.to_local()), "to the bit, of two ranks"
    # Two batches; the rows are padded to a multiple of the ranks.
    padded = [p.numel() // len(p) * (len(p) + -len(p) % mesh.size()) for p in model.parameters()]
    assert sum(sent) == 2 * sum(padded) * dtype.itemsize, (sent, padded)


if __name__ == "__main__":
    main.init_env()
    for dtype in (torch.bfloat16, torch.float32):
        check(dtype, compiles=False, seed=1)
    check(torch.bfloat16, compiles=sys.argv[1] == "compile", seed=2)
    dist.barrier()
    dist.destroy_process_group()
    process.leave()
