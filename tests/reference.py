"""An independent Llama for the tests: dense attention over one document at a time, in float64.

Written from the formulas, with nothing of ours imported. `weights` is a state dict with Hugging
Face's names, in float64.
"""

import math

import torch


def rope(x: torch.Tensor, theta: float, scaling: dict | None) -> torch.Tensor:
    """x: [tokens, heads, head_dim] of one document; pairs (x_i, x_{i + hd / 2}) turn as x + iy."""
    tokens, _, head_dim = x.shape
    half = head_dim // 2
    frequencies = []
    for i in range(half):
        frequency = theta ** (-2 * i / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            original = scaling["original_max_position_embeddings"]
            if wavelength > original / scaling["low_freq_factor"]:
                frequency /= scaling["factor"]
            elif wavelength > original / scaling["high_freq_factor"]:
                smooth = (original / wavelength - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                frequency *= (1 - smooth) / scaling["factor"] + smooth
        frequencies.append(frequency)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.tensor(
        frequencies, dtype=torch.float64
    )
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention within one document. q: [tokens, nh, hd]; k, v: [tokens, nkv, hd]."""
    group = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[2])
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -math.inf)
        out.append(scores.softmax(dim=-1) @ v[:, head // group])
    return torch.stack(out, dim=1)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, config) -> torch.Tensor:
    """tokens: [tokens] of one document; config: any object with LlamaConfig's fields."""
    hd = config.head_dim
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        y = norm(x, layer["input_layernorm"], config.rms_norm_eps)
        q, k, v = (
            (y @ layer[f"self_attn.{p}_proj"].T).unflatten(-1, (-1, hd)) for p in ("q", "k", "v")
        )
        q, k = (rope(z, config.rope_theta, config.rope_scaling) for z in (q, k))
        out = attention(q, k, v, config.is_causal).flatten(1)
        x = x + out @ layer["self_attn.o_proj"].T
        y = norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
        gate, up = y @ layer["mlp.gate_proj"].T, y @ layer["mlp.up_proj"].T
        x = x + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj"].T
    x = norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ weights[head].T


def label_losses(
    weights, documents: list[tuple[torch.Tensor, torch.Tensor]], config
) -> list[tuple[int, torch.Tensor]]:
    """Returns each label's token's position in its document, from 1, and the loss.

    documents: (tokens, labels) each, labels already shifted, -100 where none counts.
    """
    losses = []
    for tokens, labels in documents:
        log_probs = logits(weights, tokens, config).log_softmax(dim=-1)
        for place, label in enumerate(labels.tolist()):
            if label != -100:
                losses.append((place + 1, -log_probs[place, label]))
    return losses


def mean_loss(weights, documents: list[tuple[torch.Tensor, torch.Tensor]], config) -> torch.Tensor:
    """documents: as `label_losses` takes them."""
    losses = [loss for _, loss in label_losses(weights, documents, config)]
    return sum(losses) / len(losses)
