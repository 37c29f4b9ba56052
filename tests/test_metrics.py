"""FLOPs against torch's own counter, and what a run writes."""

import dataclasses
import functools
import io
import json
import math
import os
import runpy
import sys
import threading
import time
import types
from types import MappingProxyType

import pytest
import reference
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import CheckpointError
from configuration_llama import PRESETS
from modeling_llama import LlamaForCausalLM
from support import stop, wandb_run
from support.flops import attention_area, training_flops
from support.metrics import (
    Batch,
    MetricsWriter,
    _short,
    _write_trace,
    format_step,
    log_evaluation,
    sums_by_position,
)
from support.plot import import_pyplot, plot, plot_by_position
from support.plot import main as plot_command

pytestmark = pytest.mark.usefixtures("cp_group")
BATCH = Batch([], num_labels=4090.0, area=1e6, data_seconds=0.002, plan_seconds=0.001)
KEYS = (
    "step loss grad_norm lr tokens step_ms tokens_per_s tflops_per_gpu mfu peak_memory_gib plan_ms "
    "data_ms save_ms"
).split()
EVALUATION_KEYS = "eval_loss eval_perplexity eval_loss_by_position eval_labels_by_position".split()


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_are_those_of_the_matrix_products(is_causal):
    """The reference's forward pass, every product of it counted by torch, times three."""
    config = PRESETS["tiny"]
    weights = {n: p.double() for n, p in LlamaForCausalLM(config).state_dict().items()}
    lengths = [50, 14]
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            reference.logits(weights, torch.zeros(length, dtype=torch.long), config)
    full_area = sum(length**2 for length in lengths)
    assert training_flops(config, sum(lengths), full_area) == 3 * counter.get_total_flops()

    cu_seqlens = torch.tensor([0, 50, 64], dtype=torch.int32)
    assert attention_area(cu_seqlens, is_causal) == (full_area / 2 if is_causal else full_area)


def evaluation(*buckets):
    """buckets: (the sum of losses, labels) at the positions 1-2, 3-4, 5-8..."""
    return torch.tensor(buckets, dtype=torch.float64).T


def write_run(
    output_dir,
    steps,
    first_iter=0,
    loss=2.5,
    evaluations=MappingProxyType({}),
    until=0,
    error=None,
    **keys,
):
    """Writes steps first_iter + 1 to `until`, or to the last. evaluations: from `evaluation`, by
    step. error: comes after the steps, instead of the last checkpoint. keys: of train_config.
    """
    config = {
        "llama_config": dataclasses.asdict(PRESETS["tiny"]),
        "data_config": {"batch_size": 4, "seqlen": 1024, "source": "random"},
        "model_config": {},
        "tokenizer": {"sha256": ""},
        "train_config": {
            "train_iters": steps,
            "step_timeout": 60.0,
            "profile_steps": (),
            "output_dir": str(output_dir),
            "log_interval": 1,
            "wandb_project": "",
            **keys,
        },
    }
    with MetricsWriter(config, first_iter, world_size=2) as writer:
        for number in range(first_iter + 1, (until or steps) + 1):
            results = torch.tensor(loss), torch.tensor(1.25)
            step = writer.queue(number, BATCH, *results, learning_rate=3e-4, save_seconds=0.003)
            step.end = writer.start + 0.5
            step.wait()
            writer.write(step, evaluations.get(number))
        if error:
            raise error
        if writer.file is not None and number == steps:
            (output_dir / f"step-{steps:08}").mkdir(exist_ok=True)


def test_metrics_jsonl_has_one_object_a_step_in_a_fixed_order(tmp_path):
    write_run(tmp_path, 3)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [list(record) for record in records] == [KEYS] * 3
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0]["tokens_per_s"] == 8192
    flops = training_flops(PRESETS["tiny"], 4096, 1e6)
    assert records[0]["tflops_per_gpu"] == pytest.approx(flops / 2 / 0.5 / 1e12)


