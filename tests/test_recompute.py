"""Recomputation changes no value, and keeps what it should."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import math
import weakref

import pytest
import torch
from conftest import ROOT, SMALL, gpus, relative_error, run_model, torchrun
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configuration_llama import LlamaConfig
from context_parallel import native
from modeling_llama import LlamaForCausalLM
from support import recompute
from support.recompute import apply_compile, apply_recompute

MODES = ["none", "selective", "full"]
CONFIG = dataclasses.replace(SMALL, tie_word_embeddings=False)


def build(mode: str, config: LlamaConfig = CONFIG, compiled: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    apply_recompute(model, mode)
    if compiled:
        apply_compile(model)
    return model


def run_and_differentiate(model, cp_group) -> dict[str, torch.Tensor]:
    """Returns the gradients of two documents' loss, by the parameters' names."""
    torch.manual_seed(3)
    tokens, labels = torch.randint(model.config.vocab_size, (2, 60))
    run_model(model, tokens, [20, 40], cp_group, labels=labels).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("slice_size", [7, 64])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_recomputation_slices_and_compilation_change_no_gradient(
    mode, compiled, slice_size, cp_group, monkeypatch
):
    monkeypatch.setattr(recompute, "MLP_SLICE_SIZE", slice_size)
    expected = run_and_differentiate(build("none"), cp_group)
    found = run_and_differentiate(build(mode, compiled=compiled), cp_group)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert relative_error(grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["model.embed_tokens", "lm_head", "model.layers.0", "model"])
def test_frozen_parts_cut_no_other_gradient_off(frozen, mode, cp_group):
    expected = run_and_differentiate(build("none"), cp_group)
    model = build(mode)
    model.get_submodule(frozen).requires_grad_(False)
    found = run_and_differentiate(model, cp_group)
    trained = {name for name in expected if not name.startswith(f"{frozen}.")}
    assert found.keys() == trained
    for name in trained:
        assert relative_error(found[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("mode", MODES)
def test_hooks_fire_and_replaced_modules_are_used(mode, cp_group):
    class Halved(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args) / 2

    plain, model = build("none"), build(mode)
    for changed in (plain, model):
        for layer in changed.model.layers:
            layer.mlp, layer.self_attn = Halved(layer.mlp), Halved(layer.self_attn)
    called = []
    for name in ("self_attn", "mlp"):
        module = getattr(model.model.layers[0], name)
        module.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    expected, found = run_and_differentiate(plain, cp_group), run_and_differentiate(model, cp_group)
    assert set(called) == {"self_attn", "mlp"}
    for name, grad in found.items():
        assert relative_error(grad, expected[name]) < 1e-6, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_dropout_drops_the_same_again(mode, compiled, cp_group, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for model in (build("none"), build(mode, compiled=compiled)):
        for layer in model.model.layers:
            for parent, name in [(layer.self_attn, "v_proj"), (layer, "self_attn"), (layer, "mlp")]:
                parent.add_module(name, Dropped(getattr(parent, name)))
        found.append(run_and_differentiate(model, cp_group))
    for name, grad in found[1].items():
        assert relative_error(grad, found[0][name]) < 1e-5, name


class Dropped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return nn.functional.dropout(self.module(*args), 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_can_be_asked_for_by_name(mode, cp_group):
    """`torch.autograd.grad` and hooks on a parameter work as without recomputation."""
    expected = run_and_differentiate(build("none"), cp_group)
    model = build(mode)
    torch.manual_seed(3)
    tokens, labels = torch.randint(model.config.vocab_size, (2, 60))
    weight, hooked = model.model.layers[1].mlp.up_proj.weight, []
    weight.register_hook(lambda grad: hooked.append(grad))
    loss = run_model(model, tokens, [20, 40], cp_group, labels=labels).sum()
    (grad,) = torch.autograd.grad(loss, [weight])
    assert len(hooked) == 1
    assert relative_error(grad, expected["model.layers.1.mlp.up_proj.weight"]) < 1e-6


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("mode, kernels", [("none", 1), ("selective", 1), ("full", 2)])
def test_each_mode_keeps_and_computes_what_it_says(mode, kernels, gathers, cp_group, monkeypatch):
    """In floats. The attention's output is as large as a layer's input, x. On a CPU, `native` keeps
    each piece's output too.
    """
    monkeypatch.setattr(recompute, "MLP_SLICE_SIZE", 64)
    calls = count_calls(monkeypatch)
    change_keys(monkeypatch, gathers=gathers)
    config = dataclasses.replace(CONFIG, intermediate_size=1000)
    model = build(mode, config)
    tokens, labels = torch.randint(config.vocab_size, (2, 512))
    with Live() as live:
        hidden = run_model(model, tokens, [512], cp_group)
        kept = live.bytes() // 4 - hidden.numel()
        hidden.sum().backward()
    assert len(calls) == kernels * config.num_hidden_layers

    x, mlp = 512 * config.hidden_size, 512 * 1000
    per_layer = {"full": x, "selective": 3 * x + 512 * config.num_attention_heads}
    others = 3 * x + 4 * 512 * config.head_dim  # of the final norm, and RoPE
    if mode == "none":
        assert kept > config.num_hidden_layers * 3 * mlp
    else:
        assert kept <= config.num_hidden_layers * per_layer[mode] + others
        assert live.largest < mlp


def test_a_compiled_run_may_have_many_shapes(cp_group, monkeypatch):
    """Documents decide how many tokens a rank gets. Each shape is compiled, also without grad."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)  # torch's own is 8
    model = build("none", dataclasses.replace(CONFIG, num_hidden_layers=1), compiled=True)
    for tokens in range(1, 4):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                run_model(model, torch.arange(tokens), [tokens], cp_group)


