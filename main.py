"""Pretrains a Llama with FSDP2 over a flattened dp_cp mesh and context parallelism.

    bash run.sh                            # without a GPU: a small run, two minutes on two cores
    GPUS_PER_NODE=1 bash run.sh            # one GPU
    torchrun --nproc-per-node 8 main.py    # one node of 8 GPUs; `bash run.sh` does the same there

The keys and their defaults are in llama_pretrain_config.py; `python main.py --help` lists them.

Shapes in comments: `S` tokens of a packed sequence, `s` = S / cp tokens of this rank's shard.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
import context_parallel
import huggingface
import llama_pretrain_config
import metrics
from configuration_llama import LlamaConfig
from data import IGNORED_LABEL, RandomSource, TextSource, open_source
from llama_pretrain_config import data_config, model_config, parallel_config, train_config
from metrics import log
from modeling_llama import LlamaForCausalLM


def init_env(backend: str) -> None:
    """Joins the launcher's process group; a single process makes one of its own.

    backend: "nccl", with the GPU that LOCAL_RANK says, or "gloo", on the CPU.
    """
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Longer than the watchdog of a step waits, which can say more.
    timeout = timedelta(seconds=2 * train_config["step_timeout"])
    store, rank, world_size = checkpoint.meet(timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


def build_mesh() -> DeviceMesh:
    """Returns the mesh (dp, cp): cp ranks are neighbours, and so on one node where they fit."""
    cp_size = parallel_config["context_parallel_size"]
    return init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu",
        (dist.get_world_size() // cp_size, cp_size),
        mesh_dim_names=("dp", "cp"),
    )


def dp_cp_mesh(device_mesh: DeviceMesh) -> DeviceMesh:
    """Returns all ranks as one dimension; the first call builds it, later calls return the same."""
    return device_mesh["dp", "cp"]._flatten("dp_cp")


def build_llama_config() -> LlamaConfig:
    """Returns the model's shape: that of `init_from`, or the preset, with the overrides."""
    if model_config["init_from"]:
        return huggingface.read_config(model_config["init_from"], model_config["overrides"])
    return LlamaConfig.from_preset(model_config["preset"], model_config["overrides"])


def build_llama_model() -> LlamaForCausalLM:
    """Returns the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama_config(), train_config["activation_checkpointing"])


def apply_fsdp(model: LlamaForCausalLM, dp_cp: DeviceMesh) -> None:
    """Shards each decoder layer, and the root with what is left, over the 1-D dp_cp mesh.

    Context parallelism gives each rank other tokens of a sequence just as data parallelism gives it
    other sequences, so to FSDP both are one. Embedding and head stay together in the root's group:
    two groups would split a tied weight in two, and its gradients with it.

    The weights are float32 and gradients are reduced in float32, whatever the compute type.
    cast_forward_inputs=False: FSDP's cast would try to copy the runtime key, which cannot be.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, train_config["dtype"]),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp_cp, mp_policy=policy)
    fully_shard(model, mesh=dp_cp, mp_policy=policy)


@torch.no_grad()
def init_weights(model: nn.Module, initializer_range: float, seed: int) -> None:
    """Fills the parameters: norms with 1, matrices from N(0, initializer_range^2).

    Every rank draws each full matrix from a seed of its own and keeps its shard of it. So the
    weights do not depend on the layout, and never more than one full matrix is in memory.
    """
    for index, param in enumerate(model.parameters()):
        if param.ndim == 1:
            param.fill_(1.0)
            continue
        generator = torch.Generator(param.device).manual_seed(seed * 1_000_003 + index)
        full = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        full.normal_(0.0, initializer_range, generator=generator)
        if isinstance(param, DTensor):  # src_data_rank=None: cut out of this rank's own copy
            full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(full)


