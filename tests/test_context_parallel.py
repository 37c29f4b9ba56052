"""The choice of the backend."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, no_such_package

from context_parallel import kernels, select_backend

# The choice of the backend. What a real placeholder is, an importable package without `api`, was
# seen in the one that PyPI has under the name magi_attention, version 0.0.1.


@pytest.fixture(autouse=True)
def a_hopper(monkeypatch):
    """Every GPU is a Hopper, without FlashAttention-4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(importlib.metadata, "version", no_such_package)
    kernels.select_kernel.cache_clear()
    yield
    kernels.select_kernel.cache_clear()


def refuse(sentence: str, head_dim=64, dtype="bfloat16", device="cuda") -> None:
    """Asked for by name it is an error that says why; `auto` takes native and gives that reason."""
    with pytest.raises(ValueError, match=f"'magi_attention': .* cannot run: {sentence}"):
        select_backend("magi_attention", head_dim, dtype, device)
    backend, (chosen, reason, *_) = select_backend("auto", head_dim, dtype, device)
    assert backend == "native" and chosen.startswith("native (")
    assert reason.startswith("magi_attention cannot run")


@pytest.fixture
def another_magi_attention():
    """Forgets an imported magi_attention, so that the test's own is found, and that one after."""
    loaded = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "magi_attention"}
    for name in loaded:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "magi_attention"]:
        del sys.modules[name]
    sys.modules.update(loaded)


def test_float32_and_other_head_dims_are_refused():
    refuse("it needs .*bfloat16, .*not NVIDIA H100, float32, 64", dtype="float32")
    refuse("it needs .*head_dim 64 or 128, not NVIDIA H100, bfloat16, 32", head_dim=32)


def test_an_absent_package_is_refused(another_magi_attention, monkeypatch):
    shown = [p for p in sys.path if not (Path(p) / "magi_attention").is_dir()]
    monkeypatch.setattr(sys, "path", shown)
    refuse("it is not installed; docs/magi_attention.md")


def test_the_empty_placeholder_from_pypi_is_refused(another_magi_attention, tmp_path, monkeypatch):
    (tmp_path / "magi_attention").mkdir()
    (tmp_path / "magi_attention/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    refuse("PyPI's package of this name is empty")


def test_a_missing_debugpy_is_named(another_magi_attention, tmp_path, monkeypatch):
    (tmp_path / "magi_attention").mkdir()
    (tmp_path / "magi_attention/__init__.py").write_text("")
    (tmp_path / "magi_attention/api.py").write_text("import debugpy")
    monkeypatch.setitem(sys.modules, "debugpy", None)  # as if it were not installed
    monkeypatch.syspath_prepend(tmp_path)
    refuse("it imports 'debugpy' without declaring it")
    (tmp_path / "magi_attention/api.py").write_text("raise RuntimeError('built for another CUDA')")
    monkeypatch.delitem(sys.modules, "magi_attention.api", raising=False)
    refuse("importing it failed: RuntimeError.*another CUDA")


def test_a_gpu_that_is_none_or_no_hopper_is_refused(another_magi_attention, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/stand_in")
    refuse("it needs Hopper, .*not a CPU", device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ValueError, match="it needs Hopper, .*not NVIDIA A100"):
        select_backend("magi_attention", 64, "bfloat16", "cuda")


def test_a_library_that_imports_on_a_hopper_is_taken(another_magi_attention, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/stand_in")
    expected = ("magi_attention", ["magi_attention (stand-in)"])
    assert select_backend("auto", 128, "bfloat16", "cuda") == expected


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="bfloat16 from capability 8.0 on, .*Tesla T4"):
        select_backend("native", 64, "bfloat16", "cuda")
    assert select_backend("native", 64, "float32", "cuda")[0] == "native"


def test_native_is_always_there():
    expected = ("native", ["native (scaled_dot_product_attention)"])
    assert select_backend("native", 31, "float32", "cpu") == expected


def test_a_gpu_that_could_run_flash_attention_4_hears_how_to_install_it(monkeypatch):
    _, (chosen, hint) = select_backend("native", 64, "bfloat16", "cuda")
    assert chosen.startswith("native (FlashAttention-2")
    assert "FlashAttention-4" in hint and "not installed" in hint
    assert "pip install -r requirements-gpu.txt" in hint
    assert len(select_backend("native", 64, "float32", "cuda")[1]) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    _, (_, reason) = select_backend("native", 64, "bfloat16", "cuda")
    assert "it needs Hopper or newer" in reason and "pip" not in reason


def test_a_head_dim_that_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="a multiple of 8, 256 at the most, .*not head_dim 264"):
        select_backend("native", 264, "float32", "cuda")
