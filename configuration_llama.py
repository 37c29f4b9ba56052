"""The shape of a Llama: one dataclass, its presets, and the way from and to Hugging Face."""

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LlamaConfig:
    """The fields carry the names of Hugging Face's `LlamaConfig`; the defaults are the size of
    Llama 3.2 1B.

    `rope_scaling` is None or Hugging Face's dict for a `rope_type` in ROPE_SCALING.
    `is_causal=False` lets every token attend to its whole document.
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
            if wanted is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if wanted in (int, float, bool) and type(value) is not wanted:
                raise ValueError(f"model: {field.name}={value!r} must be of type {wanted.__name__}")
            elif wanted is int and not 1 <= value < 2**31:
                raise ValueError(f"model: {field.name}={value} must be at least 1, and below 2^31")
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
        object.__setattr__(self, "rope_scaling", self._checked_rope_scaling())

    def _checked_rope_scaling(self) -> dict[str, Any] | None:
        """Returns `rope_scaling` in one spelling: with the key `rope_type` and without nulls."""
        if self.rope_scaling is None:
            return None
        given = f"model: rope_scaling={self.rope_scaling!r} must be None or a dict with "
        scaling = self.rope_scaling if isinstance(self.rope_scaling, dict) else {}
        scaling = {key: value for key, value in scaling.items() if value is not None}
        older = scaling.pop("type", None)  # the key's name in older files
        rope_type = scaling.setdefault("rope_type", older)
        if scaling == {"rope_type": "default"}:
            return None
        if not isinstance(rope_type, str) or rope_type not in ROPE_SCALING:
            raise ValueError(f"{given}a rope_type of {', '.join(ROPE_SCALING)}")
        needed, optional = ROPE_SCALING[rope_type]
        if not set(needed) <= set(scaling) <= {"rope_type", *needed, *optional} or not all(
            type(value) is bool if key == "truncate" else _is_positive(value)
            for key, value in scaling.items()
            if key != "rope_type"
        ):
            also = f" and optionally for {', '.join(optional)}" if optional else ""
            raise ValueError(
                f"{given}rope_type={rope_type!r} and numbers above 0 for {', '.join(needed)}{also}"
            )
        if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"{given}a high_freq_factor above its low_freq_factor")
        if rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"model: rope_theta={self.rope_theta} must be above 1 with yarn")
        return scaling

    @classmethod
    def from_preset(cls, preset: str, overrides: dict[str, Any]) -> "LlamaConfig":
        """Returns the preset's shape, with the fields in `overrides` replaced.

        Raises ValueError for an unknown preset, and what `override` raises.
        """
        if preset not in PRESETS:
            raise ValueError(f"model_config.preset={preset!r} must be one of {', '.join(PRESETS)}")
        return PRESETS[preset].override(overrides)

    def override(self, overrides: dict[str, Any]) -> "LlamaConfig":
        """Returns this shape, with the fields in `overrides` (name to value) replaced.

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

        A Mistral is a Llama, as long as no row is longer than its `sliding_window`.
        Raises ValueError for an architecture that `modeling_llama.py` does not have.
        """
        # A null means the default, except for the sliding_window of a Mistral.
        given = {key: value for key, value in hf_config.items() if value is not None}
        is_mistral = given.get("model_type") == "mistral"
        rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: rope_scaling={rope!r} must be null or an object")
        rope = {key: value for key, value in rope.items() if value is not None}
        for key, allowed in HF_READ.items():
            value = rope.pop(key, given.get(key, allowed[0]))  # one of them may be in either
            if value not in allowed:
                names = " or ".join("absent" if c is None else repr(c) for c in allowed)
                raise ValueError(f"config.json: {key}={value!r} must be {names}")
        values = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if name not in values:
                raise ValueError(f"config.json: {name} is missing")
        # What Hugging Face's class takes for a field that is missing or null.
        values.setdefault("num_attention_heads", 32)
        values.setdefault("max_position_embeddings", 131_072 if is_mistral else 2048)
        for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
            if type(values[name]) is not int or values[name] < 1:
                raise ValueError(f"config.json: {name}={values[name]!r} must be an integer above 0")
        heads, longest = values["num_attention_heads"], values["max_position_embeddings"]
        kv_heads = 8 if is_mistral and "num_key_value_heads" not in hf_config else heads
        defaults = {
            "num_key_value_heads": kv_heads,
            "head_dim": values["hidden_size"] // heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }
        # transformers 5 holds theta and scaling together in `rope_parameters`.
        values["rope_theta"] = rope.pop("rope_theta", given.get("rope_theta", 10_000.0))
        values["rope_scaling"] = _from_hf_rope(rope, given, longest)
        if window := sliding_window(hf_config):
            values["max_position_embeddings"] = min(longest, window)
        return cls(**{**defaults, **values})

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a Hugging Face `config.json` that describes the same model."""
        return {**HF_ARCHITECTURE, "architectures": ["LlamaForCausalLM"], **asdict(self)}


