"""Ranks of real runs: processes that call `main.main`.

They are forked from a server that has imported torch, which saves seconds for each.
"""

import multiprocessing
import os
import re
import signal
import socket
import sys

from conftest import ROOT, environment

os.environ |= {"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["main", "checkpoint_worker", "torch._dynamo", "torch.utils.tensorboard"]
)

ITERS = 12  # steps of a run
# A model whose steps take a moment, on English text.
SHORT = [
    "model_config.preset=tiny",
    'model_config.overrides={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}',
    "data_config.source=LICENSE",
    "data_config.seqlen=24",
    "data_config.batch_size=4",
    "train_config.dtype=float32",
    "train_config.compile=false",
    "train_config.activation_checkpointing=none",
    "train_config.optimizer_config.learning_rate=3e-3",
    "train_config.optimizer_config.warmup_iters=2",
]


def work(rank: int, world_size: int, port: int, arguments: list[str], output, kill_at: int):
    """Runs one rank. kill_at: the number of the change to a checkpoint's files that kills it."""
    os.chdir(ROOT)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
    }
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    import torch

    import main
    from support import process, stop

    torch.set_num_threads(1)
    (output_dir,) = (re.findall(r"output_dir=(.*)", "\n".join(arguments)) or [""])[-1:]
    changes = 0

    def count(event: str, found: tuple) -> None:
        nonlocal changes
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
            changes += str(found[0]).startswith(f"{output_dir}/step-")
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(count)
    stop.listen()
    main.main(arguments)
    process.end_process()


class Run:
    """The processes of a run, and their output in `said`."""

    def __init__(self, processes: int, arguments: list, kill_at: int = 0, absent: int = 0) -> None:
        """absent: ranks that are not started."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.said, (self.output, output) = "", context.Pipe(duplex=False)
        self.ranks = [
            context.Process(
                target=work,
                args=(rank, processes + absent, port, [*SHORT, *arguments], output, kill_at),
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

    def wait_for(self, text: str) -> "Run":
        """Waits for a line that begins with `text`."""
        while f"\n{text}" not in self.said:
            assert self.read(), self.said
        return self

    def signal(self, number: int, *ranks: int) -> "Run":
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
