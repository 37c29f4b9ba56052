"""Llama in plain PyTorch, with Hugging Face's parameter names.

The model sees one packed sequence and no batch dimension: `s` tokens, the shard that dispatch gave
this rank. Nothing here is distributed but `calc_attn`, which takes the runtime key of the step.

Shapes in comments: `s` local tokens, `h` hidden, `nh` heads, `nkv` key/value heads, `hd` head_dim,
`v` vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configuration_llama import LlamaConfig
from context_parallel import DistAttnRuntimeKey, calc_attn

LOSS_CHUNK_SIZE = 2048  # tokens whose logits exist at a time


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
    """Grouped-query attention over whatever the runtime key lets a token see."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: DistAttnRuntimeKey
    ) -> Tensor:
        """x: [s, h]; cos, sin: [s, hd / 2]; returns [s, h]."""
        q, k, v = (
            rearrange(proj(x), "s (heads hd) -> s heads hd", hd=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, _ = calc_attn(q, k, v, runtime_key)  # [s, nh, hd]
        return self.o_proj(rearrange(out, "s heads hd -> s (heads hd)"))


class LlamaMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream.

    `activation_checkpointing` is "none", or "full" to keep only the layer's input for the backward
    pass and compute the rest again. The recomputation happens inside the layer, so that FSDP, which
    wraps it from outside, gathers the layer's parameters once for it and the gradients.
    """

    def __init__(self, config: LlamaConfig, activation_checkpointing: str) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: DistAttnRuntimeKey
    ) -> Tensor:
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cos, sin, runtime_key, use_reentrant=False)
        return self._forward(x, cos, sin, runtime_key)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, runtime_key: DistAttnRuntimeKey
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, runtime_key)
        return x + self.mlp(self.post_attention_layernorm(x))


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

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, runtime_key: DistAttnRuntimeKey
    ) -> Tensor:
        """input_ids, position_ids: [s]; returns the normed hidden states, [s, h]."""
        cos, sin = rope_cos_sin(self.config, position_ids)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, runtime_key)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The model with its head: logits for a caller without labels, the loss for one with."""

    def __init__(self, config: LlamaConfig, activation_checkpointing: str = "none") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, activation_checkpointing)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        runtime_key: DistAttnRuntimeKey,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Runs this rank's shard.

        input_ids: [s], int64. position_ids: [s], the position of each token in its own document.
        runtime_key: what the attention needs to know of the whole sequence (`context_parallel.py`).
        labels: [s], the token that follows, -100 where none counts.

        Returns logits, [s, v], or with labels the *sum* of the token losses in nats, a float32
        scalar: dividing by the number of labels is up to the caller, who knows of the other ranks.
        """
        x = self.model(input_ids, position_ids, runtime_key)
        if labels is None:
            return self.lm_head(x)
        # The logits of all tokens at once can be larger than everything else together (131,072
        # tokens x 128,256 words in float32 are 67 GB), so they exist for one chunk at a time, and
        # are computed again in backward.
        loss_sum = torch.zeros((), device=x.device)
        chunks, labels_of = x.split(LOSS_CHUNK_SIZE), labels.split(LOSS_CHUNK_SIZE)
        for chunk, chunk_labels in zip(chunks, labels_of, strict=True):
            loss_sum += checkpoint(self._loss_sum, chunk, chunk_labels, use_reentrant=False)
        return loss_sum

    def _loss_sum(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(x).float(), labels, ignore_index=-100, reduction="sum")