def parallelize_model(model: LlamaForCausalLM, device_mesh: DeviceMesh) -> LlamaForCausalLM:
    """Shards the meta model, then gives it memory on this rank's device, and weights."""
    apply_fsdp(model, dp_cp_mesh(device_mesh))
    model.to_empty(device=device_mesh.device_type)
    if model_config["init_from"]:
        huggingface.load_weights(model, model_config["init_from"])
    else:
        init_weights(model, model.config.initializer_range, train_config["seed"])
    return model


def build_optimizer(
    model: nn.Module, optimizer_config: dict
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Returns AdamW, with weight decay on matrices only, and its schedule.

    The schedule is stepped once per training step: linear warm-up to learning_rate, then half a
    cosine down to min_learning_rate_ratio of it at the last step. Called after sharding: the
    optimizer's state takes the parameters' sharding.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer_config["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optimizer_config["learning_rate"],
        betas=optimizer_config["betas"],
        eps=optimizer_config["eps"],
    )
    warmup, train_iters = optimizer_config["warmup_iters"], train_config["train_iters"]
    floor = optimizer_config["min_learning_rate_ratio"]

    def learning_rate_factor(train_iter: int) -> float:
        if train_iter < warmup:
            return (train_iter + 1) / warmup
        progress = min(1.0, (train_iter - warmup + 1) / max(1, train_iters - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, LambdaLR(optimizer, learning_rate_factor)


def prepare_data(device_mesh: DeviceMesh, train_iter: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns this dp rank's part of step train_iter (the first is 0), one tuple per micro-batch.

    Each is (input_ids [S], labels [S], cu_seqlens [documents + 1], int32), on the CPU: the rows
    squashed into one packed sequence, in which every row begins a new document. The cp ranks of one
    dp rank get the same; the dp ranks together get the global batch, whatever the layout.
    """
    batch_size, seqlen = data_config["batch_size"], data_config["seqlen"]
    accumulation = train_config["gradient_accumulation_steps"]
    rank_rows = batch_size // device_mesh["dp"].size()
    first_row = train_iter * batch_size + device_mesh["dp"].get_local_rank() * rank_rows
    num_rows = rank_rows // accumulation
    source = open_token_source()
    micro_batches = []
    for micro in range(accumulation):
        rows = source.rows(first_row + micro * num_rows, num_rows, seqlen)
        # A new cu_seqlens each time: magi_attention caches by tensor object. On the CPU and int32,
        # it costs no device sync there.
        lengths = torch.tensor([0, *rows.document_lengths], dtype=torch.int32)
        cu_seqlens = lengths.cumsum(dim=0, dtype=torch.int32)
        input_ids, labels = torch.from_numpy(rows.tokens), torch.from_numpy(rows.labels)
        micro_batches.append((input_ids.flatten(), labels.flatten(), cu_seqlens))
    return micro_batches


def open_token_source() -> TextSource | RandomSource:
    """Returns the opened `data_config.source`; the first call reads it."""
    return open_source(
        data_config["source"],
        build_llama_config().vocab_size,
        data_config["seed"],
        data_config["skip_undecodable"],
    )


def prepare_magi_attention(
    input_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    config: LlamaConfig,
    device_mesh: DeviceMesh,
) -> tuple[Tensor, Tensor, Tensor, context_parallel.DistAttnRuntimeKey]:
    """Plans the attention of one packed sequence and deals its tokens out to the cp ranks.

    Returns this rank's (input_ids [s], labels [s], position_ids [s], runtime key), on its device.
    Padding is token 0 with label -100; position_ids count from the start of each document.

    A collective over the cp group: every rank of it comes here in the same order.
    """
    api = context_parallel.load_api(parallel_config["context_parallel_backend"])
    input_ids, labels = (x.to(device_mesh.device_type) for x in (input_ids, labels))
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    position_ids = (torch.arange(len(starts)) - starts).to(device_mesh.device_type)

    # magi_attention deprecates this call; magi_attn_varlen_key (the same arguments without the
    # first) and dispatch replace it. It also wants pad_size=0, and the chunk size in the config.
    input_ids, key = api.magi_attn_varlen_dispatch(
        input_ids,
        cu_seqlens,
        cu_seqlens,
        num_heads_q=config.num_attention_heads,
        num_heads_kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        pad_size=0,
        cp_group_or_mesh=device_mesh.get_group("cp"),
        causal=config.is_causal,
        dist_attn_config=api.DistAttnConfig(
            dispatch_config=api.DispatchConfig(chunk_size=parallel_config["chunk_size"])
        ),
    )
    labels = api.dispatch(labels, key, pad_value=IGNORED_LABEL)
    position_ids = api.dispatch(position_ids, key)
    return input_ids, labels, position_ids, key


def loss_func(loss_sum: Tensor, num_labels: Tensor, device_mesh: DeviceMesh) -> Tensor:
    """Returns what this rank backpropagates: loss_sum x world size / num_labels.

    loss_sum: the summed token losses of this rank's shard. num_labels: the labels that count in the
    whole step, over all ranks and accumulation steps.

    The loss of a step is (sum over all ranks) / (labels over all ranks), so its gradient is the sum
    over ranks of d(loss_sum) / num_labels. FSDP averages gradients, dividing that sum by the world
    size, which the factor here undoes. A mean per rank would weigh ranks with few labels too high.
    """
    return loss_sum * (device_mesh.size() / num_labels)


def forward_backward(
    model: LlamaForCausalLM, micro_batches: list[tuple], device_mesh: DeviceMesh
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Accumulates the gradients of one step.

    micro_batches: of `prepare_data`. Returns (this rank's loss sum, the labels that count over all
    ranks, the mask area over all ranks), each a scalar tensor, and the seconds spent on the keys.
    """
    # cp ranks hold the same labels before dispatch: the sum over dp is the sum over all.
    counts = torch.zeros(2, dtype=torch.float64)
    for _, labels, cu_seqlens in micro_batches:
        counts[0] += (labels != IGNORED_LABEL).sum()
        counts[1] += metrics.attention_area(cu_seqlens, model.config.is_causal)
    counts = counts.to(device_mesh.device_type)
    dist.all_reduce(counts, group=device_mesh.get_group("dp"))
    num_labels, area = counts

    # All keys before any forward: a later copy to the GPU would queue behind the kernels.
    start = time.perf_counter()
    prepared = [
        prepare_magi_attention(*micro_batch, model.config, device_mesh)
        for micro_batch in micro_batches
    ]
    plan_seconds = time.perf_counter() - start

    loss_sum = torch.zeros((), device=device_mesh.device_type)
    for input_ids, labels, position_ids, key in prepared:
        micro_loss_sum = model(input_ids, position_ids, key, labels)
        loss_func(micro_loss_sum, num_labels.clamp(min=1), device_mesh).backward()
        loss_sum += micro_loss_sum.detach()
    return loss_sum, num_labels, area, plan_seconds


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    device_mesh: DeviceMesh,
    train_iters: int,
) -> None:
    """Trains up to step train_iters, from the checkpoint that is there, and logs each step.

    Raises FloatingPointError, before the weights change, if loss or gradient norm is not finite,
    and CheckpointError if what should be resumed or saved cannot be.
    """
    model.train()
    world = dp_cp_mesh(device_mesh)
    checkpointer = checkpoint.Checkpointer(model, optimizer, lr_scheduler, run_config(), log)
    first_iter = checkpointer.resume()
    writer = metrics.MetricsWriter(run_config(), first_iter, world.size())
    max_norm = train_config["optimizer_config"]["max_clip_grad_norm"]
    save_seconds = 0.0
    step_start = time.perf_counter()
    for train_iter in range(first_iter, train_iters):
        data_start = time.perf_counter()
        micro_batches = prepare_data(device_mesh, train_iter)
        data_seconds = time.perf_counter() - data_start

        loss_sum, num_labels, area, plan_seconds = forward_backward(
            model, micro_batches, device_mesh
        )
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        # Together, so that all ranks leave after the same step.
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, checkpointer.stopping)]).double()
        dist.all_reduce(totals, group=world.get_group())

        # The step's one wait for its results.
        total_loss, stop, num_labels, area, norm = torch.stack(
            [*totals, num_labels, area, grad_norm.full_tensor().double()]
        ).tolist()
        loss = total_loss / max(1.0, num_labels)
        writer.check_finite(train_iter + 1, loss, norm, loss_sum, model)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, grad_norm)
        learning_rate = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

        step_seconds = time.perf_counter() - step_start
        step_start += step_seconds
        writer.write(
            step=train_iter + 1,
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate,
            num_labels=int(num_labels),
            area=area,
            step_seconds=step_seconds,
            plan_seconds=plan_seconds,
            data_seconds=data_seconds,
            save_seconds=save_seconds,
        )
        save_seconds = checkpointer.after_step(train_iter + 1, stop > 0)
        if stop:
            break
    writer.close()


