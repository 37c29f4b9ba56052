"""Real runs are killed, stopped, damaged or out of disk space, and resume without a loss."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_worker import ITERS, SHORT
from conftest import ROOT, environment, read_metrics, run
from test_data import write_prepared

import checkpoint
import main
from checkpoint.__main__ import inspect
from checkpoint.format import CheckpointError, checkpoints, find_damage, read_manifest
from data.corpus import open_corpus
from support import preflight, process
from support.config import resolve
from support.process import ERROR_CODE

COMPARED = ("step", "loss", "grad_norm", "lr", "tokens")


def trained(output_dir) -> list[tuple]:
    return [tuple(record[key] for key in COMPARED) for record in read_metrics(output_dir)]


def assert_same_to_1e_5(output_dir, reference_dir):
    records, references = trained(output_dir), trained(reference_dir)
    assert len(records) == len(references) == ITERS
    for record, reference in zip(records, references, strict=True):
        assert record == pytest.approx(reference, rel=1e-5)
        assert record[0] == reference[0]


def newest(output_dir) -> str:
    return checkpoints(str(output_dir))[0]


def write_manifest(path, manifest: dict) -> None:
    """Writes a changed manifest into a checkpoint, with the checksum that fits."""
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    Path(path, "manifest.json").write_text(json.dumps(manifest))


def config_of(output_dir) -> dict:
    """Returns the config that the run saved."""
    return json.loads((output_dir / "config.json").read_text())


# ---------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------


def test_a_run_killed_at_many_moments_ends_bitwise_identical(start, undisturbed, tmp_path):
    """Most kills hit a change of the checkpoints' files (writing, renaming or removing), and some
    come after a step's line in the log.
    """
    output_dir, chance, moments = tmp_path / "run", random.Random(0), set()
    # A resumed run reads in its first changes; then it writes a checkpoint in 13.
    moments_to_kill = [*range(8, 28), *["logged"] * 5]
    chance.shuffle(moments_to_kill)
    for moment in moments_to_kill:
        if moment == "logged":
            killed = start().wait_for("step:").signal(signal.SIGKILL)
        else:
            killed = start(kill_at=moment)
        assert killed.exit_codes() == [-signal.SIGKILL], killed.said
        assert "warning" not in killed.said
        moments |= {Path(name).suffix for name in os.listdir(output_dir) if "step-" in name}
        for path in checkpoints(str(output_dir)):
            assert find_damage(path) == ""
    last = start()
    assert last.exit_codes() == [0], last.said
    assert "\nresume: " in last.said
    assert trained(output_dir) == trained(undisturbed[1])
    assert moments == {"", ".tmp", ".removed"}, "the kills did not fall where they should"
    left = [name for name in os.listdir(output_dir) if name.startswith("step-")]
    assert sorted(left) == [f"step-{ITERS - 1:08}", f"step-{ITERS:08}"], "keep_last=2"


def test_one_killed_rank_ends_all_and_the_run_resumes_bitwise_identical(
    start, undisturbed, tmp_path
):
    running = start(processes=2, cp=2).wait_for(f"saved: {tmp_path}/run/step-00000002")
    running.signal(signal.SIGKILL, 1)
    codes = running.exit_codes()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    resumed = start(processes=2, cp=2)
    assert resumed.exit_codes() == [0, 0], resumed.said
    assert trained(tmp_path / "run") == trained(undisturbed[2])


class Stop(NamedTuple):
    """A signal to one rank of a run with this layout, after this step."""

    signal: int
    step: int
    rank: int
    processes: int
    cp: int


def test_a_run_stopped_by_a_signal_resumes_in_another_layout(start, undisturbed, tmp_path):
    """(dp, cp): (2,1), (1,2), (1,1), (2,2). One rank gets the signal; all save the same step."""
    output_dir, last = tmp_path / "run", 0
    for stop in [
        Stop(signal.SIGTERM, step=2, rank=1, processes=2, cp=1),
        Stop(signal.SIGUSR1, step=5, rank=0, processes=2, cp=2),
        Stop(signal.SIGINT, step=8, rank=0, processes=1, cp=1),
    ]:
        running = start(processes=stop.processes, cp=stop.cp, every=0)
        running.wait_for(f"step: {max(stop.step, last + 1)}/").signal(stop.signal, stop.rank)
        assert running.exit_codes() == [0] * stop.processes, running.said
        last = read_metrics(output_dir)[-1]["step"]
        assert stop.step <= last < ITERS  # the signal takes its time on a busy machine
        assert newest(output_dir).endswith(f"step-{last:08}")
        assert f"stopping: saved step {last}" in running.said
    ended = start("train_config.gradient_accumulation_steps=2", processes=4, cp=2, every=0)
    assert ended.exit_codes() == [0] * 4, ended.said
    assert "\nresume: parallel_config.context_parallel_size 1 -> 2\n" in ended.said
    assert_same_to_1e_5(output_dir, undisturbed[1])


def test_a_run_resumes_with_replicas_of_its_weights_and_without(start, undisturbed, tmp_path):
    replicas = "parallel_config.data_parallel_replicate_size=2"
    for processes, arguments in ((2, [replicas]), (1, [])):
        running = start(*arguments, processes=processes, every=0).wait_for("step: ")
        running.signal(signal.SIGTERM, 0)
        assert running.exit_codes() == [0] * processes, running.said
    ended = start(replicas, processes=4, cp=2, every=0)
    assert ended.exit_codes() == [0] * 4, ended.said
    assert "\nmesh: dp 2 x cp 2, 4 processes; 2 replicas of the weights\n" in ended.said
    assert_same_to_1e_5(tmp_path / "run", undisturbed[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_rank_waits_for_others_ends_it_at_once(number, start):
    waiting = start(processes=1, absent=1).wait_for("parameters: ").signal(number)
    assert waiting.exit_codes() == [0]
    assert "stopped before training began\n" in waiting.said


def test_ctrl_c_answers_at_once_and_the_second_ends_the_run_without_saving(start, tmp_path):
    running = start(processes=2, cp=2, every=0).wait_for("step: 2/")
    running.signal(signal.SIGSTOP, 1).signal(signal.SIGINT, 0)
    while "stopping after this step; Ctrl-C again to leave without saving" not in running.said:
        assert running.read(), running.said
    running.signal(signal.SIGINT, 0)
    running.ranks[0].join()
    running.signal(signal.SIGKILL, 1)
    assert running.exit_codes() == [128 + signal.SIGINT, -signal.SIGKILL], running.said
    assert checkpoints(str(tmp_path / "run")) == []


def test_a_log_that_nobody_reads_does_not_end_the_run(start, undisturbed, tmp_path):
    running = start().wait_for("step: 3/")
    running.output.close()
    running.ranks[0].join()
    assert running.ranks[0].exitcode == 0
    assert trained(tmp_path / "run") == trained(undisturbed[1])


def test_a_restarted_run_resumes_and_run_sh_exits_with_0_on_sigterm(undisturbed, tmp_path):
    """`torchrun --max-restarts 3`, as run.sh starts it. resume=never applies to the first start.

    torchrun itself, on TERM, would kill the ranks after 30 seconds and fail.
    """
    output_dir = tmp_path / "run"
    arguments = [
        *SHORT,
        f"train_config.output_dir={output_dir}",
        f"train_config.train_iters={ITERS}",
        "train_config.checkpoint_interval=2",
        "train_config.resume=never",
    ]
    running = subprocess.Popen(
        ["bash", "run.sh", *arguments],
        cwd=ROOT,
        env=environment(GPUS_PER_NODE="2", MAX_RESTARTS="3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []

    def wait_for(text):
        while not said or not said[-1].startswith(text):
            said.append(running.stdout.readline())
            assert said[-1], "".join(said)

    try:
        wait_for(f"saved: {output_dir}/step-00000002")
        (launcher,) = run("pgrep", "-P", running.pid).stdout.split()
        workers = run("pgrep", "-P", launcher).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        wait_for(f"resume: {output_dir}/step-")
        wait_for("step: 7/")
        os.kill(int(launcher), signal.SIGUSR1)  # of a scheduler that signals all processes
        running.send_signal(signal.SIGTERM)
        said += running.stdout
        assert running.wait() == 0, "".join(said)
    finally:
        running.kill()
    records, references = trained(output_dir), trained(undisturbed[2])
    assert 7 <= len(records) < ITERS, "the signal takes its time on a busy machine"
    assert records == references[: len(records)]
    assert newest(output_dir).endswith(f"step-{len(records):08}")


def test_ranks_of_a_killed_torchrun_save_and_exit_and_lock_out_a_second_run(tmp_path):
    """They do not train to the end. Until they exit, their output_dir is locked."""
    output_dir, train_iters = tmp_path / "run", 3000
    arguments = [
        *SHORT,
        f"train_config.output_dir={output_dir}",
        f"train_config.train_iters={train_iters}",
        "train_config.checkpoint_interval=0",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen(
        [*launch, "main.py", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (line := running.stdout.readline()).startswith("step: 3/"):
        assert line
    second = run(sys.executable, "main.py", *arguments, check=False)
    running.kill()
    said = running.stdout.read()  # until the workers have ended
    running.wait()
    assert second.returncode == ERROR_CODE
    assert second.stderr.startswith(f"error: train_config.output_dir='{output_dir}' is in use: ")
    last = read_metrics(output_dir)[-1]["step"]
    assert f"stopping: saved step {last}" in said
    assert newest(output_dir).endswith(f"step-{last:08}") and last < train_iters


# ---------------------------------------------------------------------------------------------
# Damaged, full, hanging, not a number
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "a bit flipped", "missing"])
def test_damage_to_any_file_is_found_and_named(harm, name, undisturbed, tmp_path):
    path = shutil.copytree(newest(undisturbed[2]), tmp_path / "step-00000012")
    assert find_damage(str(path)) == ""
    content = bytearray((path / name).read_bytes())
    if harm == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    elif harm == "missing":
        (path / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    assert name in find_damage(str(path))
    parts = [find_damage(str(path), part, 2) for part in range(2)]
    assert any(parts), "the ranks together find it"


def test_a_damaged_checkpoint_is_skipped_and_named(start, undisturbed, tmp_path):
    output_dir = shutil.copytree(undisturbed[1], tmp_path / "run")
    with open(Path(newest(output_dir)) / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    resumed = start("train_config.keep_last=0")
    assert resumed.exit_codes() == [0], resumed.said
    assert (
        f"warning: {output_dir}/step-00000012 is damaged and skipped: __0_0.distcp has 1,000 bytes"
    ) in resumed.said
    assert f"resume: {output_dir}/step-00000008, step 8 of {ITERS}\n" in resumed.said
    assert trained(output_dir) == trained(undisturbed[1])
    assert find_damage(newest(output_dir)) == "", "it is written again"

    for path in checkpoints(str(output_dir)):
        (Path(path) / ".metadata").unlink()
    lost = start()
    assert lost.exit_codes() == [ERROR_CODE]
    assert f"error: all checkpoints are damaged: {output_dir}/step-00000012, " in lost.said


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk) -> Path:
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path


def test_a_full_disk_costs_only_a_checkpoint(start, undisturbed, small_disk):
    """The run warns and continues with the last checkpoint, or stops if the config asks for it."""
    output_dir = small_disk / "run"
    running = start(output_dir=output_dir).wait_for("saved:")
    filler = fill(small_disk)
    running.wait_for("warning: the checkpoint ")
    assert find_damage(newest(output_dir)) == ""
    filler.unlink()
    assert running.exit_codes() == [0], running.said
    assert "No space left on device" in running.said
    assert find_damage(newest(output_dir)) == "" and newest(output_dir).endswith(f"{ITERS:08}")
    assert trained(output_dir) == trained(undisturbed[1])

    shutil.rmtree(output_dir)
    arguments = {"output_dir": output_dir}
    running = start("train_config.on_checkpoint_failure=stop", **arguments).wait_for("saved:")
    filler = fill(small_disk)
    assert running.exit_codes() == [ERROR_CODE], running.said
    assert "\nerror: the checkpoint " in running.said
    assert "No space left on device" in running.said
    assert not [name for name in os.listdir(output_dir) if name.endswith(".tmp")]
    assert find_damage(newest(output_dir)) == ""
    filler.unlink()
    assert start(**arguments).exit_codes() == [0]
    assert trained(output_dir) == trained(undisturbed[1])


def test_a_checkpoint_and_an_export_name_a_full_disk(
    config, cp_group, undisturbed, small_disk, monkeypatch
):
    """There is room for a part of them, and no part stays."""
    checkpointer, filler = build(small_disk), fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 2**16)
    with pytest.raises(CheckpointError, match="could not be written, .*No space left on device"):
        checkpointer.after_step(1, stop=True)
    assert os.listdir(small_disk) == ["filler"]
    error = command_error(monkeypatch, "export", undisturbed[1], small_disk / "hf")
    assert error.startswith(f"error: '{small_disk}/hf' cannot be written (")
    assert "No space left on device" in error and "\n" not in error
    assert os.listdir(small_disk) == ["filler"]


def test_a_start_on_a_full_disk_is_one_sentence_and_changes_no_file(start, undisturbed, small_disk):
    output_dir = shutil.copytree(undisturbed[1], small_disk / "run")
    for old in checkpoints(str(output_dir))[1:]:
        shutil.rmtree(old)
    before = {name: (output_dir / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    fill(small_disk)
    refused = start(f"train_config.train_iters={ITERS + 1}", output_dir=output_dir)
    assert refused.exit_codes() == [ERROR_CODE]
    assert refused.said.splitlines()[-1] == (
        f"error: train_config.output_dir='{output_dir}' cannot be written ([Errno 28] No space "
        "left on device); free its disk, or give another"
    )
    for name, content in before.items():
        assert (output_dir / name).read_bytes() == content


def test_a_file_named_lock_that_is_the_user_s_stays(config, tmp_path):
    (tmp_path / "lock").write_text("my notes")
    with pytest.raises(
        ValueError, match="lock is not a run's; move it, or give another output_dir"
    ):
        process.lock_output_dir(str(tmp_path))
    assert (tmp_path / "lock").read_text() == "my notes"


def test_a_lock_that_cannot_be_opened_is_one_sentence(config, tmp_path):
    """A folder here; another user's file in a folder of many."""
    (tmp_path / "lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot be locked \(.* Is a directory: .*; remove"):
        process.lock_output_dir(str(tmp_path))


