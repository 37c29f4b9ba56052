"""Compares the gradients of steps with and without `activation_offload`, on GPUs.

    torchrun --nproc-per-node 1 tests/offload_worker.py native selective 64

The third argument is the length of documents. Rank 0 prints one line.

Kernels add up gradients in an order that varies, but in one order if a document fits one block of
theirs and each query head has its own keys.
"""

import sys
import tempfile
import warnings

import torch
import torch.distributed as dist

import main
from llama_pretrain_config import train_config
from support import config, plan, recompute
from support.process import end_process, rank

STEPS = 3


def gradients(device_mesh, sources, offload: bool) -> tuple[list[dict], float, int]:
    """Returns each step's local gradients by name; the GiB that its last step adds at its peak, and
    how often that step waited for the GPU.
    """
    train_config["activation_offload"] = offload
    model, found = main.parallelize_model(main.build_llama_model(), device_mesh), []
    for step in range(STEPS):
        batch = main.prepare_batch(sources["train"], device_mesh, model.config, None, step)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for input_ids, labels, position_ids, key in batch.micro_batches:
                with torch.no_grad():  # as in an evaluation
                    model(input_ids, position_ids, key, labels)
                losses = model(input_ids, position_ids, key, labels)
                main.loss_func(losses, batch.num_labels, device_mesh).backward()
            torch.cuda.set_sync_debug_mode("default")
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        waits = sum("synchronizing" in str(warning.message) for warning in caught)
        found.append({n: p.grad.to_local().clone() for n, p in model.named_parameters()})
        model.zero_grad()
    return found, peak, waits


def compare(backend: str, mode: str, length: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = main.set_up(
            [
                f"train_config.output_dir={folder}",
                f"train_config.activation_checkpointing={mode}",
                "train_config.gradient_accumulation_steps=2",
                "data_config.source=random",
                f"data_config.random_document_length={length}",
                "data_config.seqlen=40000",
                "data_config.batch_size=2",
                f"parallel_config.context_parallel_backend={backend}",
                "model_config.overrides.num_hidden_layers=4",
                "model_config.overrides.num_key_value_heads=32",
                "model_config.overrides.vocab_size=1024",
            ]
        )
        main.init_env()
        device_mesh, hosts = main.build_mesh(), []
        build = recompute._Host
        recompute._Host = lambda: hosts.append(build()) or hosts[-1]
        plain, peak, waits = gradients(device_mesh, sources, offload=False)
        again, *_ = gradients(device_mesh, sources, offload=False)
        moved, lower, more_waits = gradients(device_mesh, sources, offload=True)
    assert more_waits == waits, (waits, more_waits)
    assert lower < peak, (peak, lower)
    world_size, llama = dist.get_world_size(), main.build_llama_config()
    settings = plan.Settings.of(config.sections(), llama, "", backend, world_size)
    expected = plan.host_bytes(settings, 40_000 // world_size, gathers=world_size > 1)
    expected //= recompute.HOST_BLOCK_SIZE
    in_host = len(hosts[0].free)  # all of them are free again
    # magi_attention keeps K and V in one tensor, which can need a block less than two.
    assert 0.9 * expected <= in_host <= expected, (in_host, expected)
    (rounding, _), (error, name) = largest_error(plain, again), largest_error(plain, moved)
    assert error <= 2 * rounding, (error, rounding, name)
    if rank() == 0:
        print(
            f"{backend} {mode}: without offload run twice {rounding:.1e}, with it {error:.1e} "
            f"({name}); "
            f"{peak:.2f} -> {lower:.2f} GiB; {in_host} blocks; waits {waits}, {more_waits}"
        )


def largest_error(some: list[dict], others: list[dict]) -> tuple[float, str]:
    """Returns the largest relative error of all gradients, and whose; 0.0: equal bit for bit."""

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        return 0.0 if torch.equal(x, y) else float((x - y).norm() / y.norm())

    return max(
        (error(x[name], y[name]), name) for x, y in zip(some, others, strict=True) for name in x
    )


if __name__ == "__main__":
    compare(*sys.argv[1:])
    end_process()
