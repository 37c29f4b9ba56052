"""Floating-point operations of a training step."""

from torch import Tensor

from configuration_llama import LlamaConfig


def attention_area(cu_seqlens: Tensor, causal: bool) -> float:
    """Returns a packed sequence's (query, key) pairs: the sum of len^2, or of len^2/2 if causal.

    cu_seqlens: [documents + 1], where documents begin and end. A causal mask's diagonal is counted
    half, as is usual for FLOPs.
    """
    squares = cu_seqlens.diff().double().square().sum().item()
    return squares / 2 if causal else squares


def training_flops(config: LlamaConfig, num_tokens: float, area: float) -> float:
    """Returns the floating-point operations of one step, recomputation not counted.

    num_tokens: trained on, over all ranks. area: of the attention mask, over all ranks.

    A matrix product takes 2 FLOPs per weight and token, and backward computes two more of the same
    size: 6 per weight. (The embedding is a look-up, the head a product, tied or not.) Attention is
    two products, QK^T and PV, each 2 x head_dim FLOPs per head and pair, and again threefold:
    12 x head_dim. (PaLM, https://arxiv.org/abs/2204.02311, appendix B, with the true mask area.)
    """
    hidden, q_size = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * q_size + 2 * hidden * kv_size + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * layer + hidden * config.vocab_size
    return 6 * weights * num_tokens + 12 * config.num_hidden_layers * q_size * area