def test_an_output_dir_with_the_name_of_a_checkpoint_is_refused_and_not_made(start, tmp_path):
    running = start(output_dir=tmp_path / "step-00000010")
    assert running.exit_codes() == [ERROR_CODE]
    assert "has the name of a checkpoint; give a folder of another name" in running.said
    assert not (tmp_path / "step-00000010").exists()


def test_an_output_dir_that_cannot_be_written_ends_the_run_before_step_1(start, tmp_path):
    (tmp_path / "file").touch()
    refused = start(output_dir=tmp_path / "file" / "run")
    assert refused.exit_codes() == [ERROR_CODE]
    assert "cannot be written: " in refused.said
    assert "step:" not in refused.said


def test_a_rank_that_hangs_ends_the_run_with_the_step_named(start, tmp_path):
    hanging = start("train_config.step_timeout=4", processes=2, every=0).wait_for("step: 2/")
    hanging.signal(signal.SIGSTOP, 1)
    hanging.ranks[0].join()
    hanging.signal(signal.SIGKILL, 1)
    assert hanging.exit_codes() == [1, -signal.SIGKILL], hanging.said
    step = read_metrics(tmp_path / "run")[-1]["step"] + 1
    assert f"error: step {step} is not done after 4 s (train_config.step_timeout)" in hanging.said
    assert "rank 0 is at:" in hanging.said and "in train" in hanging.said


