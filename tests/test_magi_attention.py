"""The magi_attention path of main.py, against a stand-in with the library's signatures."""

import json

import pytest
import torch
from conftest import ROOT, relative_error, torchrun

STAND_IN = ROOT / "tests/stand_in"
CASE = [
    "model_config.preset=tiny",
    'model_config.overrides={"num_hidden_layers": 2, "initializer_range": 0.1}',
    f"data_config.source={ROOT}/tests/*.py",
    "data_config.batch_size=4",
    "train_config.gradient_accumulation_steps=2",
]


@pytest.mark.parametrize(
    "processes, cp, dtype, seqlen", [(1, 1, "bfloat16", 50), (4, 2, "float32", 333)]
)
def test_the_magi_attention_path_gives_the_gradients_of_native(
    processes, cp, dtype, seqlen, tmp_path
):
    """The stand-in computes with `native`: what differs is what main.py and the model hand over."""
    cases = [
        {
            "overrides": [
                *CASE,
                f"train_config.dtype={dtype}",
                f"data_config.seqlen={seqlen}",
                f"parallel_config.context_parallel_size={cp}",
                f"parallel_config.context_parallel_backend={backend}",
            ],
            "ignored_from_row": None,
        }
        for backend in ("magi_attention", "native")
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = ROOT / "tests/gradients_worker.py"
    arguments = (worker, tmp_path / "cases.json", tmp_path / "out.pt")
    torchrun(processes, *arguments, PYTHONPATH=f"{STAND_IN}:{ROOT}:{ROOT}/tests")
    magi, native = torch.load(tmp_path / "out.pt")
    assert magi["loss"] == native["loss"]
    for name, gradient in magi["gradients"].items():
        assert relative_error(gradient, native["gradients"][name]) < 1e-6, name
