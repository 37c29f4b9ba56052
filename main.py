"""Pretrains a Llama with FSDP2 over a flattened dp_cp mesh and context parallelism.

    python main.py                         # one process: a GPU, or a small model on a CPU
    torchrun --nproc-per-node 8 main.py    # one node of 8 GPUs
    bash run.sh                            # all GPUs of this machine, or two processes on a CPU
    python main.py --evaluate KEY=VALUE    # the held-out loss of a run's newest checkpoint

Edit llama_pretrain_config.py, or override its keys: `main.py data_config.seqlen=4096`.
Shapes in comments: `S` tokens of a packed sequence, `s` = S / cp tokens of this rank's shard.
"""

if __name__ == "__main__":  # before the slow import of torch
    from support import stop

    stop.listen()

import math
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.cuda import Stream
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
from configuration_llama import LlamaConfig
from context_parallel import load_api
from context_parallel.chunks import balanced_chunk_size
from data import IGNORED_LABEL, DataError, Source
from llama_pretrain_config import data_config, model_config, parallel_config, train_config
from modeling_llama import LlamaForCausalLM
from support import metrics, stop
from support.flops import attention_area
from support.preflight import build_llama_config, group_timeout, run_config, set_up, with_timeout
from support.process import end_process, exit_with, raise_on_all_ranks, rendezvous, restarts
from support.recompute import apply_compile, apply_recompute


def init_env() -> None:
    """Joins the launcher's process group; a single process makes its own."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
        backend = "cpu:gloo,cuda:nccl"  # gloo: CPU collectives do not queue behind GPU kernels
    dist.init_process_group(backend, **rendezvous(group_timeout()))


def build_mesh() -> DeviceMesh:
    """Returns the mesh (dp, cp). cp ranks are neighbours, to share a node where they fit."""
    cp_size = parallel_config["context_parallel_size"]
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    shape = dist.get_world_size() // cp_size, cp_size
    return with_timeout(init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp")))


def dp_cp_mesh(device_mesh: DeviceMesh) -> DeviceMesh:
    """Returns FSDP's mesh: all ranks in one dimension, or with replicas (HSDP) a row for each."""
    replicas = parallel_config["data_parallel_replicate_size"]
    if replicas == 1:
        return with_timeout(device_mesh["dp", "cp"]._flatten("dp_cp"))
    ranks, names = device_mesh.mesh.view(replicas, -1), ("replicate", "dp_cp")
    return with_timeout(DeviceMesh(device_mesh.device_type, ranks, mesh_dim_names=names))


def build_llama_model() -> LlamaForCausalLM:
    """Returns the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(build_llama_config())


def apply_fsdp(model: LlamaForCausalLM, dp_cp: DeviceMesh) -> None:
    """Shards each decoder layer, the head and the rest over the dp_cp mesh.

    Each rank has other tokens, whether along dp or along cp, so FSDP treats both alike. A tied
    embedding and head share the root's group: two groups would split their gradient. With
    recomputation, layers are gathered again in backward, which saves memory.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, train_config["dtype"]),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # FSDP cannot copy the runtime key
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
    mode, offload = train_config["activation_checkpointing"], train_config["activation_offload"]
    apply_recompute(model, mode, offload)
    if train_config["compile"]:
        apply_compile(model)
    apply_fsdp(model, dp_cp_mesh(device_mesh))
    model.to_empty(device=device_mesh.device_type)
    if model_config["init_from"]:
        checkpoint.weights.load_weights(model, model_config["init_from"])
    else:
        checkpoint.weights.init_weights(model, model.config.initializer_range, train_config["seed"])
    return model


def build_optimizer(model: nn.Module, config: dict) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Returns AdamW, with weight decay on matrices only, and its schedule. Call it after sharding.
    The schedule: linear warm-up to learning_rate, half a cosine down to min_learning_rate_ratio.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    lr, betas, eps = config["learning_rate"], tuple(map(float, config["betas"])), config["eps"]
    optimizer = torch.optim.AdamW(groups, lr, betas, eps, config["weight_decay"], fused=True)
    optimizer.found_inf = torch.zeros((), device=matrices[0].device)  # see `clip_gradients`
    warmup, floor = config["warmup_iters"], config["min_learning_rate_ratio"]
    decay_iters = max(1, train_config["train_iters"] - warmup)

    def learning_rate_factor(train_iter: int) -> float:
        if train_iter < warmup:
            return (train_iter + 1) / warmup
        progress = min(1.0, (train_iter - warmup + 1) / decay_iters)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, LambdaLR(optimizer, learning_rate_factor)