def test_the_watchdog_ends_a_process_whose_log_cannot_be_written():
    hang = "from support import process; import signal; process.Watchdog(0).watch('a step'); "
    code = [sys.executable, "-c", hang + "signal.pause()"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(code, cwd=ROOT, stderr=full).returncode == 1


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(start, tmp_path):
    stopped = start("train_config.optimizer_config.learning_rate=1e30", processes=2)
    stopped.ranks[0].join()  # the other waits for torchrun to end it
    stopped.signal(signal.SIGKILL, 1)
    assert stopped.exit_codes() == [ERROR_CODE, -signal.SIGKILL]
    (said,) = [line for line in stopped.said.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: step 2: the loss is ")
    assert "stopped before the weights changed. rank 0: " in said and "; rank 1: " in said
    path = newest(tmp_path / "run")
    assert path.endswith("step-00000001") and find_damage(path) == ""
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]


# ---------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    {
        "data_config.seqlen": 48,
        "data_config.batch_size": 8,
        "data_config.seed": 1,
        "train_config.seed": 1,
        "llama_config.hidden_size": 64,
        "train_config.train_iters": 6,
    }.items(),
)
def test_a_change_that_is_not_allowed_names_the_key_and_both_values(key, value, undisturbed):
    config = config_of(undisturbed[1])
    checkpoint.resume.check_resume(config)
    section, name = key.split(".")
    before, config[section][name] = config[section][name], value
    with pytest.raises(CheckpointError) as error:
        checkpoint.resume.check_resume(config)
    assert f"{key}={value!r}, but " in str(error.value)
    assert f"was trained with {before!r}" in str(error.value) or name == "train_iters"
    assert newest(undisturbed[1]) in str(error.value)