HF_ARCHITECTURE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

# What `from_hf` reads, with the default first. A Mistral has Llama's other fields, or none.
HF_READ = {
    **{key: (value,) for key, value in HF_ARCHITECTURE.items()},
    "model_type": ("llama", "mistral"),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
    "transformers_weights": (None,),
}

# The keys of `rope_scaling`, by its rope_type: those that are needed, and others.
ROPE_SCALING = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**63


def _from_hf_rope(
    rope: dict[str, Any], given: dict[str, Any], max_position_embeddings: int
) -> dict[str, Any] | None:
    """Returns the `rope_scaling` of a config.json as transformers reads it.

    rope: the file's, without rope_theta. given: the file's fields.
    """
    rope_type = rope.pop("rope_type", rope.pop("type", None))
    if rope_type == "default" or not (rope or rope_type):
        return None
    if not isinstance(rope_type, str) or rope_type not in ROPE_SCALING:
        return {**rope, "rope_type": rope_type}  # the caller's check names it
    needed, optional = ROPE_SCALING[rope_type]
    if "original_max_position_embeddings" in needed:
        original = "original_max_position_embeddings"
        rope[original] = given.get(original, rope.get(original, max_position_embeddings))
        if rope_type == "yarn" and "factor" not in rope and _is_positive(rope[original]):
            rope["factor"] = max_position_embeddings / rope[original]
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.get(key) == 0:  # the default
            del rope[key]
    # transformers ignores other keys.
    read = {key: rope[key] for key in (*needed, *optional) if key in rope}
    return {"rope_type": rope_type, **read}


def sliding_window(hf_config: dict[str, Any]) -> int | None:
    """Returns how many tokens a Mistral attends to by its config.json, None for all of them."""
    if hf_config.get("model_type") != "mistral":
        return None
    window = hf_config.get("sliding_window", 4096)
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"config.json: sliding_window={window!r} must be null or at least 1")
    return window


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Returns RoPE's angular frequencies in radians per position, [head_dim / 2], float64.

    `linear` divides all by `factor`. The others divide long wavelengths and keep short ones.
    """
    size, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    frequencies = config.rope_theta ** -(exponents / size)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        # https://arxiv.org/abs/2407.21783; the formula as in Meta's `apply_scaling`: wavelengths
        # above `original / low` are stretched by `factor`, those below `original / high` are kept,
        # and between the two it interpolates linearly in `original / wavelength`.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # YaRN, https://arxiv.org/abs/2309.00071, section 3.2: component i makes `turns` turns in
        # `original` positions. Those with more than beta_fast are kept, those with fewer than
        # beta_slow are stretched, and between the two it interpolates linearly in i.
        def component(turns: float) -> float:
            return (
                size * math.log(original / (turns * 2 * math.pi)) / 2 / math.log(config.rope_theta)
            )

        low, high = component(scaling.get("beta_fast", 32)), component(scaling.get("beta_slow", 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        width = high - low or 0.001
        kept = 1 - ((exponents / 2 - low) / width).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rope_attention_factor(config: LlamaConfig) -> float:
    """Returns what YaRN multiplies cos and sin with: the paper's equation 22, or the config's."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def temperature(mscale: float) -> float:
        return 1 + 0.1 * mscale * math.log(max(1, scaling["factor"]))

    if "mscale" in scaling and "mscale_all_dim" in scaling:  # DeepSeek's
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1)


LLAMA_32_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

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