def test_tensorboard_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """Its thread ends with a full disk, and every later call raises that error again."""
    pytest.importorskip("torch.utils.tensorboard")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", fail)
    write_run(tmp_path, 3)
    assert capsys.readouterr().out.count("warning") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_step_and_an_evaluation_without_labels_have_no_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "BATCH", BATCH._replace(num_labels=0.0))
    write_run(tmp_path, 1, loss=0.0, evaluations={1: evaluation((0, 0), (0, 0))})
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert record["loss"] is record["eval_loss"] is record["eval_perplexity"] is None
    assert record["eval_loss_by_position"] == record["eval_labels_by_position"] == {}
    said = capsys.readouterr().out
    assert "  loss: n/a (no label counts)  " in said
    assert "  eval_loss: n/a (no label counts)  eval_perplexity: n/a" in said
    assert "done: loss n/a (no label counts), eval_loss n/a (no label counts), " in said


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    path = str(tmp_path / "absent" / "trace.json.gz")
    with torch.profiler.profile(on_trace_ready=functools.partial(_write_trace, path)):
        pass
    assert capsys.readouterr().out.startswith("warning: ")


def steps_of(said: str) -> list[str]:
    """The lines of steps and evaluations in a log."""
    return [line for line in said.splitlines() if line.startswith(("step: ", "eval: "))]


def test_the_log_line_has_a_fixed_order(tmp_path, capsys):
    write_run(tmp_path, 2)
    first, second = steps_of(capsys.readouterr().out)
    assert (
        first == "step: 1/2  loss: 2.5000  grad_norm: 1.25  lr: 3.00e-04  tokens: 4,096  tps: 8,192"
    )
    names = [field.split(": ")[0] for field in second.split("  ")]
    assert names == ["step", "loss", "grad_norm", "lr", "tokens", "tps", "left"]  # no mfu on a CPU
    assert "  tokens: 8,192  " in second and second.endswith("  left: 0:00:00")


def test_a_line_of_large_numbers_fits_120_columns():
    record = {"step": 100_000, "loss": 11.3461, "grad_norm": 12.5, "lr": 3e-4, "mfu": 0.506}
    tokens = 100_000 * 1_048_576
    line = format_step({**record, "tokens_per_s": 1_234_567.0}, 1_000_000, tokens, 8.8 * 86400)
    assert line == (
        "step: 100000/1000000  loss: 11.3461  grad_norm: 12.50  lr: 3.00e-04  tokens: 105B  "
        "tps: 1.23M  mfu: 50.6%  left: 8d 19h"
    )
    assert len(line) <= 120


@pytest.mark.parametrize(
    "count, text",
    [(99_999.4, "99,999"), (1e5, "100K"), (999_999, "1M"), (12_345_678, "12.3M"), (4e15, "4e+03T")],
)
def test_a_count_has_five_digits_or_three_and_a_unit(count, text):
    assert _short(count) == text


def test_log_interval_leaves_out_lines_of_the_log_alone(tmp_path, capsys):
    """Not those of the first step of a start, of the last one, and of an evaluation."""
    write_run(tmp_path, 9, until=2)
    (tmp_path / "step-00000001").mkdir()
    capsys.readouterr()
    write_run(tmp_path, 9, first_iter=1, evaluations={7: evaluation((2, 1))}, log_interval=4)
    lines = [line.split("  ")[0] for line in steps_of(capsys.readouterr().out)]
    assert lines == ["step: 2/9", "step: 4/9", "step: 7/9", "eval: 7/9", "step: 8/9", "step: 9/9"]
    assert [step for step, _ in steps_and_losses(tmp_path)] == list(range(1, 10))


def test_the_log_has_the_memory_of_two_steps_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.metrics.peak_memory_gib", lambda: 70.123)
    write_run(tmp_path, 5, log_interval=3)
    said = capsys.readouterr().out
    assert said.count("memory: 70.12 GiB at the peak of the first two steps\n") == 1


