"""Scaling: the simulation against brute force, the planner, and two nodes on a slow network."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, environment, read_metrics

import main
from context_parallel import native
from context_parallel.chunks import balanced_chunk_size, balanced_partitions, chunk_areas
from support import plan, scaling


def random_cu_seqlens(seed: int, documents: int = 6, longest: int = 90) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (documents,), generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()


def dealt_tokens(cu_seqlens: torch.Tensor, chunk_size: int, causal: bool, cp_size: int):
    """Returns each rank's tokens, padding too, in the order in which it holds them."""
    areas = chunk_areas(cu_seqlens, chunk_size, causal, cp_size)
    return [
        [chunk * chunk_size + i for chunk in chunks for i in range(chunk_size)]
        for chunks in balanced_partitions(areas, cp_size)
    ]


def mask_of(cu_seqlens: torch.Tensor, causal: bool) -> torch.Tensor:
    document = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    mask = document[:, None] == document
    return mask.tril() if causal else mask


CASES = [(seed, cp_size, causal) for seed in range(4) for cp_size in (2, 5) for causal in (0, 1)]


@pytest.mark.parametrize("seed, cp_size, causal", CASES)
def test_areas_and_needed_rows_are_those_of_the_mask(seed, cp_size, causal):
    cu_seqlens = random_cu_seqlens(seed)
    work = plan.deal(cu_seqlens, bool(causal), cp_size)
    mask, total = mask_of(cu_seqlens, bool(causal)), int(cu_seqlens[-1])
    needed = scaling.needed_rows(work, total)
    dealt = dealt_tokens(cu_seqlens, work.chunk_size, bool(causal), cp_size)
    assert work.padded == sum(map(len, dealt))
    for rank, tokens in enumerate(dealt):
        own = [token for token in tokens if token < total]
        seen = mask[own].any(dim=0)
        assert work.areas[rank] == mask[own].sum()
        assert needed[rank] == seen.sum() - seen[own].sum()
    assert work.gathers or not any(needed)


@pytest.mark.parametrize("lengths, cp_size", [([64] * 8, 4), ([256], 1)])
def test_documents_that_are_not_cut_need_no_rows(lengths, cp_size):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    work = plan.deal(cu_seqlens, True, cp_size)
    assert not work.gathers and scaling.needed_rows(work, sum(lengths)) == [0] * cp_size


@pytest.mark.parametrize("seed, cp_size, causal", CASES)
def test_the_key_gathers_the_rows_that_the_pieces_see(seed, cp_size, causal, monkeypatch):
    """Each rank's key, compared with the mask. Short documents, so that some are whole."""
    cu_seqlens = random_cu_seqlens(seed, documents=3 * cp_size, longest=2 + 30 * (seed % 3))
    chunk_size = balanced_chunk_size(cu_seqlens, bool(causal), cp_size)
    dealt = dealt_tokens(cu_seqlens, chunk_size, bool(causal), cp_size)
    held = [token for tokens in dealt for token in tokens]
    padded = torch.cat([cu_seqlens, torch.tensor([len(held)])])  # padding is a document
    mask = mask_of(padded, bool(causal))
    seen = [set(mask[tokens].any(dim=0).nonzero().flatten().tolist()) for tokens in dealt]
    is_cut = any(seen[rank] != set(tokens) for rank, tokens in enumerate(dealt))
    monkeypatch.setattr(dist, "get_world_size", lambda group: cp_size)
    for rank in range(cp_size):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        config = native.DistAttnConfig(native.DispatchConfig(chunk_size))
        bounds = cu_seqlens, cu_seqlens
        key = native.magi_attn_varlen_key(*bounds, 4, 2, 8, 0, None, bool(causal), config)
        assert key.order.tolist() == held
        assert {held[row] for row in key.key_rows.tolist()} == seen[rank]
        assert key.gathers == is_cut


def test_rows_are_filled_with_documents_of_the_stated_lengths():
    for kind in scaling.KINDS:
        assert sum(scaling.document_lengths(kind, 100_000)) == 100_000
    lengths = torch.tensor(scaling.document_lengths("log-normal", 2**26)).double()
    assert lengths.mean().item() == pytest.approx(8192, rel=0.05)
    assert lengths.median().item() == pytest.approx(2660, rel=0.05)


