"""Checkpoints: save, and resume on any layout.

format.py writes, checks and reads the files of a checkpoint. __main__.py has the commands `inspect`
and `export`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
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
    checkpoints,
    find_damage,
    read_manifest,
    remove_leftovers,
    remove_partial,
)

# Keys, or their beginnings, that may not change on resume. All others may.
FIXED = ("data", "data_config.", "llama_config.", "train_config.seed")
# Except these, if a checkpoint has the fingerprints of its corpora: the files may have moved.
CORPORA = ("data", "data_config.source", "data_config.validation_source")
# Keys of a run's place. They do not change its training.
PLACE = (
    "machine.",
    "model_config.init_from",
    "tokenizer.",
    "train_config.output_dir",
    "train_config.resume",
)


def find(config: dict[str, Any], restarts: int) -> list[str]:
    """Returns the checkpoints from which a run may resume, the newest first; none to start anew.

    config: the run's, with `train_config.resume`. restarts: the number of restarts by torchrun; a
    restarted run ignores `resume` if it has checkpoints of its own.
    Raises CheckpointError if the run would lose or mix up files in output_dir.
    """
    resume, output_dir = config["train_config"]["resume"], config["train_config"]["output_dir"]
    own = checkpoints(output_dir)
    if resume == "auto" or (restarts and own):
        return own
    if resume == "never":
        if not restarts and (own or os.path.exists(os.path.join(output_dir, "metrics.jsonl"))):
            raise CheckpointError(
                f"train_config.resume='never', but train_config.output_dir={output_dir!r} holds a "
                f"run; give another output_dir, remove this one, or set resume='auto'"
            )
        return []
    found = checkpoints(resume)
    if not found:
        raise CheckpointError(
            f"train_config.resume={resume!r} holds no checkpoint; it must be 'auto', 'never', the "
            f"output_dir of a run, or one step-... folder in it"
        )
    if own and not os.path.samefile(own[0], found[0]):
        raise CheckpointError(
            f"train_config.resume={resume!r}, but the newest checkpoint in train_config.output_dir "
            f"is {own[0]}; give another output_dir, or set resume='auto' to resume from it"
        )
    return found


def check_resume(config: dict[str, Any], restarts: int = 0) -> None:
    """Raises CheckpointError if a run with this config cannot resume. It reads only manifests."""
    for path in find(config, restarts):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # `Checkpointer.resume` warns of it
        _config_changes(path, manifest, config)
        return


def _config_changes(
    path: str, manifest: dict[str, Any], config: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns (key, saved value, new value) of each key that differs from the checkpoint's config.

    Keys that only one of the two has come from another version and are ignored.
    Raises CheckpointError for a key that may not change.
    """
    changes = list(_differences(manifest["config"], json.loads(json.dumps(config))))
    has_fingerprints = "fingerprints" in manifest["config"]
    for key, saved, new in changes:
        if key.startswith("fingerprints."):
            source = "source" if key == "fingerprints.train" else "validation_source"
            raise CheckpointError(
                f"data_config.{source}={config['data_config'][source]!r} does not hold the "
                f"documents of {path}; restore them, or give another train_config.output_dir"
            )
        may_differ = key in CORPORA and (has_fingerprints or os.path.expanduser(saved) == new)
        if key.startswith(FIXED) and not may_differ:
            raise CheckpointError(
                f"{key}={new!r}, but {path} was trained with {saved!r}, and a run may not change "
                f"this key; set it back, or give another train_config.output_dir"
            )
    if manifest["step"] > config["train_config"]["train_iters"]:
        raise CheckpointError(
            f"train_config.train_iters={config['train_config']['train_iters']}, but {path} has "
            f"more steps; raise train_iters, or give another train_config.output_dir"
        )
    return changes