def test_time_left_counts_all_but_the_first_step(tmp_path, monkeypatch, capsys):
    """Which compiles: 100 s, and then 10 s for each of 8 steps, evaluations included."""
    clock = iter([0.0, 100.0, *range(110, 1000, 10)])
    monkeypatch.setattr("support.metrics.now", lambda: 0.0)
    monkeypatch.setattr("support.metrics.time.perf_counter", lambda: next(clock))
    write_run(tmp_path, 9, until=4)
    left = [line.partition("  left: ")[2] for line in steps_of(capsys.readouterr().out)]
    assert left == ["", "0:01:10", "0:01:00", "0:00:50"]


def test_the_last_line_says_the_result_and_what_to_do_next(tmp_path, monkeypatch, capsys):
    """A resumed run says since when its time counts; its tokens are those of all steps."""
    output_dir = tmp_path / "a run"
    output_dir.mkdir()
    clock = {"seconds": 0.0}
    monkeypatch.setattr("support.metrics.time.perf_counter", lambda: clock["seconds"])
    write_run(output_dir, 300, until=2)
    assert "done: " not in capsys.readouterr().out
    (output_dir / "step-00000002").mkdir()
    monkeypatch.setattr(
        "support.metrics.seconds_between", lambda *_: clock.update(seconds=3725.0) or 0.5
    )
    write_run(output_dir, 300, first_iter=2, evaluations={300: evaluation((2, 1))})
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"done: loss 2.5000, eval_loss 2.0000, 1,228,800 tokens, 1:02:05 since step 2, "
        f"{output_dir}/step-00000300; "
        f"next: python -m checkpoint export '{output_dir}' hf-model"
    )
    write_run(output_dir, 300, first_iter=300)
    assert capsys.readouterr().out == "", "a finished run writes nothing"


def test_a_run_without_its_last_checkpoint_is_not_done(tmp_path, capsys):
    with pytest.raises(CheckpointError):
        write_run(tmp_path, 1, error=CheckpointError("the checkpoint could not be written"))
    assert "done: " not in capsys.readouterr().out


def test_an_evaluation_stands_in_its_step(tmp_path, capsys):
    by_position = evaluation((6, 2), (0, 0), (2, 2))  # no label at 3-4
    write_run(tmp_path, 3, evaluations={2: by_position, 3: evaluation((1e4, 1))})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [list(record) for record in records[:2]] == [
        KEYS,
        [*KEYS, *EVALUATION_KEYS],
    ]
    assert records[1]["eval_loss"] == 2.0
    assert records[1]["eval_perplexity"] == pytest.approx(7.389056)
    assert records[1]["eval_loss_by_position"] == {"2": 3.0, "8": 1.0}
    assert records[1]["eval_labels_by_position"] == {"2": 2, "8": 2}
    assert records[2]["eval_perplexity"] is None
    lines = steps_of(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in lines] == (
        ["step: 1/3", "step: 2/3", "eval: 2/3", "step: 3/3", "eval: 3/3"]
    )
    assert lines[2] == "eval: 2/3  eval_loss: 2.0000  eval_perplexity: 7.39"
    assert lines[4] == "eval: 3/3  eval_loss: 10000.0000  eval_perplexity: n/a"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(2, 2.0), (3, 1e4)]
    assert [e.step for e in events.Scalars("eval_perplexity")] == [2]
    by_position = {"eval_loss_by_position/2", "eval_loss_by_position/8"}
    by_position |= {"eval_labels_by_position/2", "eval_labels_by_position/8"}
    assert {tag for tag in events.Tags()["scalars"] if "/" in tag} == by_position
    assert [e.value for e in events.Scalars("eval_loss_by_position/2")] == [3.0, 1e4]
    assert [e.value for e in events.Scalars("eval_labels_by_position/8")] == [2]


def test_an_evaluation_that_overflows_is_null_and_keeps_its_labels(tmp_path, capsys):
    write_run(tmp_path, 1, evaluations={1: evaluation((math.inf, 2), (math.nan, 1), (2, 2))})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["eval_loss"] is record["eval_perplexity"] is None
    assert record["eval_loss_by_position"] == {"2": None, "4": None, "8": 1.0}
    assert record["eval_labels_by_position"] == {"2": 2, "4": 1, "8": 2}
    assert "  eval_loss: n/a  eval_perplexity: n/a\n" in capsys.readouterr().out


