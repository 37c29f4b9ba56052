"""Pretrains a Llama with FSDP2 over a flattened dp_cp mesh and context parallelism.

    bash run.sh                            # without a GPU: a small run, a minute on two cores
    GPUS_PER_NODE=1 bash run.sh            # one GPU
    torchrun --nproc-per-node 8 main.py    # one node of 8 GPUs; `bash run.sh` does the same there

The keys and their defaults are in llama_pretrain_config.py; `python main.py --help` lists them.

Shapes in comments: `S` tokens of a packed sequence, `s` = S / cp tokens of this rank's shard.
"""

import math
import os
import sys
import time
from collections import deque
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
import context_parallel
from checkpoint import weights
from configuration_llama import LlamaConfig
from context_parallel.chunks import balanced_chunk_size
from data import IGNORED_LABEL
from llama_pretrain_config import data_config, model_config, parallel_config, train_config
from modeling_llama import LlamaForCausalLM
from support import metrics
from support.preflight import build_llama_config, open_token_source, run_config, set_up
from support.process import exit_with, leave, log, meet, restarts


def init_env() -> None:
    """Joins the launcher's process group. A single process makes one of its own.

    A GPU, chosen by LOCAL_RANK, uses NCCL. CPU tensors use gloo, which keeps CPU collectives for
    the next step from queuing behind this step's kernels.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    # Twice as long as the watchdog of a step, whose message says more.
    timeout = timedelta(seconds=2 * train_config["step_timeout"])
    store, rank, world_size = meet(timeout)
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


def build_llama_model() -> LlamaForCausalLM:
    """Returns the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama_config(), train_config["activation_checkpointing"])


