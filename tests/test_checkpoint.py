"""Nothing lost: real runs are killed, starved of disk, stopped and damaged, and go on."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_worker import ITERS, SHORT
from conftest import ROOT, environment, read_metrics, run

import checkpoint
import main
from checkpoint.__main__ import inspect
from checkpoint.format import CheckpointError, Reader, checkpoints, damage, read_manifest
from support import preflight
from support.config import resolve

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


def config_of(output_dir) -> dict:
    """The config that a run of this output_dir would have again."""
    return json.loads((output_dir / "config.json").read_text())


# ---------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------


def test_killed_at_many_moments_a_run_ends_as_if_nothing_had_happened(start, undisturbed, tmp_path):
    """Most kills fall on a change of the checkpoints' files, in writing, renaming or removing; the
    others on whatever goes on after a step's line was logged. Bit for bit the same.
    """
    output_dir, chance, moments = tmp_path / "run", random.Random(0), set()
    # A start that resumes reads for so many changes, and then a checkpoint is written in 13.
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
            assert damage(path) == ""
    last = start()
    assert last.exit_codes() == [0], last.said
    assert "\nresume: " in last.said
    assert trained(output_dir) == trained(undisturbed[1])
    assert moments == {"", ".tmp", ".removed"}, "the kills did not fall where they should"
    left = [name for name in os.listdir(output_dir) if name.startswith("step-")]
    assert sorted(left) == [f"step-{ITERS - 1:08}", f"step-{ITERS:08}"], "keep_last=2"


def test_one_killed_rank_ends_all_and_the_run_goes_on_bit_for_bit(start, undisturbed, tmp_path):
    running = start(processes=2, cp=2).wait_for(f"saved: {tmp_path}/run/step-00000002")
    running.signal(signal.SIGKILL, 1)
    codes = running.exit_codes()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    resumed = start(processes=2, cp=2)
    assert resumed.exit_codes() == [0, 0], resumed.said
    assert trained(tmp_path / "run") == trained(undisturbed[2])


def test_layouts_change_from_start_to_start(start, undisturbed, tmp_path):
    """(dp, cp): (2,1), (1,2), (1,1), (2,2). One rank hears of it, all leave after the same step."""
    output_dir = tmp_path / "run"
    for processes, cp, after, number, rank in [
        (2, 1, 2, signal.SIGTERM, 1),
        (2, 2, 5, signal.SIGUSR1, 0),
        (1, 1, 8, signal.SIGINT, 0),
    ]:
        stopped = start(processes=processes, cp=cp, every=0).wait_for(f"step: {after}/")
        assert stopped.signal(number, rank).exit_codes() == [0] * processes, stopped.said
        last = read_metrics(output_dir)[-1]["step"]
        assert after <= last < ITERS  # the signal takes its time on a busy machine
        assert newest(output_dir).endswith(f"step-{last:08}")
        assert f"asked to stop: left after step {last}" in stopped.said
    ended = start("train_config.gradient_accumulation_steps=2", processes=4, cp=2, every=0)
    assert ended.exit_codes() == [0] * 4, ended.said
    assert "\nresume: parallel_config.context_parallel_size 1 -> 2\n" in ended.said
    assert_same_to_1e_5(output_dir, undisturbed[1])


def test_torchrun_restarts_a_run_where_it_was_and_run_sh_leaves_with_0(undisturbed, tmp_path):
    """`torchrun --max-restarts 3`, as run.sh starts it; resume=never speaks of the first start.

    TERM to run.sh ends it with 0. torchrun, asked itself, would kill what is not done in 30 seconds
    and fail.
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
        wait_for("step: 4/")
        (launcher,) = run("pgrep", "-P", running.pid).stdout.split()
        workers = run("pgrep", "-P", launcher).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        wait_for(f"resume: {output_dir}/step-")
        wait_for("step: 7/")
        running.send_signal(signal.SIGTERM)
        said += running.stdout
        assert running.wait() == 0, "".join(said)
    finally:
        running.kill()
    records, references = trained(output_dir), trained(undisturbed[2])
    assert 7 <= len(records) < ITERS, "the signal takes its time on a busy machine"
    assert records == references[: len(records)]
    assert newest(output_dir).endswith(f"step-{len(records):08}")


def test_a_killed_torchrun_takes_its_workers_along_and_no_second_run_comes_between(tmp_path):
    """They save and leave, before their last step; meanwhile their output_dir is locked."""
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
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: train_config.output_dir='{output_dir}' is in use: ")
    last = read_metrics(output_dir)[-1]["step"]
    assert f"asked to stop: left after step {last}" in said
    assert newest(output_dir).endswith(f"step-{last:08}") and last < train_iters


