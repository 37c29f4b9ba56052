"""benchmark.py: a small measurement on the CPU, and the table that it makes."""

import json

import pytest
from conftest import ROOT, open_data
from ranks import run_ranks

import benchmark
from llama_pretrain_config import data_config, train_config
from support import report
from support.config import resolve


def test_a_case_of_one_s_own_is_measured_on_a_cpu(tmp_path):
    run_ranks(
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
    assert result["machine"]["torch"] and result["series"]


def result(case: str, backend: str, speed: float, series="2", device="2 x H100", **fields) -> dict:
    measured = {"case": case, "backend": backend, "tokens_per_s": speed, "peak_memory_gib": 20.0}
    measured["tokens_per_s_range"] = [speed - 1000, speed + 1000]
    return {"series": series, "machine": {"device": device}, **measured, **fields}


def test_the_report_shows_the_newest_series_of_one_machine_beside_the_peer_s(tmp_path, capsys):
    lines = [
        result("8k", "native", 1.0, series="1"),
        result("8k", "native", 1.0, device="2 x H200"),
        result("32k", "native", 60_000.0),
        result("8k", "native", 1.0),
        result("8k", "native", 99_000.0),
        result("8k", "torchtitan a2a0d99", 66_000.0),
        {"case": "8k", "backend": "native", "tokens_per_s": 2.0},  # of a time without series
        result("8k", "magi_attention", 33_000.0),
        kernel("FA4", "causal", 400.0),
    ]
    report.report(lines, str(tmp_path / "plot.png"), list(benchmark.CASES))
    rows, kernels = (x.splitlines() for x in capsys.readouterr().out.split("\n\n"))
    assert rows[0] == (
        "| case | native, tokens/s | memory | torchtitan, tokens/s | memory "
        "| magi_attention, tokens/s | memory |"
    )
    assert rows[2:] == [
        "| 8k | 99,000 (98,000 to 100,000), 1.50 | 20.0 GiB | 66,000 (65,000 to 67,000) | 20.0 GiB "
        "| 33,000 (32,000 to 34,000), 0.50 | 20.0 GiB |",
        "| 32k | 60,000 (59,000 to 61,000) | 20.0 GiB |  |  |  |  |",
    ]
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert kernels[2:] == ["| causal | 500 / 400 |"]
    with pytest.raises(ValueError, match="no results with a 'case' in 7"):
        report.report(lines, "", [], series="7")


def kernel(name: str, mask: str, both: float) -> dict:
    measured = {"kernel": name, "mask": mask, "head_dim": 64, "forward_tflops": 500.2}
    return {"series": "1", "machine": {"device": "H100"}, **measured, "both_tflops": both}


def test_the_table_of_kernels_has_a_row_a_mask():
    lines = [
        kernel("FA4", "causal", 400.0),
        kernel("FFA", "causal", 390.0),
        kernel("FA4", "full", 450.0),
    ]
    assert report.kernels_table(lines).splitlines() == [
        "| mask | head_dim 64: FA4 | head_dim 64: FFA |",
        "| --- | --- | --- |",
        "| causal | 500 / 400 | 500 / 390 |",
        "| full | 500 / 450 |  |",
    ]


def test_a_case_is_the_config_that_it_names(config):
    for case in benchmark.CASES.values():
        resolve(benchmark.overrides(case, "folder"), world_size=2)
        assert (data_config["seqlen"], data_config["batch_size"]) == (case.seqlen, case.batch_size)
        found = data_config["source"]
        if found == "random":
            found = data_config["random_document_length"]
        assert found in (case.documents, f"folder/{case.documents}")
        assert train_config["activation_checkpointing"] == case.recomputation


def test_random_documents_are_a_corpus_that_training_reads(tmp_path):
    benchmark.write_random_documents(tmp_path / "corpus", vocab_size=128_256)
    source = open_data(tmp_path / "corpus", vocab_size=128_256, seqlen=65_536)
    lengths = source.lengths
    assert 3500 < lengths.mean() < 4500 and lengths.std() > 3000
    assert source.rows(0, 1, 65_536).tokens.max() > 120_000
