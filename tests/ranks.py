"""Ranks of runs, without torchrun: they are forked from a server that has imported torch, which
saves seconds for each.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import connection

from conftest import ROOT, environment, free_port

os.environ |= {"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["main", "torch._dynamo", "torch.utils.tensorboard"])


def work(rank: int, world_size: int, port: int, output, function: Callable, *args) -> None:
    """Runs one rank."""
    os.chdir(ROOT)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
    }
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    import torch

    torch.set_num_threads(1)
    function(*args)


class Ranks:
    """Processes that call a function, each as one rank. Their output is in `said`."""

    def __init__(self, processes: int, function: Callable, *args, absent: int = 0) -> None:
        """absent: ranks that are not started."""
        port = free_port()
        self.said, (self.output, output) = "", context.Pipe(duplex=False)
        self.ranks = [
            context.Process(
                target=work, args=(rank, processes + absent, port, output, function, *args)
            )
            for rank in range(processes)
        ]
        for process in self.ranks:
            process.start()
        output.close()

    def read(self) -> str:
        """Waits for more output; returns it, or "" if the processes have ended."""
        more = os.read(self.output.fileno(), 1 << 16).decode()
        self.said += more
        return more

    def wait_for(self, text: str) -> "Ranks":
        """Waits for a line that begins with `text`."""
        while f"\n{text}" not in self.said:
            assert self.read(), self.said
        return self

    def signal(self, number: int, *ranks: int) -> "Ranks":
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid, number)
        return self

    def exit_codes(self) -> list[int]:
        while self.read():
            pass
        for process in self.ranks:
            process.join()
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def finish(self) -> str:
        """Waits for all; returns their output. If one fails, the others are killed, and the test
        fails.
        """
        while alive := [process.sentinel for process in self.ranks if process.is_alive()]:
            if self.output in connection.wait([self.output, *alive]):
                self.read()
            if any(process.exitcode for process in self.ranks):
                self.kill()
        assert self.exit_codes() == [0] * len(self.ranks), self.said
        return self.said


def run_ranks(processes: int, script, *arguments, import_from: str = "") -> str:
    """Runs a script, as `torchrun --nproc-per-node PROCESSES` does on a CPU; returns its output.

    import_from: a folder before all others.
    """
    words = [str(word) for word in (script, *arguments)]
    return Ranks(processes, run_script, words, import_from).finish()


def run_script(words: list[str], import_from: str) -> None:
    sys.argv = words
    sys.path[:0] = [str(import_from)] if import_from else []
    runpy.run_path(words[0], run_name="__main__")
