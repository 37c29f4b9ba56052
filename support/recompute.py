"""Less memory and less time for a plain model: recomputation, and torch.compile.

Both are applied from outside, before FSDP, and change no value:

    apply_recompute(model, "selective")
    apply_compile(model)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from context_parallel import calc_attn
from context_parallel.native import not_saved

MLP_SLICE_SIZE = 16_384  # tokens whose MLP activations exist at a time


def apply_recompute(model: nn.Module, mode: str) -> None:
    """Makes each decoder layer keep little from forward to backward, and compute the rest again.

    mode: "full" keeps a layer's input, [s, h]; "selective" also attention's output and log-sum-exp,
    and so runs its kernel once; "none" changes nothing.
    """
    if mode != "none":
        for layer in model.model.layers:
            layer.forward = _RecomputingForward(layer, keeps_attention=mode == "selective")


def apply_compile(model: nn.Module) -> None:
    """Compiles the loss and each decoder layer, except `calc_attn`."""
    # Each shape is compiled by itself, for all layers at once. Too many shapes are an error, where
    # torch would continue without compiled code.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = partial(torch.compile, dynamic=False)
    tuned = {"coordinate_descent_tuning": True}  # tries block sizes, which takes a second
    model.lm_head.cross_entropy = compiled(model.lm_head.cross_entropy, options=tuned)
    for layer in model.model.layers:
        if isinstance(layer.forward, _RecomputingForward):
            layer.forward.compile(compiled)
        else:
            layer.forward = partial(_unguarded, compiled(layer.forward))


def _unguarded(forward: Callable, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object):
    return forward(x, cos, sin, _Unguarded(runtime_key))


class _Unguarded:
    """Attention by a runtime key. `calc_attn` calls it, in place of a backend.

    torch.compile guards each field of a runtime key, since that is a dataclass, and so would
    compile again for each batch. Of this object it guards the type.
    """

    def __init__(self, runtime_key: object) -> None:
        self.runtime_key = runtime_key

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return calc_attn(q, k, v, self.runtime_key)[0]


class _RecomputingForward:
    """A decoder layer's forward, as two halves.

    Backward needs the output of the attention half for the MLP, and then all of that half. The MLP
    half goes slice by slice: its activations are 12 times as large as its input.
    """

    def __init__(self, layer: nn.Module, keeps_attention: bool) -> None:
        self.layer, self.keeps_attention = layer, keeps_attention
        self.attention_half, self.mlp_half = _attention_half, _mlp_half

    def compile(self, compiled: Callable) -> None:
        norm = self.layer.input_layernorm
        norm.forward = compiled(norm.forward)
        self.attention_half, self.mlp_half = compiled(_attention_half), compiled(_mlp_half)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        attention = _Attention(runtime_key, self.keeps_attention)
        half = partial(self.attention_half, self.layer, cos=cos, sin=sin, attention=attention)
        first_half = _Recomputed(self.layer.input_layernorm, half, x)
        x = first_half.run()
        with not_saved([x], first_half.output_again):
            return torch.cat([self.mlp_half(self.layer, part) for part in x.split(MLP_SLICE_SIZE)])


def _attention_half(layer: nn.Module, x: Tensor, normed: Tensor, cos, sin, attention) -> Tensor:
    return x + layer.self_attn(normed, cos, sin, attention)


def _mlp_half(layer: nn.Module, x: Tensor) -> Tensor:
    def half(x: Tensor) -> Tensor:
        return x + layer.mlp(layer.post_attention_layernorm(x))

    # Neither torch.compile nor eager mode computes the last product, of down_proj, again.
    return checkpoint(half, x, use_reentrant=False)


class _Recomputed:
    """Runs a function for which autograd saves no tensors.

    Backward runs it once more, from the same random states. It then gets the tensors from that run,
    in the order of the first, and the output, which the MLP half needs.
    """

    def __init__(self, norm: Callable, function: Callable, x: Tensor) -> None:
        """norm: x -> normed, cheap, so recomputed later still. function: x, normed -> output."""
        self.norm, self.function, self.x = norm, function, x
        self.num_saved, self.saved, self.output, self.normed = 0, {}, None, None
        self.cpu_rng, self.device_rng = torch.get_rng_state(), get_device_states(x)

    def run(self) -> Tensor:
        with saved_tensors_hooks(self._count, self._saved_again):
            return self.function(self.x, self.norm(self.x))

    def output_again(self) -> tuple[Tensor]:
        if self.output is None:
            self._run_again()
        return (self.output,)

    def _count(self, tensor: Tensor) -> int:
        self.num_saved += 1
        return self.num_saved - 1

    def _saved_again(self, index: int) -> Tensor:
        if index not in self.saved:
            self._run_again()
        self.output = None  # read before, by the other half
        tensor = self.saved.pop(index)
        if isinstance(tensor, Tensor):
            return tensor
        if self.normed is None:
            self.normed = self.norm(self.x.detach())
        return self.normed.as_strided(*tensor)

    def _run_again(self) -> None:
        saved, storage_of_normed = [], None

        def save(tensor: Tensor) -> None:
            if tensor.untyped_storage().data_ptr() == storage_of_normed:
                saved.append((tensor.shape, tensor.stride(), tensor.storage_offset()))
            else:
                saved.append(tensor.detach())

        x = self.x.detach().requires_grad_(self.x.requires_grad)
        devices, states = self.device_rng
        with (
            torch.enable_grad(),
            saved_tensors_hooks(save, _never),
            torch.random.fork_rng(devices, device_type=x.device.type),
        ):
            torch.set_rng_state(self.cpu_rng)
            set_device_states(devices, states, device_type=x.device.type)
            normed = self.norm(x)
            # Not the tensor: its graph holds `save`, which would be a reference cycle.
            storage_of_normed = normed.untyped_storage().data_ptr()
            self.output = self.function(x, normed).detach()
        self.saved = dict(enumerate(saved))


class _Attention:
    """Attention that keeps no q, k and v from forward to backward. `calc_attn` calls it, in place
    of a backend: first in forward, then when backward runs the layer's half again.
    """

    def __init__(self, runtime_key: object, is_kept: bool) -> None:
        """is_kept: keeps the output and log-sum-exp of forward, so that its kernel runs once."""
        self.runtime_key, self.is_kept = runtime_key, is_kept
        self.out, self.edges, self.qkv, self.ran = None, [], [], False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.ran:
            self.ran = True
            return _FirstAttention.apply(q, k, v, self)
        if self.out is None:
            self.run(q, k, v)
        self.qkv[:] = map(_in_storage_of_its_own, (q, k, v))
        return self.out.detach().requires_grad_(any(x.requires_grad for x in (q, k, v)))

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Runs forward, in a graph of its own that does not hold q, k and v."""
        again = self.qkv  # not `self` below, which would be a reference cycle
        qkv = [_in_storage_of_its_own(x) for x in (q, k, v)]
        with torch.enable_grad():
            qkv = _Inputs.apply(torch.empty(0, requires_grad=True), *qkv)
            self.edges = [get_gradient_edge(x) for x in qkv]
            with not_saved(qkv, lambda: again):
                self.out, _ = calc_attn(*qkv, self.runtime_key)

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """grad: of the output. Returns the gradients of q, k and v, once."""
        out, self.out = self.out, None
        gradients = torch.autograd.grad(out, self.edges, grad)
        self.qkv.clear()
        return gradients


class _FirstAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, attention):
        ctx.attention = attention
        if attention.is_kept and any(ctx.needs_input_grad):
            attention.run(q, k, v)
            return attention.out.detach()
        return calc_attn(q, k, v, attention.runtime_key)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *ctx.attention.gradients(grad), None


class _Inputs(torch.autograd.Function):
    """The beginning of a graph that does not hold its tensors; leaves would be held."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


def _in_storage_of_its_own(x: Tensor) -> Tensor:
    """Returns x, contiguous, copied where its storage holds more than it."""
    x = x.detach().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _never(packed: object) -> Tensor:
    raise AssertionError("the graph of a recomputation has no backward")
