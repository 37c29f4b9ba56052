"""The log of a run, `metrics.jsonl`, TensorBoard, Weights & Biases, and evaluation."""

import contextlib
import functools
import json
import math
import operator
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import CheckpointError, tokenizer
from checkpoint.format import checkpoints
from configuration_llama import LlamaConfig
from data import IGNORED_LABEL

from . import stop, wandb_run
from .flops import training_flops
from .machine import GPUS, gpu_model, now, peak_memory_gib, seconds_between
from .process import Watchdog, raise_on_all_ranks, rank
from .stop import log

NO_LABELS = "n/a (no label counts)"


def sums_by_position(
    token_losses: Tensor, labels: Tensor, position_ids: Tensor, seqlen: int
) -> Tensor:
    """Returns the sum of the losses and the number of labels, by their tokens' position in the
    document: [2, buckets], float64, without a device sync.

    token_losses: [s], 0 where the label is -100. position_ids: [s], from 0; positions are from 1.
    Buckets end at 2, 4, 8... up to seqlen or more: positions 1-2, 3-4, 5-8...
    """
    buckets = torch.arange(max(1, (seqlen - 1).bit_length()), device=position_ids.device)
    bucket = torch.bucketize(position_ids, 2 ** (buckets + 1), right=True)
    values = torch.stack([token_losses.double(), (labels != IGNORED_LABEL).double()])
    # Sums in a fixed order, unlike those of `index_add_` on a GPU.
    return torch.where(bucket == buckets[:, None], values[:, None], 0.0).sum(dim=-1)


def check_finite(step: "Step", model: nn.Module, run_again: Callable[[], Tensor]) -> None:
    """Raises FloatingPointError if loss or grad_norm is not finite, with each rank's part in it.

    step: one that has not changed the weights if they are not finite. run_again: computes its
    gradients again and returns this rank's part of the loss. A collective where it raises.
    """
    if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
        return
    loss = run_again()
    bad = [
        name
        for name, param in model.named_parameters()
        if param.grad is not None and not param.grad.to_local().isfinite().all()
    ]
    where = f"in {len(bad)} parameters, first {bad[0]}" if bad else "nowhere"
    states = [""] * dist.get_world_size()
    state = f"its part of the loss {loss.item():.6g}, non-finite gradients {where}"
    dist.all_gather_object(states, state)
    raise FloatingPointError(
        f"step {step.number}: the loss is {step.loss} and the gradient norm {step.grad_norm}; "
        f"stopped before the weights changed. "
        + "; ".join(f"rank {r}: {state}" for r, state in enumerate(states))
    )


class Batch(NamedTuple):
    """One step's input. num_labels and area are sums over all ranks."""

    micro_batches: list[tuple]  # each from `main.prepare_magi_attention`
    num_labels: float  # that are not -100
    area: float  # (query, key) pairs of the attention mask
    data_seconds: float  # this rank's time to read its rows
    plan_seconds: float  # and to build the runtime keys


class Step:
    """A step of `train`: queued on the device, and after `wait` complete."""

    def __init__(
        self,
        number: int,
        batch: Batch,
        loss: Tensor,
        grad_norm: Tensor,
        learning_rate: float,
        save_seconds: float,
    ) -> None:
        """number: the first is 1. batch: kept until the step is complete, since another stream
        allocated its memory, and would reuse it. save_seconds: of the checkpoint before the step.
        """
        self.number, self.batch = number, batch
        self.learning_rate, self.save_seconds = learning_rate, save_seconds
        results = torch.stack([loss.double(), grad_norm.double()])
        self.results = results.to("cpu", non_blocking=True)
        self.end = now()

    def wait(self) -> None:
        """Sets `loss` and `grad_norm`. Only this, checkpoints and evaluations wait for the GPU."""
        if not isinstance(self.end, float):
            self.end.synchronize()
        self.loss, self.grad_norm = self.results.tolist()