@pytest.mark.parametrize("seqlen", [1, 2, 3, 8, 9, 100])
def test_sums_by_position_are_those_of_a_loop_over_the_tokens(seqlen):
    """Two documents, the longest one as long as a row; every fifth label does not count."""
    position_ids = torch.cat([torch.arange(seqlen), torch.arange(min(seqlen, 5))])
    labels = torch.arange(1, len(position_ids) + 1)
    labels[labels % 5 == 0] = -100
    losses = torch.where(labels == -100, 0.0, torch.rand(len(labels)))
    ends = [2]
    while ends[-1] < seqlen:
        ends.append(2 * ends[-1])
    expected = {end: [0.0, 0] for end in ends}
    for place, label, loss in zip(position_ids, labels, losses, strict=True):
        end = next(end for end in ends if place + 1 <= end)
        expected[end][0] += loss.item()
        expected[end][1] += label.item() != -100
    sums = sums_by_position(losses, labels, position_ids, seqlen)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, evaluation(*expected.values()), rtol=1e-12, atol=1e-12)


def test_other_ranks_are_silent_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_run(tmp_path, 1)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_kept(tmp_path):
    for steps in (1, 2, 3):  # without a checkpoint
        write_run(tmp_path, 10 + steps, until=steps)
    for name, steps in (("metrics.jsonl.1", 1), ("metrics.jsonl.2", 2), ("metrics.jsonl", 3)):
        assert len((tmp_path / name).read_text().splitlines()) == steps
    assert json.loads((tmp_path / "config.json.1").read_text())["train_config"]["train_iters"] == 11


