"""What each process of a run does at its start and its end, and how the processes speak as one."""

import faulthandler
import fcntl
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist


def rank() -> int:
    """Returns this process's rank; known before there is a process group."""
    return int(os.environ.get("RANK", 0))


def log(message: str) -> None:
    """Prints on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def is_one_node() -> bool:
    """Returns whether all ranks are on this node."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Returns the store through which the ranks find each other, this rank and the world size.

    torchrun keeps its store when it starts the processes of a node again, and these would take the
    addresses that are left there for each other's. So each start on one node has keys of its own.
    (Over several nodes the counts of restarts differ; there a scheduler has to start all again.)
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if is_one_node():
        store = dist.PrefixStore(f"start {restarts()}", store)
    return store, rank, world_size


def restarts() -> int:
    """Returns how often torchrun has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


locks = []  # open files: closed, they would lock no more


def take_output_dir(output_dir: str) -> None:
    """Makes the folder where it is missing; rank 0 keeps other runs out of it as long as it lives.

    Raises ValueError if it cannot be written, or another run is in there: two would write over each
    other's files.
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
    locks.append(file := open(os.path.join(output_dir, "lock"), "a+"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(
            f"train_config.output_dir={output_dir!r} is in use: {file.read().strip()} writes it; "
            f"end that, or remove {file.name} if it is gone, or give another output_dir"
        ) from None
    except OSError:
        pass  # a file system that has no locks


class Watchdog:
    """Ends this process, which torchrun takes as the end of all, when something takes too long."""

    def __init__(self, seconds: float) -> None:
        """seconds: how long what is watched may take, `train_config.step_timeout`."""
        self.seconds = seconds
        self.timer: threading.Timer | None = None

    def watch(self, what: str) -> None:
        """Begins to count anew, for what is named, in place of what was watched before."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = threading.Timer(self.seconds, self._give_up, [what])
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        """To be called after `watch`: nothing is watched any more."""
        self.timer.cancel()
        self.timer.join()

    def _give_up(self, what: str) -> None:
        print(
            f"error: {what} is not done after {self.seconds:g} s (train_config.step_timeout); rank "
            f"{rank()} is at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(1)


def exit_with(error: Exception) -> NoReturn:
    """Ends this process with the error, one sentence that a person sees once on each node.

    Rank 0 speaks, and its exit makes torchrun end the other ranks of its node. What is wrong may be
    wrong on another node alone (a missing file), so the first rank there speaks too, if it is still
    there after a while.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save: torchrun may end this
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if rank() != 0:
        time.sleep(10 if first_of_node else 20)  # whoever exits first ends the node's others
    sys.exit(f"error: {error}" if first_of_node else 1)


def leave() -> NoReturn:
    """Ends this process, whose work is done and saved, with 0, and without Python's own ending.

    A thread of gloo lets go of a collective's tensors only after that has been waited for. If
    Python ends meanwhile, the thread cannot take Python's lock any more, and aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
