"""The all-to-all that takes the place of FSDP's reduce-scatter."""

import pytest
from conftest import ROOT, torchrun
from torch.distributed.fsdp import FSDPModule

import main
from gradient_exchange import GradientExchange

WORKER = ROOT / "tests/gradient_exchange_worker.py"


@pytest.mark.parametrize("processes, compiles", [(2, "compile"), (4, "eager")])
def test_gradients_are_sent_as_they_are_and_added_in_float32(processes, compiles):
    """Compared with the ranks' own gradients, averaged in float64, and of two ranks, to the bit,
    with FSDP's own reduction in float32.
    """
    torchrun(processes, WORKER, compiles)


@pytest.mark.parametrize("on_one_node", [True, False])
def test_it_is_for_one_node_alone(on_one_node, config, cp_group, monkeypatch):
    main.set_up(["model_config.preset=tiny", "train_config.compile=false"])
    exchanges = []
    monkeypatch.setattr(
        FSDPModule, "set_custom_reduce_scatter", lambda _, exchange: exchanges.append(exchange)
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "1" if on_one_node else "2")
    model = main.build_llama_model()
    main.apply_fsdp(model, main.dp_cp_mesh(main.build_mesh()))
    assert all(isinstance(exchange, GradientExchange) for exchange in exchanges)
    num_modules = sum(isinstance(module, FSDPModule) for module in model.modules())
    assert len(exchanges) == (num_modules if on_one_node else 0)