def prepare_data(source: Source, device_mesh: DeviceMesh, train_iter: int) -> list[tuple]:
    """Returns this dp rank's rows of step train_iter (the first is 0), one tuple per micro-batch.

    Each is (input_ids [S], labels [S], cu_seqlens [documents + 1], int32), on the CPU: rows packed
    into one sequence, each beginning a new document. The cp ranks of a dp rank get the same.
    """
    batch_size, seqlen = data_config["batch_size"], data_config["seqlen"]
    rank_rows = batch_size // device_mesh["dp"].size()
    first_row = train_iter * batch_size + device_mesh["dp"].get_local_rank() * rank_rows
    num_rows = rank_rows // train_config["gradient_accumulation_steps"]
    micro_batches = []
    for row in range(first_row, first_row + rank_rows, num_rows):
        rows = source.rows(row, num_rows, seqlen)
        # New each time, since magi_attention caches by tensor object; on the CPU, no device sync.
        cu_seqlens = torch.tensor([0, *rows.document_lengths]).cumsum(0, dtype=torch.int32)
        input_ids, labels = torch.from_numpy(rows.tokens), torch.from_numpy(rows.labels)
        micro_batches.append((input_ids.flatten(), labels.flatten(), cu_seqlens))
    return micro_batches


def prepare_magi_attention(
    input_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    llama: LlamaConfig,
    device_mesh: DeviceMesh,
) -> tuple[Tensor, Tensor, Tensor, object]:
    """Plans the attention of one packed sequence, and dispatches its tokens to the cp ranks.

    Returns this rank's (input_ids [s], labels [s], position_ids [s], runtime key), on its device.
    Padding is token 0, label -100. position_ids count per document. A collective of the cp ranks.
    """
    api = load_api(parallel_config["context_parallel_backend"])
    group = device_mesh.get_group("cp")
    size = balanced_chunk_size(cu_seqlens, llama.is_causal, dist.get_world_size(group))
    key = api.magi_attn_varlen_key(
        cu_seqlens,
        cu_seqlens,
        num_heads_q=llama.num_attention_heads,
        num_heads_kv=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        pad_size=0,  # the key finds its own
        cp_group_or_mesh=group,
        causal=llama.is_causal,
        dist_attn_config=api.DistAttnConfig(dispatch_config=api.DispatchConfig(chunk_size=size)),
    )
    device = device_mesh.device_type
    places = api.dispatch(torch.arange(len(input_ids), device=device), key)  # in the sequence
    starts = cu_seqlens.to(device, places.dtype)
    position_ids = places - starts[torch.searchsorted(starts, places, right=True) - 1]
    labels = api.dispatch(labels.to(device), key, pad_value=IGNORED_LABEL)
    return api.dispatch(input_ids.to(device), key), labels, position_ids, key


def prepare_batch(
    source: Source, device_mesh: DeviceMesh, llama: LlamaConfig, stream: Stream, train_iter: int
) -> metrics.Batch:
    """Prepares the batch of step train_iter. stream: for copies to the GPU, or None.

    Raises DataError on all ranks if one of them reads a damaged row.
    """
    start, damage, counts = time.perf_counter(), None, torch.zeros(3, dtype=torch.float64)
    try:
        micro_batches = prepare_data(source, device_mesh, train_iter)
    except DataError as error:
        micro_batches, damage, counts[2] = [], error, 1
    data_seconds = time.perf_counter() - start
    for _, labels, cu_seqlens in micro_batches:
        counts[0] += (labels != IGNORED_LABEL).sum()
        counts[1] += attention_area(cu_seqlens, llama.is_causal)
    dist.all_reduce(counts)
    if counts[2]:
        raise_on_all_ranks(damage)
    counts /= device_mesh["cp"].size()  # cp ranks have the same labels before dispatch
    start = time.perf_counter()
    with torch.cuda.stream(stream):
        prepared = [prepare_magi_attention(*m, llama, device_mesh) for m in micro_batches]
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    plan_seconds = time.perf_counter() - start
    return metrics.Batch(prepared, *counts[:2].tolist(), data_seconds, plan_seconds)


def loss_func(token_losses: Tensor, num_labels: float, device_mesh: DeviceMesh) -> Tensor:
    """Returns what this rank backpropagates: sum(token_losses) x world size / num_labels.

    token_losses: [s], 0 where the label is -100. num_labels: of the whole step, over all ranks.
    A step's loss is (sum over all ranks) / (labels over all ranks), for every layout. FSDP divides
    the sum of all ranks' gradients by the world size; the factor here undoes that.
    """
    return token_losses.sum() * (device_mesh.size() / max(1.0, num_labels))


