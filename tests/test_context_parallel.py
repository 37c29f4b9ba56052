"""The choice of the backend, and attention that is not kept whole."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.multiprocessing.reductions import StorageWeakRef

import context_parallel
from context_parallel import SavedAttention, select_backend
from native_attention import magi_attn_varlen_key


def test_saved_attention_keeps_none_of_its_inputs_and_gives_their_gradients(cp_group):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 10, 64], dtype=torch.int32)
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True)
    inputs = [torch.randn(64, heads, 64, requires_grad=True) for heads in (4, 2, 2)]
    out, _ = context_parallel.calc_attn(*inputs, key)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad)

    q, k, v = (x.detach().clone() for x in inputs)
    wide = torch.randn(64, 4, 64)  # v as a part of something larger, which has to stay
    wide[:, 1:3] = v
    saved = SavedAttention(q, k, wide[:, 1:3], key)
    assert [x.untyped_storage().nbytes() for x in (q, k)] == [0, 0]
    assert torch.equal(wide[:, 1:3], v)
    assert torch.equal(saved.out, out)
    found = torch.autograd.grad(saved.out, saved.restore(*inputs), grad)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_saved_attention_that_nobody_needs_any_more_is_freed_at_once(cp_group):
    """Without its backward, too: as after an error, or a forward that was for its loss alone."""
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True)
    saved = SavedAttention(*(torch.randn(64, heads, 64) for heads in (4, 2, 2)), key)
    out = StorageWeakRef(saved.out.untyped_storage())
    gc.disable()
    try:
        del saved
        assert out.expired()
    finally:
        gc.enable()


# The choice of the backend. What a real placeholder is, an importable package without `api`, was
# seen in the one that PyPI has under the name magi_attention, version 0.0.1.


@pytest.fixture(autouse=True)
def a_hopper(monkeypatch):
    """Whoever asks for the GPU's capability hears of Hopper's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def refuse(sentence: str, head_dim=64, dtype="bfloat16", device="cuda") -> None:
    """Asked for by name it is an error that says why; `auto` takes native and gives that reason."""
    with pytest.raises(ValueError, match=f"'magi_attention' cannot run: {sentence}"):
        select_backend("magi_attention", head_dim, dtype, device)
    backend, reason = select_backend("auto", head_dim, dtype, device)
    assert backend == "native"
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
    refuse("its kernels compute in bfloat16.*'float32'", dtype="float32")
    refuse("its kernels take a head_dim of 64 or 128.* is 32", head_dim=32)


def test_an_absent_package_is_refused(another_magi_attention, monkeypatch):
    shown = [p for p in sys.path if not (Path(p) / "magi_attention").is_dir()]
    monkeypatch.setattr(sys, "path", shown)
    refuse("it is not installed; it is built from source")


def test_the_empty_placeholder_from_pypi_is_refused(another_magi_attention, tmp_path, monkeypatch):
    (tmp_path / "magi_attention").mkdir()
    (tmp_path / "magi_attention/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    refuse("the installed package is the empty placeholder.*PyPI")


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
    refuse("it needs an NVIDIA GPU", device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"for Hopper, capability 9.0, and NVIDIA A100 has 8.0"):
        select_backend("magi_attention", 64, "bfloat16", "cuda")


def test_a_library_that_imports_on_a_hopper_is_taken(another_magi_attention, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/stand_in")
    expected = ("magi_attention", "version stand-in, auto")
    assert select_backend("auto", 128, "bfloat16", "cuda") == expected


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="'bfloat16' needs .* 8.0 .*Tesla T4 has less"):
        select_backend("native", 64, "bfloat16", "cuda")
    assert select_backend("native", 64, "float32", "cuda")[0] == "native"


def test_native_is_always_there():
    assert select_backend("native", 31, "float32", "cpu") == ("native", "as configured")