def test_one_document_on_a_node_takes_what_the_measured_rates_give(monkeypatch):
    monkeypatch.setattr(scaling, "planning_seconds", lambda *_: 0.0)
    with open(ROOT / "docs/results.jsonl") as file:
        rates = scaling.measured_rates([json.loads(line) for line in file])
    assert 400e12 < rates.products < 989e12  # of H100s, below their peak
    point = scaling.predict("one document", 131_072, 8, rates)
    assert point.gathered == 7 * 16_384 * 4096  # 8 key/value heads of 128, K and V, bfloat16
    assert point.needed == point.gathered  # the rank with the last chunk sees all
    attention = 3.5 * 4 * 32 * 128 * 131_072**2 / 2 / 8 / rates.native["131,072 causal"]
    assert point.attention == pytest.approx(attention, rel=1e-3)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336  # weights
    assert point.products == pytest.approx(8 * layer * 16_384 / rates.products)
    exchange = 3 * 32 * point.gathered / 450e9
    assert point.native_share == pytest.approx(exchange / point.native)
    head = 6 * 4096 * 128_256 * 16_384 / rates.products
    compute = 32 * (point.products + point.attention) + head
    assert point.native == pytest.approx(compute + exchange)


def test_missing_measurements_are_named():
    with pytest.raises(ValueError, match="no results with a 'kernel'"):
        scaling.measured_rates([])


# ---------------------------------------------------------------------------------------------
# Two nodes
# ---------------------------------------------------------------------------------------------

ROWS_BYTES = 1024 * 512  # K and V in float32 of 2 heads of 64, 512 tokens
RUN = [
    "model_config.preset=tiny",
    'model_config.overrides={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}',
    "data_config.source=LICENSE",
    "data_config.seqlen=512",
    "train_config.train_iters=3",
    "train_config.dtype=float32",
    "train_config.compile=false",
    "train_config.activation_checkpointing=none",
    "train_config.checkpoint_interval=0",
]


@pytest.fixture
def nodes():
    """Two network namespaces, joined by 400 Mbit/s; skips where they are not permitted."""
    names = [f"node{i}-{os.getpid()}" for i in range(2)]
    pair = [["name", "net0", "netns", name] for name in names]
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", *pair[0], "type", "veth", "peer", *pair[1]])
    for i, name in enumerate(names):
        limit = ["tbf", "rate", "400mbit", "burst", "256kb", "latency", "400ms"]
        commands += [
            ["ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "net0"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
            ["ip", "-n", name, "link", "set", "net0", "up"],
            ["tc", "-n", name, "qdisc", "add", "dev", "net0", "root", *limit],
        ]
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            pytest.skip(f"needs network namespaces; the command {tool!r} is missing")
    try:
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"needs network namespaces; {' '.join(command)}: {result.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_two_nodes_compute_the_same_and_send_the_predicted_bytes(
    cp_size, nodes, config, cp_group, tmp_path
):
    """dp 2 has FSDP's collectives; cp 2 also K and V of one document."""
    arguments = [*RUN, f"data_config.batch_size={2 // cp_size}"]
    running = []
    for rank, name in enumerate(nodes):
        worker = [sys.executable, "tests/two_nodes_worker.py", "net0", tmp_path / f"sent-{rank}"]
        layout = [f"parallel_config.context_parallel_size={cp_size}"]
        layout.append(f"train_config.output_dir={tmp_path}/two")
        env = {"RANK": f"{rank}", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "net0"}
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *worker, *arguments, *layout],
                cwd=ROOT,
                env=environment(**env),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs

    layout = ["parallel_config.context_parallel_size=1", f"train_config.output_dir={tmp_path}/one"]
    sources = main.set_up([*arguments, *layout])
    mesh = main.build_mesh()
    model = main.parallelize_model(main.build_llama_model(), mesh)
    optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
    main.train(model, optimizer, lr_scheduler, mesh, sources, train_iters=3)
    one, two = ([r["loss"] for r in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)

    # Per step and rank, a half of everything: FSDP gathers the weights, K and V are gathered twice
    # in each layer. gloo computes a reduce-scatter as an all-reduce, which sends twice a half.
    weights = 4 * sum(param.numel() for param in model.parameters())
    keys = 2 * ROWS_BYTES if cp_size == 2 else 0  # of two layers
    predicted = [(1 + factor) * weights / 2 + (2 + factor) * keys / 2 for factor in (1, 2)]
    for rank in range(2):
        first, *_, last = map(int, (tmp_path / f"sent-{rank}").read_text().split())
        sent = (last - first) / 2  # per step
        print(f"cp {cp_size}, rank {rank}: {sent:,.0f} bytes, predicted {predicted[1]:,.0f}")
        # The rest is headers, norms and counts. A gloo that reduce-scatters sends the first.
        assert any(x < sent < 1.02 * x for x in predicted), (sent, predicted)
