"""Checkpoints: save, and resume on any layout.

format.py writes, checks and reads the files of a checkpoint. __main__.py has the commands.
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
# Keys of a run's place and its log. They do not change its training.
PLACE = (
    "machine.",
    "tokenizer.",
    "train_config.output_dir",
    "train_config.resume",
    "train_config.continue_from",
    "train_config.log_interval",
    "train_config.wandb_project",
    "model_config.init_from",
)
# Fields of the model that a new stage may change: no weight depends on them.
FREE_FIELDS = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "initializer_range",
    "is_causal",
)


def find(config: dict[str, Any], restarts: int) -> tuple[list[str], bool]:
    """Returns the checkpoints that a run may load, the newest first, and whether it resumes them.

    There are none if the run starts anew. It does not resume checkpoints of
    `train_config.continue_from`: a new run begins with their weights and optimizer state.

    config: the run's. restarts: the number of restarts by torchrun; a restarted run ignores
    `resume` if it has checkpoints of its own.
    Raises CheckpointError if the run would lose or mix up files in output_dir.
    """
    train_config = config["train_config"]
    resume, output_dir = train_config["resume"], train_config["output_dir"]
    continue_from, own = train_config["continue_from"], checkpoints(output_dir)
    if continue_from:
        if resume not in ("auto", "never"):
            raise CheckpointError(
                f"train_config.resume={resume!r} and continue_from={continue_from!r} exclude each "
                f"other: the first resumes a run, the second begins a new one; give one"
            )
        path = os.path.realpath(continue_from)
        if os.path.realpath(output_dir) in (path, os.path.dirname(path)):
            raise CheckpointError(
                f"train_config.continue_from={continue_from!r} lies in train_config.output_dir, "
                f"but begins a new run; give another output_dir"
            )
    if own and (resume == "auto" or restarts):
        return own, True
    if resume == "never":
        if not restarts and (own or os.path.exists(os.path.join(output_dir, "metrics.jsonl"))):
            raise CheckpointError(
                f"train_config.resume='never', but train_config.output_dir={output_dir!r} holds a "
                f"run; give another output_dir, remove this one, or set resume='auto'"
            )
    if resume in ("auto", "never"):
        found = checkpoints(continue_from) if continue_from else []
        if continue_from and not found:
            raise CheckpointError(
                f"train_config.continue_from={continue_from!r} holds no checkpoint; give the "
                f"output_dir of a run, or one step-... folder in it"
            )
        return found, False
    found = checkpoints(resume)
    if not found:
        raise CheckpointError(
            f"train_config.resume={resume!r} holds no checkpoint; it must be 'auto', 'never', the "
            f"output_dir of a run, or one step-... folder in it (looked in "
            f"{os.path.abspath(resume)})"
        )
    if own and not os.path.samefile(own[0], found[0]):
        raise CheckpointError(
            f"train_config.resume={resume!r}, but the newest checkpoint in train_config.output_dir "
            f"is {own[0]}; give another output_dir, or set resume='auto' to resume from it"
        )
    return found, True


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


def find_weights(config: dict[str, Any]) -> list[str]:
    """Returns the checkpoints that `--evaluate` may load, the newest first: of `resume`, if it is
    a path, or of output_dir, or of `continue_from`.
    """
    train_config = config["train_config"]
    if train_config["resume"] not in ("auto", "never"):
        if found := checkpoints(train_config["resume"]):
            return found
        raise CheckpointError(f"train_config.resume={train_config['resume']!r} holds no checkpoint")
    source = train_config["continue_from"]
    return checkpoints(train_config["output_dir"]) or (checkpoints(source) if source else [])


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
        _check_model(path, {"config": saved}, config)
        Reader(path).load({"model": weights.model_state(model)})
        differences = _differences(
            {key: saved[key] for key in ("llama_config", "data_config")},
            json.loads(json.dumps(config)),
        )
        for key, old, new in differences:
            if key.startswith(("llama_config.", "data_config.validation_fraction")):
                log(f"warning: {key} is {new!r}, but {path} was trained with {old!r}")
    log(f"weights: {path or config['model_config']['init_from']}")


def check_resume(config: dict[str, Any], restarts: int = 0) -> None:
    """Raises CheckpointError if a run with this config cannot resume, or cannot continue from its
    `continue_from`. It reads only manifests.
    """
    paths, resumes = find(config, restarts)
    for path in paths:
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # `Checkpointer.resume` warns of it
        (_config_changes if resumes else _check_model)(path, manifest, config)
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


def _check_model(path: str, manifest: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises CheckpointError if the checkpoint's weights do not fit the config's model."""
    saved, new = manifest["config"]["llama_config"], config["llama_config"]
    for key, value, wanted in _differences(saved, new):
        if key.partition(".")[0] not in FREE_FIELDS:
            raise CheckpointError(
                f"llama_config.{key}={wanted!r}, but {path} was trained with {value!r}; set "
                f"model_config to the checkpoint's, or give another checkpoint"
            )
    names = [c.get("tokenizer", {}).get("sha256") for c in (manifest["config"], config)]
    if all(names) and names[0] != names[1] and config["model_config"]["check_tokenizer"]:
        name = "bytes" if names[0] == "bytes" else f"{os.path.dirname(path)}/tokenizer"
        raise CheckpointError(
            f"{path} was trained on a corpus of another tokenizer; prepare this one with "
            f"--tokenizer {name}, or set model_config.check_tokenizer=false"
        )


