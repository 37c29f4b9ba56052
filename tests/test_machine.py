"""What is known of the machine: its GPU, and the host memory that is free."""

import pytest
import torch

from support.machine import GPUS, free_host_memory, gpu_model


@pytest.mark.parametrize(
    "name, model, peak",
    [
        ("NVIDIA H200", "H200", 989e12),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA GB200", None, None),
    ],
)
def test_known_gpus_alone_have_a_peak(name, model, peak, monkeypatch):
    assert gpu_model() is None, "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu_model() == model
    assert peak is None or GPUS[model].peak_flops == peak


def limited(limit: str, used: str, statistics: str) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": statistics}


VERSION_1 = {
    "memory.limit_in_bytes": "900",
    "memory.usage_in_bytes": "500",
    "memory.stat": "total_inactive_file 30\n",
}


@pytest.mark.parametrize(
    "groups, files, free",
    [
        ("", {}, 1024),
        ("0::/", {"": limited("max", "5", "")}, 1024),
        ("0::/", {"": limited("900", "500", "file 7")}, 400),
        ("0::/", {"": limited("900", "500", "inactive_anon 7\ninactive_file 100\n")}, 500),
        (
            "0::/slurm/job_1/step_0",
            {
                "slurm/job_1/step_0": limited("max", "5", ""),
                "slurm/job_1": limited("900", "700", ""),
                "slurm": limited("950", "700", ""),
            },
            200,
        ),
        ("5:cpu,cpuacct:/\n4:memory:/job", {"memory/job": VERSION_1}, 430),
        ("4:memory:/docker/of-the-host", {"memory": VERSION_1}, 430),
    ],
)
def test_free_host_memory_is_the_container_s_and_the_job_s_too(groups, files, free, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemFree:  9 kB\nMemAvailable:       1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n" if groups else "")
    for folder, contents in files.items():
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (group / name).write_text(text)
    assert free_host_memory(str(tmp_path)) == free
    assert free_host_memory() > 2**20, "of this machine"