def test_tensorboard_gets_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 2.5)]
    assert set(events.Tags()["scalars"]) == set(KEYS) - {"step", "mfu"}  # no mfu on a CPU


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', "\0\0"])
def test_a_resumed_run_goes_on_after_its_checkpoint(torn, tmp_path, monkeypatch):
    """Steps 2 and 3 were logged but not saved, and the last line may be torn."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, 3)
    (tmp_path / "step-00000001").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 9)  # TensorBoard orders its files by seconds
    write_run(tmp_path, 5, first_iter=1, loss=1.5)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    steps = [(1, 2.5), (2, 1.5), (3, 1.5), (4, 1.5), (5, 1.5)]
    assert [(record["step"], record["loss"]) for record in records] == steps
    assert json.loads((tmp_path / "config.json").read_text())["train_config"]["train_iters"] == 5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == steps


def steps_and_losses(output_dir, name="metrics.jsonl"):
    records = [json.loads(line) for line in (output_dir / name).open()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize(
    "line, is_gap",
    [
        (b"\0" * 200, True),
        (b"\xff\xfe", True),
        (b"[" * 100_000, True),
        (b"[]", True),
        (b'{"step": "2"}', True),
        (b"", False),
    ],
)
def test_a_damaged_line_costs_that_line_and_is_said(line, is_gap, tmp_path, capsys):
    """Also where it is an empty line that someone added."""
    write_run(tmp_path, 4)
    (tmp_path / "step-00000003").mkdir()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    lines[1:2] = [line] if is_gap else [lines[1], line]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    capsys.readouterr()
    write_run(tmp_path, 5, first_iter=3, loss=1.5)
    expected = [(1, 2.5), (2, 2.5), (3, 2.5), (4, 1.5), (5, 1.5)]
    if is_gap:
        expected.remove((2, 2.5))
    assert steps_and_losses(tmp_path) == expected
    warnings = [said for said in capsys.readouterr().out.splitlines() if "warning" in said]
    path, number = tmp_path / "metrics.jsonl", 2 if is_gap else 3
    damage = f"warning: damaged lines removed from {path}: 1, first line {number}"
    gap = f"warning: steps up to 3 without a line in {path}: 1, first step 2"
    assert warnings == [damage, *[gap] * is_gap]


def test_a_metrics_jsonl_that_ends_early_or_is_gone_is_said(tmp_path, capsys):
    write_run(tmp_path, 2)
    (tmp_path / "step-00000008").mkdir()
    path = tmp_path / "metrics.jsonl"
    write_run(tmp_path, 9, first_iter=8)
    gap = f"warning: steps up to 8 without a line in {path}: "
    assert f"{gap}6, first step 3\n" in capsys.readouterr().out
    path.unlink()
    write_run(tmp_path, 9, first_iter=8)
    assert f"{gap}8, first step 1\n" in capsys.readouterr().out
    assert steps_and_losses(tmp_path) == [(9, 2.5)]


def test_a_branch_begins_with_its_own_steps_and_an_earlier_run_is_kept(tmp_path, capsys):
    """The earlier run was killed before its first checkpoint; the branch starts from step 6."""
    write_run(tmp_path, 9, until=7)
    write_run(tmp_path, 8, first_iter=6, loss=1.5)
    assert steps_and_losses(tmp_path) == [(7, 1.5), (8, 1.5)]
    assert steps_and_losses(tmp_path, "metrics.jsonl.1") == [(step, 2.5) for step in range(1, 8)]
    assert (tmp_path / "config.json.1").exists()
    write_run(tmp_path, 9, first_iter=8, loss=1.0)
    assert steps_and_losses(tmp_path) == [(7, 1.5), (8, 1.5), (9, 1.0)]
    assert "warning" not in capsys.readouterr().out


def test_the_log_says_where_tensorboard_s_events_are(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, 1)
    where = f"metrics: {tmp_path}/metrics.jsonl; TensorBoard events: {tmp_path}/tensorboard\n"
    assert capsys.readouterr().out.startswith(where)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", 1)
    assert "no TensorBoard events: pip install tensorboard\n" in capsys.readouterr().out


class Wandb(types.ModuleType):
    """A stand-in for wandb, which the tests do not install: `init` returns the module itself as the
    run, and it notes its calls. fails: the name of the call that raises.
    """

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.fails, self.runs, self.logged, self.finished = fails, [], [], 0

    def note(self, name):
        if name == self.fails:
            raise ConnectionError("no network")

    def init(self, **settings):
        self.note("init")
        self.runs.append(settings)
        return self

    def log(self, figures, step):
        self.note("log")
        self.logged.append((step, figures["loss"]))

    def finish(self, exit_code=0):
        self.note("finish")
        self.finished += 1


def test_a_resumed_run_continues_its_run_of_wandb_and_a_finished_one_starts_none(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    write_run(tmp_path, 4, until=2, wandb_project="llamas")
    (tmp_path / "step-00000002").mkdir()
    for first_iter in (2, 4):
        write_run(tmp_path, 4, first_iter=first_iter, wandb_project="llamas")
    first, second = wandb.runs
    assert first["project"] == "llamas" and first["resume"] == "allow"
    assert first["config"]["train_config"]["train_iters"] == 4
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text()
    assert wandb.logged == [(step, 2.5) for step in (1, 2, 3, 4)]
    assert wandb.finished == 2


def test_a_new_run_in_the_folder_of_an_earlier_one_is_another_run_of_wandb(tmp_path, monkeypatch):
    """Other ranks have none, nor has a run whose wandb_project is empty."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    for _ in range(2):
        write_run(tmp_path, 4, until=2, wandb_project="llamas")
    assert len({run["id"] for run in wandb.runs}) == len(wandb.runs) == 2
    write_run(tmp_path, 4, until=2)
    monkeypatch.setenv("RANK", "1")
    write_run(tmp_path, 4, until=2, wandb_project="llamas")
    assert len(wandb.runs) == 2


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_that_fails_is_a_warning_and_the_run_goes_on(fails, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails))
    write_run(tmp_path, 3, wandb_project="llamas")
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "ConnectionError('no network')" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert said.splitlines()[-1].startswith("done: ")


