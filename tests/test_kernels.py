"""The choice of a kernel, and what each is given.

What the kernels for GPUs compute is compared by `pytest -m gpu tests/test_native.py`. Here
FlashAttention-2 gets tensors without memory, and FlashAttention-4 has a stand-in.
"""

import importlib.metadata
import inspect
import sys
import types

import pytest
import reference
import torch
from conftest import relative_error

from context_parallel import kernels
from context_parallel.kernels import Pieces, select_kernel, varlen_attention

NH, NKV, HD = 4, 2, 64


@pytest.fixture(autouse=True)
def a_hopper(monkeypatch):
    """Every GPU is a Hopper, and what is known of the machine is forgotten."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


def make_pieces(lengths_q, lengths_k, causal, device="cpu") -> Pieces:
    cu_seqlens = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        for lengths in (lengths_q, lengths_k)
    )
    return Pieces(lengths_q, lengths_k, causal, *cu_seqlens)


def ends_of_documents(q, k, v, pieces) -> torch.Tensor:
    """Dense attention of the whole documents, of which the pieces' queries are the ends."""
    outs = []
    tensors = q.split(pieces.lengths_q), k.split(pieces.lengths_k), v.split(pieces.lengths_k)
    for q_piece, k_piece, v_piece in zip(*tensors, strict=True):
        before = q_piece.new_zeros(len(k_piece) - len(q_piece), *q_piece.shape[1:])
        whole = reference.attention(torch.cat([before, q_piece]), k_piece, v_piece, pieces.causal)
        outs.append(whole[len(before) :])
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [True, False])
def test_a_piece_sees_its_own_keys_aligned_at_the_end(causal):
    pieces = make_pieces([7, 1, 12, 5], [30, 9, 12, 6], causal)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, HD, dtype=torch.float64, requires_grad=True)
        for tokens, heads in ((25, NH), (57, NKV), (57, NKV))
    )
    found = varlen_attention(q, k, v, pieces)
    expected = ends_of_documents(q, k, v, pieces)
    grad = torch.randn_like(found)
    assert relative_error(found, expected) < 1e-13
    gradients = (torch.autograd.grad(out, (q, k, v), grad) for out in (found, expected))
    for x, y in zip(*gradients, strict=True):
        assert relative_error(x, y) < 1e-13


@pytest.mark.parametrize("causal", [True, False])
def test_this_torch_has_flash_attention_2_with_our_arguments(causal):
    pieces = make_pieces([100, 156], [300, 156], causal, "meta")
    q = torch.empty(256, 8, HD, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k, v = torch.empty(2, 456, 2, HD, dtype=torch.bfloat16, device="meta").requires_grad_()
    out = kernels._flash_attention_2(q, k, v, pieces)
    assert out.shape == q.shape and out.dtype == q.dtype
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


# FlashAttention-4, without its kernels. The stand-in has the arguments that 4.0.0b36 has up to
# `causal`, in their order, which the test for GPUs at the end compares with the real one.


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    *,
    causal=False,
):
    assert qv is None
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths_q), max(lengths_k))
    pieces = Pieces(lengths_q, lengths_k, causal, cu_seqlens_q, cu_seqlens_k)
    return ends_of_documents(q, k, v, pieces), "log-sum-exp"


@pytest.fixture
def install(monkeypatch):
    """Installs a stand-in of FlashAttention-4: its version, and what its import does."""

    def installed(version, **module):
        monkeypatch.setattr(importlib.metadata, "version", {"flash-attn-4": version}.get)
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        cute = types.SimpleNamespace(**module) if module else None
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

    return installed


@pytest.mark.parametrize("version", ["4.0.0b36", "4.0.0b100", "4.0.0", "4.1.0b2"])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_4_is_taken_and_given_the_pieces(version, causal, install):
    install(version, flash_attn_varlen_func=flash_attn_varlen_func)
    name, kernel = select_kernel("cuda", torch.bfloat16, HD)
    assert name == f"FlashAttention-4 {version}"
    pieces = make_pieces([7, 12], [30, 12], causal)
    q, k, v = (torch.randn(n, heads, HD) for n, heads in ((19, NH), (42, NKV), (42, NKV)))
    assert relative_error(kernel(q, k, v, pieces), varlen_attention(q, k, v, pieces)) < 1e-6


def test_a_package_that_is_absent_too_old_or_broken_is_left_alone(install):
    assert kernels.flash_attention_4_obstacle(HD) == "it is not installed"
    for version in ("4.0.0b8", "4.0.0b35", "3.9.0"):
        install(version, flash_attn_varlen_func=flash_attn_varlen_func)
        assert kernels.flash_attention_4_obstacle(HD) == f"version {version} is too old"
    install("4.0.0b36")
    assert "importing it failed" in kernels.flash_attention_4_obstacle(HD)
    assert select_kernel("cuda", torch.bfloat16, HD)[0].startswith("FlashAttention-2")


def test_other_gpus_and_sizes_take_flash_attention_2_and_float32_neither(install, monkeypatch):
    install("4.0.0b36", flash_attn_varlen_func=flash_attn_varlen_func)
    assert "head_dim 64 and 128" in kernels.flash_attention_4_obstacle(96)
    assert select_kernel("cuda", torch.bfloat16, 96)[0].startswith("FlashAttention-2")
    assert select_kernel("cuda", torch.float32, 64)[0] == "scaled_dot_product_attention"
    assert select_kernel("cpu", torch.bfloat16, 64)[0] == "scaled_dot_product_attention"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    select_kernel.cache_clear()
    assert select_kernel("cuda", torch.bfloat16, 64)[0].startswith("FlashAttention-2")


@pytest.mark.gpu
def test_flash_attention_4_has_the_arguments_of_the_stand_in():
    cute = pytest.importorskip("flash_attn.cute", reason="needs FlashAttention-4")
    found, real = (
        list(inspect.signature(function).parameters)
        for function in (flash_attn_varlen_func, cute.flash_attn_varlen_func)
    )
    assert found[:8] == real[:8] and "causal" in real
