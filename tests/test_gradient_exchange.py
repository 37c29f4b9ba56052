"""The all-to-all that takes the place of FSDP's reduce-scatter."""

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, gpus, torchrun
from torch.distributed.fsdp import FSDPModule

import main
from gradient_exchange import GradientExchange, average

WORKER = ROOT / "tests/gradient_exchange_worker.py"
SMALL = [
    "model_config.preset=tiny",
    "model_config.overrides.num_hidden_layers=2",
    "data_config.source=random",
    "data_config.seqlen=64",
    "train_config.dtype=bfloat16",
    "train_config.compile=false",
    "parallel_config.context_parallel_backend=native",
]


@pytest.mark.parametrize("processes, compiles", [(2, "compile"), (4, "eager")])
def test_gradients_are_sent_as_they_are_and_added_in_float32(processes, compiles, tmp_path):
    """Compared with the ranks' own gradients, averaged in float64. Of two ranks main.py's gradients
    in bfloat16 are those of FSDP's own reduction in float32, to the bit.
    """
    torchrun(processes, WORKER, compiles, *SMALL, f"train_config.output_dir={tmp_path}")


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", ["compile", "eager"])
def test_gradients_over_nccl(compiles, tmp_path):
    """Compared as above: main.py's are those of NCCL's reduce-scatter in float32, to the bit."""
    arguments = (WORKER, compiles, *SMALL, f"train_config.output_dir={tmp_path}")
    torchrun(2, *arguments, CUDA_VISIBLE_DEVICES=gpus(2))


@pytest.mark.parametrize(
    "local_world_size, world_size, exchanges",
    [("1", "1", True), ("1", "2", False), (None, "2", False)],
)
@pytest.mark.parametrize("compiles", [True, False])
def test_it_is_for_one_node_alone(
    local_world_size, world_size, exchanges, compiles, config, cp_group, monkeypatch, tmp_path
):
    main.set_up(
        [
            "model_config.preset=tiny",
            f"train_config.compile={str(compiles).lower()}",
            f"train_config.output_dir={tmp_path}",
        ]
    )
    given = []
    monkeypatch.setattr(
        FSDPModule, "set_custom_reduce_scatter", lambda module, exchange: given.append(exchange)
    )
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    model = main.build_llama_model()
    main.apply_fsdp(model, main.dp_cp_mesh(main.build_mesh()))
    num_modules = sum(isinstance(module, FSDPModule) for module in model.modules())
    assert len(given) == (num_modules if exchanges else 0)
    for exchange in given:
        assert exchange.dtype == getattr(torch, main.train_config["dtype"])
        assert (exchange.average is average) != compiles


@pytest.mark.parametrize("dtype, op", [("bfloat16", "SUM"), ("float32", "AVG")])
def test_it_refuses_what_it_does_not_do(dtype, op, cp_group):
    exchange = GradientExchange(torch.bfloat16, compiles=False)
    x = torch.zeros(4, dtype=getattr(torch, dtype))
    with pytest.raises(
        ValueError, match=f"averages torch.bfloat16; FSDP gave .*{op}.* torch.{dtype}"
    ):
        exchange(torch.zeros(4), x, cp_group, getattr(dist.ReduceOp, op))