# ---------------------------------------------------------------------------------------------
# Damaged, full, hanging, not a number
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "a bit flipped", "missing"])
def test_damage_to_any_file_is_found_and_named(harm, name, undisturbed, tmp_path):
    path = shutil.copytree(newest(undisturbed[2]), tmp_path / "step-00000012")
    assert damage(str(path)) == ""
    content = bytearray((path / name).read_bytes())
    if harm == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    elif harm == "missing":
        (path / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    assert name in damage(str(path))
    parts = [damage(str(path), part, 2) for part in range(2)]
    assert any(parts), "the ranks together find it too"


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
    assert damage(newest(output_dir)) == "", "written anew"

    for path in checkpoints(str(output_dir)):
        (Path(path) / ".metadata").unlink()
    lost = start()
    assert lost.exit_codes() == [1]
    assert f"error: of {output_dir}/step-00000012, " in lost.said and "none is whole" in lost.said


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


def test_a_full_disk_costs_a_checkpoint_and_no_more(start, undisturbed, small_disk):
    """The run says so, keeps the last good one, and goes on; or stops, if it was told to."""
    output_dir = small_disk / "run"
    running = start(output_dir=output_dir).wait_for("saved:")
    filler = fill(small_disk)
    running.wait_for("warning: the checkpoint ")
    assert damage(newest(output_dir)) == ""
    filler.unlink()
    assert running.exit_codes() == [0], running.said
    assert "No space left on device" in running.said
    assert damage(newest(output_dir)) == "" and newest(output_dir).endswith(f"{ITERS:08}")
    assert trained(output_dir) == trained(undisturbed[1])

    shutil.rmtree(output_dir)
    arguments = {"output_dir": output_dir}
    running = start("train_config.on_checkpoint_failure=stop", **arguments).wait_for("saved:")
    filler = fill(small_disk)
    assert running.exit_codes() == [1], running.said
    assert "\nerror: the checkpoint " in running.said
    assert "No space left on device" in running.said
    assert not [name for name in os.listdir(output_dir) if name.endswith(".tmp")]
    assert damage(newest(output_dir)) == ""
    filler.unlink()
    assert start(**arguments).exit_codes() == [0]
    assert trained(output_dir) == trained(undisturbed[1])


def test_an_output_dir_that_cannot_be_written_ends_the_run_before_step_1(start, tmp_path):
    (tmp_path / "file").touch()
    refused = start(output_dir=tmp_path / "file" / "run")
    assert refused.exit_codes() == [1]
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


def test_what_is_not_finite_stops_before_the_weights_change(start, tmp_path):
    stopped = start("train_config.optimizer_config.learning_rate=1e30", processes=2)
    stopped.ranks[0].join()  # the other gives torchrun time to end it
    stopped.signal(signal.SIGKILL, 1)
    assert stopped.exit_codes() == [1, -signal.SIGKILL]
    assert "error: step 2: the loss is " in stopped.said
    path = newest(tmp_path / "run")
    assert path.endswith("step-00000001") and damage(path) == ""
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]


# ---------------------------------------------------------------------------------------------
# What a run goes on from
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, key, value, sentence",
    [
        ("data_config", "source", "README.md", "data_config.source='README.md', but "),
        ("data_config", "seqlen", 48, "data_config.seqlen=48, but "),
        ("data_config", "batch_size", 8, "data_config.batch_size=8, but "),
        ("data_config", "seed", 1, "data_config.seed=1, but "),
        ("train_config", "seed", 1, "train_config.seed=1, but "),
        ("llama_config", "hidden_size", 64, "llama_config.hidden_size=64, but "),
        ("train_config", "train_iters", 6, "train_config.train_iters=6, but "),
    ],
)
def test_what_may_not_change_is_named_with_both_values(section, key, value, sentence, undisturbed):
    config = config_of(undisturbed[1])
    checkpoint.check_resume(config)
    before = config[section][key]
    config[section][key] = value
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_resume(config)
    assert sentence in str(error.value)
    assert f"was trained with {before!r}" in str(error.value) or key == "train_iters"
    assert newest(undisturbed[1]) in str(error.value)


