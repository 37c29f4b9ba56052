"""`main.py --plan`: its arguments, and the text that it prints. plan.py has the estimate."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from .config import CHOICES
from .machine import GPUS
from .plan import BESIDE_GIB, Settings, estimate


def parse(arguments: list[str]) -> tuple[int, str, list[str]]:
    """Returns world_size, gpu and the other arguments of `--plan`."""
    given = {"world_size": "8", "gpu": "H100"}
    rest = [x for x in arguments if not x.startswith(("world_size=", "gpu="))]
    given |= dict(x.split("=", 1) for x in arguments if x not in rest)
    if given["gpu"] not in GPUS:
        raise ValueError(f"gpu={given['gpu']!r} must be one of {', '.join(GPUS)}")
    if not re.fullmatch("[1-9][0-9]{0,5}", given["world_size"]):
        raise ValueError(f"world_size={given['world_size']!r} must be an integer from 1 to 999999")
    return int(given["world_size"]), given["gpu"], rest


def choose_kernel(gpu: str, head_dim: int, requested: str, dtype: str) -> str:
    """Returns the attention kernel on a GPU that is not here, with all packages installed except
    magi_attention, unless it is requested. Raises ValueError as `context_parallel.select_backend`.
    """
    is_fast = gpu != "A100" and dtype == "bfloat16" and head_dim in (64, 128)
    if requested == "magi_attention":
        if is_fast and gpu != "B200":
            return requested
        raise ValueError(
            f"parallel_config.context_parallel_backend={requested!r}: magi_attention cannot run: "
            f"it needs Hopper, bfloat16, head_dim 64 or 128, not {gpu}, {dtype}, {head_dim}. Mend "
            f"that, or choose 'native' or 'auto'"
        )
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"native on a GPU takes a head_dim that is a multiple of 8, 256 at the most, not "
            f"head_dim {head_dim}"
        )
    slow = "FlashAttention-2" if dtype == "bfloat16" else "scaled_dot_product_attention"
    return "FlashAttention-4" if is_fast else slow


def neighbours(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yields settings worth trying: those asked for, and others that differ in one key."""
    cp_size, rows = settings.cp_size, settings.batch_size
    changes = {
        "train_config.activation_checkpointing": CHOICES["activation_checkpointing"],
        "train_config.activation_offload": (False, True),
        "parallel_config.context_parallel_size": (max(1, cp_size // 2), cp_size * 2),
        "data_config.batch_size": (max(1, rows // 2), rows * 2),
    }
    yield "as asked", settings
    fields = "recomputation", "offloads", "cp_size", "batch_size"
    for (key, values), field in zip(changes.items(), fields, strict=True):
        for value in values:
            other = replace(settings, **{field: value})
            if other == settings or (other.offloads and other.recomputation == "none"):
                continue
            if other.world_size % other.cp_size == 0:
                parts = other.dp_size * other.accumulation
                if other.batch_size % parts == 0 and other.dp_size % other.replicas == 0:
                    yield f"{key}={value}", other


def report(settings: Settings, lengths: Callable[[int], list[int]]) -> str:
    """Returns the text of `--plan`."""
    asked, gpu = estimate(settings, lengths), settings.gpu
    others = ", ".join(
        f"{moment} {sum(parts.values()):.1f}"
        for moment, parts in asked.moments.items()
        if moment != asked.moment
    )
    answer = {"yes": "fits", "barely": "may fit: see docs/plan.md", "no": "does not fit"}
    copies = f", {settings.replicas} replicas" if settings.replicas > 1 else ""
    lines = [
        f"plan: {settings.world_size} x {gpu}, dp {settings.dp_size} x cp {settings.cp_size}"
        f"{copies}; attention: {settings.kernel}; keys with ON_GPU have their GPU values",
        "",
        f"GiB on each GPU at the peak of a step, which is {asked.moment}:",
        *(f"{size:8.2f}  {part}" for part, size in asked.moments[asked.moment].items()),
        f"{asked.peak:8.2f}  together, and {BESIDE_GIB:g} for CUDA and NCCL, of "
        f"{GPUS[gpu].memory_gib}: {answer[asked.fits(gpu)]}",
        f"other moments: {others}",
        *([f"host memory: {asked.host:.1f} GiB for each GPU"] if settings.offloads else []),
        "",
        "milliseconds of a step: "
        + ", ".join(f"{part} {value * 1e3:,.0f}" for part, value in asked.seconds.items())
        if asked.seconds
        else f"speed: not measured for {gpu}, {settings.kernel}, compile={settings.compiled}",
        f"expected: {asked}",
        "",
        f"{'':46}{'GiB':>8}  {'fits':8}{'tokens/s':>10}{'MFU':>6}",
    ]
    for name, other in neighbours(settings):
        found = estimate(other, lengths)
        speed = f"{found.tokens_per_s:10,.0f}{found.mfu:6.0%}" if found.seconds else ""
        lines.append(f"{name:46}{found.peak:8.1f}  {found.fits(gpu):8}{speed}")
    return "\n".join(lines)