def test_an_optional_key_of_rope_scaling_may_not_be_added(forged_run):
    """It changes the model, although the checkpoint does not have it."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    manifest = read_manifest(newest(forged_run))
    manifest["config"]["llama_config"]["rope_scaling"] = yarn
    write_manifest(newest(forged_run), manifest)
    config = config_of(forged_run)
    config["train_config"]["output_dir"] = str(forged_run)
    config["llama_config"]["rope_scaling"] = dict(yarn)
    checkpoint.resume.check_resume(config)
    config["llama_config"]["rope_scaling"]["attention_factor"] = 2.0
    with pytest.raises(CheckpointError, match="llama_config.rope_scaling=.*attention_factor"):
        checkpoint.resume.check_resume(config)


def write_corpus(path: Path, kind: str, text: bytes) -> Path:
    """Writes `text` as one kind of corpus; returns its data_config.source."""
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    if kind == "prepared folder":
        return write_prepared(path, tokens, np.array([0, 1000, len(text)]), vocab_size=257)
    path.mkdir()
    file = path / ("a.txt" if kind == "text" else "a.bin")
    file.write_bytes(text if kind == "text" else tokens.tobytes())
    return path if kind == "text" else file


@pytest.mark.parametrize("key", ["source", "validation_source"])
@pytest.mark.parametrize("kind", ["text", "prepared folder", "token file"])
def test_a_moved_corpus_resumes_and_other_text_of_its_name_does_not(
    kind, key, config, cp_group, tmp_path
):
    text = (ROOT / "LICENSE").read_bytes()
    source = write_corpus(tmp_path / "corpus", kind, text)
    other = ["data_config.source=random", "train_config.eval_interval=1"]
    other = [] if key == "source" else [*other, "train_config.eval_iters=1"]
    build(tmp_path / "run", *other, f"data_config.{key}={source}").after_step(1, stop=True)

    def check(source):
        open_corpus.cache_clear()
        resolve([f"data_config.{key}={source}"], world_size=1)
        checkpoint.resume.check_resume(preflight.run_config(preflight.open_sources()))

    os.rename(tmp_path / "corpus", tmp_path / "moved")
    check(tmp_path / "moved" / source.relative_to(tmp_path / "corpus"))
    os.symlink(tmp_path / "moved", tmp_path / "corpus")
    check(f"{source.parent}/./{source.name}")
    os.unlink(tmp_path / "corpus")
    write_corpus(tmp_path / "corpus", kind, text[:5000] + b"X" + text[5001:])
    with pytest.raises(CheckpointError, match=f"data_config.{key}='{source}' does not hold the"):
        check(source)


def test_a_checkpoint_without_fingerprints_resumes_by_the_path_of_its_corpus(
    forged_run, monkeypatch
):
    """It may have a tilde in its path."""
    monkeypatch.setenv("HOME", "/home/me")
    manifest = read_manifest(newest(forged_run))
    del manifest["config"]["fingerprints"]
    manifest["config"]["data_config"]["source"] = "~/corpus"
    manifest["config"]["data"] = "~/corpus, 3 documents"
    write_manifest(newest(forged_run), manifest)
    resumed = config_of(forged_run)
    resumed["train_config"]["output_dir"] = str(forged_run)
    resumed["data_config"]["source"] = "/home/me/corpus"
    resumed["data"] = "/home/me/corpus, 3 documents"
    checkpoint.resume.check_resume(resumed)
    resumed["data"] = "/home/me/corpus, 4 documents"
    with pytest.raises(CheckpointError, match="data='/home/me/corpus, 4 documents', but "):
        checkpoint.resume.check_resume(resumed)
    resumed["data_config"]["source"] = "README.md"
    with pytest.raises(CheckpointError, match="data_config.source='README.md', but .*'~/corpus'"):
        checkpoint.resume.check_resume(resumed)


def test_a_finished_run_whose_inputs_moved_is_still_finished(undisturbed, config, cp_group):
    checkpointer = build(undisturbed[1], f"data_config.source={ROOT / 'LICENSE'}")
    checkpointer.config = config_of(undisturbed[1])
    checkpointer.config["data_config"]["source"] = "moved"
    checkpointer.config["model_config"]["init_from"] = "moved"
    assert checkpointer.resume() == ITERS


def test_other_changes_are_allowed(undisturbed):
    config = config_of(undisturbed[1])
    config["train_config"] |= {"dtype": "bfloat16", "checkpoint_interval": 7, "train_iters": 90}
    config["parallel_config"] |= {"context_parallel_backend": "magi_attention"}
    checkpoint.resume.check_resume(config)


def test_never_refuses_a_folder_with_a_run_and_auto_reports_a_finished_run(start, undisturbed):
    output_dir = undisturbed[1]

    def files():
        found = [path for path in output_dir.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    before = files()
    refused = start("train_config.resume=never", output_dir=output_dir)
    assert refused.exit_codes() == [ERROR_CODE]
    assert f"train_config.output_dir={str(output_dir)!r} holds a run; give another" in refused.said
    done = start("train_config.log_interval=5", output_dir=output_dir, every=4)
    assert done.exit_codes() == [0], done.said
    assert f"resume: {output_dir}/step-00000012, step 12 of 12; all its steps" in done.said
    changed = start("train_config.optimizer_config.learning_rate=0.5", output_dir=output_dir)
    assert changed.exit_codes() == [ERROR_CODE]
    keys = "train_config.checkpoint_interval, train_config.optimizer_config.learning_rate"
    assert f"has all 12 steps, so a change of {keys} would train nothing" in changed.said
    assert f"an output_dir other than {str(output_dir)!r}" in changed.said
    layout = start(output_dir=output_dir, every=4, processes=2, cp=2)
    assert layout.exit_codes() == [0, 0], layout.said
    assert "step 12 of 12; all its steps are done" in layout.said
    assert files() == before


def test_a_path_starts_a_branch_in_another_folder(start, undisturbed, tmp_path):
    path = checkpoints(str(undisturbed[1]))[1]
    assert path.endswith("step-00000008")
    resumed = start(f"train_config.resume={path}")
    assert resumed.exit_codes() == [0], resumed.said
    assert trained(tmp_path / "run") == trained(undisturbed[1])[8:]

    config = config_of(undisturbed[1])
    config["train_config"]["resume"] = path
    with pytest.raises(
        CheckpointError, match="newest checkpoint in train_config.output_dir is .*step-00000012"
    ):
        checkpoint.resume.check_resume(config)
    config["train_config"]["resume"] = str(tmp_path / "run")  # step 12 too, of another run
    with pytest.raises(
        CheckpointError, match="newest checkpoint in train_config.output_dir is .*step-00000012"
    ):
        checkpoint.resume.check_resume(config)
    config["train_config"]["resume"] = str(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint; it must be 'auto', 'never', "):
        checkpoint.resume.check_resume(config)
    config["train_config"]["resume"] = str(undisturbed[1] / "step-00000099")
    with pytest.raises(CheckpointError, match="holds no checkpoint; it must be 'auto', 'never', "):
        checkpoint.resume.check_resume(config)


def build(output_dir, *arguments) -> checkpoint.Checkpointer:
    """Returns a new model's in this process."""
    arguments = [*SHORT, f"train_config.output_dir={output_dir}", *arguments]
    resolve(arguments, world_size=1)
    model = main.parallelize_model(main.build_llama_model(), main.build_mesh())
    optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
    config = preflight.run_config(preflight.open_sources())
    return checkpoint.Checkpointer(model, optimizer, lr_scheduler, config, print)