def _differences(saved: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in [key for key in saved if key in new and saved[key] != new[key]]:
        if isinstance(saved[key], dict) and isinstance(new[key], dict):
            yield from _differences(saved[key], new[key], f"{prefix}{key}.")
        else:
            yield prefix + key, saved[key], new[key]


# ---------------------------------------------------------------------------------------------
# A run's checkpoints
# ---------------------------------------------------------------------------------------------


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
        self.failure, self.ever_failed = "", False  # the last save's error; whether any save failed
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def stops_on_failure(self) -> bool:
        """Whether the last save failed and the config asks to stop then."""
        return bool(self.failure) and self.train_config["on_checkpoint_failure"] == "stop"

    def resume(self) -> int:
        """Resumes from the newest complete checkpoint that `find` returns; returns its step, or 0.

        Raises CheckpointError if all checkpoints are damaged, or if the config does not fit.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        found = [None]
        if rank == 0:
            remove_leftovers(self.train_config["output_dir"], self.log)
            found = [find(self.config, self.restarts)]
        dist.broadcast_object_list(found, group=self.group)
        problems = [""] * world_size
        for path in found[0]:
            problem = find_damage(path, rank, world_size)
            dist.all_gather_object(problems, problem, group=self.group)
            if any(problems):
                self.log(f"warning: {path} is damaged and skipped: {max(problems)}")
                continue
            manifest = read_manifest(path)
            changes = _config_changes(path, manifest, self.config)
            for key, saved, new in changes:
                self.log(f"resume: {key} {saved!r} -> {new!r}")
            step, train_iters = manifest["step"], self.train_config["train_iters"]
            changed = [key for key, *_ in changes if not key.startswith((*PLACE, *CORPORA))]
            if step == train_iters and changed:
                raise CheckpointError(
                    f"{path} has all {train_iters} steps, so a change of {', '.join(changed)} "
                    f"would train nothing; raise train_config.train_iters, or give an output_dir "
                    f"other than {self.train_config['output_dir']!r}"
                )
            self._load(path, manifest)
            done = "; all its steps are done" if step == train_iters else ""
            self.log(f"resume: {path}, step {step} of {train_iters}{done}")
            return step
        if found[0]:
            raise CheckpointError(
                f"all checkpoints are damaged: {', '.join(found[0])}; give another "
                f"train_config.output_dir to start anew"
            )
        return 0

    def is_any_stopping(self, requested: bool) -> bool:
        """Returns whether the run has to save and end after this step. A collective, on the CPU.

        requested: whether this rank was asked to stop. The end of torchrun asks too, since nothing
        else would end this process.
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
        if stop or step == self.train_config["train_iters"]:
            self.wait_for_save()
            if self.failure:
                raise CheckpointError(self.failure)
            if stop:
                resume = self.train_config["resume"]
                same = "" if resume == "auto" else " with train_config.resume=auto"
                self.log(f"asked to stop: saved step {step}; the same command{same} resumes")
        return time.perf_counter() - start

    def wait_for_save(self) -> None:
        """Waits for the pending save, if there is one, and logs its result."""
        if self.saving is None:
            return
        error, self.saving = self.saving.exception(), None
        temporary = os.fspath(self.writer.path)
        if error is None:
            self.failure = ""
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
        schedule = manifest["lr_scheduler"]
        schedule |= {"base_lrs": self.lr_scheduler.base_lrs, "last_epoch": manifest["step"] - 1}
        self.lr_scheduler.load_state_dict(schedule)
        self.lr_scheduler.step()
        for name, generator_state in state["rng"].items():
            cuda = name.startswith("cuda")
            (torch.cuda.set_rng_state if cuda else torch.set_rng_state)(generator_state)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def newest_complete(path: str) -> str:
    """Returns the newest complete checkpoint at `path`; warns of damaged ones."""
    for checkpoint in checkpoints(path):
        problem = find_damage(checkpoint)
        if not problem:
            return checkpoint
        print(f"warning: {checkpoint} is damaged and skipped: {problem}", file=sys.stderr)
    raise CheckpointError(
        f"{path!r} holds no complete checkpoint; give a run's output_dir, or one step-... folder"
    )
