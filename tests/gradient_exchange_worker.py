"""Run by torchrun: FSDP's gradients with `GradientExchange`, against each rank's own, averaged, and
main.py's with it against those with FSDP's own reduction.
"""

import copy
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import main
import process
from gradient_exchange import exchange_gradients

all_to_all, sent = dist.all_to_all_single, []


def note_what_is_sent(received: Tensor, x: Tensor, **kwargs) -> None:
    sent.append((x.dtype, x.numel()))
    all_to_all(received, x, **kwargs)


def padded(parameters: list[nn.Parameter]) -> int:
    """Returns the elements of the parameters, rows padded to a multiple of the ranks."""
    ranks = dist.get_world_size()
    return sum(p.numel() // len(p) * (len(p) + -len(p) % ranks) for p in parameters)


def gradients(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    for x in batches:
        (model(x) ** 2).sum().backward()
    return [p.grad for p in model.parameters()]


def check_average(dtype: torch.dtype, compiles: bool, mesh: DeviceMesh) -> None:
    # 13 or 4,099 rows, which no number of ranks here divides. Large on a GPU, so that a group is
    # still exchanged while the next one's backward runs.
    sizes = (24, 13, 40) if mesh.device_type == "cpu" else (4096, 4099, 4096)
    torch.manual_seed(0)
    layers = nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:], bias=False)
    model = nn.Sequential(*layers).to(mesh.device_type)
    sharded, parameters = copy.deepcopy(model), list(model.parameters())
    torch.manual_seed(1 + dist.get_rank())
    batches = [torch.randn(30, sizes[0], dtype=dtype, device=mesh.device_type) for _ in range(2)]

    # What is to come out: the ranks' gradients of each batch in dtype, everything else in float64.
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for batch in batches:
        plain = copy.deepcopy(model).to(dtype)
        for total, gradient in zip(expected, gradients(plain, [batch]), strict=True):
            total += gradient.double() / dist.get_world_size()
    for total in expected:
        dist.all_reduce(total)

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*sharded, sharded]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    exchange_gradients(sharded, dtype, compiles)
    sent.clear()
    for gradient, total in zip(gradients(sharded, batches), expected, strict=True):
        assert gradient.dtype == torch.float32
        error = (gradient.full_tensor() - total).norm() / total.norm()
        assert error < 1e-6, error
    assert {kind for kind, _ in sent} == {dtype}
    assert sum(numel for _, numel in sent) == len(batches) * padded(parameters)


def main_s_gradients(
    exchanges: bool, compiles: bool, mesh: DeviceMesh
) -> tuple[list[Tensor], list[nn.Parameter]]:
    """Returns this rank's shards of one step's gradients by main.py, and the parameters.

    The model is not compiled, whether or not the exchange is, and so small that each backward gives
    the same to the bit, on a GPU too.
    """

    def exchange(model: nn.Module, dtype: torch.dtype, _: bool) -> None:
        exchange_gradients(model, dtype, compiles)

    with (
        mock.patch.object(main, "is_one_node", lambda: exchanges),
        mock.patch.object(main, "exchange_gradients", exchange),
    ):
        model = main.parallelize_model(main.build_llama_model(), mesh)
    main.forward_backward(model, main.prepare_step(mesh, model.config, 0), mesh)
    parameters = list(model.parameters())
    return [p.grad.to_local() for p in parameters], parameters


if __name__ == "__main__":
    main.set_up(sys.argv[2:])
    main.init_env()
    mesh = main.build_mesh()
    compiles = sys.argv[1] == "compile"
    with mock.patch.object(dist, "all_to_all_single", note_what_is_sent):
        for dtype in (torch.bfloat16, torch.float32):
            check_average(dtype, compiles, main.dp_cp_mesh(mesh))
        if dist.get_world_size() == 2:
            default, _ = main_s_gradients(False, compiles, mesh)
            sent.clear()
            found, parameters = main_s_gradients(True, compiles, mesh)
            assert sent and {kind for kind, _ in sent} == {torch.bfloat16}
            assert sum(numel for _, numel in sent) == padded(parameters)
            for gradient in found:  # added in float32: no sum of bfloat16
                assert not torch.equal(gradient, gradient.bfloat16().float())
            assert all(map(torch.equal, found, default)), "to the bit, of two ranks"
    dist.barrier()
    dist.destroy_process_group()
    process.leave()