class MetricsWriter:
    """Logs steps. Rank 0 also writes `config.json`, and each step into `metrics.jsonl`, TensorBoard
    events and Weights & Biases.

    A resumed run continues its metrics.jsonl from the checkpoint's step. Files of an earlier run
    are renamed. A finished run writes nothing. A step that is not written within
    `train_config.step_timeout` ends the process. As a context it closes the files, and logs the
    result of a run that has all its steps and their checkpoint.
    """

    def __init__(self, run_config: dict[str, Any], first_iter: int, world_size: int) -> None:
        """run_config: from `preflight.run_config`. first_iter: the number of completed steps.

        A collective. Raises CheckpointError on all ranks if output_dir has no space for its files,
        which stay as they are.
        """
        data_config, train_config = run_config["data_config"], run_config["train_config"]
        self.llama_config = LlamaConfig(**run_config["llama_config"])
        self.tokens_per_step = data_config["batch_size"] * data_config["seqlen"]  # of all ranks
        self.world_size = world_size
        self.train_iters = train_config["train_iters"]
        self.log_interval = train_config["log_interval"]
        self.output_dir = output_dir = train_config["output_dir"]
        self.first_iter, self.record = first_iter, {}  # the last step's record
        self.watchdog = Watchdog(train_config["step_timeout"])
        self.watchdog.watch(f"step {first_iter + 1}")
        self.file = self.tensorboard = self.wandb = self.profiler = None
        self.start, self.started, self.first_step_end = now(), time.perf_counter(), None
        if first_iter == self.train_iters:
            return
        failure = None
        if rank() == 0:
            try:
                self._open_files(run_config)
            except (OSError, UnicodeError) as error:
                failure = CheckpointError(
                    f"train_config.output_dir={output_dir!r} cannot be written ({error}); free its "
                    f"disk, or give another"
                )
        try:
            raise_on_all_ranks(failure)
        except CheckpointError as error:
            self.__exit__(type(error))
            raise
        if rank() == 0:
            if train_config["wandb_project"]:
                self.wandb = wandb_run.start(run_config)
            self.profiler = _profiler(train_config["profile_steps"], first_iter, output_dir)

    def _open_files(self, run_config: dict[str, Any]) -> None:
        content = json.dumps(run_config, indent=2)
        path = os.path.join(self.output_dir, "metrics.jsonl")
        with tempfile.TemporaryFile("w", dir=self.output_dir) as file:
            file.write(content)  # a full disk shows here, before a file is changed
        tokenizer.keep(run_config)
        if checkpoints(self.output_dir):
            _cut_after(path, self.first_iter)
        else:  # a new run, or a branch of another
            names = ["config.json", "metrics.jsonl", "tensorboard", "wandb_id"]
            _keep_earlier(self.output_dir, names)
        with open(os.path.join(self.output_dir, "config.json"), "w") as file:
            file.write(content)
        # Unbuffered, so that `write` returns how much of a line is in the file.
        self.file, self.unwritten = open(path, "ab", buffering=0), b""
        folder = os.path.join(self.output_dir, "tensorboard")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder, purge_step=self.first_iter + 1, flush_secs=10)
            events = f"TensorBoard events: {folder}"
        except ImportError:
            events = "no TensorBoard events: pip install tensorboard"
        log(f"metrics: {path}; {events}")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.watchdog.stop()
        if self.profiler is not None:
            self.profiler.stop()
        for file in (self.file, self.tensorboard):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if self.wandb is not None:
            wandb_run.finish(self.wandb, failed=error is not None)
        if error is None and rank() == 0 and self.record.get("step") == self.train_iters:
            log(self._result())

    def queue(self, *args: Any, **kwargs: Any) -> Step:
        """Returns `Step(...)`, which ends with the kernels queued so far."""
        if self.profiler is not None:
            self.profiler.step()
        return Step(*args, **kwargs)

    def write(self, step: Step, eval_sums: Tensor | None = None) -> None:
        """step: complete. eval_sums: from `sums_by_position`, of an evaluation after the step."""
        is_last = step.number == self.train_iters
        self.watchdog.watch("the last checkpoint" if is_last else f"step {step.number + 1}")
        step_seconds = seconds_between(self.start, step.end)
        self.start = step.end if eval_sums is None else now()  # no step includes an evaluation
        flops = training_flops(self.llama_config, self.tokens_per_step, step.batch.area)
        flops_per_gpu = flops / self.world_size / step_seconds
        gpu = gpu_model()
        record = {
            "step": step.number,
            "loss": step.loss if step.batch.num_labels else None,
            "grad_norm": step.grad_norm,
            "lr": step.learning_rate,
            "tokens": int(step.batch.num_labels),
            "step_ms": step_seconds * 1e3,
            "tokens_per_s": self.tokens_per_step / step_seconds,
            "tflops_per_gpu": flops_per_gpu / 1e12,
            "mfu": flops_per_gpu / GPUS[gpu].peak_flops if gpu else None,
            "peak_memory_gib": peak_memory_gib(),
            "plan_ms": step.batch.plan_seconds * 1e3,
            "data_ms": step.batch.data_seconds * 1e3,
            "save_ms": step.save_seconds * 1e3,
        }
        if eval_sums is not None:
            record |= _evaluation(eval_sums)
        self.record = record
        self._log(record, is_last)
        try:
            if self.file is not None:
                self.unwritten += json.dumps(record).encode() + b"\n"
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:  # a full disk: the next step tries again
            log(f"warning: the metrics of step {step.number} could not be written: {error}")
        figures = _scalars(record)
        try:
            if self.tensorboard is not None:
                for name, value in figures.items():
                    self.tensorboard.add_scalar(name, value, step.number)
        except OSError as error:  # its thread has ended
            log(f"warning: no TensorBoard events from step {step.number} on: {error}")
            self.tensorboard = None
        try:
            if self.wandb is not None:
                self.wandb.log(figures, step=step.number)
        except Exception as error:  # of many types
            log(f"warning: nothing goes to wandb from step {step.number} on: {error!r}")
            self.wandb = None

    def _log(self, record: dict[str, Any], is_last: bool) -> None:
        """Logs the step if it is due, and its evaluation."""
        step, clock, left = record["step"], time.perf_counter(), None
        if self.first_step_end is None:  # the first step compiles, so it predicts nothing
            self.first_step_end = clock
        else:
            steps = step - self.first_iter - 1
            left = (clock - self.first_step_end) / steps * (self.train_iters - step)
        is_due = step % self.log_interval == 0 or is_last or left is None or stop.requested()
        if is_due or "eval_loss" in record:
            log(format_step(record, self.train_iters, step * self.tokens_per_step, left))
        if "eval_loss" in record:
            log(f"eval: {step}/{self.train_iters}  {_format_evaluation(record)}")
        if step == self.first_iter + 2:  # the first one has no optimizer state
            log(f"memory: {record['peak_memory_gib']:.2f} GiB at the peak of the first two steps")

    def _result(self) -> str:
        """Returns the last line of a run: the last step's loss, the tokens of all its steps, the
        time of this start, the newest checkpoint, and the next command.
        """
        parts = [f"loss {_number(self.record['loss'], '.4f', NO_LABELS)}"]
        if "eval_loss" in self.record:
            parts.append(f"eval_loss {_eval_loss(self.record)}")
        parts.append(f"{self.train_iters * self.tokens_per_step:,} tokens")
        since = f" since step {self.first_iter}" if self.first_iter else ""
        parts.append(_duration(time.perf_counter() - self.started) + since)
        parts.append(checkpoints(self.output_dir)[0])
        command = f"python -m checkpoint export {shlex.quote(self.output_dir)} hf-model"
        return f"done: {', '.join(parts)}; next: {command}"


