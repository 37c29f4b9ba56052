"""A new stage begins with another run's weights and optimizer state; a checkpoint is evaluated."""

import re
import shutil
import signal

import pytest
from checkpoint_worker import ITERS
from conftest import read_metrics
from test_checkpoint import config_of, newest, trained

import checkpoint
from checkpoint.format import CheckpointError
from support.process import ERROR_CODE

ROPE = '{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,'
OTHER_DATA = ["data_config.seqlen=48", "data_config.batch_size=2"]


def files(output_dir) -> dict:
    found = [path for path in output_dir.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def step_of(output_dir, number: int) -> list:
    """Returns what a step computed before it changed the weights."""
    return [read_metrics(output_dir)[number - 1][key] for key in ("loss", "grad_norm", "tokens")]


def test_with_nothing_changed_a_new_stage_computes_the_next_step_of_the_run_it_came_from(
    start, undisturbed, tmp_path
):
    source = undisturbed[1] / "step-00000008"
    running = start(f"train_config.continue_from={source}")
    assert running.exit_codes() == [0], running.said
    assert f"continue: a new run begins with {source}, step 8, and with row 32" in running.said
    assert step_of(tmp_path / "run", 1) == step_of(undisturbed[1], 9), "bitwise"
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [*range(1, ITERS + 1)]
    schedule = [record["lr"] for record in read_metrics(undisturbed[1])]
    assert [record["lr"] for record in records] == schedule, "its own"


def test_a_new_stage_on_another_layout_computes_the_same(start, undisturbed, tmp_path):
    running = start(
        f"train_config.continue_from={undisturbed[1]}/step-00000008",
        "train_config.gradient_accumulation_steps=2",
        processes=4,
        cp=2,
    )
    assert running.exit_codes() == [0] * 4, running.said
    expected = pytest.approx(step_of(undisturbed[1], 9), rel=1e-5)
    assert step_of(tmp_path / "run", 1) == expected


def test_a_killed_stage_with_other_rows_and_rope_resumes_bitwise_identical(
    start, undisturbed, tmp_path
):
    """Its source is gone by then. It begins with the first rows of its data."""
    source = shutil.copytree(undisturbed[1], tmp_path / "source")
    arguments = [
        *OTHER_DATA,
        f"train_config.continue_from={source}",
        f'model_config.overrides.rope_scaling={ROPE} "original_max_position_embeddings": 64}}',
        "model_config.overrides.rope_theta=20000.0",
    ]
    whole = start(*arguments, output_dir=tmp_path / "whole")
    assert whole.exit_codes() == [0], whole.said
    assert "\ncontinue: data_config.seqlen 24 -> 48\n" in whole.said
    assert f"begins with {source}/step-00000012, step 12, and with the first row" in whole.said
    assert "resume: " not in whole.said
    killed = start(*arguments).wait_for("saved:").signal(signal.SIGKILL)
    assert killed.exit_codes() == [-signal.SIGKILL]
    shutil.rmtree(source)
    resumed = start(*arguments)
    assert resumed.exit_codes() == [0], resumed.said
    assert "\nresume: " in resumed.said
    assert trained(tmp_path / "run") == trained(tmp_path / "whole")


def test_a_stage_of_a_stage_goes_on_with_rows_that_none_has_trained_on(
    start, undisturbed, tmp_path
):
    """And a finished stage is finished: the same command again changes nothing."""
    for said in ("continue: a new run begins", "step 12 of 12; all its steps are done"):
        second = start(
            f"train_config.continue_from={undisturbed[1]}", output_dir=tmp_path / "second"
        )
        assert second.exit_codes() == [0], second.said
        assert said in second.said and "first_row" not in second.said
    third = start(
        f"train_config.continue_from={tmp_path}/second/step-00000012", "data_config.batch_size=8"
    )
    assert third.exit_codes() == [0], third.said
    assert f"step 12, and with row {2 * ITERS * 4} of the same data" in third.said


def test_an_older_checkpoint_s_data_are_taken_from_the_first_row(undisturbed):
    manifest = checkpoint.read_manifest(newest(undisturbed[1]))
    config = config_of(undisturbed[1])
    assert checkpoint.resume.next_row(manifest["config"], config, step=12) == 48
    del manifest["config"]["fingerprints"]
    assert checkpoint.resume.next_row(manifest["config"], config, step=12) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continue_from": "{run}", "output_dir": "{run}"}, "lies in train_config.output_dir"),
        ({"continue_from": "{run}/step-00000012", "output_dir": "{run}"}, "lies in train_config"),
        ({"continue_from": "{run}", "resume": "{run}"}, "exclude each other"),
        ({"continue_from": "/nowhere"}, "'/nowhere' holds no checkpoint; give the output_dir of"),
        ({"continue_from": "{run}"}, "llama_config.hidden_size=64, but .* was trained with 32"),
    ],
)
def test_a_stage_that_cannot_begin_is_refused(changes, message, undisturbed, tmp_path):
    config = config_of(undisturbed[1])
    config["train_config"] |= {"output_dir": str(tmp_path / "run"), "resume": "auto"}
    config["train_config"] |= {k: v.format(run=undisturbed[1]) for k, v in changes.items()}
    config["llama_config"]["hidden_size"] = 64
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resume.check_resume(config)


