"""The model against transformers' LlamaForCausalLM and against the reference in float64."""

import dataclasses
import functools
import gc
import math

import pytest
import reference
import torch
import transformers
from conftest import relative_error
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import context_parallel
import modeling_llama
from configuration_llama import LLAMA_32_ROPE, PRESETS, LlamaConfig
from context_parallel import native
from context_parallel.native import magi_attn_varlen_key
from modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaHead, rope_cos_sin

SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.2,
)
CONFIGS = {
    "grouped_query_tied": SMALL,
    "untied": dataclasses.replace(SMALL, tie_word_embeddings=False),
    "multi_head": dataclasses.replace(SMALL, num_key_value_heads=6),
    "multi_query_wide_heads": dataclasses.replace(SMALL, num_key_value_heads=1, head_dim=16),
    # Short original length, so that kept, blended and stretched frequencies all occur.
    "rope_scaling": dataclasses.replace(
        SMALL,
        rope_theta=10_000.0,
        rope_scaling={**LLAMA_32_ROPE, "factor": 8.0, "original_max_position_embeddings": 64},
    ),
}


def run_model(model, tokens, lengths, cp_group, labels=None):
    """Runs a packed sequence on one process; returns logits or loss sum in stream order."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    config = model.config
    key = magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        num_heads_q=config.num_attention_heads,
        num_heads_kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        pad_size=0,
        cp_group_or_mesh=cp_group,
        causal=config.is_causal,
    )
    pad = key.pad_size
    tokens, positions = (torch.nn.functional.pad(x, (0, pad)) for x in (tokens, positions))
    if labels is not None:
        labels = torch.nn.functional.pad(labels, (0, pad), value=-100)
        return model(tokens, positions, key, labels)
    return model(tokens, positions, key)[: len(tokens) - pad]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name, cp_group):
    config = CONFIGS[name]
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_hf(), attn_implementation="eager")
    ).float()
    for param in theirs.parameters():  # norms too: a weight of 1 would hide a missing one
        torch.nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.2)
    ours = LlamaForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())

    tokens = torch.randint(config.vocab_size, (150,))
    their_logits = theirs(tokens[None]).logits[0]
    our_logits = run_model(ours, tokens, [150], cp_group)
    assert relative_error(our_logits, their_logits) < 1e-5

    weight = torch.randn_like(their_logits)
    (their_logits * weight).sum().backward()
    (our_logits * weight).sum().backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    our_grads = {n: p.grad for n, p in ours.named_parameters()}
    assert our_grads.keys() == their_grads.keys()
    for param_name, grad in our_grads.items():
        assert relative_error(grad, their_grads[param_name]) < 1e-5, param_name


@pytest.mark.parametrize("is_causal", [True, False])
def test_documents_do_not_see_each_other(is_causal, cp_group):
    """Packed documents equal the reference, which gets them one at a time."""
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIGS["rope_scaling"], is_causal=is_causal)
    model = LlamaForCausalLM(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.2)
    lengths = [1, 40, 2, 1, 77, 13]
    tokens = torch.randint(config.vocab_size, (sum(lengths),))
    logits = run_model(model, tokens, lengths, cp_group)

    weights = {name: value.double() for name, value in model.state_dict().items()}
    expected = [reference.logits(weights, doc, config) for doc in tokens.split(lengths)]
    assert relative_error(logits, torch.cat(expected)) < 1e-5


@pytest.mark.parametrize("slice_size", [7, 64, 2048])
@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
def test_slices_and_recomputation_change_no_gradient(
    slice_size, activation_checkpointing, cp_group, monkeypatch
):
    monkeypatch.setattr(modeling_llama, "LOSS_SLICE_SIZE", slice_size)
    monkeypatch.setattr(modeling_llama, "LAYER_SLICE_SIZE", slice_size)
    torch.manual_seed(2)
    config = CONFIGS["untied"]
    model = LlamaForCausalLM(config)
    tokens, labels = torch.randint(config.vocab_size, (2, 60))
    labels[10:20] = -100

    logits = run_model(model, tokens, [20, 40], cp_group)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    expected_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    for layer in model.model.layers:
        layer.activation_checkpointing = activation_checkpointing
    loss_sum = run_model(model, tokens, [20, 40], cp_group, labels=labels)
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    for param, grad in zip(model.parameters(), expected_grads, strict=True):
        assert relative_error(param.grad, grad) < 1e-5


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("frozen", ["model.embed_tokens", "lm_head", "model.layers.0", "model"])
def test_what_is_frozen_cuts_nothing_else_off(frozen, activation_checkpointing, cp_group):
    torch.manual_seed(3)
    model = LlamaForCausalLM(CONFIGS["untied"], activation_checkpointing)
    tokens, labels = torch.randint(model.config.vocab_size, (2, 60))
    run_model(model, tokens, [20, 40], cp_group, labels=labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.get_submodule(frozen).requires_grad_(False)
    run_model(model, tokens, [20, 40], cp_group, labels=labels).backward()
    for name, param in model.named_parameters():
        if name.startswith(f"{frozen}."):
            assert param.grad is None, name
        else:
            assert relative_error(param.grad, expected[name]) < 1e-6, name


@pytest.mark.parametrize(
    "activation_checkpointing, calls", [("none", 1), ("selective", 1), ("full", 2)]
)
def test_what_is_kept_for_backward_and_what_is_computed_again(
    activation_checkpointing, calls, cp_group, monkeypatch
):
    monkeypatch.setattr(modeling_llama, "LAYER_SLICE_SIZE", 64)
    calls_found, kept = [], {}
    for module in (modeling_llama, context_parallel):
        counted = functools.partial(count_call, calls_found, module.calc_attn)
        monkeypatch.setattr(module, "calc_attn", counted)
    before_attention, with_graph = LlamaDecoderLayer.before_attention, [0]

    def noted(layer, x, *args):
        with_graph.append(len(x) * torch.is_grad_enabled())
        return before_attention(layer, x, *args)

    monkeypatch.setattr(LlamaDecoderLayer, "before_attention", noted)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    config = dataclasses.replace(SMALL, intermediate_size=1000)
    model = LlamaForCausalLM(config, activation_checkpointing)
    tokens, labels = torch.randint(config.vocab_size, (2, 512))
    parameters = {param.untyped_storage().data_ptr() for param in model.parameters()}
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_sum = run_model(model, tokens, [512], cp_group, labels=labels)
        storages = [x.untyped_storage() for ptr, x in kept.items() if ptr not in parameters]
        floats_kept = sum(storage.nbytes() for storage in storages) // 4
        kept.clear()
        loss_sum.backward()
    assert len(calls_found) == calls * config.num_hidden_layers

    layers, x, mlp = config.num_hidden_layers, 512 * config.hidden_size, 512 * 1000
    head = 3 * x + 97 * config.hidden_size  # and the final norm
    if activation_checkpointing == "none":
        assert floats_kept > layers * 3 * mlp
    else:
        out, log_sum_exp = x, 512 * config.num_attention_heads
        per_layer = {"full": x, "selective": x + out + log_sum_exp}
        angles = 4 * 512 * config.head_dim
        assert floats_kept <= layers * per_layer[activation_checkpointing] + head + angles
        assert largest.elements < mlp
        assert max(with_graph) == 64


@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
def test_recomputation_leaves_out_the_last_product(activation_checkpointing, cp_group):
    """Counted by torch: every matrix product of a layer once more, but that of down_proj."""
    tokens, labels = torch.randint(SMALL.vocab_size, (2, 512))
    counted = {}
    for mode in ("none", activation_checkpointing):
        model = LlamaForCausalLM(SMALL, mode)
        with FlopCounterMode(display=False) as counter:
            run_model(model, tokens, [512], cp_group, labels=labels).backward()
        counted[mode] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    layer = model.model.layers[0]
    products = [m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    again = sum(products) - layer.mlp.down_proj.weight.numel()
    expected = 2 * 512 * again * SMALL.num_hidden_layers
    assert counted[activation_checkpointing] - counted["none"] == expected


def test_a_compiled_layer_that_recomputes_keeps_its_input_but_not_the_norm_of_it():
    """For the backward of the half before the attention, through which memory is shortest."""
    layer = LlamaForCausalLM(SMALL, "full").model.layers[0]
    before_attention = torch.compile(layer.before_attention, backend="aot_eager_decomp_partition")
    x = torch.randn(512, SMALL.hidden_size, requires_grad=True)
    cos, sin = torch.randn(2, 512, SMALL.head_dim // 2)
    known = {tensor.data_ptr() for tensor in (*layer.parameters(), x, cos, sin)}
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        before_attention(x, cos, sin)
    assert x.data_ptr() in kept
    assert sum(numel for ptr, numel in kept.items() if ptr not in known) <= 512  # a scalar a token


def test_the_memory_of_a_recomputing_layer_s_backward(cp_group, monkeypatch):
    """In sizes of its input: q, k and v, their gradients (5 / 3 each), the attention's output, its
    gradient and that of the input; not compiled also the norm of the input; on a CPU the pieces'
    gradients while they are put together. All else belongs to a slice, and ends with it.
    """
    monkeypatch.setattr(modeling_llama, "LAYER_SLICE_SIZE", 64)
    layer = LlamaForCausalLM(SMALL, "full").model.layers[0]
    x = torch.randn(4096, SMALL.hidden_size, requires_grad=True)
    cos, sin = torch.randn(2, 4096, SMALL.head_dim // 2)
    cu_seqlens = torch.arange(0, 4097, 64, dtype=torch.int32)
    key = magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, 6, 2, SMALL.head_dim, 0, cp_group, causal=True
    )
    y = layer(x, cos, sin, key)
    grad = torch.ones_like(y)
    with Live() as live:
        y.backward(grad)
    assert live.peak / x.nbytes < 2 * 5 / 3 + 5 + 0.25


def test_an_attention_of_selective_keeps_none_of_its_inputs_and_gives_their_gradients(cp_group):
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
    attention = modeling_llama._Attention(q, k, wide[:, 1:3], key)
    kept = [StorageWeakRef(x.untyped_storage()) for x in (q, k, wide)]
    del q, k, v, wide
    assert all(x.expired() for x in kept)
    assert torch.equal(attention.out, out)
    found = attention.gradients(inputs, grad)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


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


@pytest.mark.parametrize("gathers", [False, True])
def test_an_attention_that_nobody_needs_any_more_is_freed_at_once(gathers, cp_group, monkeypatch):
    """Without its backward, too: as after an error, or a forward that was for its loss alone."""
    monkeypatch.setattr(native, "select_kernel", lambda *args: ("kernel", KeepsItsOutput.apply))
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 0, cp_group, causal=True)
    key = dataclasses.replace(key, gathers=gathers)
    attention = modeling_llama._Attention(*(torch.randn(64, heads, 64) for heads in (4, 2, 2)), key)
    out = StorageWeakRef(attention.out.untyped_storage())
    gc.disable()
    try:
        del attention
        assert out.expired()
    finally:
        gc.enable()


def count_call(calls, function, *args):
    calls.append(function)
    return function(*args)


class Live(TorchDispatchMode):
    """Notes the most bytes that live at a time, of what operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return out


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_exist_for_one_slice_at_a_time(cp_group, monkeypatch):
    """In forward and backward; and forward keeps none of them for backward."""
    monkeypatch.setattr(modeling_llama, "LOSS_SLICE_SIZE", 16)
    config = dataclasses.replace(SMALL, vocab_size=5000)  # larger than all that is not logits
    model = LlamaForCausalLM(config)
    tokens, labels = torch.randint(config.vocab_size, (2, 256))
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run_model(model, tokens, [100, 156], cp_group, labels=labels).backward()
    assert largest.elements == config.vocab_size * config.hidden_size  # the weight, not 256 logits
    assert 16 * config.vocab_size not in kept


