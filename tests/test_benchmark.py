"""benchmark.py: a small measurement on the CPU, and the table that it makes."""

import json

import pytest
from conftest import ROOT, torchrun

import benchmark
import llama_pretrain_config


def test_a_case_of_one_s_own_is_measured_on_a_cpu(tmp_path):
    torchrun(
        2,
        ROOT / "benchmark.py",
        "model_config.preset=tiny",
        'model_config.overrides={"num_hidden_layers": 1, "hidden_size": 64}',
        "data_config.seqlen=128",
        "data_config.batch_size=2",
        "data_config.random_document_length=40",
        "train_config.compile=false",
        *("--steps", "2", "--results", tmp_path / "results.jsonl"),
        "train_config.dtype=float32",
    )
    (result,) = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    low, high = result["tokens_per_s_range"]
    assert 0 < low <= result["tokens_per_s"] <= high
    assert result["tokens_per_s"] * result["step_ms"] / 1e3 == pytest.approx(256)
    assert (result["case"], result["backend"], result["world_size"]) == ("custom", "native", 2)
    assert result["config"]["data_config"]["random_document_length"] == 40
    assert result["machine"]["torch"]
    benchmark.draw([result], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_table_shows_the_newest_result_beside_the_peer_s():
    machine = {"device": "2 x NVIDIA H200"}
    data = {"seqlen": 8192, "batch_size": 2, "source": "random", "random_document_length": 0}
    config = {
        "data_config": data,
        "train_config": {"activation_checkpointing": "none"},
        "parallel_config": {"context_parallel_size": 2},
    }
    result = {
        "config": config,
        **{"case": "8k", "backend": "native", "world_size": 2, "machine": machine},
        **{"tokens_per_s": 80_293.0, "tokens_per_s_range": [80_000.0, 81_000.0], "mfu": 0.4},
        **{"kernel_bound_tokens_per_s": 160_586.0, "peak_memory_gib": 20.0},
    }
    h100 = {**result, "machine": {"device": "2 x NVIDIA H100 80GB HBM3"}}
    rows = benchmark.table([{**result, "tokens_per_s": 1.0}, result, h100]).splitlines()[2:]
    speed = "80,293 (80,000 to 81,000) | 40.0% | 50% | 20.0 GiB"
    assert rows == [
        f"| 8k | native, 2 x H100 | {speed} | 72,469 | 1.11 |  |",
        f"| 8k | native, 2 x H200 | {speed} | 80,293 | 1.00 | 11,704 |",
    ]
    full = {**config, "train_config": {"activation_checkpointing": "full"}}
    dp = {**config, "parallel_config": {"context_parallel_size": 1}}
    corpus = {**config, "data_config": {**data, "source": "python-stdlib"}}
    rows = [benchmark.table([{**result, "config": changed}]) for changed in (full, dp, corpus)]
    assert all(row.endswith("| 20.0 GiB |  |  |  |") for row in rows), "that is another case"
    others = [
        {**result, "world_size": 1},
        {**result, "machine": {"device": "2 x NVIDIA H100 PCIe"}},
        *({**result, "machine": {"device": "CPU with 2 cores"}, "world_size": n} for n in (1, 2)),
    ]
    rows = benchmark.table(others).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [
        *("native, 1 x CPU with 2 cores", "native, 2 x CPU with 2 cores"),
        *("native, 1 x H200", "native, 2 x NVIDIA H100 PCIe"),
    ]
    assert all(row.endswith("| 20.0 GiB |  |  |  |") for row in rows), "the peer's is of two H200s"


def test_a_case_is_the_config_that_it_names(config):
    for case, expected in benchmark.CASES.items():
        llama_pretrain_config.resolve(benchmark.overrides(case), world_size=2)
        assert benchmark.shape(llama_pretrain_config.sections()) == expected[:4]