@pytest.mark.parametrize("mode", MODES)
def test_another_key_compiles_nothing_again(mode, cp_group, monkeypatch):
    """Each batch has a key. torch 2.11 guarded its fields, which took 0.2 s of each step."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = build(mode, compiled=True)
    run_and_differentiate(model, cp_group)
    change_keys(monkeypatch, key_slices=[slice(0, 20), slice(20, 60)])
    with torch.compiler.set_stance("fail_on_recompile"):
        run_and_differentiate(model, cp_group)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_leaves_out_the_last_product(mode, cp_group):
    """Counted by torch: each matrix product of a layer once more, except down_proj's."""
    counted = {}
    for each in ("none", mode):
        model = build(each)
        with FlopCounterMode(display=False) as counter:
            run_and_differentiate(model, cp_group)
        counted[each] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    layer = model.model.layers[0]
    products = [m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)]
    again = sum(products) - layer.mlp.down_proj.weight.numel()
    assert counted[mode] - counted["none"] == 2 * 60 * again * CONFIG.num_hidden_layers


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_memory_of_a_recomputing_layer_s_backward(mode, cp_group, monkeypatch):
    """In sizes of its input: q, k and v, their gradients (5 / 3 each), the attention's output, its
    gradient, and the gradients of both halves. On a CPU also the pieces' gradients while they are
    concatenated. All else belongs to a slice, and ends with it.
    """
    monkeypatch.setattr(recompute, "MLP_SLICE_SIZE", 64)
    layer = build(mode).model.layers[0]
    x = torch.randn(4096, CONFIG.hidden_size, requires_grad=True)
    cos, sin = torch.randn(2, 4096, CONFIG.head_dim // 2)
    cu_seqlens = torch.arange(0, 4097, 64, dtype=torch.int32)
    key = native.magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, 6, 2, CONFIG.head_dim, 0, cp_group, causal=True
    )
    y = layer(x, cos, sin, key)
    grad = torch.ones_like(y)
    with Live() as live:
        y.backward(grad)
    assert live.peak / x.nbytes < 2 * 5 / 3 + 5 + 0.25


class KeepsItsOutput(torch.autograd.Function):
    """Stands for a GPU's kernel, whose backward takes its output. It computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v, pieces):
        out = q + 1
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        return grad, torch.zeros_like(k), torch.zeros_like(v), None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_that_is_no_longer_needed_is_freed_at_once(
    mode, gathers, backward, cp_group, monkeypatch
):
    """Also without its backward, as after an error: no reference cycle waits for gc."""
    monkeypatch.setattr(native, "select_kernel", lambda *args: ("kernel", KeepsItsOutput.apply))
    change_keys(monkeypatch, gathers=gathers)
    model = build(mode)
    gc.collect()
    gc.disable()
    try:
        with Live() as live:
            logits = run_model(model, torch.arange(64), [64], cp_group)
            if backward:
                logits.sum().backward()
                model.zero_grad()
            del logits
            assert live.bytes() == 0
    finally:
        gc.enable()


def count_calls(monkeypatch) -> list:
    """Returns a list that grows with each call of `native`'s attention."""
    calls, calc_attn = [], native.calc_attn

    def counted(*args):
        calls.append("attention")
        return calc_attn(*args)

    monkeypatch.setattr(native, "calc_attn", counted)
    return calls


