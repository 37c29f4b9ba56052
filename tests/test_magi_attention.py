"""The magi_attention path of main.py, with a stand-in on the CPU and with the library on GPUs."""

import dataclasses
import importlib.util
import inspect
import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT, gpus, relative_error, torchrun
from ranks import run_ranks

import context_parallel
from support import preflight

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
        }
        for backend in ("magi_attention", "native")
    ]
    magi, native = gradients(cases, tmp_path, run_ranks, processes, import_from=STAND_IN)
    assert magi["loss"] == pytest.approx(native["loss"], rel=1e-6)
    for name, gradient in magi["gradients"].items():
        assert relative_error(gradient, native["gradients"][name]) < 1e-5, name


def test_kernels_that_are_not_compiled_yet_are_counted(tmp_path, monkeypatch):
    """The folders have the names that 1.1.1 gave them, in its package and in its cache."""
    package, cache = tmp_path / "magi_attention", tmp_path / ".cache/magi_attention/90/cached_ops"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "magi_attention", raising=False)
    monkeypatch.setenv("MAGI_ATTENTION_WORKSPACE_BASE", str(tmp_path))
    package.mkdir()
    (package / "__init__.py").write_text("")

    def compile(folder, name):
        name = f"flex_flash_attn_sm_90_{name}"
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.so").write_text("")

    def missing():
        return [preflight.missing_magi_kernels(128, cp_size) for cp_size in (1, 2)]

    compile(cache, "fwd_64hd_compute_bfloat16_out_float32_m192n128")
    assert missing() == [2, 3]
    compile(cache, "fwd_128hd_compute_bfloat16_out_float32_m128n128")
    assert missing() == [1, 2]
    compile(package / "lib", "bwd_128hd_compute_bfloat16_dq_float32_dkv_float32_atomic")
    assert missing() == [0, 1]
    compile(cache, "fwd_128hd_compute_bfloat16_out_float32_atomic_m128n128")
    assert missing() == [0, 0]


def gradients(cases: list[dict], folder, launch, processes: int, **options) -> list[dict]:
    """Returns what the worker found in each case. launch: run_ranks or torchrun."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(processes, GRADIENTS_WORKER, folder / "cases.json", folder / "out.pt", **options)
    return torch.load(folder / "out.pt")


# The library itself, on GPUs: `pytest -m gpu -rP tests/test_magi_attention.py` shows the figures.


@pytest.fixture
def magi_gpus():
    """Returns `gpus`. Skips the test without the library or a Hopper; a broken library fails it."""
    if importlib.util.find_spec("magi_attention") is None:
        pytest.skip("`pytest -m gpu` runs this; here magi_attention is not installed")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("`pytest -m gpu` runs this on a Hopper GPU, and none is here")
    _, reasons = context_parallel.select_backend("magi_attention", 64, "bfloat16", "cuda")
    print("attention:", *reasons)
    return gpus


@pytest.mark.gpu
def test_the_stand_in_has_the_library_s_signatures(magi_gpus):
    """Names, kinds and defaults of the arguments, and the fields of the configs."""
    from magi_attention import api

    spec = importlib.util.spec_from_file_location("stand_in", STAND_IN / "magi_attention/api.py")
    stand_in = importlib.util.module_from_spec(spec)
    sys.modules["stand_in"] = stand_in  # dataclasses look their module up
    spec.loader.exec_module(stand_in)
    for name in ("magi_attn_varlen_key", "dispatch", "calc_attn"):
        found, real = (inspect.signature(getattr(module, name)) for module in (stand_in, api))
        assert list(found.parameters) == list(real.parameters), name
        for parameter, expected in zip(
            found.parameters.values(), real.parameters.values(), strict=True
        ):
            if parameter.name != "dist_attn_config":  # the default is an instance of each's own
                assert parameter.default == expected.default, (name, parameter.name)
    for name in ("DistAttnConfig", "DispatchConfig", "OverlapConfig"):
        found, real = (
            {field.name: field.init for field in dataclasses.fields(getattr(module, name))}
            for module in (stand_in, api)
        )
        assert found == real, name


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_the_library_in_float64_equals_dense_attention(processes, magi_gpus):
    """Also that its dispatch means what native's means."""
    torchrun(
        processes,
        *(ATTENTION_WORKER, "magi_attention", "cuda", "float64", "", processes),
        CUDA_VISIBLE_DEVICES=magi_gpus(processes),
        MAGI_ATTENTION_KERNEL_BACKEND="sdpa",
        MAGI_ATTENTION_PRECISION="fp64",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_the_library_s_kernels_are_as_exact_as_pytorch_s(processes, magi_gpus):
    """bfloat16: out, dq, dk, dv within twice the errors of cuDNN or flash against float64."""
    arguments = (ATTENTION_WORKER, "magi_attention", "cuda", "bfloat16", "", processes)
    print(torchrun(processes, *arguments, CUDA_VISIBLE_DEVICES=magi_gpus(processes)).stdout)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cp, name",
    [
        *itertools.product([1, 2], ["documents", "one document"]),
        (2, "one for each rank"),
    ],
)
def test_a_step_is_the_same_with_either_backend(cp, name, magi_gpus, tmp_path):
    """In bfloat16, beside `native` at cp 1, with each recomputation: loss within 2e-3, gradient
    norm within 1e-2. A recomputation alone changes less than that: each gradient stays within 2 %.
    """
    visible = magi_gpus(cp)
    (tmp_path / "long.txt").write_text("".join(chr(33 + i * i % 90) for i in range(50_000)))
    data = {
        "documents": [f"data_config.source={ROOT}/tests/*.py", "data_config.batch_size=2"],
        "one document": [f"data_config.source={tmp_path}/long.txt", "data_config.batch_size=1"],
        "one for each rank": [
            f"data_config.source={tmp_path}/long.txt",
            f"data_config.batch_size={cp}",
        ],
    }
    shared = [
        "model_config.preset=tiny",
        'model_config.overrides={"num_hidden_layers": 2, "initializer_range": 0.1}',
        "data_config.seqlen=5001",
        "train_config.compile=false",
        *data[name],
    ]

    def steps(cp, backends, recomputations):
        keys = list(itertools.product(backends, recomputations))
        cases = [
            {
                "overrides": [
                    *shared,
                    f"parallel_config.context_parallel_size={cp}",
                    f"parallel_config.context_parallel_backend={backend}",
                    f"train_config.activation_checkpointing={recomputation}",
                ],
            }
            for backend, recomputation in keys
        ]
        results = gradients(cases, tmp_path, torchrun, cp, CUDA_VISIBLE_DEVICES=visible)
        return dict(zip(keys, results, strict=True))

    found = steps(cp, ("magi_attention", "native"), ("none", "selective", "full"))
    alone = found if cp == 1 else steps(1, ("native",), ("none",))
    expected = alone["native", "none"]
    for (backend, recomputation), result in found.items():
        loss, norm = result["loss"], result["grad_norm"]
        print(f"{name}, {backend} cp {cp}, {recomputation}: loss {loss:.6f}  {norm:.6f}")
        assert loss == pytest.approx(expected["loss"], rel=2e-3)
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-2)
        for parameter, gradient in result["gradients"].items():
            error = relative_error(gradient, found[backend, "none"]["gradients"][parameter])
            assert error < 2e-2, (parameter, recomputation)
