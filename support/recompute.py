"""Less memory and less time for a plain model: recomputation, offload, and torch.compile.

All are applied from outside, before FSDP, and change no value but bfloat16's rounding:

    apply_recompute(model, "selective", offload=True)
    apply_compile(model)

Backward of a recomputing layer, in order:

1. The MLP half needs its input: `_Recomputed.output_again` runs the attention half again, and holds
   what autograd saves.
2. The MLP half runs again and backward, slice by slice.
3. Backward of the attention half takes the held tensors from `_saved_again`, and the gradients of
   q, k and v from `_Attention.gradients`.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from context_parallel import calc_attn
from context_parallel.native import KEEP, not_saved

MLP_SLICE_SIZE = 16_384  # tokens whose MLP activations exist at a time
HOST_BLOCK_SIZE = 2**25  # bytes; PyTorch rounds pinned memory up to a power of two
SMALLEST_OFFLOADED = 2**20  # bytes; a smaller tensor is not worth a block


def apply_recompute(model: nn.Module, mode: str, offload: bool = False) -> None:
    """Makes each decoder layer keep little from forward to backward, and compute the rest again.

    mode: "full" keeps a layer's input, [s, h]; "selective" also attention's output and log-sum-exp,
    so that attention's kernel runs once; "none" changes nothing. offload: keeps it in pinned host
    memory, except on a CPU.
    """
    if mode != "none":
        host = _Host() if offload and torch.cuda.is_available() else None
        for layer in model.model.layers:
            layer.forward = _RecomputingForward(layer, mode == "selective", host)


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
        return calc_attn(q, k, v, self.runtime_key)


class _RecomputingForward:
    """A decoder layer's forward, as two halves.

    Backward needs the output of the attention half for the MLP, and then all of that half. The MLP
    half goes slice by slice: its activations are 12 times as large as its input in llama-1b.
    """

    def __init__(self, layer: nn.Module, keeps_attention: bool, host: "_Host | None") -> None:
        self.layer, self.keeps_attention, self.host = layer, keeps_attention, host
        self.attention_half, self.mlp_half = _attention_half, _mlp_half

    def compile(self, compiled: Callable) -> None:
        norm = self.layer.input_layernorm
        norm.forward = compiled(norm.forward)
        self.attention_half, self.mlp_half = compiled(_attention_half), compiled(_mlp_half)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        offloaded = _Offloaded(self.host) if self.host and torch.is_grad_enabled() else None
        keep = offloaded.keep if offloaded else KEEP.get()
        attention = _Attention(runtime_key, keep if self.keeps_attention else None)
        half = partial(self.attention_half, self.layer, cos=cos, sin=sin, attention=attention)
        first_half = _Recomputed(self.layer.input_layernorm, half, x, keep)
        x = first_half.run(x)
        with not_saved([x], first_half.output_again):
            x = torch.cat([self.mlp_half(self.layer, part) for part in x.split(MLP_SLICE_SIZE)])
        if offloaded:
            offloaded.free_layer_before()
        return x


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

    def __init__(self, norm: Callable, function: Callable, x: Tensor, keep: Callable) -> None:
        """norm: x -> normed; it is cheap, so it runs a third time. function: x, normed -> output.
        keep: x -> a function for backward that returns x, as KEEP.
        """
        self.norm, self.function = norm, function
        self.x, self.needs_grad = keep(x), x.requires_grad
        self.num_saved, self.saved, self.output, self.normed = 0, {}, None, None
        self.cpu_rng, self.device_rng = torch.get_rng_state(), get_device_states(x)

    def run(self, x: Tensor) -> Tensor:
        with saved_tensors_hooks(self._count, self._saved_again):
            return self.function(x, self.norm(x))

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
            self.normed = self.norm(self.x())
        return self.normed.as_strided(*tensor)

    def _run_again(self) -> None:
        saved, storage_of_normed = [], None

        def save(tensor: Tensor) -> None:
            if tensor.untyped_storage().data_ptr() == storage_of_normed:
                saved.append((tensor.shape, tensor.stride(), tensor.storage_offset()))
            else:
                saved.append(tensor.detach())

        x = self.x().detach().requires_grad_(self.needs_grad)
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

    def __init__(self, runtime_key: object, keep: Callable | None) -> None:
        """keep: as KEEP; for forward's output and log-sum-exp, so that its kernel runs once."""
        self.runtime_key, self.keep = runtime_key, keep
        self.out, self.edge, self.edges, self.qkv, self.ran = None, None, [], [], False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.ran:
            self.ran = True
            return _FirstAttention.apply(q, k, v, self)
        if self.out is None:
            self.run(q, k, v)
        self.qkv[:] = map(_in_storage_of_its_own, (q, k, v))
        return self.out().detach().requires_grad_(any(x.requires_grad for x in (q, k, v)))

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Runs forward, in a graph of its own that does not hold q, k and v. Returns the output."""
        again, keep = self.qkv, self.keep or KEEP.get()  # not `self`: a reference cycle
        qkv = [_in_storage_of_its_own(x) for x in (q, k, v)]
        with torch.enable_grad():
            qkv = _Inputs.apply(torch.empty(0, requires_grad=True), *qkv)
            self.edges = [get_gradient_edge(x) for x in qkv]
            token = KEEP.set(keep)
            try:
                with not_saved(qkv, lambda: again):
                    out = calc_attn(*qkv, self.runtime_key)
            finally:
                KEEP.reset(token)
        self.out, self.edge = keep(out), get_gradient_edge(out)
        return out.detach()

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """grad: of the output. Returns the gradients of q, k and v, once."""
        # The graph's nodes hold `self` for longer than backward.
        edge, self.out, self.edge, self.keep = self.edge, None, None, None
        gradients = torch.autograd.grad(edge, self.edges, grad)
        self.qkv.clear()
        return gradients


class _FirstAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, attention):
        ctx.attention = attention
        if attention.keep and any(ctx.needs_input_grad):
            return attention.run(q, k, v)
        return calc_attn(q, k, v, attention.runtime_key)

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


class _Host:
    """Page-locked host memory, shared by all layers. Each step uses its blocks again."""

    def __init__(self) -> None:
        # One stream makes all copies, in their order: a block that is free can be filled at once.
        self.stream, self.free, self.newest_layer = torch.cuda.Stream(), [], lambda: None

    def take(self) -> Tensor:
        if not self.free:
            return torch.empty(HOST_BLOCK_SIZE, dtype=torch.uint8, pin_memory=True)
        return self.free.pop()


class _Offloaded:
    """What a layer keeps. It goes to the host while the next layer computes, and comes back while
    the next layer's backward does. So what the last layer keeps stays on the GPU.
    """

    def __init__(self, host: _Host) -> None:
        self.host, self.kept, self.blocks = host, {}, []
        self.copied = host.stream.record_event()  # until its own copies: of earlier layers
        # Weak: a strong reference would keep the tensors of two forwards, if both come first.
        self.before, host.newest_layer = host.newest_layer, weakref.ref(self)
        if before := self.before():
            before._copy(to_host=True)

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        x, key = x.detach(), (x.data_ptr(), x.shape)
        if x.nbytes < SMALLEST_OFFLOADED or not x.is_contiguous():
            return lambda: x
        self.kept[key] = x  # once, where attention keeps its output twice
        return lambda: self._get(key)

    def free_layer_before(self) -> None:
        if before := self.before():
            torch.cuda.current_stream().wait_event(before.copied)  # then its memory is free
            before.kept = {key: x.to("meta") for key, x in before.kept.items()}

    def _get(self, key: tuple) -> Tensor:
        for layer in filter(None, [self, self.before()]):
            if any(x.is_meta for x in layer.kept.values()):
                layer.kept = {k: torch.empty_like(x, device="cuda") for k, x in layer.kept.items()}
                layer._copy(to_host=False)
        torch.cuda.current_stream().wait_event(self.copied)
        return self.kept[key]

    def _copy(self, to_host: bool) -> None:
        flat = [x.view(-1).view(torch.uint8) for x in self.kept.values()]
        parts = [part for x in flat for part in x.split(HOST_BLOCK_SIZE)]
        self.blocks = self.blocks or [self.host.take() for _ in parts]
        self.host.stream.wait_stream(torch.cuda.current_stream())  # it may still use this memory
        with torch.cuda.stream(self.host.stream):
            for part, block in zip(parts, self.blocks, strict=True):
                source, target = (part, block) if to_host else (block, part)
                target[: len(part)].copy_(source[: len(part)], non_blocking=True)
        self.copied = self.host.stream.record_event()

    def __del__(self) -> None:
        torch.cuda.current_stream().wait_event(self.copied)  # a copy may be under way
        self.host.free += self.blocks