def clip_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Makes `optimizer.step()` clip, without a device sync; returns the gradient norm, a scalar.

    Fused AdamW reads two attributes that `GradScaler` sets. It divides the gradients by grad_scale,
    and skips the step if found_inf is 1. A loss or norm that is not finite sets it for good.
    """
    # float64: the error of a CPU's float32 norm, up to 1e-4, depends on the size of the shards.
    grads = [p.grad.double() if p.is_cpu else p.grad for p in model.parameters() if p.requires_grad]
    grad_norm = nn.utils.get_total_norm(grads).full_tensor().float()
    max_norm = train_config["optimizer_config"]["max_clip_grad_norm"]
    optimizer.grad_scale = (grad_norm / max_norm).clamp(min=1.0)
    optimizer.found_inf.logical_or_(~(loss + grad_norm).isfinite())
    return grad_norm


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, source: Source, device_mesh: DeviceMesh) -> Tensor:
    """Returns `metrics.sums_by_position` of the source's first eval_iters batches, on the CPU."""
    sums = 0.0
    for eval_iter in range(train_config["eval_iters"]):
        batch = prepare_batch(source, device_mesh, model.config, None, eval_iter)
        for input_ids, labels, position_ids, key in batch.micro_batches:
            losses = model(input_ids, position_ids, key, labels)
            sums += metrics.sums_by_position(losses, labels, position_ids, data_config["seqlen"])
    for module in model.modules():  # frees what FSDP keeps for a backward pass
        if isinstance(module, FSDPModule):
            module.reshard()
    dist.all_reduce(sums)
    return sums.cpu()


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    device_mesh: DeviceMesh,
    sources: dict[str, Source],
    train_iters: int,
) -> None:
    """Trains up to step train_iters, from the newest checkpoint. sources: "train", "validation".

    Raises FloatingPointError, with the weights unchanged, if a loss or norm is not finite,
    DataError, when the step before is saved, and CheckpointError.
    """
    config, log, eval_interval = run_config(sources), stop.log, train_config["eval_interval"]
    checkpointer = checkpoint.Checkpointer(model, optimizer, lr_scheduler, config, log, restarts())
    first_iter = checkpointer.resume()
    sources["train"].first_row = config["first_row"]
    stop.defer(partial(dist.all_reduce, torch.zeros(1)))
    stream = Stream() if device_mesh.device_type == "cuda" else None
    prepare = partial(prepare_batch, sources["train"], device_mesh, model.config, stream)

    def forward_backward(batch: metrics.Batch) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=device_mesh.device_type)
        for input_ids, labels, position_ids, key in batch.micro_batches:
            token_losses = model(input_ids, position_ids, key, labels)  # [s], float32
            loss_func(token_losses, batch.num_labels, device_mesh).backward()
            loss += token_losses.detach().sum() / max(1.0, batch.num_labels)
        return loss

    def log_step(step: metrics.Step, evaluates: bool = False) -> None:
        step.wait()
        metrics.check_finite(step, model, partial(forward_backward, step.batch))
        if evaluates:
            writer.watchdog.watch(f"the evaluation after step {step.number}")
        sums = evaluate(model, sources["validation"], device_mesh) if evaluates else None
        writer.write(step, sums)

    with metrics.MetricsWriter(config, first_iter, device_mesh.size()) as writer:
        batch = prepare(first_iter) if first_iter < train_iters else None
        queued, damage, save_seconds = None, None, 0.0
        for train_iter in range(first_iter, train_iters):
            loss = forward_backward(batch)
            dist.all_reduce(loss)
            grad_norm = clip_gradients(model, optimizer, loss)
            optimizer.step()
            optimizer.zero_grad()
            number, is_last = train_iter + 1, train_iter + 1 == train_iters
            learning_rate = lr_scheduler.get_last_lr()[0]
            step = writer.queue(number, batch, loss, grad_norm, learning_rate, save_seconds)
            lr_scheduler.step()

            try:
                batch = None if is_last else prepare(train_iter + 1)  # while the GPU works
            except DataError as error:
                damage = error  # raised when this step is saved
            stops = checkpointer.is_any_stopping(stop.requested() or damage is not None)
            evaluates = eval_interval > 0 and (is_last or number % eval_interval == 0)
            if queued:
                log_step(queued)
            queued = step  # on a GPU it is logged when the next step is queued
            if stream is None or is_last or evaluates or checkpointer.is_due(number, stops):
                log_step(step, evaluates)
                queued = None
            save_seconds = checkpointer.after_step(number, stops)
            if damage:
                raise damage
            if stops:
                break


def main(arguments: list[str]) -> None:
    """Sets up, and trains or evaluates. An error that a user can correct is one sentence."""
    try:
        sources = set_up(arguments)
    except ValueError as error:
        exit_with(error)
    init_env()
    device_mesh = build_mesh()
    model = parallelize_model(build_llama_model(), device_mesh)
    try:
        if "train" in sources:
            optimizer, lr_scheduler = build_optimizer(model, train_config["optimizer_config"])
            train(model, optimizer, lr_scheduler, device_mesh, sources, train_config["train_iters"])
        else:  # --evaluate
            checkpoint.load_model(model, run_config(sources), stop.log)
            metrics.log_evaluation(evaluate(model, sources["validation"], device_mesh))
    except (FloatingPointError, checkpoint.CheckpointError, DataError) as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process()