def test_the_head_s_gradient_adds_up_in_float32():
    """64 products of bfloat16, each far smaller than their sum; a bfloat16 sum is 0.7 % off."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 64, 8, 16).bfloat16()
    total = None
    for a_part, b_part in zip(a, b, strict=True):
        total = modeling_llama._add_product(total, a_part.T, b_part)
    expected = torch.einsum("ink,inl->kl", a.double(), b.double())
    assert total.dtype == torch.float32
    assert relative_error(total, expected) < 1e-3


def test_a_loss_without_gradients_computes_none(cp_group, monkeypatch):
    """As in an evaluation: no second and third product with the head."""
    monkeypatch.setattr(modeling_llama, "_add_product", None)
    model = LlamaForCausalLM(SMALL)
    tokens, labels = torch.randint(SMALL.vocab_size, (2, 64))
    with torch.no_grad():
        loss_sum = run_model(model, tokens, [64], cp_group, labels=labels)
        logits = run_model(model, tokens, [64], cp_group)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_that_are_all_ignored_give_zero_and_no_nan(cp_group):
    model = LlamaForCausalLM(SMALL)
    labels = torch.full((16,), -100)
    loss_sum = run_model(model, torch.arange(16), [16], cp_group, labels=labels)
    loss_sum.backward()
    assert loss_sum.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_an_ignored_label_hides_logits_that_are_not_finite():
    logits = torch.randn(3, 97)
    logits[1, 5] = torch.inf
    loss, gradient = LlamaHead.cross_entropy(logits, torch.tensor([4, -100, 96]))
    expected = torch.nn.functional.cross_entropy(
        logits[::2], torch.tensor([4, 96]), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()


def test_rope_angles_stay_exact_at_a_million_tokens():
    """Against Python's own arithmetic; an angle in float32 would be off by hundredths here."""
    config = PRESETS["tiny"]
    position = 1_048_575
    cos, sin = rope_cos_sin(config, torch.tensor([position]))
    for i in range(config.head_dim // 2):
        angle = position * config.rope_theta ** (-2 * i / config.head_dim)
        assert cos[0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
