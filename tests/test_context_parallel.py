"""The choice of the backend, the balance of the ranks, and attention that is not kept whole."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.multiprocessing.reductions import StorageWeakRef

import context_parallel
import native_attention
from context_parallel import SavedAttention, balanced_chunk_size, select_backend
from native_attention import DispatchConfig, DistAttnConfig, magi_attn_varlen_key


def imbalance(partitions: list[list[int]], chunk_size: int, lengths: list[int]) -> float:
    """Largest over mean area of the ranks, counted pair by pair from the documents."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])  # keys of each query
    areas = []
    for chunks in partitions:
        areas.append(sum(seen[c * chunk_size : (c + 1) * chunk_size].sum().item() for c in chunks))
    return max(areas) / (sum(areas) / len(areas))


@pytest.mark.parametrize("seed", range(5))
def test_load_of_64_random_documents_is_balanced_at_cp_8(seed, monkeypatch, cp_group):
    lengths = torch.randint(1, 4096, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
    partitions, chunk_size = plan(lengths, 8, monkeypatch, cp_group)
    assert imbalance(partitions, chunk_size, lengths) <= 1.03
    assert sorted(sum(partitions, [])) == list(range(len(partitions[0]) * 8))
    assert len({len(chunks) for chunks in partitions}) == 1  # equally many tokens each


def test_load_of_one_causal_document_is_balanced_at_cp_8(monkeypatch, cp_group):
    partitions, chunk_size = plan([65_536], 8, monkeypatch, cp_group)
    assert imbalance(partitions, chunk_size, [65_536]) <= 1.001
    assert chunk_size == 4096  # two per rank: the first with the last, the second with ...
    halves = [[2 * rank, 2 * rank + 1] for rank in range(8)]  # what contiguous gives
    assert imbalance(halves, chunk_size, [65_536]) > 1.8


def test_of_chunk_sizes_that_balance_alike_the_largest_is_taken():
    """9, 18 and 36 tokens per chunk leave cp 7 equally far from balance under a full mask."""
    cu_seqlens = torch.tensor([0, 252], dtype=torch.int32)
    assert balanced_chunk_size(cu_seqlens, False, 7) == 36


def test_documents_that_balance_as_they_are_stay_whole_and_need_no_other_rank(
    monkeypatch, cp_group
):
    key = key_of([128] * 16, 4, monkeypatch, cp_group)
    assert key.chunk_size == 512 and sorted(key.partitions) == [[0], [1], [2], [3]]
    assert not key.gathers and key.stream_blocks == []


def plan(lengths, cp_size, monkeypatch, cp_group) -> tuple[list[list[int]], int]:
    """Returns the partitions and chunk size of a key."""
    key = key_of(lengths, cp_size, monkeypatch, cp_group)
    return key.partitions, key.chunk_size


def key_of(lengths, cp_size, monkeypatch, cp_group):
    """Returns a key as main.py makes it, on a group that says it has cp_size ranks."""
    monkeypatch.setattr(native_attention.dist, "get_world_size", lambda group=None: cp_size)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    config = DistAttnConfig(DispatchConfig(balanced_chunk_size(cu_seqlens, True, cp_size)))
    return magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True, dist_attn_config=config
    )


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