def log_evaluation(eval_sums: Tensor) -> None:
    """Logs the result of `--evaluate`, with a table. eval_sums: from `sums_by_position`."""
    record = _evaluation(eval_sums)
    lines = [_format_evaluation(record), f"{'position':>15}{'loss':>10}{'labels':>15}"]
    for end, labels in record["eval_labels_by_position"].items():
        positions = f"{int(end) // 2 + 1 if end != '2' else 1:,}-{int(end):,}"
        loss = _number(record["eval_loss_by_position"][end], ".4f")
        lines.append(f"{positions:>15}{loss:>10}{labels:>15,}")
    log("\n".join(lines))


def _evaluation(eval_sums: Tensor) -> dict[str, Any]:
    """Returns the result of an evaluation, with null for a loss that is not finite.

    eval_sums: from `sums_by_position`, over all ranks. Buckets without a label are left out.
    """
    buckets = {2**n: sums for n, sums in enumerate(eval_sums.T.tolist(), start=1) if sums[1]}
    loss_sum, num_labels = eval_sums.sum(dim=1).tolist()
    eval_loss = _mean(loss_sum, num_labels)
    is_small = eval_loss is not None and eval_loss < 700  # exp(710) is not finite
    return {
        "eval_loss": eval_loss,
        "eval_perplexity": math.exp(eval_loss) if is_small else None,
        "eval_loss_by_position": {str(end): _mean(*sums) for end, sums in buckets.items()},
        "eval_labels_by_position": {str(end): int(sums[1]) for end, sums in buckets.items()},
    }


