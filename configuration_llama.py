"""The shape of a Llama: one dataclass, its presets, and the way from and to Hugging Face."""

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class LlamaConfig:
    """The fields carry the names of Hugging Face's `LlamaConfig`; the defaults are the size of
    Llama 3.2 1B.

    `rope_scaling` is None or Hugging Face's dict for `rope_type="llama3"`. `is_causal=False` lets
    every token attend to its whole document.
    """

    vocab_size: int = 128_256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 500_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    is_causal: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), field.type
            if wanted is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if wanted in (int, float, bool) and type(value) is not wanted:
                raise ValueError(f"model: {field.name}={value!r} must be of type {wanted.__name__}")
            elif wanted is int and value < 1:
                raise ValueError(f"model: {field.name}={value} must be at least 1")
            elif wanted is float and not 0 < value < math.inf:
                raise ValueError(f"model: {field.name}={value} must be a number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}, so that every key/value head "
                f"serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model: head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.rope_scaling is not None:
            scaling = dict(self.rope_scaling) if isinstance(self.rope_scaling, dict) else {}
            numbers = [scaling.get(key) for key in LLAMA3_ROPE_SCALING]
            if (
                set(scaling) != {"rope_type", *LLAMA3_ROPE_SCALING}
                or scaling["rope_type"] != "llama3"
                or not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers)
            ):
                raise ValueError(
                    f"model: rope_scaling={self.rope_scaling!r} must be None or a dict with "
                    f"rope_type='llama3' and numbers for {', '.join(LLAMA3_ROPE_SCALING)}"
                )

    @classmethod
    def from_preset(cls, preset: str, overrides: dict[str, Any]) -> "LlamaConfig":
        """Returns the preset's shape with `overrides` put in its place.

        Raises ValueError for an unknown preset, and what `override` raises.
        """
        if preset not in PRESETS:
            raise ValueError(f"model_config.preset={preset!r} must be one of {', '.join(PRESETS)}")
        return PRESETS[preset].override(overrides)

    def override(self, overrides: dict[str, Any]) -> "LlamaConfig":
        """Returns this shape with `overrides` (field name to value) put in its place.

        Raises ValueError for an unknown field, naming the nearest, and for a value that makes no
        model.
        """
        names = [field.name for field in fields(self)]
        for name in overrides:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"model_config.overrides has no field {name!r}; the nearest is {nearest!r}"
                )
        return replace(self, **overrides)

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "LlamaConfig":
        """Reads the content of a Hugging Face `config.json`, of transformers 4 or 5.

        Raises ValueError for an architecture that `modeling_llama.py` does not have.
        """
        for key, wanted in HF_ARCHITECTURE.items():
            if hf_config.get(key, wanted) != wanted:
                raise ValueError(f"config.json: {key}={hf_config[key]!r} must be {wanted!r}")
        values = {f.name: hf_config[f.name] for f in fields(cls) if f.name in hf_config}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if name not in values:
                raise ValueError(f"config.json: {name} is missing")
        # What Hugging Face's LlamaConfig takes for a field that is missing or null.
        heads = values.get("num_attention_heads") or 32
        for name, default in (
            ("num_attention_heads", heads),
            ("num_key_value_heads", heads),
            ("head_dim", values["hidden_size"] // heads),
            ("max_position_embeddings", 2048),
            ("rms_norm_eps", 1e-6),
            ("tie_word_embeddings", False),
        ):
            if values.get(name) is None:
                values[name] = default
        # transformers 5 holds theta and scaling together in `rope_parameters`.
        rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or hf_config.get("rope_theta") or 10_000.0
        values["rope_theta"] = float(theta)
        plain = not rope or rope == {"rope_type": "default"}
        values["rope_scaling"] = None if plain else rope
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a Hugging Face `config.json` that describes the same model."""
        return {**HF_ARCHITECTURE, "architectures": ["LlamaForCausalLM"], **asdict(self)}


HF_ARCHITECTURE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

# The frequency scaling of Llama 3.1 and 3.2; `modeling_llama.rope_frequencies` has the formula.
LLAMA3_ROPE_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_32_ROPE = {"rope_type": "llama3", **LLAMA3_ROPE_SCALING}

PRESETS = {
    # 2,976,000 parameters: small enough for a laptop, and all the machinery shows. The vocabulary
    # holds the byte tokens (0 to 256), rounded up to a multiple of 32.
    "tiny": LlamaConfig(
        vocab_size=288,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10_000.0,
    ),
    # Llama 3.2 1B: 1,235,814,400 parameters.
    "llama-1b": LlamaConfig(rope_scaling=LLAMA_32_ROPE),
    # Llama 3.2 3B: 3,212,749,824 parameters.
    "llama-3b": LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        rope_scaling=LLAMA_32_ROPE,
    ),
    # Llama 3.1 8B: 8,030,261,248 parameters.
    "llama-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        head_dim=128,
        rope_scaling={**LLAMA_32_ROPE, "factor": 8.0},
        tie_word_embeddings=False,
    ),
}