def test_random_states_are_restored(config, cp_group, tmp_path):
    torch.manual_seed(5)
    build(tmp_path).after_step(3, stop=True)
    expected = torch.rand(4)
    torch.manual_seed(6)
    assert build(tmp_path).resume() == 3
    assert torch.equal(torch.rand(4), expected)


def test_a_first_save_that_fails_costs_only_itself(config, cp_group, tmp_path, capsys):
    (tmp_path / "step-00000001.tmp").write_text("in the way of its folder")
    checkpointer = build(tmp_path, "train_config.checkpoint_interval=1")
    for step in (1, 2, 3):
        checkpointer.after_step(step, stop=step == 3)
    said = capsys.readouterr().out
    assert said.count("could not be written") == 1 and "step-00000001 could not be" in said
    assert [Path(path).name for path in checkpoints(str(tmp_path))] == [
        "step-00000003",
        "step-00000002",
    ]


def test_a_folder_or_link_that_no_run_made_stays_as_it_is(config, cp_group, tmp_path, capsys):
    """Not at the start, not by a save that fails, and not as an old checkpoint."""
    output_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    notes = [output_dir / "step-00000001.tmp", output_dir / "step-00000009.removed", elsewhere]
    for folder in notes:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    for name in ("step-00000002.tmp", "step-00000008.removed"):
        (output_dir / name).symlink_to(elsewhere)
    checkpointer = build(output_dir, "train_config.checkpoint_interval=1")
    assert checkpointer.resume() == 0
    assert capsys.readouterr().out.count("warning: not removed: ") == 4
    for step in range(1, 8):
        checkpointer.after_step(step, stop=False)
        checkpointer.wait_for_save()
        if step == 3:
            (output_dir / "step-00000003" / "hf").mkdir()
            notes.append(output_dir / "step-00000003")
            (notes[-1] / "notes.txt").write_text("mine")
    said = capsys.readouterr().out
    for name, other in (("step-00000001.tmp", "notes.txt"), ("step-00000002.tmp", "a link")):
        assert re.search(rf"could not be written, .*{name} (holds|is) '?{other}", said)
    assert f"warning: not removed: {output_dir}/step-00000003 holds " in said
    for folder in notes[:3]:
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
            ("notes.txt", "mine")
        ]
    assert {"hf", "notes.txt", "manifest.json"} < set(os.listdir(notes[3]))
    steps = [Path(path).name for path in checkpoints(str(output_dir))]
    assert steps == ["step-00000007", "step-00000006", "step-00000003"], "keep_last=2"


def steps_in(output_dir) -> list[int]:
    return [int(path[-8:]) for path in checkpoints(str(output_dir))]


def test_a_damaged_checkpoint_takes_no_place_of_a_complete_one(config, cp_group, tmp_path):
    checkpointer = build(tmp_path, "train_config.checkpoint_interval=1", "train_config.keep_last=0")
    for step in range(1, 5):
        checkpointer.after_step(step, stop=True)
    (tmp_path / "step-00000004" / "manifest.json").write_text("{")
    checkpointer = build(tmp_path, "train_config.keep_last=2")
    assert checkpointer.resume() == 3
    checkpointer.after_step(5, stop=True)
    assert steps_in(tmp_path) == [5, 3], "keep_last=2"


def test_a_damaged_checkpoint_counts_once_it_is_written_again(config, cp_group, tmp_path):
    checkpointer = build(tmp_path, "train_config.checkpoint_interval=1", "train_config.keep_last=0")
    for step in range(1, 6):
        checkpointer.after_step(step, stop=True)
    for step in (4, 5):
        (tmp_path / f"step-{step:08}" / "manifest.json").write_text("{")
    checkpointer = build(tmp_path, "train_config.keep_last=2")
    assert checkpointer.resume() == 3
    checkpointer.after_step(4, stop=True)
    assert steps_in(tmp_path) == [5, 4, 3], "the run has not reached step 5 again"
    checkpointer.after_step(6, stop=True)
    assert steps_in(tmp_path) == [6, 4], "keep_last=2"


