"""Trains the same five steps in each layout, after one start of the processes: for eight_gpus.sh.

    export PYTHONPATH=.
    torchrun --nproc-per-node 8 tests/layouts_worker.py OUTPUT native,magi_attention KEY=VALUE...

writes OUTPUT/BACKEND-cpN/metrics.jsonl for each N, and OUTPUT/BACKEND-2-replicas-cp2.
"""

import os
import sys
from pathlib import Path

import benchmark
from support import process

STEPS = 5


def main() -> None:
    output, backends, *arguments = sys.argv[1:]
    processes = int(os.environ["WORLD_SIZE"])
    layouts = {f"cp{2**k}": (2**k, 1) for k in range(processes.bit_length())}
    if processes % 4 == 0:
        layouts["2-replicas-cp2"] = 2, 2
    for backend in backends.split(","):
        for name, (cp_size, replicas) in layouts.items():
            of_layout = [
                f"parallel_config.context_parallel_backend={backend}",
                f"parallel_config.context_parallel_size={cp_size}",
                f"parallel_config.data_parallel_replicate_size={replicas}",
            ]
            benchmark.train(Path(output) / f"{backend}-{name}", STEPS, [*arguments, *of_layout])
    process.end_process()


if __name__ == "__main__":
    main()