def test_an_upload_to_wandb_that_never_ends_does_not_keep_the_run(tmp_path, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    monkeypatch.setattr(wandb, "finish", lambda exit_code: released.wait(5))
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.01)
    write_run(tmp_path, 1, wandb_project="llamas")
    released.set()
    assert "warning: wandb has not uploaded everything" in capsys.readouterr().out


def test_wandb_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    """Also beside a folder `wandb`, such as of wandb's runs, which Python would import."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="^train_config.wandb_project='llamas' needs .*`pip inst"):
        wandb_run.check("llamas")


def test_plot_draws_several_runs(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, 2)
    capsys.readouterr()
    plot([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "loss.png"))
    assert capsys.readouterr().out == f"written: {tmp_path}/loss.png\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_prints_a_table_by_position(capsys):
    log_evaluation(evaluation((6, 2), (0, 0), (2, 2), *[(0, 0)] * 7, (12345.5, 12345)))
    assert capsys.readouterr().out.splitlines() == [
        "eval_loss: 1.0004  eval_perplexity: 2.72",
        "       position      loss         labels",
        "            1-2    3.0000              2",
        "            5-8    1.0000              2",
        "    1,025-2,048    1.0000         12,345",
    ]


def test_plot_by_position_draws_the_last_evaluation_of_each_run(tmp_path, monkeypatch, capsys):
    short, long = evaluation((6, 2), (0, 0), (2, 2)), evaluation((6, 2), (9, 3), (2, 2), (1, 4))
    for name, last in {"short": short, "long": long}.items():
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, 3, evaluations={1: evaluation((9, 1)), 2: last})
    capsys.readouterr()
    drawn = []
    pyplot = import_pyplot()
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_by_position([str(tmp_path / "short"), str(tmp_path / "long")], "loss.png")
    assert capsys.readouterr().out == "written: loss.png\n"
    curves, labels = drawn[0].axes
    assert [line.get_xydata().tolist() for line in curves.lines] == [
        [[1, 3], [3, 1]],  # log2 of the position, and the loss
        [[0, 2], [1, 2]],  # the mean, from the left to the right
        [[1, 3], [2, 3], [3, 1], [4, 0.25]],
        [[0, 18 / 11], [1, 18 / 11]],
    ]
    assert [text.get_text() for text in curves.texts] == ["long (1.64)", "short (2.00)"]
    assert [bar.get_height() for bar in labels.patches] == [2, 2, 2, 3, 2, 4]
    assert [tick.get_text() for tick in labels.get_xticklabels()] == ["2", "4", "8", "16"]


@pytest.mark.parametrize("evaluations", [{}, {1: evaluation((0, 0))}, {1: None}])
def test_plot_by_position_of_a_run_without_the_figures_is_one_sentence(
    evaluations, tmp_path, monkeypatch
):
    """No evaluation, none with a label, and one of an earlier version."""
    write_run(tmp_path, 2, evaluations=evaluations)
    if None in evaluations.values():
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.5, "eval_loss": 2.0, "eval_perplexity": 7.39}\n')
    monkeypatch.setattr("sys.argv", ["metrics", str(tmp_path), "--by-position"])
    with pytest.raises(SystemExit, match="^error: .*: its metrics.jsonl has no loss by position; "):
        plot_command()


def test_plot_by_position_draws_at_most_six_runs(tmp_path):
    with pytest.raises(ValueError, match="draws at most 6 runs, not 7; leave some out"):
        plot_by_position([str(tmp_path)] * 7, str(tmp_path / "loss.png"))


def test_a_tilde_in_the_command_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["plot", "~/run", "--output=~/loss.png"])
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", 2)
    with pytest.warns(RuntimeWarning, match="support.plot"):  # it is imported already
        runpy.run_module("support.plot", run_name="__main__")
    assert (tmp_path / "loss.png").exists()


def test_the_log_escapes_bytes_of_a_file_name_that_are_not_utf_8(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", stdout)
    stop.log(f"data: caf{os.fsdecode(bytes([0xE9]))}.txt, é")
    assert stdout.buffer.getvalue().decode() == "data: caf\\udce9.txt, é\n"