def _mean(loss_sum: float, num_labels: float) -> float | None:
    return loss_sum / num_labels if num_labels and math.isfinite(loss_sum) else None


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a step, those by position as `eval_loss_by_position/2`."""
    scalars = {}
    for name, value in record.items():
        parts = value.items() if isinstance(value, dict) else []
        scalars |= {f"{name}/{part}": v for part, v in parts} if parts else {name: value}
    return {k: v for k, v in scalars.items() if k != "step" and v not in (None, {})}


def format_step(
    record: dict[str, Any], train_iters: int, num_tokens: int, seconds_left: float | None
) -> str:
    """Returns the log line of one step: a fixed order, in 120 columns.

    num_tokens: trained on so far. seconds_left: None where it is not known yet.
    """
    parts = [
        f"step: {record['step']}/{train_iters}",
        f"loss: {_number(record['loss'], '.4f', NO_LABELS)}",
        f"grad_norm: {record['grad_norm']:.2f}",
        f"lr: {record['lr']:.2e}",
        f"tokens: {_short(num_tokens)}",
        f"tps: {_short(record['tokens_per_s'])}",
    ]
    if record["mfu"] is not None:
        parts.append(f"mfu: {record['mfu']:.1%}")
    if seconds_left is not None:
        parts.append(f"left: {_duration(seconds_left)}")
    return "  ".join(parts)


def _format_evaluation(record: dict[str, Any]) -> str:
    return (
        f"eval_loss: {_eval_loss(record)}  "
        f"eval_perplexity: {_number(record['eval_perplexity'], '.2f')}"
    )


def _eval_loss(record: dict[str, Any]) -> str:
    missing = "n/a" if record["eval_labels_by_position"] else NO_LABELS
    return _number(record["eval_loss"], ".4f", missing)


def _number(value: float | None, form: str, missing: str = "n/a") -> str:
    return missing if value is None else f"{value:{form}}"


def _short(count: float) -> str:
    """Returns 99,999 as it is, and from 100K on three digits."""
    if round(count) < 100_000:
        return f"{count:,.0f}"
    power = min(4, int(f"{count:.2e}"[5:]) // 3)  # after rounding: 999,999 is 1M
    return f"{count / 1000**power:.3g}{' KMBT'[power]}"


def _duration(seconds: float) -> str:
    """Returns 1:02:03, or 2d 3h from a day on."""
    days, rest = divmod(round(seconds), 86400)
    return f"{days}d {rest // 3600}h" if days else str(timedelta(seconds=rest))


def _profiler(steps: tuple[int, ...], first_iter: int, output_dir: str):
    """Returns rank 0's profiler, started, or None without steps.

    steps: the first and the last. first_iter: the number of completed steps.
    """
    if not steps:
        return None
    if steps[1] <= first_iter + 1:
        log(f"warning: no trace of steps {steps}: this run starts with step {first_iter + 1}")
        return None
    first, last = max(steps[0], first_iter + 2), steps[1]  # the profiler warms up for a step
    path = os.path.join(output_dir, f"trace-{first}-{last}.json.gz")
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=first - first_iter - 2, warmup=1, active=last - first + 1, repeat=1
        ),
        on_trace_ready=functools.partial(_write_trace, path),
    )
    profiler.start()
    return profiler


def _write_trace(path: str, profiler: torch.profiler.profile) -> None:
    try:
        profiler.export_chrome_trace(path)
    except (OSError, RuntimeError) as error:  # a full disk
        log(f"warning: {path} could not be written: {error}")


def _cut_after(path: str, step: int) -> None:
    """Leaves in a metrics.jsonl the steps up to `step`, each once; warns of damage and of a gap."""
    with open(path, "rb+" if os.path.exists(path) else "wb+") as file:
        content, found, damaged = file.read(), {}, []
        *lines, last = content.split(b"\n")
        for number, line in enumerate([*lines, last], start=1):
            try:
                found[operator.index(json.loads(line)["step"])] = line + b"\n"
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += [number] if number <= len(lines) else []  # a killed run tears the last
        steps = sorted(number for number in found if 1 <= number <= step)
        kept = b"".join(found[number] for number in steps)
        if not content.startswith(kept):
            file.seek(0)
            file.write(kept)
        file.truncate(len(kept))
    if damaged:
        log(f"warning: damaged lines removed from {path}: {len(damaged)}, first line {damaged[0]}")
    if missing := sorted({*range(min(steps, default=1), step + 1)} - {*steps}):
        gap = f"{len(missing)}, first step {missing[0]}"
        log(f"warning: steps up to {step} without a line in {path}: {gap}")


def _keep_earlier(output_dir: str, names: list[str]) -> None:
    """Renames existing files to NAME.1, or the first number that is free for all of them."""
    number = 1
    while any(os.path.lexists(os.path.join(output_dir, f"{name}.{number}")) for name in names):
        number += 1
    for name in names:
        path = os.path.join(output_dir, name)
        if os.path.lexists(path):
            os.rename(path, f"{path}.{number}")
