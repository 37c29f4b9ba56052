"""Context parallelism: the choice of a backend, and the attention call.

The backends are `magi_attention.api` and native_attention.py, which has the same functions. Both
build a *runtime key*, which remembers which rank has which chunks of a packed sequence (chunks.py)
and what they see; it is built once per step and goes wherever the tokens go.
"""

import importlib
import importlib.machinery
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

import native_attention

# Where magi_attention's own default is slower; what is set in the environment stays.
MAGI_ATTENTION_ENVIRONMENT = {
    "MAGI_ATTENTION_MIN_CHUNKS_PER_RANK": "1",  # `balanced_chunk_size` knows how many it takes
    "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN": "0",  # multiprocessors left to communication
    "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN": "0",
}


def select_backend(requested: str, head_dim: int, dtype: str, device: str) -> tuple[str, str]:
    """Returns the backend's name ("magi_attention" or "native") and the reason, one line.

    requested: "auto", "magi_attention" or "native". dtype: the compute type, "bfloat16" or
    "float32". device: the type of the device that will compute, "cuda" or "cpu".
    Raises ValueError if the backend asked for by name cannot run, or none can.
    """
    reason = "as configured"
    if requested != "native":
        obstacle = _magi_attention_obstacle(head_dim, dtype, device)
        if obstacle is None:
            for name, value in MAGI_ATTENTION_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            version = importlib.import_module("magi_attention").__version__ or "unknown"
            return "magi_attention", f"version {version}, {requested}"
        if requested == "magi_attention":
            raise ValueError(
                f"parallel_config.context_parallel_backend='magi_attention' cannot run: "
                f"{obstacle}. Mend that, or choose 'native' or 'auto'"
            )
        reason = f"magi_attention cannot run: {obstacle}"
    if device == "cuda" and dtype == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        raise ValueError(
            f"train_config.dtype='bfloat16' needs a GPU of capability 8.0 or newer, and "
            f"{torch.cuda.get_device_name()} has less; choose 'float32'"
        )
    if device == "cuda" and (head_dim % 8 or head_dim > 256):
        raise ValueError(
            f"PyTorch's kernels, native on a GPU, take a head_dim that is a multiple of 8, 256 at "
            f"the most, not {head_dim}"
        )
    return "native", reason


def _magi_attention_obstacle(head_dim: int, dtype: str, device: str) -> str | None:
    """Returns what keeps magi_attention 1.1 from running here, or None."""
    if device != "cuda":
        return "it needs an NVIDIA GPU, and none is here"
    if dtype != "bfloat16":
        return f"its kernels compute in bfloat16, and train_config.dtype is {dtype!r}"
    if head_dim not in (64, 128):
        return f"its kernels take a head_dim of 64 or 128, and the model's is {head_dim}"
    package = importlib.util.find_spec("magi_attention")
    if package is None:
        return "it is not installed; it is built from source, see the README"
    places = package.submodule_search_locations
    if importlib.machinery.PathFinder.find_spec("magi_attention.api", places) is None:
        return (
            "the installed package is the empty placeholder of that name from PyPI, without "
            "`magi_attention.api`; uninstall it and build the real one from source, see the README"
        )
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        name = torch.cuda.get_device_name()
        return f"its kernels are for Hopper, capability 9.0, and {name} has {major}.{minor}"
    try:
        importlib.import_module("magi_attention.api")
    except ModuleNotFoundError as error:
        if error.name == "debugpy":
            return "it imports 'debugpy' without declaring it; `pip install debugpy`"
        return f"it needs the module {error.name!r}, which is missing; see the README"
    except Exception as error:  # a broken build can fail in any way, and `auto` goes on without it
        return f"importing it failed: {error!r}"
    return None


def load_api(backend: str) -> ModuleType:
    """Returns the module that holds the calls: `magi_attention.api`, or native_attention."""
    modules = {"magi_attention": "magi_attention.api", "native": "native_attention"}
    return importlib.import_module(modules[backend])


def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: object) -> tuple[Tensor, object]:
    """Attention of the local queries to all keys that the mask lets them see.

    q: [s, nh, hd]; k, v: [s, nkv, hd]. key: of either backend; the key decides which one computes.
    Returns (out, meta): out is [s, nh, hd], zero at padding; meta is magi_attention's, or None.
    """
    if isinstance(key, native_attention.DistAttnRuntimeKey):
        return native_attention.calc_attn(q, k, v, key)
    # Strided inputs can give NaN gradients without a word in magi_attention 1.1.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return load_api("magi_attention").calc_attn(q, k, v, key)


class SavedAttention:
    """The attention of a layer that recomputes q, k and v: its kernel runs once all the same.

    It keeps `out` and what else the backend saves for backward (the log-sum-exp; magi_attention,
    but in a group of one, its copy of k and v), but not q, k and v: their memory is given back,
    and filled again for backward. That goes past autograd, which sees the same tensors as before.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, key: object) -> None:
        """As `calc_attn`; `self.out` is its output, [s, nh, hd]. q, k and v become empty."""
        self._qkv = [_in_storage_of_its_own(x.detach()).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            self.out, _ = calc_attn(*self._qkv, key)
        for x in self._qkv:
            x.untyped_storage().resize_(0)

    def restore(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Returns the q, k and v that `out` depends on, filled again with these values."""
        for x, again in zip(self._qkv, (q, k, v), strict=True):
            again = _in_storage_of_its_own(again.detach())
            x.untyped_storage().resize_(x.nbytes)
            x.untyped_storage().copy_(again.untyped_storage())
        return self._qkv


def _in_storage_of_its_own(x: Tensor) -> Tensor:
    """Returns x, contiguous, copied where its storage holds more than it."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
