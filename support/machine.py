"""The machine of this process: its GPU, its memory, its clock, and its description."""

import functools
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    peak_flops: float  # dense bfloat16 FLOP/s, NVIDIA's data sheets
    memory_gib: float  # that PyTorch can use


GPUS = {  # by words of `torch.cuda.get_device_name()`; the first match counts
    "H100 PCIe": Gpu(756e12, 79.2),
    "H100 NVL": Gpu(835e12, 93.1),
    "H100": Gpu(989e12, 79.2),
    "H200 NVL": Gpu(835e12, 139.8),
    "H200": Gpu(989e12, 139.8),
    "B200": Gpu(2250e12, 178.4),
    "A100": Gpu(312e12, 79.2),
}


def gpu_model() -> str | None:
    """Returns this rank's GPU as a key of GPUS, None on a CPU or for another GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu}\b", name)), None)


@functools.cache
def describe_machine() -> dict[str, str]:
    """Returns versions, hardware and commit."""
    cuda = torch.cuda.is_available()
    commit = ""
    if shutil.which("git"):
        here = os.path.dirname(os.path.abspath(__file__))
        command = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
            if cuda
            else f"CPU with {os.cpu_count()} cores"
        ),
        "cuda": str(torch.version.cuda) if cuda else "none",
        "commit": commit or "unknown",
    }


def peak_memory_gib() -> float:
    """Returns this process's peak of allocated GPU memory, or on a CPU of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_host_memory(root: str = "/") -> int:
    """Returns the bytes that processes can still take: of the machine, and of each control group
    that this process is in, as in a container or a Slurm job.
    """
    meminfo = Path(root, "proc/meminfo").read_text()
    free = [1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo)[1])]
    for line in Path(root, "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = "sys/fs/cgroup", ("memory.max", "memory.current")  # version 2
        if controllers:
            top, names = f"{top}/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                limit, used = (Path(root, top, folder, name).read_text() for name in names)
                statistics = Path(root, top, folder, "memory.stat").read_text()
            except OSError:  # the top group has no limit; a container sees its own group as the top
                continue
            if limit.strip() != "max":
                # Files that were read count as used, but give way.
                cached = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
                free.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return min(free)


def now() -> torch.cuda.Event | float:
    """Returns the time: on a GPU an event behind all queued kernels, else the clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Returns the seconds between two times of `now`; the events are complete."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
