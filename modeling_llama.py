"""Llama in plain PyTorch, with Hugging Face's parameter names.

The model runs on one packed sequence, without a batch dimension: `s` tokens, this rank's shard.
Only `calc_attn` communicates. support/recompute.py and FSDP are applied from outside.

Shapes in comments: `s` local tokens, `h` hidden, `nh` heads, `nkv` key/value heads, `hd` head_dim,
`v` vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configuration_llama import LlamaConfig, rope_attention_factor, rope_frequencies
from context_parallel import calc_attn

LOSS_SLICE_SIZE = 8192  # tokens whose logits exist at a time


def rope_cos_sin(config: LlamaConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of RoPE's angles, each [s, hd / 2], float32.

    The angles are float64: at position 1,000,000 a float32 angle is off by hundredths of a radian.
    """
    frequencies = rope_frequencies(config, position_ids.device)
    angles = torch.outer(position_ids.to(torch.float64), frequencies)
    factor = rope_attention_factor(config)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x, [s, heads, hd], in float32; component i is paired with i + hd / 2, as in HF."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same angle for every head
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.type_as(x)


class LlamaAttention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) with RoPE."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out = calc_attn(q, k, v, runtime_key)
        return self.o_proj(out.flatten(1))


class LlamaMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, h]; returns [s, h]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream.

    `support/recompute.py` runs the two lines of `forward` by itself: change both.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: object) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, runtime_key)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor, runtime_key: object) -> Tensor:
        """input_ids, position_ids: [s]; returns the normed hidden states, [s, h]."""
        cos, sin = rope_cos_sin(self.config, position_ids)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, runtime_key)
        return self.norm(x)


class LlamaHead(nn.Linear):
    """The product with the vocabulary: logits, or with labels the loss of each token."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: [s, h]; labels: [s]; returns logits, [s, v], or token losses, [s], float32."""
        if labels is None:
            return super().forward(x)
        # `_TokenLosses` sees from a detached weight that no gradient is needed.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _TokenLosses.apply(x, weight, labels, self.cross_entropy)

    @staticmethod
    def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits: [n, v]; labels: [n]. Returns token losses, [n], and their gradients, [n, v].

        The loss of a token is log(sum(exp(logits))) - logits[label]. Its gradient is
        softmax(logits) - one_hot(label), computed in float32 and rounded at the end. Both are 0
        where the label is -100.
        """
        ignored = (labels == -100)[:, None]
        labels = labels[:, None].masked_fill(ignored, 0)
        log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
        loss = (log_sum - logits.gather(1, labels)).masked_fill(ignored, 0)
        gradient = (logits - log_sum).exp_()
        is_label = torch.arange(logits.shape[1], device=logits.device) == labels
        gradient = gradient.sub_(is_label.to(logits.dtype)).masked_fill_(ignored, 0)
        return loss[:, 0], gradient.to(logits.dtype)


class _TokenLosses(torch.autograd.Function):
    """The cross-entropy of x @ weight.T for each token, LOSS_SLICE_SIZE tokens at a time.

    All logits at once would be too large: 131,072 tokens x 128,256 words take 67 GB in float32.
    Forward computes the gradients of the losses' sum while the logits exist. Backward multiplies
    them by that sum's gradient. It computes them again only if tokens have gradients of their own.
    """

    @staticmethod
    def forward(ctx, x, weight, labels, cross_entropy):
        ctx.cross_entropy = cross_entropy
        losses, *gradients = _losses_and_gradients(
            x, weight, labels, cross_entropy, any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(x, weight, labels, *gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, labels, grad_x, grad_weight = ctx.saved_tensors
        if grad.stride() == (0,):  # one number, expanded: the gradient of a sum
            return grad_x * grad[0], grad_weight * grad[0], None, None
        _, *gradients = _losses_and_gradients(x, weight, labels, ctx.cross_entropy, True, grad)
        return *gradients, None, None


def _losses_and_gradients(x, weight, labels, cross_entropy, needs_gradients, factors=None):
    """Returns token losses, [s], and the gradients of x and weight, each None if not needed.

    The gradients are those of the losses' sum. factors: [s], of the losses in that sum.
    """
    losses, grad_weight = [], None
    grad_x = torch.empty_like(x) if needs_gradients else None
    for start in range(0, len(x), LOSS_SLICE_SIZE):
        rows = slice(start, start + LOSS_SLICE_SIZE)
        slice_losses, grad_logits = cross_entropy(F.linear(x[rows], weight), labels[rows])
        losses.append(slice_losses)
        if needs_gradients:
            if factors is not None:
                grad_logits = (grad_logits * factors[rows, None]).to(x.dtype)
            torch.mm(grad_logits, weight, out=grad_x[rows])
            grad_weight = _add_product(grad_weight, grad_logits.T, x[rows])
    if needs_gradients:
        grad_weight = grad_weight.to(weight.dtype)
    return torch.cat(losses), grad_x, grad_weight


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns total + a @ b in float32, in place; a total of None is 0."""
    if a.is_cuda and a.dtype != torch.float32:  # without a float32 copy of the product
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = (a @ b).float()
    return product if total is None else total.add_(product)


class LlamaForCausalLM(nn.Module):
    """The model with its head: returns logits, or with labels the loss of each token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
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
        """Returns logits, [s, v], or with labels the token losses in nats, [s], float32.

        input_ids: [s], int64. position_ids: [s], the position of each token in its own document.
        runtime_key: describes the attention of the whole sequence (`context_parallel/`).
        labels: [s], the next token, or -100 where none counts.
        """
        return self.lm_head(self.model(input_ids, position_ids, runtime_key), labels)