def run_config() -> dict:
    """Returns what describes the run: what `config.json` and the checkpoints say of it."""
    data, sections = open_token_source().description, llama_pretrain_config.sections()
    return metrics.run_config(sections, build_llama_config(), data)


def set_up(arguments: list[str]) -> None:
    """Resolves the config, chooses the backend, opens the data, and logs what will run.

    All that can be wrong with what a person asked for comes to light here, as a ValueError of one
    sentence, before any process group exists.
    """
    if "LOCAL_RANK" not in os.environ:
        # No torchrun: RANK and WORLD_SIZE, if they are set, are a scheduler's and count nodes.
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    world_size = int(os.environ["WORLD_SIZE"])
    notes = llama_pretrain_config.resolve(arguments, world_size)
    on_gpu = torch.cuda.is_available()
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if on_gpu and processes > gpus:
        raise ValueError(f"{processes} processes on a node with {gpus} GPUs; start at most {gpus}")
    config = build_llama_config()
    backend, reason = context_parallel.select_backend(
        parallel_config["context_parallel_backend"],
        config.head_dim,
        train_config["dtype"],
        "cuda" if on_gpu else "cpu",
    )
    parallel_config["context_parallel_backend"] = backend
    source = open_token_source()
    if model_config["init_from"]:
        huggingface.check_weights(build_llama_model(), model_config["init_from"])
    metrics.make_output_dir(train_config["output_dir"])
    checkpoint.check_resume(run_config())

    for line in notes:
        log(line)
    log(f"machine: {', '.join(f'{k} {v}' for k, v in metrics.describe_machine().items())}")
    cp_size = parallel_config["context_parallel_size"]
    log(f"mesh: dp {world_size // cp_size} x cp {cp_size}, {world_size} processes")
    log(f"attention: {backend} ({reason})")
    log(f"data: {source.description}")
    log(f"config: {json.dumps(llama_pretrain_config.sections())}")
    log(f"model: {json.dumps(asdict(config))}")


def main(arguments: list[str]) -> None:
    """Sets up and trains; an error that a person can mend ends it with one sentence."""
    try:
        set_up(arguments)
    except ValueError as error:
        metrics.exit_with(error)
    init_env("nccl" if torch.cuda.is_available() else "gloo")
    device_mesh = build_mesh()
    model = build_llama_model()
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    parallelize_model(model, device_mesh)
    optimizer, lr_scheduler = build_optimizer(model, train_config["optimizer_config"])
    try:
        train(model, optimizer, lr_scheduler, device_mesh, train_config["train_iters"])
    except (FloatingPointError, checkpoint.CheckpointError) as error:
        metrics.exit_with(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(llama_pretrain_config.describe())
    else:
        main(sys.argv[1:])
