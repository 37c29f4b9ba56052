"""The processes of a run: how they start, lock output_dir, time out and end."""

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist


def rank() -> int:
    """Returns this process's rank, also before the process group exists."""
    return int(os.environ.get("RANK", 0))


def is_one_node() -> bool:
    """Returns whether all ranks are on this node."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


def rendezvous(timeout: timedelta) -> dict[str, Any]:
    """Returns arguments of `init_process_group`: the store in which the ranks find each other.

    torchrun keeps its store when it restarts the processes of a node. Each start therefore has keys
    of its own: a rank must not read an address that an earlier start left there. Nodes count
    restarts separately, so on several nodes a scheduler has to restart all of them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1, "timeout": timeout}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if is_one_node():
        store = dist.PrefixStore(f"start {restarts()}", store)
    return {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raises on all ranks the error that the first of them has; returns if none has one.

    Without it, other ranks would print a broken connection. A collective, on the CPU.
    """
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error


def restarts() -> int:
    """Returns how often torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


ERROR_CODE = 2  # of an error that a user can correct; support/launch.py prints no report of it
locks = []  # open files, since closing one unlocks it


def lock_output_dir(output_dir: str) -> None:
    """Creates the folder if it is missing. Rank 0 locks it until this process ends.

    Raises ValueError if it cannot be written, or if another run uses it: two runs would overwrite
    each other's files.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(
            f"train_config.output_dir={output_dir!r} cannot be written: {error}"
        ) from None
    if rank() != 0:
        return
    path = os.path.join(output_dir, "lock")
    try:
        locks.append(file := open(path, "a+"))
    except OSError as error:
        raise ValueError(
            f"train_config.output_dir={output_dir!r} cannot be locked ({error}); remove {path} if "
            f"no run uses it, or give another output_dir"
        ) from None
    file.seek(0)
    if (content := file.read(8)) and content != "process ":
        raise ValueError(f"{file.name} is not a run's; move it, or give another output_dir")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(
            f"train_config.output_dir={output_dir!r} is in use: {file.read().strip()} writes it; "
            f"end that, or remove {file.name} if it has ended, or give another output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks


class Watchdog:
    """Ends this process when something takes too long; torchrun then ends the others."""

    def __init__(self, seconds: float) -> None:
        """seconds: the limit, `train_config.step_timeout`."""
        self.seconds = seconds
        self.timer: threading.Timer | None = None

    def watch(self, what: str) -> None:
        """Restarts the clock for `what`; the message names it."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = threading.Timer(self.seconds, self._give_up, [what])
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        """Ends the watch."""
        self.timer.cancel()
        self.timer.join()

    def _give_up(self, what: str) -> None:
        try:  # the log's disk may be full
            print(
                f"error: {what} is not done after {self.seconds:g} s (train_config.step_timeout); "
                f"rank {rank()} is at:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback()
        finally:
            os._exit(1)


def exit_with(error: Exception) -> NoReturn:
    """Ends this process with the error, one sentence that appears once on each node.

    Rank 0 prints it; its exit makes torchrun end the other ranks of its node. Another node may have
    an error of its own (a missing file), so its first rank prints too, some seconds later.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save, so torchrun may end it
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if rank() != 0:
        time.sleep(10 if first_of_node else 20)  # the first exit ends the node's other ranks
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with its message
        message = {"message": f"error: {error}", "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(report, "w") as file:
            json.dump({"message": message}, file)
    if first_of_node:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(ERROR_CODE)


def end_process() -> NoReturn:
    """Ends this process, and its process group, with exit code 0, without Python's own shutdown.

    gloo's thread frees a collective's tensors after the collective. It needs the GIL for that, and
    aborts the process if Python is shutting down.
    """
    if dist.is_initialized():
        dist.barrier()  # other ranks' threads may still need this one
        dist.destroy_process_group()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            file.flush()
    os._exit(0)
