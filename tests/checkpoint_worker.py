"""Ranks of real runs: processes that call `main.main`."""

import os
import re
import signal
import sys

from ranks import Ranks

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


class Run(Ranks):
    def __init__(self, processes: int, arguments: list, kill_at: int = 0, absent: int = 0) -> None:
        """kill_at: the number of the change to a checkpoint's files that kills a rank."""
        super().__init__(processes, train, [*SHORT, *arguments], kill_at, absent=absent)


def train(arguments: list[str], kill_at: int) -> None:
    """Runs one rank."""
    import main
    from support import process, stop

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