def change_keys(monkeypatch, **changes) -> None:
    """Changes fields of keys. With gathers=True, one process gathers as a cp group does."""
    build_key = native.magi_attn_varlen_key

    def with_changes(*args, **kwargs):
        return dataclasses.replace(build_key(*args, **kwargs), **changes)

    monkeypatch.setattr("conftest.magi_attn_varlen_key", with_changes)


class Live(TorchDispatchMode):
    """Notes which storages operations make: the bytes alive now, the peak, the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.peak, self.largest = {}, 0, 0

    def bytes(self) -> int:
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, tensor.numel())
                if storage.data_ptr() not in known:
                    self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return out


class Streams:
    """Stands for CUDA's streams, without a GPU: copies are made as late as the waits for events
    allow, and memory that is free before its copy is an error. On an H100 the real ones gave the
    same gradients bit for bit (`pytest -m gpu`, below).
    """

    def __init__(self) -> None:
        self.copies, self.made, self.errors, self.is_ordered = [], 0, [], False

    def wait_stream(self, other) -> None:
        self.is_ordered = True

    @contextlib.contextmanager
    def copying(self, stream):
        """Stands for `torch.cuda.stream`."""
        if not self.is_ordered:
            self.errors.append("copies do not wait for kernels that use the memory")

        def copy_(target, source, non_blocking):
            storages = [StorageWeakRef(x.untyped_storage()) for x in (target, source)]
            addresses = target.data_ptr(), source.data_ptr(), source.nbytes
            self.copies.append((storages, addresses))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", copy_)
            yield
        self.is_ordered = False

    def record_event(self) -> int:
        return len(self.copies)

    def wait_event(self, event: int) -> None:
        for storages, addresses in self.copies[self.made : event]:
            if any(storage.expired() for storage in storages):
                self.errors.append("memory is free before it is copied")
            else:
                ctypes.memmove(*addresses)
        self.made = max(self.made, event)


@pytest.fixture
def host(monkeypatch):
    """Yields what a model that is built from now on offloads to."""
    empty, empty_like, streams, blocks = torch.empty, torch.empty_like, Streams(), []

    def counted(*args, pin_memory=False, **kwargs):
        x = empty(*args, **kwargs)
        blocks.extend([x] if pin_memory else [])
        return x

    def on_gpu(x, device=None, **kwargs):
        y = empty_like(x, device="cpu" if device else None, **kwargs)
        return y.fill_(math.nan) if device else y

    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams)
    monkeypatch.setattr(torch.cuda, "stream", streams.copying)
    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(torch, "empty_like", on_gpu)
    monkeypatch.setattr(recompute, "HOST_BLOCK_SIZE", 1024)
    monkeypatch.setattr(recompute, "SMALLEST_OFFLOADED", 1024)
    made = recompute._Host()
    monkeypatch.setattr(recompute, "_Host", lambda: made)
    yield made
    gc.collect()
    streams.wait_event(len(streams.copies))
    assert streams.copies
    assert streams.errors == []
    free = sorted(block.data_ptr() for block in made.free)
    assert free == sorted(block.data_ptr() for block in blocks), "each block is free, once"


def build_offloading(mode: str, **keys) -> LlamaForCausalLM:
    model = build("none", **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        apply_recompute(model, mode, offload=True)
    return model


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_changes_no_gradient_and_uses_its_memory_again(
    mode, gathers, host, cp_group, monkeypatch
):
    monkeypatch.setattr(native, "select_kernel", lambda *args: ("kernel", KeepsItsOutput.apply))
    change_keys(monkeypatch, gathers=gathers)
    expected = run_and_differentiate(build(mode), cp_group)
    model, blocks = build_offloading(mode), []
    for _ in range(2):
        model.zero_grad()
        found = run_and_differentiate(model, cp_group)
        with torch.no_grad():
            run_model(model, torch.arange(60), [60], cp_group)
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), name
        blocks.append({block.data_ptr() for block in host.free})
    assert blocks[0] == blocks[1]
    # Inputs of 60 x 48 and outputs of as many numbers, 11.25 blocks each; 60 x 6 log-sum-exps.
    each = {"full": 12, "selective": 12 + 12}[mode]
    assert len(blocks[0]) == each * (CONFIG.num_hidden_layers - 1)


@pytest.mark.parametrize("mode, kept", [("full", 1), ("selective", 2)])
def test_offload_keeps_the_last_layer_and_brings_one_back_ahead(
    mode, kept, host, cp_group, monkeypatch
):
    """In sizes of a layer's input, which the attention's output has too."""
    monkeypatch.setattr(native, "select_kernel", lambda *args: ("kernel", KeepsItsOutput.apply))
    config = dataclasses.replace(CONFIG, num_hidden_layers=4)
    model, made, seen = build_offloading(mode, config=config), [], []
    init = recompute._Offloaded.__init__

    def noted(self, host):
        init(self, host)
        made.append(weakref.ref(self))

    monkeypatch.setattr(recompute._Offloaded, "__init__", noted)

    def on_device() -> list[int]:
        layers = [ref() for ref in made]
        return [sum(not x.is_meta for x in y.kept.values()) if y else 0 for y in layers]

    run_again = recompute._Recomputed._run_again
    monkeypatch.setattr(
        recompute._Recomputed,
        "_run_again",
        lambda self: (run_again(self), seen.append(on_device())),
    )
    tokens = torch.arange(60)
    hidden = run_model(model, tokens, [60], cp_group)
    assert on_device() == [0, 0, 0, kept]
    hidden.sum().backward()
    assert seen == [[0, 0, kept, kept], [0, kept, kept, 0], [kept, kept, 0, 0], [kept, 0, 0, 0]]
    assert on_device() == [0, 0, 0, 0]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_survives_what_a_trainer_may_do(mode, host, cp_group):
    """Two forwards before their backwards; a backward that ends early; a graph that is dropped."""
    tokens, labels = torch.randint(CONFIG.vocab_size, (2, 60))

    def gradients(model):
        losses = [
            run_model(model, x, [20, 40], cp_group, labels=labels).sum()
            for x in (tokens, tokens.flip(0))
        ]
        losses[0].backward()
        losses[1].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, model = gradients(build(mode)), build_offloading(mode)
    loss = run_model(model, tokens, [60], cp_group, labels=labels).sum()
    weight = model.model.layers[1].mlp.up_proj.weight
    torch.autograd.grad(loss, [weight])
    run_model(model, tokens, [60], cp_group)
    found = gradients(model)
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name

    def count() -> int:
        return sum(isinstance(x, recompute._Offloaded) for x in gc.get_objects())

    del loss
    before = count()
    first, second = (run_model(model, tokens, [60], cp_group).sum() for _ in range(2))
    first.backward()
    del first
    assert count() - before == CONFIG.num_hidden_layers, "the second graph holds its own layers"
    second.backward()
    del second
    free = len(host.free)
    gradients(model)
    assert len(host.free) == free


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("index", range(CONFIG.num_hidden_layers))
@pytest.mark.parametrize("at_backward", [False, True])
def test_offload_survives_an_error_in_a_layer(at_backward, index, mode, host, cp_group):
    expected, model = run_and_differentiate(build(mode), cp_group), build_offloading(mode)
    mlp = model.model.layers[index].mlp

    def broken(x):
        if not at_backward or torch._C._current_graph_task_id() >= 0:
            raise RuntimeError("out of memory, say")
        return type(mlp).forward(mlp, x)

    mlp.forward = broken
    with pytest.raises(RuntimeError, match="out of memory, say"):
        run_and_differentiate(model, cp_group)
    del mlp.forward
    model.zero_grad()
    for name, grad in run_and_differentiate(model, cp_group).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", ["native", "magi_attention"])
@pytest.mark.parametrize("processes, length", [(1, 64), (2, 0)])
def test_offload_on_gpus_adds_no_error_and_no_wait(processes, length, backend, mode):
    """With documents of 64 tokens the kernels add up in one order, and gradients are equal."""
    if backend == "magi_attention":
        pytest.importorskip("magi_attention")
    arguments = ROOT / "tests/offload_worker.py", backend, mode, length
    said = torchrun(processes, *arguments, CUDA_VISIBLE_DEVICES=gpus(processes)).stdout
    print(said.splitlines()[-1])
    if backend == "native" and length:
        assert "with it 0.0e+00" in said