EVALUATION = [
    "data_config.source=README.md",
    "data_config.validation_source=LICENSE",
    "train_config.eval_iters=6",
]


@pytest.mark.parametrize(("processes", "cp"), [(1, 1), (2, 2)])
def test_evaluate_gives_the_loss_of_the_last_evaluation_and_writes_nothing(
    processes, cp, start, tmp_path
):
    trains = start(*EVALUATION, "train_config.eval_interval=100")
    assert trains.exit_codes() == [0], trains.said
    before = files(tmp_path / "run")
    record = read_metrics(tmp_path / "run")[-1]
    expected, losses = record["eval_loss"], record["eval_loss_by_position"]
    evaluates = start("--evaluate", *EVALUATION, processes=processes, cp=cp)
    assert evaluates.exit_codes() == [0] * processes, evaluates.said
    assert f"\nweights: {tmp_path}/run/step-00000012\n" in evaluates.said
    assert f"\neval_loss: {expected:.4f}  eval_perplexity: " in evaluates.said
    labels = record["eval_labels_by_position"]
    assert re.findall(r"\n +[\d,]+-([\d,]+) +([\d.]+) +([\d,]+)(?=\n)", evaluates.said) == [
        (f"{int(end):,}", f"{loss:.4f}", f"{labels[end]:,}") for end, loss in losses.items()
    ]
    assert "step: " not in evaluates.said
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("output_dir", ["run", "the run itself"])
def test_evaluate_takes_the_checkpoint_that_resume_names(output_dir, start, undisturbed, tmp_path):
    path = f"{undisturbed[1]}/step-00000008"
    folder = undisturbed[1] if output_dir == "the run itself" else tmp_path / output_dir
    evaluation = ["data_config.source=/nowhere", *EVALUATION[1:], f"train_config.resume={path}"]
    running = start("--evaluate", *evaluation, output_dir=folder)
    assert running.exit_codes() == [0], running.said
    assert f"\nweights: {path}\n" in running.said
    assert "warning" not in running.said
    assert not (tmp_path / "run").exists()


def test_evaluate_warns_where_it_computes_another_model_or_knows_the_documents(start, undisturbed):
    changes = ["model_config.overrides.rope_theta=20000.0", "data_config.source=python-stdlib"]
    changes += ["data_config.validation_fraction=0.1", "train_config.eval_iters=1"]
    running = start("--evaluate", *changes, output_dir=undisturbed[1])
    assert running.exit_codes() == [0], running.said
    was = f"but {newest(undisturbed[1])} was trained with"
    assert f"warning: llama_config.rope_theta is 20000.0, {was} 10000.0" in running.said
    assert f"warning: data_config.validation_fraction is 0.1, {was} 0.0" in running.said


def test_evaluate_without_weights_or_documents_is_one_sentence(start, tmp_path):
    nothing = start("--evaluate", *EVALUATION)
    assert nothing.exit_codes() == [ERROR_CODE]
    assert "error: --evaluate finds no weights: train_config.output_dir=" in nothing.said
    nothing = start("--evaluate")
    assert nothing.exit_codes() == [ERROR_CODE]
    assert "error: --evaluate needs documents to evaluate on; set " in nothing.said
    assert not (tmp_path / "run").exists()
