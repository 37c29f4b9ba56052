"""Checkpoints: save, and resume on any layout.

resume.py finds the checkpoint that a run begins with. format.py writes, checks and reads the files
of a checkpoint. __main__.py has the commands.
"""

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from . import weights
from .format import (
    CheckpointError,
    Reader,
    Writer,
    find_damage,
    read_manifest,
    remove_leftovers,
    remove_partial,
)
from .resume import (
    CORPORA,
    PLACE,
    check_model,
    config_changes,
    differences,
    find,
    find_weights,
    next_row,
)


def _first_complete(
    paths: list[str], log: Callable[[str], None], group: dist.ProcessGroup | None = None
) -> str:
    """Returns the first complete checkpoint of the paths, or "" if there are none.

    The ranks share the reading of its files. A collective over the group, on the CPU.
    Raises CheckpointError if all are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problems = [""] * world_size
    for path in paths:
        dist.all_gather_object(problems, find_damage(path, rank, world_size), group=group)
        if not any(problems):
            return path
        log(f"warning: {path} is damaged and skipped: {max(problems)}")
    if paths:
        raise CheckpointError(
            f"all checkpoints are damaged: {', '.join(paths)}; give another "
            f"train_config.output_dir to start anew"
        )
    return ""


def load_model(model: nn.Module, config: dict[str, Any], log: Callable[[str], None]) -> None:
    """Fills a sharded model from the newest complete checkpoint of `find_weights`, if any.

    config, log: as for `Checkpointer`. A collective over all ranks.
    Raises CheckpointError if all are damaged, or if the model has another shape.
    """
    found = [find_weights(config)]
    dist.broadcast_object_list(found)
    path = _first_complete(found[0], log)
    if path:
        saved = read_manifest(path)["config"]
        check_model(path, {"config": saved}, config)
        Reader(path).load({"model": weights.model_state(model)})
        changes = differences(
            {key: saved[key] for key in ("llama_config", "data_config")},
            json.loads(json.dumps(config)),
        )
        for key, old, new in changes:
            if key.startswith(("llama_config.", "data_config.validation_fraction")):
                log(f"warning: {key} is {new!r}, but {path} was trained with {old!r}")
    log(f"weights: {path or config['model_config']['init_from']}")


class Checkpointer:
    """Saves and resumes a run."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        config: dict[str, Any],
        log: Callable[[str], None],
        restarts: int = 0,
    ) -> None:
        """config: the resolved sections, `llama_config` and `machine`. log: prints on rank 0 only.
        restarts: as in `find`. All methods are collectives over all ranks.
        """
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.config, self.log, self.restarts = config, log, restarts
        self.train_config = config["train_config"]
        self.writer = Writer(self.train_config["keep_last"], log)
        # DCP's thread needs its own group, since training uses the others at the same time.
        timeout = timedelta(seconds=2 * self.train_config["step_timeout"])
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.saving = None  # the future of the pending save
        self.failure, self.disk_is_full = "", False  # of the last save
        self.ever_failed = False  # whether any save failed
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def stops_on_failure(self) -> bool:
        """Whether the last save failed and the config asks to stop then."""
        return bool(self.failure) and self.train_config["on_checkpoint_failure"] == "stop"

    def resume(self) -> int:
        """Loads the newest complete checkpoint that `find` returns; returns its step.

        Without one, and if it only begins a new run, it returns 0. It sets the config's
        "first_row", the row of the data with which the run began, and "branch_of", the path of the
        checkpoint or run with which a branch began.
        Raises CheckpointError if all checkpoints are damaged, or if the config does not fit.
        """
        found = [None]
        if dist.get_rank() == 0:
            remove_leftovers(self.train_config["output_dir"], self.log)
            try:
                found = [find(self.config, self.restarts)]
            except CheckpointError as error:
                found = [error]
        dist.broadcast_object_list(found, group=self.group)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        paths, resumes = found[0]
        path = _first_complete(paths, self.log, self.group)
        if not path:
            self.config["first_row"] = 0
            return 0
        self.writer.damaged = {os.path.basename(x) for x in paths[: paths.index(path)]}
        manifest = read_manifest(path)
        if not resumes:
            self._continue(path, manifest)
            return 0
        changes = config_changes(path, manifest, self.config)
        for key, saved, new in changes:
            self.log(f"resume: {key} {saved!r} -> {new!r}")
        step, train_iters = manifest["step"], self.train_config["train_iters"]
        free = *PLACE, *CORPORA, "parallel_config."
        changed = [key for key, *_ in changes if not key.startswith(free)]
        if step == train_iters and changed:
            raise CheckpointError(
                f"{path} has all {train_iters} steps, so a change of {', '.join(changed)} "
                f"would train nothing; raise train_config.train_iters, or give an output_dir "
                f"other than {self.train_config['output_dir']!r}"
            )
        self._load(path, manifest)
        self._load_schedule(manifest)
        saved = manifest["config"]
        self.config["first_row"] = saved.get("first_row", 0)
        run, resume = os.path.dirname(os.path.abspath(path)), self.train_config["resume"]
        is_own = os.path.samefile(run, self.train_config["output_dir"])
        self.config["branch_of"] = saved.get("branch_of") if is_own else os.path.realpath(resume)
        done = "; all its steps are done" if step == train_iters else ""
        self.log(f"resume: {path}, step {step} of {train_iters}{done}")
        return step

    def _continue(self, path: str, manifest: dict[str, Any]) -> None:
        """Begins a new run with the weights and the optimizer state of another one."""
        check_model(path, manifest, self.config)
        self._load(path, manifest)
        saved, step = manifest["config"], manifest["step"]
        self.config["first_row"] = first_row = next_row(saved, self.config, step)
        for key, old, new in differences(saved, json.loads(json.dumps(self.config))):
            if not key.startswith((*PLACE, "first_row")):
                self.log(f"continue: {key} {old!r} -> {new!r}")
        rows = f"row {first_row:,} of the same data" if first_row else "the first row of the data"
        self.log(f"continue: a new run begins with {path}, step {step}, and with {rows}")

    def is_any_stopping(self, requested: bool) -> bool:
        """Returns whether the run has to save and end after this step. A collective, on the CPU.

        requested: whether this rank was asked to stop, or cannot read its next batch. The end of
        torchrun asks too, since nothing else would end this process.
        """
        is_orphan = self.torchrun not in (None, os.getppid())
        stopping = torch.tensor(float(requested or is_orphan or self.stops_on_failure))
        dist.all_reduce(stopping)
        return bool(stopping > 0)

    def is_due(self, step: int, stop: bool) -> bool:
        """Returns whether `after_step`, with these arguments, saves."""
        interval = self.train_config["checkpoint_interval"]
        is_last = stop or step == self.train_config["train_iters"]
        return is_last or (interval > 0 and step % interval == 0)

    def after_step(self, step: int, stop: bool) -> float:
        """Saves if a checkpoint is due; returns the seconds for which training paused.

        step: the first is 1. stop: of `is_any_stopping`, the same on all ranks. With
        `stop`, and after the last step, it waits until the checkpoint is complete. Raises
        CheckpointError if this save fails, or if one failed and `on_checkpoint_failure` is "stop".
        """
        start = time.perf_counter()
        if self.saving is not None and self.saving.done():
            self.wait_for_save()
        if not self.is_due(step, stop):
            return 0.0
        self.wait_for_save()
        if self.stops_on_failure:
            raise CheckpointError(self.failure)
        self._begin_save(step)
        if stop or step == self.train_config["train_iters"]:
            self.wait_for_save()
            if self.disk_is_full:  # it may have room now
                dist.barrier(group=self.group)  # rank 0 has removed the partial checkpoint
                self._begin_save(step)
                self.wait_for_save()
            if self.failure:
                raise CheckpointError(self.failure)
            if stop and step < self.train_config["train_iters"]:
                resume = self.train_config["resume"]
                same = " with train_config.resume=auto" if resume == "never" else ""
                self.log(f"stopping: saved step {step}; the same command{same} resumes")
        return time.perf_counter() - start

    def _begin_save(self, step: int) -> None:
        self.writer.manifest = {
            "step": step,
            "world_size": dist.get_world_size(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "config": self.config,
        }
        self.saving = dcp.async_save(
            self._state(dist.get_rank()),
            checkpoint_id=os.path.join(self.train_config["output_dir"], f"step-{step:08}.tmp"),
            storage_writer=self.writer,
            # Each save writes the same tensors, so DCP may cache its plan; after a failure torch
            # 2.11 has it on only some ranks.
            planner=dcp.DefaultSavePlanner(enable_plan_caching=not self.ever_failed),
            process_group=self.group,
        )

    def wait_for_save(self) -> None:
        """Waits for the pending save, if there is one, and logs its result."""
        if self.saving is None:
            return
        error, self.saving = self.saving.exception(), None
        temporary = os.fspath(self.writer.path)
        if error is None:
            self.failure, self.disk_is_full = "", False
            self.log(f"saved: {temporary.removesuffix('.tmp')}")
            return
        self.ever_failed = True
        if dist.get_rank() == 0 and os.path.lexists(temporary):
            remove_partial(temporary, self.log)
        failures = getattr(error, "failures", {})  # DCP's: {rank: (exception, traceback)}
        reasons = [f"rank {rank}: {failure!r}" for rank, (failure, _) in failures.items()]
        self.failure = (
            f"the checkpoint {temporary.removesuffix('.tmp')} could not be written, and the one "
            f"before it is kept: {'; '.join(reasons) or repr(error)}"
        )
        self.log(f"warning: {self.failure}")
        numbers = {getattr(failure, "errno", None) for failure, _ in failures.values()}
        self.disk_is_full = bool(numbers & {errno.ENOSPC, errno.EDQUOT})
        keeps_all = not self.train_config["keep_last"] or self.stops_on_failure
        if self.disk_is_full and not keeps_all and dist.get_rank() == 0:
            self.writer.prune(self.train_config["output_dir"], keep_last=1)

    def _state(self, rng_rank: int) -> dict[str, dict]:
        """Returns the tensors of model and optimizer themselves, and copies of the random states.

        rng_rank: the rank whose random states these are. Training draws no random numbers; they are
        saved for code that a user adds, such as dropout.
        """
        rng = {f"cpu.{rng_rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng[f"cuda.{rng_rank}"] = torch.cuda.get_rng_state()
        return {
            "model": weights.model_state(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer)["state"],
            "rng": rng,
        }

    def _load(self, path: str, manifest: dict[str, Any]) -> None:
        state = self._state(dist.get_rank() % manifest["world_size"])
        reader = Reader(path)
        saved = reader.metadata.state_dict_metadata
        state["rng"] = {name: x for name, x in state["rng"].items() if f"rng.{name}" in saved}
        reader.load(state, process_group=self.group)
        # The optimizer's settings are this config's; the schedule's position is the checkpoint's.
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_optimizer_state_dict(
            self.model, self.optimizer, {"state": state["optimizer"], "param_groups": groups}
        )
        for name, generator_state in state["rng"].items():
            cuda = name.startswith("cuda")
            (torch.cuda.set_rng_state if cuda else torch.set_rng_state)(generator_state)

    def _load_schedule(self, manifest: dict[str, Any]) -> None:
        schedule = manifest["lr_scheduler"]
        schedule |= {"base_lrs": self.lr_scheduler.base_lrs, "last_epoch": manifest["step"] - 1}
        self.lr_scheduler.load_state_dict(schedule)
        self.lr_scheduler.step()
