"""torchrun for run.sh: it counts the GPUs, and an error of `exit_with` has no report behind it."""

import logging
import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .process import ERROR_CODE

if __name__ == "__main__":
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get("GPUS_PER_NODE") or gpus or 2)
    sys.argv[1:1] = ["--nproc-per-node", str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads)
    if gpus:  # the hardware queues that MagiAttention wants, to communicate while it computes
        queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") or "8"
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = queues
    # They log how each worker ended, and its error file; the report repeats both.
    for name in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    # `run.sh` sends these to the workers. If a scheduler also sends them here, they change nothing.
    for number in (signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != ERROR_CODE:
            raise
        if failure.local_rank > 0:  # `exit_with` prints that of the node's first rank
            if isinstance(failure.message, str):  # it could not write its sentence into a file
                raise
            print(failure.message["message"], file=sys.stderr)
        sys.exit(ERROR_CODE)
