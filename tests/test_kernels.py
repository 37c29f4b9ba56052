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
from conftest import no_such_package, relative_error

from context_parallel import kernels
from context_parallel.kernels import Pieces, select_kernel

NH, NKV, HD = 4, 2, 64


@pytest.fixture(autouse=True)
def a_hopper(monkeypatch):
    """Every GPU is a Hopper, and what is known of the machine is forgotten."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


def make_pieces(lengths_q, lengths_k, causal, device="cpu") -> Pieces:
    return Pieces(torch.tensor(lengths_q), torch.tensor(lengths_k), causal, device)


def ends_of_documents(q, k, v, lengths_q, lengths_k, causal) -> torch.Tensor:
    """Dense attention of the whole documents, of which the pieces' queries are the ends."""
    outs = []
    tensors = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
    for q_piece, k_piece, v_piece in zip(*tensors, strict=True):
        before = q_piece.new_zeros(len(k_piece) - len(q_piece), *q_piece.shape[1:])
        whole = reference.attention(torch.cat([before, q_piece]), k_piece, v_piece, causal)
        outs.append(whole[len(before) :])
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [True, False])
def test_a_piece_sees_its_own_keys_aligned_at_the_end(causal):
    case = [7, 1, 12, 5], [30, 9, 12, 6], causal
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, HD, dtype=torch.float64, requires_grad=True)
        for tokens, heads in ((25, NH), (57, NKV), (57, NKV))
    )
    _, attention = select_kernel("cpu", q.dtype, HD)
    found = attention(q, k, v, make_pieces(*case))
    expected = ends_of_documents(q, k, v, *case)
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


# FlashAttention-4, without its kernels: a stand-in with the two functions of 4.0.0b36 that we call.
# The arguments that we give by position are the first ones there, and those that we give by name
# exist; the test for GPUs at the end compares both with the real ones.


def flash_attn_varlen_func(q, k, v, *, return_lse, causal, **varlen):
    assert return_lse
    out = ends_of_documents(q, k, v, *lengths_of(**varlen), causal)
    return out, q.sum(dim=-1).T  # in place of the log-sum-exp: whose queries it belongs to


def _flash_attn_bwd(q, k, v, out, dout, lse, *, dq, dk, dv, causal, **varlen):
    assert torch.equal(lse, q.sum(dim=-1).T) and out.shape == dout.shape == q.shape
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = ends_of_documents(*inputs, *lengths_of(**varlen), causal)
    assert torch.allclose(again, out)
    for into, gradient in zip((dq, dk, dv), torch.autograd.grad(again, inputs, dout), strict=True):
        into.copy_(gradient)


def lengths_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert [max_seqlen_q, max_seqlen_k] == list(map(max, lengths))
    return lengths


WORKING = {"flash_attn_varlen_func": flash_attn_varlen_func, "_flash_attn_bwd": _flash_attn_bwd}


@pytest.fixture
def install(monkeypatch):
    """Installs a stand-in of FlashAttention-4: its version, and what its import does."""

    def installed(version, **module):
        monkeypatch.setattr(importlib.metadata, "version", {"flash-attn-4": version}.get)
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        cute = types.SimpleNamespace(**module) if module else None
        for name in ("flash_attn.cute", "flash_attn.cute.interface"):
            monkeypatch.setitem(sys.modules, name, cute)

    return installed


@pytest.mark.parametrize("version", ["4.0.0b36", "4.0.0b100", "4.0.0", "4.1.0b2"])
def test_flash_attention_4_is_taken_where_it_is_new_enough(version, install):
    install(version, **WORKING)
    assert select_kernel("cuda", torch.bfloat16, HD)[0] == f"FlashAttention-4 {version}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("many_tokens", [18, 19])
def test_flash_attention_4_is_given_the_pieces(many_tokens, causal, install, monkeypatch):
    """With many tokens its backward is called for each key/value head, and gives the same."""
    install("4.0.0b36", **WORKING)
    monkeypatch.setattr(kernels, "MANY_TOKENS", many_tokens)
    attentions = [select_kernel(device, torch.bfloat16, HD)[1] for device in ("cuda", "cpu")]
    pieces = make_pieces([7, 12], [30, 12], causal)
    inputs = [
        torch.randn(n, heads, HD, requires_grad=True)
        for n, heads in ((19, NH), (42, NKV), (42, NKV))
    ]
    grad = torch.randn(19, NH, HD)
    found, expected = (
        [out, *torch.autograd.grad(out, inputs, grad)]
        for out in (attention(*inputs, pieces) for attention in attentions)
    )
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-5


def test_a_package_that_is_absent_too_old_or_broken_is_left_alone(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", no_such_package)
    assert kernels.flash_attention_4_obstacle(HD).startswith("it is not installed; `pip install")
    for version in ("4.0.0b8", "4.0.0b35", "3.9.0"):
        install(version, **WORKING)
        assert f"version {version} is older than 4.0.0b36" in kernels.flash_attention_4_obstacle(HD)
    install("4.0.0b36")
    assert "importing it failed" in (obstacle := kernels.flash_attention_4_obstacle(HD))
    assert "pip install -r requirements-gpu.txt" in obstacle
    assert select_kernel("cuda", torch.bfloat16, HD)[0].startswith("FlashAttention-2")


def test_other_gpus_and_sizes_take_flash_attention_2_and_float32_neither(install, monkeypatch):
    install("4.0.0b36", **WORKING)
    assert "head_dim 64 or 128, not 96" in kernels.flash_attention_4_obstacle(96)
    assert select_kernel("cuda", torch.bfloat16, 96)[0].startswith("FlashAttention-2")
    assert select_kernel("cuda", torch.float32, 64)[0] == "scaled_dot_product_attention"
    assert select_kernel("cpu", torch.bfloat16, 64)[0] == "scaled_dot_product_attention"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    select_kernel.cache_clear()
    assert select_kernel("cuda", torch.bfloat16, 64)[0].startswith("FlashAttention-2")


@pytest.mark.gpu
def test_flash_attention_4_has_the_arguments_that_we_give():
    real = pytest.importorskip("flash_attn.cute.interface", reason="needs FlashAttention-4")
    varlen = list(inspect.signature(lengths_of).parameters)
    for function in WORKING.values():
        kinds = inspect.signature(function).parameters
        positional = [name for name, p in kinds.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        by_name = [name for name, p in kinds.items() if p.kind is p.KEYWORD_ONLY]
        theirs = list(inspect.signature(getattr(real, function.__name__)).parameters)
        assert theirs[: len(positional)] == positional
        assert set(theirs) >= {*by_name, *varlen}
