"""Llama in plain PyTorch, with Hugging Face's parameter names.

The model sees one packed sequence and no batch dimension: `s` tokens, the shard that dispatch gave
this rank. Nothing here is distributed but `calc_attn`, which takes the runtime key of the step.

Shapes in comments: `s` local tokens, `h` hidden, `nh` heads, `nkv` key/value heads, `hd` head_dim,
`v` vocabulary.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from configuration_llama import LlamaConfig
from context_parallel import calc_attn
from context_parallel.native import not_saved

LOSS_SLICE_SIZE = 8192  # tokens whose logits exist at a time
LAYER_SLICE_SIZE = 16_384  # tokens that a layer recomputes, around its attention, at a time


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Returns RoPE's angular frequencies in radians per position, [hd / 2], float64.

    Llama 3's scaling (https://arxiv.org/abs/2407.21783; the formula as in Meta's `apply_scaling`):
    wavelengths above `original / low_freq_factor` are stretched by `factor`, those below
    `original / high_freq_factor` are kept, and between the two it interpolates linearly in
    `original / wavelength`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = config.rope_theta ** -(exponents / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    low = config.rope_scaling["low_freq_factor"]
    high = config.rope_scaling["high_freq_factor"]
    original = config.rope_scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling["factor"])


def rope_cos_sin(config: LlamaConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of RoPE's angles, each [s, hd / 2], float32.

    The angles are float64: at position 1,000,000 a float32 angle is off by hundredths of a radian.
    """
    frequencies = rope_frequencies(config, position_ids.device)
    angles = torch.outer(position_ids.to(torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x, [s, heads, hd], in float32; component i is paired with i + hd / 2, as in HF."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same angle for every head
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.type_as(x)


class LlamaAttention(nn.Module):
    """The projections of grouped-query attention; between the two halves stands `calc_attn`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns q, [s, nh, hd], and k, v, [s, nkv, hd]."""
        q, k, v = (
            rearrange(proj(x), "s (heads hd) -> s heads hd", hd=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def output(self, out: Tensor) -> Tensor:
        """out: [s, nh, hd], of the attention; returns [s, h]."""
        return self.o_proj(rearrange(out, "s heads hd -> s (heads hd)"))


class LlamaMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202); down_proj stands in the layer, behind `hidden`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """x: [s, h]; returns what down_proj takes, [s, intermediate_size]."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream.

    What surrounds the attention is in methods of tokens alone, which main.py may compile.
    """

    def __init__(self, config: LlamaConfig, activation_checkpointing: str) -> None:
        """activation_checkpointing: "none", "selective" or "full", see `_Recompute`."""
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def before_attention(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.activation_checkpointing == "none":
            return self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        # Compiled, it then keeps x alone for backward, and not the norm of it, which is as large.
        normed = checkpoint(self.input_layernorm, x, use_reentrant=False)
        return self.self_attn.qkv(normed, cos, sin)

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x, hidden = self.until_last_product(x, out)
        return x + self.mlp.down_proj(hidden)

    def until_last_product(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream, [s, h], and what down_proj takes."""
        x = x + self.self_attn.output(out)
        return x, self.mlp.hidden(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        if self.activation_checkpointing != "none":
            return _Recompute.apply(x, cos, sin, runtime_key, self)
        out, _ = calc_attn(*self.before_attention(x, cos, sin), runtime_key)
        return self.after_attention(x, out)


class _Recompute(torch.autograd.Function):
    """A decoder layer that keeps only its input. Backward computes the rest again, except the
    product of `down_proj`, whose value no gradient needs.

    "selective" also keeps what the attention needs for its backward except q, k and v
    (`_Attention`), and so never runs its kernel a second time. The half behind the attention,
    and in backward the half before it, go slice by slice: the MLP's activations, 12 times as large
    as the input, exist for LAYER_SLICE_SIZE tokens.

    It stands inside the layer, so that FSDP, which wraps the layer from outside, gathers the
    layer's parameters once for the recomputation and the gradients. The gradients of the
    parameters are accumulated by the backward calls in here, those of x are returned: so only
    `loss.backward()` finds the parameters' gradients, `torch.autograd.grad` does not, and a hook
    on a parameter runs for each slice.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, runtime_key, layer):
        ctx.runtime_key, ctx.layer, ctx.attention = runtime_key, layer, None
        q, k, v = layer.before_attention(x, cos, sin)
        if layer.activation_checkpointing == "selective" and ctx.needs_input_grad[0]:
            ctx.attention = _Attention(q, k, v, runtime_key)
            out = ctx.attention.out.detach()
        else:
            out, _ = calc_attn(q, k, v, runtime_key)
        ctx.save_for_backward(x, cos, sin)
        y = torch.empty_like(x)
        for part, x_part, out_part in _slices(y, x, out):
            part.copy_(layer.after_attention(x_part, out_part))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, cos, sin = ctx.saved_tensors
        x, layer = x.detach(), ctx.layer
        attention, ctx.attention = ctx.attention, None  # its memory ends with this call
        x_parts, qkv_parts, edges = [], [], []
        for x_part, *cos_sin in _slices(x, cos, sin):
            with torch.enable_grad():
                part = layer.before_attention(x_part.requires_grad_(), *cos_sin)
            x_parts.append(x_part)
            qkv_parts.append(part)
            edges.append([torch.autograd.graph.get_gradient_edge(tensor) for tensor in part])
        qkv = [torch.cat(parts) for parts in zip(*qkv_parts, strict=True)]
        del qkv_parts, part
        attention = attention or _Attention(*qkv, ctx.runtime_key)
        grad_x, grad_out = _backward_after_attention(layer, grad, x, attention.out.detach())
        gradients = attention.gradients(qkv, grad_out)
        slices = zip(x_parts, edges, _slices(grad_x, *gradients), strict=True)
        for x_part, edges_part, (grad_x_part, *gradients_part) in slices:
            x_part.grad = grad_x_part  # to which autograd adds, in place
            torch.autograd.backward(edges_part, gradients_part)
        return grad_x, None, None, None, None


class _Attention:
    """An attention that keeps its output and its log-sum-exp for backward, and not q, k and v.

    What autograd saves of q, k and v (magi_attention in a cp group: a copy of k and v, which stays)
    is taken out of its hands, and given to it again in `gradients`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, runtime_key: object) -> None:
        self.qkv = again = []  # for backward; not `self` below, which would be a reference cycle
        qkv = [_in_storage_of_its_own(x) for x in (q, k, v)]
        with torch.enable_grad():
            qkv = _Inputs.apply(torch.empty(0, requires_grad=True), *qkv)
            self.edges = [torch.autograd.graph.get_gradient_edge(x) for x in qkv]
            with not_saved(qkv, lambda: again):
                self.out, _ = calc_attn(*qkv, runtime_key)

    def gradients(self, qkv: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of q, k and v. qkv: their values, once more."""
        self.qkv += map(_in_storage_of_its_own, qkv)
        return torch.autograd.grad(self.out, self.edges, grad_out)


class _Inputs(torch.autograd.Function):
    """The beginning of a graph that does not hold its tensors, as leaves would be held."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *tensors: Tensor):
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return None, *gradients


def _in_storage_of_its_own(x: Tensor) -> Tensor:
    """Returns x, contiguous, copied where its storage holds more than it."""
    x = x.detach().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _backward_after_attention(
    layer: LlamaDecoderLayer, grad: Tensor, x: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x, [s, h], and out, [s, nh, hd], through `after_attention`, slice by
    slice, and accumulates those of its parameters. grad: of what it returns, [s, h].
    """
    grad_x, grad_out = torch.empty_like(x), torch.empty_like(out)
    for grad_part, x_part, out_part, grad_x_part, grad_out_part in _slices(
        grad, x, out, grad_x, grad_out
    ):
        x_part, out_part = x_part.requires_grad_(), out_part.requires_grad_()
        with torch.enable_grad():
            residual, hidden = layer.until_last_product(x_part, out_part)
            product = _UnreadProduct.apply(hidden, layer.mlp.down_proj.weight)
        torch.autograd.backward([residual, product], [grad_part, grad_part])
        grad_x_part.copy_(x_part.grad)
        grad_out_part.copy_(out_part.grad)
        x_part.grad = out_part.grad = None  # the slices live on until the last
    return grad_x, grad_out


class _UnreadProduct(torch.autograd.Function):
    """The gradients of x @ weight.T, whose value nobody reads: it is not computed.

    It stands for a plain nn.Linear without bias: hooks on that, or a module in its place, would
    count in forward alone.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(len(x), len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        return grad @ weight, grad_weight


def _slices(*tensors: Tensor):
    """Returns the tensors' slices of LAYER_SLICE_SIZE tokens, those of the same tokens together."""
    return zip(*(tensor.split(LAYER_SLICE_SIZE) for tensor in tensors), strict=True)


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig, activation_checkpointing: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, activation_checkpointing)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor, runtime_key: object) -> Tensor:
        """input_ids, position_ids: [s]; returns the normed hidden states, [s, h]."""
        cos, sin = rope_cos_sin(self.config, position_ids)
        x = self.embed_tokens(input_ids)
        if torch.is_grad_enabled():
            x.requires_grad_()  # with a frozen embedding `_Recompute` would have no backward
        for layer in self.layers:
            x = layer(x, cos, sin, runtime_key)
        return self.norm(x)


class LlamaHead(nn.Linear):
    """The product with the vocabulary: logits, or with labels the loss without whole logits."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: [s, h]; returns logits, [s, v], or the summed loss of labels, [s], float32."""
        if labels is None:
            return super().forward(x)
        # Detached where nobody asks for gradients: `_HeadLoss` sees that they are not needed.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _HeadLoss.apply(x, weight, labels, self.cross_entropy)

    @staticmethod
    def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits: [n, v]; labels: [n]. Returns the summed loss and its gradient, [n, v].

        The loss of a token is log(sum(exp(logits))) - logits[label], its gradient
        softmax(logits) - one_hot(label); both in float32, the gradient rounded at the end. Label
        -100 counts for nothing, whatever its logits are.
        """
        ignored = (labels == -100)[:, None]
        labels = labels[:, None].masked_fill(ignored, 0)
        log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
        loss = (log_sum - logits.gather(1, labels)).masked_fill(ignored, 0)
        gradient = (logits - log_sum).exp_()
        is_label = torch.arange(logits.shape[1], device=logits.device) == labels
        gradient = gradient.sub_(is_label.to(logits.dtype)).masked_fill_(ignored, 0)
        return loss.sum(), gradient.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of x @ weight.T, LOSS_SLICE_SIZE tokens at a time.

    All logits at once can be larger than everything else together: of 131,072 tokens x 128,256
    words they are 67 GB in float32. Since the loss is a scalar, whose gradient is known but for a
    factor, the gradients are computed while the logits are there, with no second product for them
    in backward.
    """

    @staticmethod
    def forward(ctx, x, weight, labels, cross_entropy):
        needs_gradient = any(ctx.needs_input_grad)
        loss_sum = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if needs_gradient else None
        grad_weight = None
        start = 0
        for x_part, labels_part in zip(
            x.split(LOSS_SLICE_SIZE), labels.split(LOSS_SLICE_SIZE), strict=True
        ):
            loss, grad_logits = cross_entropy(F.linear(x_part, weight), labels_part)
            loss_sum += loss
            if needs_gradient:
                torch.mm(grad_logits, weight, out=grad_x[start : start + len(x_part)])
                grad_weight = _add_product(grad_weight, grad_logits.T, x_part)
            start += len(x_part)
        if needs_gradient:
            ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns total, if there is one, + a @ b, in float32; in place, and on a GPU without a copy
    between where a and b are bfloat16.
    """
    if a.is_cuda and a.dtype != torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = (a @ b).float()
    return product if total is None else total.add_(product)


class LlamaForCausalLM(nn.Module):
    """The model with its head: logits for a caller without labels, the loss for one with."""

    def __init__(self, config: LlamaConfig, activation_checkpointing: str = "none") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, activation_checkpointing)
        self.lm_head = LlamaHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        runtime_key: object,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Runs this rank's shard.

        input_ids: [s], int64. position_ids: [s], the position of each token in its own document.
        runtime_key: what the attention needs to know of the whole sequence (`context_parallel/`).
        labels: [s], the token that follows, -100 where none counts.

        Returns logits, [s, v], or with labels the *sum* of the token losses in nats, a float32
        scalar: dividing by the number of labels is up to the caller, who knows of the other ranks.
        """
        return self.lm_head(self.model(input_ids, position_ids, runtime_key), labels)

    def compile_parts(self) -> None:
        """Compiles the loss, and each layer's parts around the attention, which stays opaque."""
        # Each shape of a run gets its own code, of which Dynamo would allow eight to a function,
        # all layers together. One too many is an error, not a slow run.
        torch._dynamo.config.recompile_limit = 64
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        tuned = {"coordinate_descent_tuning": True}  # tries block sizes, which takes a second
        self.lm_head.cross_entropy = compiled(self.lm_head.cross_entropy, options=tuned)
        for layer in self.model.layers:
            layer.before_attention = compiled(layer.before_attention)
            layer.after_attention = compiled(layer.after_attention)
            layer.until_last_product = compiled(layer.until_last_product)
