"""The model against transformers' LlamaForCausalLM and against the reference in float64."""

import dataclasses
import math

import pytest
import reference
import torch
import transformers
from conftest import SMALL, relative_error, run_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modeling_llama
from configuration_llama import LLAMA_32_ROPE, PRESETS
from modeling_llama import LlamaForCausalLM, LlamaHead, rope_cos_sin

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
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
    "linear": dataclasses.replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "yarn": dataclasses.replace(SMALL, rope_scaling=YARN),
    "yarn_with_all_keys": dataclasses.replace(
        SMALL,
        rope_theta=10_000.0,
        rope_scaling={
            **YARN,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
    ),
    "yarn_attention_factor": dataclasses.replace(
        SMALL, rope_scaling={**YARN, "attention_factor": 1.7}
    ),
}


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
@pytest.mark.parametrize("weighted", [False, True])
def test_token_losses_and_their_gradients_equal_pytorch_s(
    slice_size, weighted, cp_group, monkeypatch
):
    """Of their sum, and of a sum in which each token has a weight of its own."""
    monkeypatch.setattr(modeling_llama, "LOSS_SLICE_SIZE", slice_size)
    torch.manual_seed(2)
    model = LlamaForCausalLM(CONFIGS["untied"])
    tokens, labels = torch.randint(model.config.vocab_size, (2, 60))
    labels[10:20] = -100
    weights = torch.rand(60) if weighted else torch.tensor(0.3)

    logits = run_model(model, tokens, [20, 40], cp_group)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected * weights).sum().backward()
    expected_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    losses = run_model(model, tokens, [20, 40], cp_group, labels=labels)
    ((losses * weights).sum() if weighted else losses.sum() * weights).backward()
    assert losses.dtype == torch.float32
    assert relative_error(losses, expected) < 1e-6
    for param, grad in zip(model.parameters(), expected_grads, strict=True):
        assert relative_error(param.grad, grad) < 1e-5


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
        run_model(model, tokens, [100, 156], cp_group, labels=labels).sum().backward()
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
        losses = run_model(model, tokens, [64], cp_group, labels=labels)
        logits = run_model(model, tokens, [64], cp_group)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert relative_error(losses, expected) < 1e-6


def test_labels_that_are_all_ignored_give_zero_and_no_nan(cp_group):
    model = LlamaForCausalLM(SMALL)
    labels = torch.full((16,), -100)
    losses = run_model(model, torch.arange(16), [16], cp_group, labels=labels)
    losses.sum().backward()
    assert (losses == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_an_ignored_label_hides_logits_that_are_not_finite():
    logits = torch.randn(3, 97)
    logits[1, 5] = torch.inf
    losses, gradient = LlamaHead.cross_entropy(logits, torch.tensor([4, -100, 96]))
    expected = torch.nn.functional.cross_entropy(
        logits[::2], torch.tensor([4, 96]), reduction="none"
    )
    assert losses[1] == 0
    assert relative_error(losses[::2], expected) < 1e-6
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
