"""What only whole runs show: the launcher, several nodes, the files of a run, and how runs fail."""

import gzip
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, environment, free_port, open_data, read_metrics, run, torchrun
from ranks import Ranks, run_ranks
from test_data import write_prepared

import main
from configuration_llama import PRESETS
from data import DataError
from llama_pretrain_config import parallel_config
from support import process, stop
from support.process import ERROR_CODE

# Three steps on English text, of a model that takes a moment.
SHORT = [
    "model_config.preset=tiny",
    'model_config.overrides={"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}',
    "data_config.source=LICENSE",
    "data_config.seqlen=100",
    "data_config.batch_size=4",
    "train_config.train_iters=3",
    "train_config.dtype=float32",
    "train_config.compile=false",
    "train_config.optimizer_config.learning_rate=1e-2",
    "train_config.optimizer_config.warmup_iters=1",
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The metrics and the output of the run on one process, without a launcher."""
    output_dir = tmp_path_factory.mktemp("one_process")
    result = run("python", "main.py", *SHORT, f"train_config.output_dir={output_dir}")
    return output_dir, result.stdout


def assert_same_training(output_dir, reference_dir):
    records, references = read_metrics(output_dir), read_metrics(reference_dir)
    assert len(records) == len(references) == 3
    for record, reference in zip(records, references, strict=True):
        for key in ("step", "lr", "tokens"):
            assert record[key] == reference[key]
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(reference[key], rel=1e-5), (key, record["step"])


def test_a_run_describes_itself_and_learns(one_process):
    output_dir, stdout = one_process
    lines = stdout.splitlines()
    described = [line for line in lines if not line.startswith("config: ")]
    assert [line.split(":")[0] for line in described] == (
        ["machine", "mesh", "one process", "attention", "attention", "data", "model", "parameters"]
        + ["metrics", "step", "step", "memory", "step", "saved", "done"]
    )
    assert lines[2] == f"config: all keys in {output_dir}/config.json"
    assert "config: data_config.seqlen 512 -> 100" in lines, "a key that differs from the file"
    assert "dtype" not in stdout, "a key that does not"
    assert "python " in lines[0] and "torch " in lines[0] and "CPU" in lines[0]
    assert lines[1] == "mesh: dp 1 x cp 1, 1 processes"
    assert described[3] == "attention: native (scaled_dot_product_attention)"
    assert described[4].startswith("attention: magi_attention cannot run: ")
    config = json.loads((output_dir / "config.json").read_text())
    assert config["data_config"]["seqlen"] == 100
    assert config["parallel_config"]["context_parallel_size"] == 1
    assert config["parallel_config"]["context_parallel_backend"] == "native"
    assert config["llama_config"]["hidden_size"] == 64
    assert config["machine"]["torch"]
    records = read_metrics(output_dir)
    assert records[0]["loss"] == pytest.approx(5.66, abs=0.2)  # ln(288): nothing is known yet
    assert records[2]["loss"] < records[0]["loss"] - 0.3


def test_run_sh_on_three_processes_trains_the_same(one_process, tmp_path):
    """cp 3: neither the length nor the head counts are divisible by it."""
    arguments = [*SHORT, f"train_config.output_dir={tmp_path}"]
    arguments.append("parallel_config.context_parallel_size=3")
    result = run("bash", "run.sh", *arguments, GPUS_PER_NODE="3")
    assert "mesh: dp 1 x cp 3" in result.stdout
    assert_same_training(tmp_path, one_process[0])
    done = result.stdout.splitlines()[-1]
    assert done.startswith("done: loss ") and ", 1,200 tokens, " in done
    assert f", {tmp_path}/step-00000003; next: python -m checkpoint export {tmp_path} hf" in done


def test_two_nodes_with_a_replica_of_the_weights_each_train_the_same_as_one(one_process, tmp_path):
    """Two run.sh on this machine; the second is told so by a scheduler's names."""
    port = str(free_port())
    nodes = [
        {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": "2", "RANK": "1"},
    ]
    arguments = [*SHORT, f"train_config.output_dir={tmp_path}"]
    arguments.append("parallel_config.context_parallel_size=2")
    arguments.append("parallel_config.data_parallel_replicate_size=2")
    running = [
        subprocess.Popen(
            ["bash", "run.sh", *arguments],
            cwd=ROOT,
            env=environment(GPUS_PER_NODE="2", MASTER_PORT=port, **node),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in nodes
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "mesh: dp 2 x cp 2, 4 processes; 2 replicas of the weights" in outputs[0]
    assert "step:" not in outputs[1], "only rank 0 speaks"
    assert_same_training(tmp_path, one_process[0])


def test_an_evaluation_changes_nothing_and_comes_every_so_many_steps_and_last(
    one_process, tmp_path
):
    arguments = ["data_config.validation_source=README.md", "train_config.eval_iters=2"]
    arguments += ["train_config.eval_interval=2", f"train_config.output_dir={tmp_path}"]
    stdout = run_ranks(1, "main.py", *SHORT, *arguments)
    assert "validation: README.md, 1 documents, " in stdout
    assert_same_training(tmp_path, one_process[0])
    records = read_metrics(tmp_path)
    assert ["eval_loss" in record for record in records] == [False, True, True]
    assert records[2]["eval_loss"] < records[1]["eval_loss"] < 5.6


def test_a_corpus_of_ones_own_from_the_tokenizer_to_text(tmp_path):
    """The README's way, with less text and fewer steps."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    files = [str(path) for path in (stdlib / "json").glob("*.py")]
    tokenizer.train(files, 512, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepare = ["prepare", stdlib / "json/*.py", stdlib / "email/*.py", "--output", tmp_path / "out"]
    prepare += ["--tokenizer", tmp_path / "tokenizer.json", "--end-of-text", "<|endoftext|>"]
    run("python", "-m", "data", *prepare)

    own = [f"data_config.source={tmp_path / 'out'}", "data_config.validation_fraction=0.2"]
    own += ["train_config.train_iters=20", "train_config.eval_interval=10"]
    own += ["train_config.eval_iters=4", f"train_config.output_dir={tmp_path / 'run'}"]
    result = run("python", "main.py", *SHORT, *own, check=False)
    assert result.returncode == ERROR_CODE
    assert "has token ids up to 511, but the model's vocab_size is 288" in result.stderr
    assert "parameters:" not in result.stdout, "said before anything is built"
    result = run("python", "main.py", *SHORT, *own, "model_config.overrides.vocab_size=512")
    documents = len(files) + len(list((stdlib / "email").glob("*.py")))
    held_out = documents // 5
    assert f"validation: {tmp_path / 'out'}, {held_out} documents" in result.stdout
    assert f"data: {tmp_path / 'out'}, {documents - held_out} documents" in result.stdout
    losses = [r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_loss" in r]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6.2  # ln(512) = 6.24: what is known at first

    run("python", "-m", "checkpoint", "export", tmp_path / "run", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    prompt = tokenizer("def __init__(self", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("def __init__(self") and len(text) > len("def __init__(self")


def test_bfloat16_follows_float32(one_process, tmp_path):
    output_dir = f"train_config.output_dir={tmp_path}"
    run_ranks(1, "main.py", *SHORT, "train_config.dtype=bfloat16", output_dir)
    for record, reference in zip(read_metrics(tmp_path), read_metrics(one_process[0]), strict=True):
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-2)
        assert record["loss"] != reference["loss"]


def test_a_trace_of_the_steps_asked_for_opens(tmp_path):
    output_dir = f"train_config.output_dir={tmp_path}"
    run_ranks(1, "main.py", *SHORT, output_dir, "train_config.profile_steps=[2, 3]")
    with gzip.open(tmp_path / "trace-2-3.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {
        "ProfilerStep#1",  # counted from 0
        "ProfilerStep#2",
    }
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_random_tokens_teach_nothing(tmp_path):
    output_dir = f"train_config.output_dir={tmp_path}"
    run_ranks(1, "main.py", *SHORT, "data_config.source=random", output_dir)
    records = read_metrics(tmp_path)
    assert len({record["loss"] for record in records}) == 3
    assert all(record["tokens"] == 400 for record in records)
    assert min(record["loss"] for record in records) > 5.5


def test_an_error_is_said_once_by_rank_0_and_ends_every_process():
    result = run("bash", "run.sh", *SHORT, "data_config.seqln=5", check=False)
    assert result.returncode == ERROR_CODE
    assert result.stderr == (
        "error: unknown key 'data_config.seqln'; the nearest is 'data_config.seqlen'; see --help\n"
    )
    assert result.stdout == ""


def test_run_sh_says_an_error_that_only_another_rank_has(tmp_path):
    """Such as a file that one rank cannot read. The rank waits for the first one, here briefly."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from support import process\n"
        "process.time.sleep = lambda seconds: None\n"
        "if os.environ['LOCAL_RANK'] == '1':\n"
        "    process.exit_with(ValueError('no such file here'))\n"
        "signal.pause()  # until torchrun ends it\n"
    )
    launch = [sys.executable, "-m", "support.launch", "--standalone", "--nproc-per-node=2", script]
    result = run(*launch, check=False)
    assert result.returncode == ERROR_CODE
    assert result.stderr == "error: no such file here\n"


def read_a_row_that_is_damaged_on_rank_1() -> None:
    def prepare_data(*_):
        if process.rank() == 1:
            raise DataError("damage")
        return [(torch.zeros(6, dtype=torch.int64), torch.zeros(6), torch.tensor([0, 6]))]

    parallel_config["context_parallel_size"] = 3
    main.prepare_data = prepare_data
    dist.init_process_group("gloo")
    try:
        main.prepare_batch(None, main.build_mesh(), PRESETS["tiny"], None, 0)
    except DataError as error:
        os.write(1, f"rank {process.rank()}: {error}\n".encode())  # whole lines
    process.end_process()


def test_damage_that_only_one_rank_reads_is_an_error_on_all():
    """Here a cp rank, whose node has a copy of its own."""
    said = Ranks(3, read_a_row_that_is_damaged_on_rank_1).finish()
    assert sorted(said.splitlines()) == [f"rank {rank}: damage" for rank in range(3)]


def defer_on_rank_1() -> None:
    def barrier():
        os.write(1, b"\nrank 1 waits\n")
        dist.all_reduce(torch.zeros(1))

    stop.listen()
    dist.init_process_group("gloo")
    if process.rank() == 1:
        stop.defer(barrier)
    while True:
        signal.pause()


def test_a_signal_while_some_ranks_train_already_ends_all_with_0():
    ranks = Ranks(2, defer_on_rank_1).wait_for("rank 1 waits").signal(signal.SIGTERM)
    assert ranks.exit_codes() == [0, 0], ranks.said
    assert "stopped before training began" in ranks.said and "Traceback" not in ranks.said


def test_an_error_that_one_rank_finds_while_it_trains_is_one_sentence(start, tmp_path):
    """First a token that only rank 1 reads, in step 3: step 2 is saved. Then, when the run is
    started again, a file that only rank 0 opens. The other rank has no broken connection.
    """
    starts = np.arange(0, 3001, 75)
    write_prepared(tmp_path / "numbered", np.arange(3000), starts, 3000)
    rows = open_data(tmp_path / "numbered", vocab_size=3000, seqlen=24, batch_size=4)
    damaged = rows.rows(2 * 4 + 2, 1, 24).tokens[0, 12]
    tokens = np.random.default_rng(0).integers(257, size=3000)
    tokens[damaged] = 300
    write_prepared(tmp_path / "damaged", tokens, starts, 257)

    def train_until_the_error():
        running = start(f"data_config.source={tmp_path}/damaged", processes=2, every=0)
        running.wait_for("error: ").ranks[0].join()
        assert running.ranks[0].exitcode == ERROR_CODE
        running.kill()  # rank 1 waits until torchrun ends it
        assert "Traceback" not in running.said
        return running.said

    said = train_until_the_error()
    assert "error: " in said and "token id 300 is larger than 256, so the files are dama" in said
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/step-00000002").exists()
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    assert "/run' cannot be written ([Errno 21] Is a directory: " in train_until_the_error()


def test_under_torchrun_the_report_ends_with_the_error():
    result = torchrun(1, "main.py", "data_config.seqlen=-1", check=False)
    sentence = "error: data_config.seqlen=-1 must be an integer of at least 1, and up to 2^62"
    assert sentence in result.stderr.splitlines(), "said by rank 0"
    assert result.stderr.splitlines()[-2].endswith(f": {sentence}"), "the report's root cause"
    assert "To enable traceback" not in result.stderr


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"GPUS_PER_NODE": "abc"}, "GPUS_PER_NODE='abc' must be an integer from 1 to 9999"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE='0' must be an integer from 1 to 9999"),
        ({"GPUS_PER_NODE": "08"}, "GPUS_PER_NODE='08' must be an integer from 1 to 9999"),
        ({"GPUS_PER_NODE": "a[$(touch x)]"}, "GPUS_PER_NODE='a[$(touch x)]' must be an integer"),
        ({"NNODES": "-1"}, "NNODES='-1' must be an integer from 1 to 99999"),
        ({"WORLD_SIZE": "1:4"}, "WORLD_SIZE='1:4' must be an integer from 1 to 99999"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK='2' must be an integer from 0 to 1"),
        ({"NNODES": "2", "RANK": "first"}, "RANK='first' must be an integer from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK='-1' must be an integer from 0 to 99999"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' must be an integer from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be an integer from 1 to 65535"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS='-1' must be an integer from 0 to 999999"),
        ({"MAX_RESTARTS": "9" * 30}, "must be an integer from 0 to 999999"),
    ],
)
def test_a_variable_of_run_sh_that_is_no_number_is_one_sentence(variables, sentence):
    result = run("bash", "run.sh", *SHORT, check=False, **variables)
    assert result.returncode == ERROR_CODE
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    "gpus, variables, expected",
    [
        (0, {}, ("2", "2", "")),
        (4, {}, ("4", "1", "8")),
        (4, {"GPUS_PER_NODE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}, ("1", "4", "32")),
        (0, {"GPUS_PER_NODE": "3", "OMP_NUM_THREADS": "7"}, ("3", "7", "")),
    ],
)
def test_the_launcher_starts_a_process_for_each_gpu(gpus, variables, expected, monkeypatch):
    """And shares four cores among them."""
    found = []

    def main():
        threads, queues = map(os.environ.get, ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"))
        found.append((*sys.argv, threads, queues))

    for name in ("GPUS_PER_NODE", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, variables.get(name, ""))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.distributed.run.main", main)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["launch", "--standalone", "main.py"])
    runpy.run_module("support.launch", run_name="__main__")
    processes, *environment = expected
    assert found == [("launch", "--nproc-per-node", processes, *sys.argv[3:], *environment)]


def test_a_crash_keeps_the_launcher_s_report(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise RuntimeError('a crash')")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    result = run(
        "bash",
        "run.sh",
        *SHORT,
        f"train_config.output_dir={tmp_path}/run",
        check=False,
        PYTHONPATH=path,
        GPUS_PER_NODE="1",
    )
    assert result.returncode == 1
    assert "RuntimeError: a crash" in result.stderr and "Root Cause" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_node_that_waits_for_another(number, tmp_path):
    waiting = subprocess.Popen(
        ["bash", "run.sh", f"train_config.output_dir={tmp_path}"],
        cwd=ROOT,
        env=environment(NNODES="2", MASTER_PORT="29999"),
        stdout=subprocess.PIPE,
        text=True,
        # bash cannot trap a signal that is ignored when it starts, as INT is in a background job.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert waiting.stdout.readline() == "node 0 of 2: waits for the others at 127.0.0.1:29999\n"
    waiting.send_signal(number)
    assert waiting.communicate()[0] == "stopped before the processes were started\n"
    assert waiting.returncode == 0  # as the processes do: a scheduler may start it again


def test_a_compiler_that_is_missing_is_said_before_anything_is_built(config, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = (
        "needs a compiler, and no-such-compiler is not in PATH; .* train_config.compile=false"
    )
    with pytest.raises(ValueError, match=sentence):
        main.set_up([*SHORT, "train_config.compile=true"])


def test_the_edited_file_is_what_run_sh_trains(tmp_path):
    """In a copy of the project, without overrides. The laptop's values stand behind ON_GPU."""
    for name in ["main.py", "run.sh", "modeling_llama.py", "configuration_llama.py"]:
        shutil.copy(ROOT / name, tmp_path)
    for wing in ("context_parallel", "data", "checkpoint", "support"):
        shutil.copytree(ROOT / wing, tmp_path / wing)
    text = (ROOT / "llama_pretrain_config.py").read_text()
    for line, edited in (
        ("seqlen=8192 if ON_GPU else 512,", "seqlen=96,"),
        ("train_iters=1000 if ON_GPU else 150,", "train_iters=2,"),
        ("learning_rate=3e-4 if ON_GPU else 2e-3,", "learning_rate=5e-4,"),
    ):
        assert line in text
        text = text.replace(line, edited)
    (tmp_path / "llama_pretrain_config.py").write_text(text)
    subprocess.run(
        ["bash", "run.sh"], cwd=tmp_path, env=environment(PYTHONPATH=""), check=True, timeout=300
    )
    config = json.loads((tmp_path / "runs/tiny/config.json").read_text())
    assert config["model_config"]["preset"] == "tiny"
    assert config["parallel_config"]["context_parallel_size"] == 2
    records = read_metrics(tmp_path / "runs/tiny")
    assert [record["lr"] for record in records] == pytest.approx([5e-5, 1e-4])
    assert all(record["tokens"] <= 4 * 96 for record in records)


def test_help_lists_the_keys():
    result = run("python", "main.py", "--help")
    for key in ("data_config.seqlen=512", "train_config.optimizer_config.betas=(0.9, 0.95)"):
        assert key in result.stdout