def test_what_may_change_does(undisturbed):
    config = config_of(undisturbed[1])
    config["train_config"] |= {"dtype": "bfloat16", "checkpoint_interval": 7, "train_iters": 90}
    config["parallel_config"] |= {"context_parallel_backend": "magi_attention"}
    checkpoint.check_resume(config)


def test_never_refuses_what_holds_a_run_and_auto_says_when_all_is_done(start, undisturbed):
    output_dir = undisturbed[1]
    before = (output_dir / "metrics.jsonl").read_bytes()
    refused = start("train_config.resume=never", output_dir=output_dir)
    assert refused.exit_codes() == [1]
    assert f"train_config.output_dir={str(output_dir)!r} holds a run; give another" in refused.said
    done = start(output_dir=output_dir, every=4)
    assert done.exit_codes() == [0], done.said
    assert f"resume: {output_dir}/step-00000012, step 12 of 12; all its steps" in done.said
    changed = start("train_config.optimizer_config.learning_rate=0.5", output_dir=output_dir)
    assert changed.exit_codes() == [1]
    keys = "train_config.checkpoint_interval, train_config.optimizer_config.learning_rate"
    assert f"has all 12 steps, so a change of {keys} would train nothing" in changed.said
    assert f"an output_dir other than {str(output_dir)!r}" in changed.said
    assert (output_dir / "metrics.jsonl").read_bytes() == before


def test_a_path_starts_from_that_one_in_another_folder(start, undisturbed, tmp_path):
    path = checkpoints(str(undisturbed[1]))[1]
    assert path.endswith("step-00000008")
    resumed = start(f"train_config.resume={path}")
    assert resumed.exit_codes() == [0], resumed.said
    assert trained(tmp_path / "run") == trained(undisturbed[1])[8:]

    config = config_of(undisturbed[1])
    config["train_config"]["resume"] = path
    with pytest.raises(CheckpointError, match="its own newest checkpoint, .*step-00000012"):
        checkpoint.check_resume(config)
    config["train_config"]["resume"] = str(tmp_path / "run")  # step 12 too, of another run
    with pytest.raises(CheckpointError, match="its own newest checkpoint, .*step-00000012"):
        checkpoint.check_resume(config)
    config["train_config"]["resume"] = str(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint; it must be 'auto', 'never', "):
        checkpoint.check_resume(config)


def build(output_dir, *arguments) -> checkpoint.Checkpointer:
    """Returns that of a new model in this process."""
    arguments = [*SHORT, f"train_config.output_dir={output_dir}", *arguments]
    resolve(arguments, world_size=1)
    model = main.parallelize_model(main.build_llama_model(), main.build_mesh())
    optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
    config = preflight.run_config(preflight.open_sources())
    return checkpoint.Checkpointer(model, optimizer, lr_scheduler, config, print)


def test_generators_go_on_too(config, cp_group, tmp_path):
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


@pytest.mark.parametrize("output_dir", [".", "a/../run"])
def test_any_way_to_write_the_output_dir_will_do(
    output_dir, config, cp_group, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.makedirs("a")
    os.makedirs(output_dir, exist_ok=True)
    source = f"data_config.source={ROOT / 'LICENSE'}"
    checkpointer = build(output_dir, source, "train_config.checkpoint_interval=1")
    for step in (1, 2, 3):
        checkpointer.after_step(step, stop=step == 3)  # raises if the last one failed
    left = [name for name in os.listdir(output_dir) if name.startswith("step-")]
    assert sorted(left) == ["step-00000002", "step-00000003"], "keep_last=2"


def test_dcps_pickle_builds_nothing_but_dcps_own_records(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(pickle.UnpicklingError, match="system does not belong into a checkpoint"):
        Reader(str(tmp_path)).read_metadata()
    assert not (tmp_path / "harmed").exists()


def test_save_ms_is_the_time_that_training_stood_still(undisturbed):
    saved = {record["step"]: record["save_ms"] for record in read_metrics(undisturbed[1])}
    assert [step for step, ms in saved.items() if ms > 0] == [5, 9]  # after steps 4 and 8


def test_inspect_prints_step_config_and_sizes(undisturbed, tmp_path, capsys):
    inspect(str(undisturbed[2]))
    said = capsys.readouterr().out
    manifest = read_manifest(newest(undisturbed[2]))
    assert said.startswith(f"{newest(undisturbed[2])}: whole\nstep: {ITERS}\n")
    assert "written by: 2 processes" in said and '"seqlen": 24' in said
    assert f"on disk: {len(manifest['files'])} files" in said
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        inspect(str(tmp_path))