def apply_fsdp(model: LlamaForCausalLM, dp_cp: DeviceMesh) -> None:
    """Shards every decoder layer, the head, and all other parameters over the 1-D dp_cp mesh.

    A cp rank has other tokens just as a dp rank has, so FSDP treats both alike. A tied embedding
    and head stay in the root's group: two groups would hold two copies, each with a part of the
    gradients. An untied head is a group, so that its gradients are reduced during the layers'
    backward.

    With recomputation, memory is short: layers are gathered again for backward. Without it, they
    stay gathered from forward to backward.

    Weights and the reduction of gradients are float32, whatever the compute type.
    cast_forward_inputs=False, since FSDP's cast fails to copy the runtime key.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, train_config["dtype"]),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    recomputes = train_config["activation_checkpointing"] != "none"
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp_cp, mp_policy=policy, reshard_after_forward=recomputes)
    if not model.config.tie_word_embeddings:
        head = [model.model.norm, model.lm_head]  # used last, so kept for backward
        fully_shard(head, mesh=dp_cp, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=dp_cp, mp_policy=policy)


def parallelize_model(model: LlamaForCausalLM, device_mesh: DeviceMesh) -> LlamaForCausalLM:
    """Shards the meta model, then gives it memory on this rank's device, and weights."""
    if train_config["compile"]:
        model.compile_parts()
    apply_fsdp(model, dp_cp_mesh(device_mesh))
    model.to_empty(device=device_mesh.device_type)
    if model_config["init_from"]:
        weights.load_weights(model, model_config["init_from"])
    else:
        weights.init_weights(model, model.config.initializer_range, train_config["seed"])
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
        fused=True,
    )
    warmup, train_iters = optimizer_config["warmup_iters"], train_config["train_iters"]
    floor = optimizer_config["min_learning_rate_ratio"]
    optimizer.found_inf = torch.zeros((), device=matrices[0].device)  # see `train_step`

    def learning_rate_factor(train_iter: int) -> float:
        if train_iter < warmup:
            return (train_iter + 1) / warmup
        progress = min(1.0, (train_iter - warmup + 1) / max(1, train_iters - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, LambdaLR(optimizer, learning_rate_factor)


def prepare_data(
    device_mesh: DeviceMesh, train_iter: int, split: str = "train"
) -> list[tuple[Tensor, Tensor, Tensor]]:
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
    source = open_token_source(split)
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


def prepare_magi_attention(
    input_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    config: LlamaConfig,
    device_mesh: DeviceMesh,
) -> tuple[Tensor, Tensor, Tensor, object]:
    """Plans the attention of one packed sequence and deals its tokens out to the cp ranks.

    Returns this rank's (input_ids [s], labels [s], position_ids [s], runtime key), on its device.
    Padding is token 0 with label -100; position_ids count from the start of each document.

    A collective over the cp group: every rank of it calls this in the same order.
    """
    api = context_parallel.load_api(parallel_config["context_parallel_backend"])
    group = device_mesh.get_group("cp")
    chunk_size = balanced_chunk_size(cu_seqlens, config.is_causal, dist.get_world_size(group))
    # magi_attention wants pad_size=0, and the chunk size in the config: it deprecates others.
    key = api.magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        num_heads_q=config.num_attention_heads,
        num_heads_kv=config.num_key_value_heads,
        head_dim=config.head_dim,
        pad_size=0,
        cp_group_or_mesh=group,
        causal=config.is_causal,
        dist_attn_config=api.DistAttnConfig(
            dispatch_config=api.DispatchConfig(chunk_size=chunk_size)
        ),
    )
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    position_ids = torch.arange(len(starts)) - starts
    input_ids, labels, position_ids = (
        x.to(device_mesh.device_type) for x in (input_ids, labels, position_ids)
    )
    input_ids, position_ids = api.dispatch(input_ids, key), api.dispatch(position_ids, key)
    labels = api.dispatch(labels, key, pad_value=IGNORED_LABEL)
    return input_ids, labels, position_ids, key


class Step(NamedTuple):
    """A batch that is ready to train on."""

    micro_batches: list[tuple]  # each of `prepare_magi_attention`
    num_labels: float  # that count, over all ranks and micro-batches
    area: float  # of the attention mask in (query, key) pairs, over the same
    data_seconds: float  # that this rank waited for its rows
    plan_seconds: float  # and spent on the runtime keys


def prepare_step(
    device_mesh: DeviceMesh,
    config: LlamaConfig,
    train_iter: int,
    split: str = "train",
    stream: torch.cuda.Stream | None = None,
) -> Step:
    """Prepares the batch and the runtime keys of step train_iter, beside the kernels of another.

    stream: where its copies to the GPU go; in the stream of the kernels they would wait for those.
    """
    start = time.perf_counter()
    micro_batches = prepare_data(device_mesh, train_iter, split)
    data_seconds = time.perf_counter() - start
    # cp ranks hold the same labels before dispatch: the sum over dp is the sum over all.
    counts = torch.zeros(2, dtype=torch.float64)
    for _, labels, cu_seqlens in micro_batches:
        counts[0] += (labels != IGNORED_LABEL).sum()
        counts[1] += metrics.attention_area(cu_seqlens, config.is_causal)
    dist.all_reduce(counts, group=device_mesh.get_group("dp"))

    start = time.perf_counter()
    with torch.cuda.stream(stream):
        prepared = [prepare_magi_attention(*m, config, device_mesh) for m in micro_batches]
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    return Step(prepared, *counts.tolist(), data_seconds, time.perf_counter() - start)


def loss_func(loss_sum: Tensor, num_labels: float, device_mesh: DeviceMesh) -> Tensor:
    """Returns what this rank backpropagates: loss_sum x world size / num_labels.

    loss_sum: the summed token losses of this rank's shard. num_labels: the labels that count in the
    whole step, over all ranks and accumulation steps.

    The loss of a step is (sum over all ranks) / (labels over all ranks), so its gradient is the sum
    over ranks of d(loss_sum) / num_labels. FSDP averages gradients, dividing that sum by the world
    size, which the factor here undoes. A mean per rank would weigh ranks with few labels too high.
    """
    return loss_sum * (device_mesh.size() / max(1.0, num_labels))


def forward_backward(model: LlamaForCausalLM, step: Step, device_mesh: DeviceMesh) -> Tensor:
    """Accumulates the gradients of one step and returns this rank's loss sum, a scalar."""
    loss_sum = torch.zeros((), device=device_mesh.device_type)
    for input_ids, labels, position_ids, key in step.micro_batches:
        micro_loss_sum = model(input_ids, position_ids, key, labels)
        loss_func(micro_loss_sum, step.num_labels, device_mesh).backward()
        loss_sum += micro_loss_sum.detach()
    return loss_sum


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    device_mesh: DeviceMesh,
    step: Step,
) -> Tensor:
    """Queues one training step and waits for nothing; returns [loss, gradient norm], float64.

    If one of them is not finite, this step and those after it leave the weights as they are.
    """
    loss_sum = forward_backward(model, step, device_mesh).double()
    dist.all_reduce(loss_sum, group=dp_cp_mesh(device_mesh).get_group())
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    grad_norm = nn.utils.get_total_norm(grads).full_tensor()

    # AdamW's fused kernel divides the gradients by grad_scale, and does nothing if found_inf is 1:
    # clipping, and the refusal of what is not finite, on the device.
    max_norm = train_config["optimizer_config"]["max_clip_grad_norm"]
    optimizer.grad_scale = (grad_norm / max_norm).clamp(min=1.0)
    is_bad = ~(loss_sum + grad_norm).isfinite()
    optimizer.found_inf = torch.maximum(optimizer.found_inf, is_bad.float())
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    return torch.stack([loss_sum / max(1.0, step.num_labels), grad_norm.double()])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, device_mesh: DeviceMesh) -> float:
    """Returns the mean loss, in nats per label, of the first eval_iters batches of the held-out
    documents: the same batches each time, and the same value for every layout.
    """
    num_labels = 0.0
    loss_sum = torch.zeros((), dtype=torch.float64, device=device_mesh.device_type)
    for eval_iter in range(train_config["eval_iters"]):
        step = prepare_step(device_mesh, model.config, eval_iter, "validation")
        for input_ids, labels, position_ids, key in step.micro_batches:
            loss_sum += model(input_ids, position_ids, key, labels)
        num_labels += step.num_labels
    for module in model.modules():  # what FSDP would keep whole for a backward pass
        if isinstance(module, FSDPModule):
            module.reshard()
    dist.all_reduce(loss_sum, group=dp_cp_mesh(device_mesh).get_group())
    return loss_sum.item() / max(1.0, num_labels)


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    device_mesh: DeviceMesh,
    train_iters: int,
) -> None:
    """Trains up to step train_iters, from the checkpoint that is there, and logs each step.

    On a GPU a step is logged when the next one is queued, unless something waits for it.

    Raises FloatingPointError, with the weights unchanged, if a loss or gradient norm is not finite,
    and CheckpointError if what should be resumed or saved cannot be.
    """
    model.train()
    config = run_config()
    checkpointer = checkpoint.Checkpointer(model, optimizer, lr_scheduler, config, log, restarts())
    first_iter = checkpointer.resume()
    on_gpu = torch.cuda.is_available()
    stream = torch.cuda.Stream() if on_gpu else None
    prepare = partial(prepare_step, device_mesh, model.config, stream=stream)
    eval_interval, save_seconds = train_config["eval_interval"], 0.0
    queue = deque()  # of steps that the GPU works on while the host prepares and queues the next
    with closing(metrics.MetricsWriter(config, first_iter, device_mesh.size())) as writer:
        start = metrics.now()
        step = prepare(first_iter) if first_iter < train_iters else None
        for train_iter in range(first_iter, train_iters):
            record = dict(
                step=train_iter + 1,
                learning_rate=lr_scheduler.get_last_lr()[0],
                num_labels=int(step.num_labels),
                area=step.area,
                plan_seconds=step.plan_seconds,
                data_seconds=step.data_seconds,
                save_seconds=save_seconds,
            )
            results = train_step(model, optimizer, lr_scheduler, device_mesh, step)
            results = results.to("cpu", non_blocking=True)
            # The step itself waits there, too: its memory is of prepare's stream, which would use
            # it again while the kernels still read it.
            queue.append((record, step, results, metrics.now()))
            writer.step_is_queued()
            is_last = train_iter + 1 == train_iters
            step = None if is_last else prepare(train_iter + 1)
            stop = checkpointer.is_any_stopping()  # so that all ranks leave after the same step

            evaluates = eval_interval and (is_last or (train_iter + 1) % eval_interval == 0)
            due = is_last or evaluates or checkpointer.is_due(train_iter + 1, stop)
            while len(queue) > (1 if on_gpu and not due else 0):
                record, done, results, end = queue.popleft()
                # The one wait of a step.
                record["step_seconds"] = metrics.seconds_between(start, end)
                record["loss"], record["grad_norm"] = results.tolist()
                start = end
                metrics.check_finite(
                    record, model, partial(forward_backward, model, done, device_mesh)
                )
                if evaluates and not queue:
                    record["eval_loss"] = evaluate(model, device_mesh)
                    start = metrics.now()  # no step's time holds an evaluation
                writer.write(**record)
            save_seconds = checkpointer.after_step(train_iter + 1, stop)
            if stop:
                break


def main(arguments: list[str]) -> None:
    """Sets up and trains; an error that a person can mend ends it with one sentence."""
    try:
        set_up(arguments)
    except ValueError as error:
        exit_with(error)
    init_env()
    device_mesh = build_mesh()
    model = build_llama_model()
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    parallelize_model(model, device_mesh)
    optimizer, lr_scheduler = build_optimizer(model, train_config["optimizer_config"])
    try:
        train(model, optimizer, lr_scheduler, device_mesh, train_config["train_iters"])
    except (FloatingPointError, checkpoint.CheckpointError) as error:
        exit_with(error)
    dist.barrier()  # no rank ends while another's threads still wait for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