def _next_row(saved: dict[str, Any], config: dict[str, Any], step: int) -> int:
    """Returns the row of the data with which a run begins that continues from `step` of another.

    saved, config: of the other run, and of this one. With the same documents, seed and seqlen,
    the rows continue, so that none is trained on twice. Otherwise the first row is 0.
    """
    same = saved.get("fingerprints", {}).get("train") == config["fingerprints"]["train"] and all(
        saved["data_config"].get(key) == config["data_config"][key]
        for key in ("random_document_length", "validation_fraction", "seqlen", "seed")
    )
    batch_size = saved["data_config"]["batch_size"]
    return saved.get("first_row", 0) + step * batch_size if same else 0


def _differences(saved: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the keys that both have with different values. rope_scaling counts as a whole, since
    its optional keys change the model.
    """
    for key in [key for key in saved if key in new and saved[key] != new[key]]:
        are_dicts = isinstance(saved[key], dict) and isinstance(new[key], dict)
        if are_dicts and key != "rope_scaling":
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
        """Loads the newest complete checkpoint that `find` returns; returns its step.

        Without one, and if it only begins a new run, it returns 0. It sets the config's
        "first_row", the row of the data with which the run began.
        Raises CheckpointError if all checkpoints are damaged, or if the config does not fit.
        """
        if dist.get_rank() == 0:
            remove_leftovers(self.train_config["output_dir"], self.log)
        found = [find(self.config, self.restarts) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, group=self.group)
        paths, resumes = found[0]
        path = _first_complete(paths, self.log, self.group)
        if not path:
            self.config["first_row"] = 0
            return 0
        manifest = read_manifest(path)
        if not resumes:
            self._continue(path, manifest)
            return 0
        changes = _config_changes(path, manifest, self.config)
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
        self.config["first_row"] = manifest["config"].get("first_row", 0)
        done = "; all its steps are done" if step == train_iters else ""
        self.log(f"resume: {path}, step {step} of {train_iters}{done}")
        return step

    def _continue(self, path: str, manifest: dict[str, Any]) -> None:
        """Begins a new run with the weights and the optimizer state of another one."""
        _check_model(path, manifest, self.config)
        self._load(path, manifest)
        saved, step = manifest["config"], manifest["step"]
        self.config["first_row"] = first_row = _next_row(saved, self.config, step)
        for key, old, new in _differences(saved, json.loads(json.dumps(self.config))):
            if not key.startswith((*PLACE, "first_row")):
                self.log(f"continue: {key} {old!r} -> {new!r}")
        rows = f"row {first_row:,} of the same data" if first_row else "the first row of the data"
        self.log(f"continue: a new run begins with {path}, step {step}, and with {rows}")

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
            if stop and step < self.train_config["train_iters"]:
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
        for name, generator_state in state["rng"].items():
            cuda = name.startswith("cuda")
            (torch.cuda.set_rng_state if cuda else torch.set_rng_state)(generator_state)

    def _load_schedule(self, manifest: dict[str, Any]) -> None:
        schedule = manifest["lr_scheduler"]
        schedule |= {"base_lrs": self.lr_scheduler.base_lrs, "last_epoch": manifest["step"] - 1}
        self.lr_scheduler.load_state_dict(schedule)
        self.lr_scheduler.step()


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def newest_complete(path: str) -> str:
    """Returns the newest complete checkpoint at `path`; warns of damaged ones."""
    if not (found := checkpoints(path)):
        where = os.path.abspath(path)
        problem = f"holds no complete checkpoint (looked in {where})"
        if not os.path.lexists(path):
            problem = f"does not exist (looked for {where})"
        raise CheckpointError(
            f"{path!r} {problem}; give a run's output_dir, or one step-... folder in it"
        )
    for checkpoint in found:
        problem = find_damage(checkpoint)
        if not problem:
            return checkpoint
        print(f"warning: {checkpoint} is damaged and skipped: {problem}", file=sys.stderr)
    raise CheckpointError(
        f"{path!r} holds no complete checkpoint; give a run's output_dir, or one step-... folder"
    )
