"""Context parallelism: the choice of a backend, and the attention call.

Each backend builds a *runtime key* per micro-batch: every rank's chunks, and the keys they see.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from . import kernels, native

# Where magi_attention's own default is slower. A variable that is set already stays.
MAGI_ATTENTION_ENVIRONMENT = {
    "MAGI_ATTENTION_MIN_CHUNKS_PER_RANK": "1",  # `balanced_chunk_size` takes as many as it needs
    "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN": "0",  # multiprocessors left to communication
    "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN": "0",
}


def select_backend(requested: str, head_dim: int, dtype: str, device: str) -> tuple[str, list[str]]:
    """Returns "magi_attention" or "native", and lines for the log: the choice and its reasons.

    requested: one of these, or "auto". dtype: the compute dtype, "bfloat16" or "float32". device:
    "cuda" or "cpu". Raises ValueError if the requested backend cannot run, or none can.
    """
    reasons = []
    if requested != "native":
        obstacle = _magi_attention_obstacle(head_dim, dtype, device)
        if obstacle is None:
            for name, value in MAGI_ATTENTION_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            version = importlib.import_module("magi_attention").__version__ or "unknown version"
            return "magi_attention", [f"magi_attention ({version})"]
        reasons.append(f"magi_attention cannot run: {obstacle}")
        if requested == "magi_attention":
            raise ValueError(
                f"parallel_config.context_parallel_backend={requested!r}: {reasons[0]}. Mend that, "
                f"or choose 'native' or 'auto'"
            )
    if device == "cuda":
        gpu, is_old = torch.cuda.get_device_name(), torch.cuda.get_device_capability() < (8, 0)
        if head_dim % 8 or head_dim > 256 or (is_old and dtype == "bfloat16"):
            raise ValueError(
                f"native on a GPU takes a head_dim that is a multiple of 8, 256 at the most, and "
                f"bfloat16 from capability 8.0 on, not head_dim {head_dim} and {dtype} on {gpu}"
            )
        obstacle = kernels.flash_attention_4_obstacle(head_dim)
        if obstacle and dtype == "bfloat16":
            reasons.append(f"FlashAttention-4 cannot run: {obstacle}")
    kernel, _ = kernels.select_kernel(device, getattr(torch, dtype), head_dim)
    return "native", [f"native ({kernel})", *reasons]


def _magi_attention_obstacle(head_dim: int, dtype: str, device: str) -> str | None:
    """Returns what keeps magi_attention 1.1 from running here, or None."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    is_hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    if not is_hopper or dtype != "bfloat16" or head_dim not in (64, 128):
        return f"it needs Hopper, bfloat16, head_dim 64 or 128, not {gpu}, {dtype}, {head_dim}"
    try:
        importlib.import_module("magi_attention.api")
    except Exception as error:  # a broken build can fail in any way
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        return {
            "magi_attention": "it is not installed; docs/magi_attention.md says how to build it",
            "magi_attention.api": "PyPI's package of this name is empty: docs/magi_attention.md",
            "debugpy": "it imports 'debugpy' without declaring it; `pip install debugpy`",
        }.get(missing, f"importing it failed: {error!r}; see docs/magi_attention.md")
    return None


def load_api(backend: str) -> ModuleType:
    """Returns the module with the backend's functions: `magi_attention.api`, or native.py."""
    return native if backend == "native" else importlib.import_module("magi_attention.api")


@torch.compiler.disable
def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: object) -> Tensor:
    """Attention of the local queries to all keys that they see, by the backend of the key.

    q: [s, nh, hd]; k, v: [s, nkv, hd]. key: a runtime key, or a function (q, k, v) -> out in its
    place (`support/recompute.py`). Returns out, [s, nh, hd].
    """
    if callable(key):
        return key(q, k, v)
    if isinstance(key, native.DistAttnRuntimeKey):
        return native.calc_attn(q, k, v, key)
    # Strided inputs can give NaN gradients without a word in magi_attention 1.1.
    return load_api("magi_attention").calc_attn(*map(Tensor.contiguous, (q, k, v)), key)[0]
