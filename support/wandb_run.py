"""Weights & Biases, where `train_config.wandb_project` is set. It never ends a run."""

import os
import threading
import uuid
from typing import Any

from .stop import log

FINISH_SECONDS = 60.0  # without a network wandb tries for much longer
FAILED_SECONDS = 5.0  # after an error, which is printed only then


def check(project: str) -> None:
    """Raises ValueError if wandb is not installed."""
    try:
        from wandb import init  # noqa: F401  a folder named wandb has none
    except ImportError:
        raise ValueError(
            f"train_config.wandb_project={project!r} needs wandb, which is not installed; "
            f"`pip install wandb`, or set train_config.wandb_project=''"
        ) from None


def start(run_config: dict[str, Any]) -> Any:
    """Returns wandb's run, or None with a warning. It continues the one named by
    `output_dir/wandb_id`.
    """
    train_config = run_config["train_config"]
    output_dir = train_config["output_dir"]
    try:
        import wandb

        with open(os.path.join(output_dir, "wandb_id"), "a+") as file:
            file.seek(0)
            if not (run_id := file.read().strip()):
                run_id = uuid.uuid4().hex
                file.write(run_id)
        return wandb.init(
            project=train_config["wandb_project"],
            name=os.path.basename(os.path.abspath(output_dir)),
            id=run_id,
            resume="allow",
            dir=output_dir,
            config=run_config,
        )
    except Exception as error:  # of many types: no network, no account, a full disk
        log(f"warning: nothing goes to wandb: {error!r}")
        return None


def finish(run: Any, failed: bool) -> None:
    """Uploads the rest. It waits a minute at most, and some seconds if the run has failed."""

    def upload() -> None:
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:
            log(f"warning: wandb could not finish: {error!r}")

    thread = threading.Thread(target=upload, daemon=True)
    thread.start()
    thread.join(FAILED_SECONDS if failed else FINISH_SECONDS)
    if thread.is_alive():
        log("warning: wandb has not uploaded everything; `wandb sync` does")