def test_a_disk_without_room_for_one_more_checkpoint_keeps_the_newest(
    config, cp_group, small_disk, capsys
):
    """Also after a start, and if the disk is full at the end of the run."""
    output_dir = small_disk / "run"
    checkpointer = build(output_dir, "train_config.checkpoint_interval=1")
    checkpointer.after_step(1, stop=True)
    size = sum(file.stat().st_size for file in (output_dir / "step-00000001").iterdir())
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - size * 3 // 2))
    checkpointer.after_step(2, stop=True)
    assert steps_in(output_dir) == [2, 1]
    checkpointer = build(output_dir, "train_config.checkpoint_interval=1")
    assert checkpointer.resume() == 2
    checkpointer.after_step(3, stop=True)
    assert steps_in(output_dir) == [3, 2]
    assert capsys.readouterr().out.count("step-00000003 could not be written") == 1
    checkpointer.after_step(4, stop=False)
    checkpointer.wait_for_save()
    assert steps_in(output_dir) == [3]
    assert all(find_damage(path) == "" for path in checkpoints(str(output_dir)))


def test_a_full_disk_removes_no_checkpoint_of_another_run(config, cp_group, small_disk):
    for step in (1, 2):
        build(small_disk / "a", "train_config.checkpoint_interval=1").after_step(step, stop=True)
    (small_disk / "b").mkdir()
    path = f"train_config.resume={small_disk / 'a'}"
    checkpointer = build(small_disk / "b", path, "train_config.checkpoint_interval=1")
    assert checkpointer.resume() == 2
    fill(small_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpointer.after_step(3, stop=True)
    assert steps_in(small_disk / "a") == [2, 1]


def test_the_command_that_begins_a_branch_resumes_it(config, cp_group, tmp_path):
    for step in (1, 2):
        build(tmp_path / "a").after_step(step, stop=True)
    (tmp_path / "b").mkdir()
    command = f"train_config.resume={tmp_path / 'a/step-00000001'}"
    for first, last in ((1, 2), (2, 4)):
        checkpointer = build(tmp_path / "b", command)
        assert checkpointer.resume() == first
        checkpointer.after_step(last, stop=True)
    shutil.rmtree(tmp_path / "a")
    assert build(tmp_path / "b", command).resume() == 4
    checkpointer = build(tmp_path / "b", "train_config.resume=auto")
    assert checkpointer.resume() == 4
    checkpointer.after_step(5, stop=True)
    assert build(tmp_path / "b", f"{command}/").resume() == 5
    other = build(tmp_path / "b", f"train_config.resume={tmp_path / 'b/step-00000004'}")
    with pytest.raises(CheckpointError, match="the newest checkpoint in train_config.output_dir"):
        other.resume()


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path):  # root, as whom tests may run, can read all folders
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); make it"):
        checkpoints(str(tmp_path))


@pytest.mark.parametrize("moved", ["an old one", "the newest, which is damaged"])
def test_a_checkpoint_moved_and_linked_back_keeps_its_files(moved, config, cp_group, tmp_path):
    output_dir, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    checkpointer = build(output_dir, "train_config.checkpoint_interval=1")
    for step in (1, 2):
        checkpointer.after_step(step, stop=True)
    name = "step-00000001" if moved == "an old one" else "step-00000002"
    shutil.move(output_dir / name, disk / name)
    (output_dir / name).symlink_to(disk / name)
    if moved == "an old one":
        assert checkpointer.resume() == 2
        checkpointer.after_step(3, stop=True)
        assert not (output_dir / name).is_symlink(), "keep_last=2"
    else:
        (disk / name / "manifest.json").write_text("[" * 100_000)
        assert checkpointer.resume() == 1
        checkpointer.after_step(2, stop=True)
        assert not (output_dir / name).is_symlink(), "it is written again"
    assert len(list((disk / name).iterdir())) == 3
    assert all(find_damage(path) == "" for path in checkpoints(str(output_dir)))
    assert checkpointer.resume() == (3 if moved == "an old one" else 2)


def test_a_signal_in_the_last_step_leaves_nothing_to_resume(config, cp_group, tmp_path, capsys):
    checkpointer = build(tmp_path, "train_config.train_iters=1")
    checkpointer.after_step(1, stop=True)
    assert capsys.readouterr().out == f"saved: {tmp_path}/step-00000001\n"


