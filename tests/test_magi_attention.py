"""The magi_attention path of main.py, with a stand-in on the CPU and with the library on GPUs."""

import json

import pytest
import torch
from conftest import ROOT, gpus, relative_error, torchrun

import context_parallel

STAND_IN = ROOT / "tests/stand_in"
ATTENTION_WORKER = ROOT / "tests/context_parallel_worker.py"
GRADIENTS_WORKER = ROOT / "tests/gradients_worker.py"
CASE = [
    "model_config.preset=tiny",
    'model_config.overrides={"num_hidden_layers": 2, "initializer_range": 0.1}',
    f"data_config.source={ROOT}/tests/*.py",
    "data_config.batch_size=4",
    "train_config.gradient_accumulation_steps=2",
    "train_config.compile=false",
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
    magi, native = gradients(
        cases, processes, tmp_path, PYTHONPATH=f"{STAND_IN}:{ROOT}:{ROOT}/tests"
    )
    assert magi["loss"] == pytest.approx(native["loss"], rel=1e-6)
    for name, gradient in magi["gradients"].items():
        assert relative_error(gradient, native["gradients"][name]) < 1e-5, name


def gradients(cases: list[dict], processes: int, folder, **env: str) -> list[dict]:
    """Returns what the worker found in each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun(processes, GRADIENTS_WORKER, folder / "cases.json", folder / "out.pt", **env)
    return torch.load(folder / "out.pt")


# The library itself, on GPUs: `pytest -m gpu -rP tests/test_magi_attention.py` shows the figures.


@pytest.fixture
def magi_gpus():
    """Returns `gpus`, where the library can run; skips the test with its obstacle elsewhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backend, reason = context_parallel.select_backend("magi_attention", 64, "bfloat16", device)
    except ValueError as error:
        pytest.skip(f"`pytest -m gpu` with the library runs this; here {error}")
    print(f"attention: {backend} ({reason})")
    return gpus


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_the_library_in_float64_equals_dense_attention(processes, magi_gpus):
    """Also that its dispatch, undispatch and position ids mean what native's mean."""
    torchrun(
        processes,
        *(ATTENTION_WORKER, "magi_attention", "cuda", "float64", processes),
        CUDA_VISIBLE_DEVICES=magi_gpus(processes),
        MAGI_ATTENTION_KERNEL_BACKEND="sdpa",
        MAGI_ATTENTION_PRECISION="fp64",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_the_library_s_kernels_are_as_exact_as_pytorch_s(processes, magi_gpus):
    """bfloat16: out, dq, dk, dv within twice the errors of cuDNN or flash against float64."""
    arguments = (ATTENTION_WORKER, "magi_attention", "cuda", "bfloat16", processes)
    print(torchrun(processes, *arguments, CUDA_VISIBLE_DEVICES=magi_gpus(processes)).stdout)


@pytest.mark.gpu
def test_a_step_is_the_same_with_either_backend_and_cp(magi_gpus, tmp_path):
    """bfloat16, on many documents and on one: loss within 2e-3, gradient norm within 1e-2."""
    visible = magi_gpus(2)
    (tmp_path / "long.txt").write_text("".join(chr(33 + i * i % 90) for i in range(50_000)))
    sources = {"documents": f"{ROOT}/tests/*.py", "one document": f"{tmp_path}/long.txt"}
    found = {}
    for cp in (1, 2):
        keys = [(b, cp, name) for b in ("magi_attention", "native") for name in sources]
        cases = [
            {
                "overrides": [
                    "model_config.preset=tiny",
                    'model_config.overrides={"num_hidden_layers": 2, "initializer_range": 0.1}',
                    f"data_config.source={sources[name]}",
                    "data_config.seqlen=5001",
                    "data_config.batch_size=2",
                    f"parallel_config.context_parallel_size={cp}",
                    f"parallel_config.context_parallel_backend={backend}",
                ],
                "ignored_from_row": None,
            }
            for backend, _, name in keys
        ]
        results = gradients(cases, cp, tmp_path, CUDA_VISIBLE_DEVICES=visible)
        found |= dict(zip(keys, results, strict=True))
    for (backend, cp, name), result in found.items():
        print(f"{name}, {backend} cp {cp}: loss {result['loss']:.6f}  {result['grad_norm']:.6f}")
        native = found["native", 1, name]
        assert result["loss"] == pytest.approx(native["loss"], rel=2e-3)
        assert result["grad_norm"] == pytest.approx(native["grad_norm"], rel=1e-2)
