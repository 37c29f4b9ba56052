"""What several test files use: a process group of one, torchrun, and comparing tensors."""

import contextlib
import copy
import fcntl
import importlib.metadata
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# All tests run on the CPU everywhere, except those of `pytest -m gpu`. torch is imported later.
if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist

import llama_pretrain_config
from configuration_llama import LlamaConfig
from context_parallel.native import magi_attn_varlen_key
from data import RandomSource, TokenSource, open_source
from data.corpus import open_corpus
from support.config import restore, sections

ROOT = Path(__file__).resolve().parent.parent
SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.2,
)
torch.set_num_threads(1)  # the machine's cores are shared with the tests' own processes


@pytest.fixture
def config(monkeypatch):
    """The config dicts, put back afterwards: `resolve` and `set_up` write into them."""
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    before = copy.deepcopy(sections())
    yield
    restore(before)


@pytest.fixture(scope="session")
def cp_group():
    """A cp group of one process, this one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def start(tmp_path):
    """Starts a run in tmp_path/run; what is still running at the end is killed."""
    from checkpoint_worker import ITERS, Run

    runs = []

    def start_run(
        *arguments, processes=1, cp=1, every=1, output_dir=tmp_path / "run", kill_at=0, absent=0
    ):
        settings = [
            f"train_config.output_dir={output_dir}",
            f"train_config.train_iters={ITERS}",
            f"train_config.checkpoint_interval={every}",
            f"parallel_config.context_parallel_size={cp}",
        ]
        runs.append(Run(processes, [*settings, *arguments], kill_at, absent))
        return runs[-1]

    yield start_run
    for started in runs:
        started.kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """{processes: the output_dir of a run that nothing happened to}; on two it is dp 1 x cp 2."""
    from checkpoint_worker import ITERS, Run

    found = {}
    for processes in (1, 2):
        found[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
        settings = [
            f"train_config.output_dir={found[processes]}",
            f"train_config.train_iters={ITERS}",
            f"parallel_config.context_parallel_size={processes}",
            "train_config.checkpoint_interval=4",
        ]
        whole = Run(processes, settings)
        assert whole.exit_codes() == [0] * processes, whole.said
    return found


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Returns a function: (name, fill) -> a folder that `fill` has filled, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def filled(name: str, fill) -> Path:
        folder = root / name
        with open(root / f"{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker waits here
            if not (root / f"{name}.done").exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                (root / f"{name}.done").touch()
        return folder

    return filled


def environment(**extra: str) -> dict[str, str]:
    """A clean environment for a child process: one thread, no GPU, nothing of an outer launcher. A
    PYTHONPATH stays, behind this project's: magi_attention may be there.
    """
    launcher = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT"
    launcher += " NNODES NODE_RANK GPUS_PER_NODE MAX_RESTARTS SLURM_NODEID"
    inherited = {name: value for name, value in os.environ.items() if name not in launcher.split()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    outer = os.environ.get("PYTHONPATH")
    imports = os.pathsep.join([f"{ROOT}", f"{ROOT / 'tests'}", *([outer] if outer else [])])
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": imports}
    return {**inherited, **fixed, "PATH": path, **extra}


def run(*command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's root; a failure shows its output.

    On a GPU it may take as long as it wants: the first time kernels are compiled.
    """
    environ = environment(**env)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=None if environ["CUDA_VISIBLE_DEVICES"] else 300,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def torchrun(processes: int, *command, check=True, **env: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run(*launcher, f"--nproc-per-node={processes}", *command, check=check, **env)


def free_port() -> int:
    """Returns a port on which nothing listens, below those that the system gives to others."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def gpus(count: int) -> str:
    """Returns CUDA_VISIBLE_DEVICES for `count` GPUs; skips the test where there are fewer."""
    here = torch.cuda.device_count()
    if here < count:
        pytest.skip(f"needs {count} GPUs and `pytest -m gpu`; {here} are here")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(here)))
    return ",".join(chosen.split(",")[:count])


def open_data(
    source, split="train", vocab_size=257, num_batches=1, **keys
) -> TokenSource | RandomSource:
    """The opened source, not a cached one; `keys` replace the defaults of data_config."""
    small = {"source": str(source), "seqlen": 1, "batch_size": 1}
    config = {**llama_pretrain_config.data_config, **small, **keys}
    open_corpus.cache_clear()
    return open_source(split, vocab_size, num_batches, **config)


def run_model(model, tokens, lengths, cp_group, labels=None):
    """Runs a packed sequence on one process; returns logits or token losses in stream order."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    config = model.config
    key = magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        num_heads_q=config.num_attention_heads,
        num_heads_kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        pad_size=0,
        cp_group_or_mesh=cp_group,
        causal=config.is_causal,
    )
    pad = key.pad_size
    tokens, positions = (torch.nn.functional.pad(x, (0, pad)) for x in (tokens, positions))
    if labels is not None:
        labels = torch.nn.functional.pad(labels, (0, pad), value=-100)
        return model(tokens, positions, key, labels)[: len(tokens) - pad]
    return model(tokens, positions, key)[: len(tokens) - pad]


def read_metrics(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").open()]


def no_such_package(name: str) -> str:
    """Takes the place of `importlib.metadata.version` where nothing is to be installed."""
    raise importlib.metadata.PackageNotFoundError(name)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| in the 2-norm, in float64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()