@pytest.mark.parametrize("output_dir", [".", "a/../run"])
def test_output_dir_may_be_a_relative_path(output_dir, config, cp_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("a")
    os.makedirs(output_dir, exist_ok=True)
    source = f"data_config.source={ROOT / 'LICENSE'}"
    checkpointer = build(output_dir, source, "train_config.checkpoint_interval=1")
    for step in (1, 2, 3):
        checkpointer.after_step(step, stop=step == 3)  # raises if the last one failed
    left = [name for name in os.listdir(output_dir) if name.startswith("step-")]
    assert sorted(left) == ["step-00000002", "step-00000003"], "keep_last=2"


def test_save_ms_is_the_pause_of_training(undisturbed):
    saved = {record["step"]: record["save_ms"] for record in read_metrics(undisturbed[1])}
    assert [step for step, ms in saved.items() if ms > 0] == [5, 9]  # after steps 4 and 8


def test_inspect_prints_step_config_and_sizes(undisturbed, tmp_path, capsys):
    inspect(str(undisturbed[2]))
    said = capsys.readouterr().out
    manifest = read_manifest(newest(undisturbed[2]))
    assert said.startswith(f"{newest(undisturbed[2])}: complete\nstep: {ITERS}\n")
    assert "written by: 2 processes" in said and '"seqlen": 24' in said
    assert f"on disk: {len(manifest['files'])} files" in said


def test_inspect_of_what_is_no_checkpoint_says_so_and_where_it_looked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for path, problem in (
        ("run", f"'run' holds no complete checkpoint (looked in {tmp_path}/run); give a run's"),
        ("gone", f"'gone' does not exist (looked for {tmp_path}/gone); give a run's output_dir"),
        ("step-00000009", f"'step-00000009' does not exist (looked for {tmp_path}/step-00000009)"),
    ):
        with pytest.raises(CheckpointError, match=f"^{re.escape(problem)}"):
            inspect(path)
    assert "damaged" not in "".join(capsys.readouterr())


# ---------------------------------------------------------------------------------------------
# Forged
# ---------------------------------------------------------------------------------------------

METADATA, FILESYSTEM = (f"torch.distributed.checkpoint.{x}" for x in ("metadata", "filesystem"))
RECORDS = ["Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"]


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    """The opcodes that push what a module names; the name may have dots."""
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    """The opcodes that push what a function returns."""
    return function + b"(" + b"".join(arguments) + b"tR"


def record(name: str, module: str = METADATA, **attributes: bytes) -> bytes:
    """The opcodes that push one of DCP's records."""
    pairs = b"".join(text(key) + value for key, value in attributes.items())
    return named(module, name) + b")\x81}(" + pairs + b"ub"


def tensor(size: bytes, name: bytes = text("model.x")) -> bytes:
    """The opcodes that push the records of one tensor."""
    encoding = called(named(METADATA, "_MEM_FORMAT_ENCODING"), b"K\x00")
    layout = called(named("torch.serialization", "_get_layout"), text("torch.strided"))
    state = b"(" + named("torch", "float32") + layout + b"\x89" + encoding + b"\x89t"
    properties = named(METADATA, "TensorProperties") + b")\x81" + state + b"b"
    x = record("TensorStorageMetadata", properties=properties, size=size, chunks=b"]")
    tensors = b"}" + name + x + b"s"
    return record("Metadata", state_dict_metadata=tensors, storage_data=b"}")


def size(number: int) -> bytes:
    """The opcodes that push torch.Size([number])."""
    digits = number.to_bytes(8, "little", signed=True)
    return called(named("torch", "Size"), b"\x8a\x08" + digits + b"\x85")


TOUCH, SYSTEM = text("touch marker"), named("os", "system")
EXEC, WRITE = text("exec"), text("open('marker', 'w')")
IMPORT, METHOD = named("importlib", "import_module"), named("operator", "attrgetter")
CLASS, FUNCTION = named(METADATA, "Metadata"), named("torch.serialization", "_get_layout")
# Each makes the file `marker` where pickle.load reads it.
ATTACKS_WITH_CODE = {
    "os.system": called(SYSTEM, TOUCH),
    "posix.system, by protocol 0": called(b"cposix\nsystem\n", TOUCH),
    "builtins.eval": called(named("builtins", "eval"), WRITE),
    "builtins.exec": called(named("builtins", "exec"), WRITE),
    "eval of Python 2": called(b"\x80\x02c__builtin__\neval\n", WRITE),
    "subprocess.run": called(
        named("subprocess", "run"), b"](" + text("touch") + text("marker") + b"e"
    ),
    "importlib.import_module": called(IMPORT, text("harm")),
    "runpy.run_path": called(named("runpy", "run_path"), text("harm.py")),
    "functools.partial": called(called(named("functools", "partial"), SYSTEM, TOUCH)),
    "operator.attrgetter": called(
        called(called(METHOD, text("system")), called(IMPORT, text("os"))), TOUCH
    ),
    "torch.load": called(
        named("torch", "load"), text("harm.pt"), b"N", called(IMPORT, text("pickle"))
    ),
    "torch.hub": called(named("torch.hub", "_load_local"), text("."), text("harm")),
    "an allowed function's builtins": called(
        called(named("torch.serialization", "_get_layout.__builtins__.get"), EXEC), WRITE
    ),
    "an allowed class's builtins": called(
        called(named(METADATA, "Metadata.__init__.__builtins__.get"), EXEC), WRITE
    ),
    "os through torch": called(named("torch", "os.system"), TOUCH),
    "os through torch.serialization": called(named("torch.serialization", "os.system"), TOUCH),
    "os through DCP": called(named(FILESYSTEM, "os.system"), TOUCH),
    "a method of PosixPath": called(
        named("pathlib", "PosixPath.touch"), called(named("pathlib", "PosixPath"), text("marker"))
    ),
    "copyreg": called(named("copyreg", "add_extension"), text("os"), text("system"), b"K\x4d")
    + b"0" + called(b"\x82\x4d", TOUCH),
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + named("subprocess", "Popen") + text("./harm") + b"o",
    "__setstate__ in a record": record("Metadata", __setstate__=SYSTEM) + TOUCH + b"b",
    "__setstate__ in a class": CLASS + b"N}" + text("__setstate__") + SYSTEM + b"s\x86b0"
    + CLASS + b")\x81" + TOUCH + b"b",
}  # fmt: skip
ATTACKS = {
    "nt.system": called(named("nt", "system"), TOUCH),
    "a changed class": CLASS + b"N}" + text("version") + CLASS + b"s\x86b",
    "a record with another attribute": record("Metadata", __setstate__=CLASS),
    "a changed function": FUNCTION + b"}" + text("cache") + b"}sb",
    "a changed enum": called(named(METADATA, "_MEM_FORMAT_ENCODING"), b"K\x00")
    + b"}" + text("_value_") + b"K\x01sb",
    "an extension that is not registered": b"\x82\x01",
    "a persistent id": b"Pos.system\n",
    "a binary persistent id": TOUCH + b"Q",
    "an allowed function as a class": FUNCTION + text("torch.strided") + b"\x85\x81",
    "deep lists": b"]" * 200_000 + b"a" * 199_999,
    "a deep tuple as a key": b"})" + b"\x85" * 200_000 + b"Ns",
    "a tuple of 2 ** 60 items as a key": b"})" + b"2\x86" * 60 + b"Ns",
    "a deep record as a key": b"}" + text("x")
    + b"".join(b"q\x010" + record("MetadataIndex", fqn=b"h\x01") for _ in range(5000)) + b"Ns",
    "a record of 2 ** 60 records as a key": b"}" + text("x") + b"".join(
        b"q\x010" + record("MetadataIndex", fqn=b"h\x01", offset=b"h\x01") for _ in range(60)
    ) + b"Ns",
    "a string of 4 EiB": b"\x8d" + (2**62).to_bytes(8, "little"),
    "a bytearray of 4 EiB": b"\x96" + (2**62).to_bytes(8, "little"),
    "a frame of 4 EiB": b"\x95" + (2**62).to_bytes(8, "little"),
    "a memo of 2 ** 31 entries": b"Nr" + (2**31 - 1).to_bytes(4, "little"),
    "an empty pickle": b"",
    "no pickle": b"once upon a time",
    "None": b"N",
    "a record without attributes": CLASS + b")\x81",
    "a record of bytes, which DCP unpickles": record(
        "Metadata", state_dict_metadata=b"}" + text("x") + record("BytesStorageMetadata") + b"s"
    ),
    "a dict instead of a record": b"}" + text("state_dict_metadata") + b"}s",
    "a name that is a number": tensor(size(5), name=b"K\x01"),
    "a tensor of 4 TiB": tensor(size(2**40)),
    "a tensor of negative size": tensor(size(-5)),
    "a size that is a list": tensor(b"](K\x01K\x02e"),
    "a size that is text": tensor(text("12")),
    "a file of another folder": record(
        "Metadata",
        state_dict_metadata=b"}",
        storage_data=b"}" + text("x") + record(
            "_StorageInfo", FILESYSTEM, relative_path=text("../x"), offset=b"K\x00", length=b"K\x00"
        ) + b"s",
    ),
}  # fmt: skip
FORGED = {name: b"\x80\x04" + x + b"." for name, x in (ATTACKS_WITH_CODE | ATTACKS).items()}
FORGED |= {"an empty file": b"", "half of a pickle": FORGED["a tensor of 4 TiB"][:200]}


def forge(path: Path, name: str, content: bytes) -> None:
    """Replaces a file of a checkpoint, and makes the manifest fit."""
    (path / name).write_bytes(content)
    manifest = read_manifest(str(path))
    manifest["files"][name] = [len(content), zlib.crc32(content)]
    write_manifest(path, manifest)
    assert find_damage(str(path)) == ""


def command_error(monkeypatch, *arguments) -> str:
    """Returns the error with which `python -m checkpoint` ends."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        checkpoint.__main__.main()
    return str(end.value)


def resume_error(output_dir) -> str:
    """Returns the error with which a run in this output_dir ends."""
    checkpointer = build(output_dir, f"data_config.source={ROOT / 'LICENSE'}")
    checkpointer.config = config_of(output_dir)
    checkpointer.config["train_config"]["output_dir"] = str(output_dir)
    with pytest.raises(CheckpointError) as refused:
        checkpointer.resume()
    return f"error: {refused.value}"


def nameable_objects() -> list[dict]:
    """The attributes of the objects that a pickle may name, and that it must not change."""
    encodings = dcp.metadata._MEM_FORMAT_ENCODING
    objects = [getattr(dcp.metadata, name) for name in RECORDS]
    return [dict(vars(x)) for x in (*objects, *encodings, torch.serialization._get_layout)]


@pytest.fixture
def forged_run(undisturbed, tmp_path, monkeypatch):
    """A copy of a run, and in the working directory files that make `marker` when they run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("harm.py", "hubconf.py"):
        (tmp_path / name).write_text("open('marker', 'w')\ndef harm(): pass\n")
    (tmp_path / "harm").write_text("#!/bin/sh\ntouch marker\n")
    (tmp_path / "harm").chmod(0o700)
    (tmp_path / "harm.pt").write_bytes(FORGED["os.system"])
    return shutil.copytree(undisturbed[1], tmp_path / "run")


@pytest.mark.parametrize("attack", FORGED)
def test_a_forged_pickle_is_one_sentence_and_runs_no_code(
    attack, forged_run, monkeypatch, config, cp_group, capfd
):
    """In both commands, and in a run that resumes."""
    step, before = Path(newest(forged_run)), nameable_objects()
    forge(step, ".metadata", FORGED[attack])
    inspect_error = command_error(monkeypatch, "inspect", forged_run)
    export_error = command_error(monkeypatch, "export", step, "exported")
    assert inspect_error == export_error == resume_error(forged_run)
    assert inspect_error.startswith(f"error: {step}/.metadata cannot be read (")
    assert inspect_error.endswith("tensors; use another checkpoint")
    assert "\n" not in inspect_error and len(inspect_error) < 500
    assert {"marker", "exported", "exported.tmp"}.isdisjoint(os.listdir())
    assert nameable_objects() == before
    assert "Traceback" not in "".join(capfd.readouterr())
    print(f"\n{attack}: {inspect_error}")


@pytest.mark.parametrize("attack", ["os.system", "a deep tuple as a key", "None"])
def test_a_run_with_a_forged_pickle_ends_with_one_line(attack, forged_run, start):
    forge(Path(newest(forged_run)), ".metadata", FORGED[attack])
    refused = start(processes=2, output_dir=forged_run, every=4)
    refused.ranks[0].join()
    refused.signal(signal.SIGKILL, 1)
    assert refused.exit_codes()[0] == ERROR_CODE
    assert f"error: {newest(forged_run)}/.metadata cannot be read (" in refused.said
    assert "Traceback" not in refused.said and "marker" not in os.listdir(ROOT)


def test_records_of_other_tensors_are_one_sentence(forged_run, config, cp_group):
    step = Path(newest(forged_run))
    forge(step, ".metadata", b"\x80\x04" + tensor(size(5)) + b".")
    error = resume_error(forged_run)
    assert error.startswith(f"error: {step} cannot be loaded (") and "\n" not in error
    assert error.endswith("; it must hold this model's tensors; use another checkpoint")
