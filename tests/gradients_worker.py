"""Run on several ranks: one step's gradients, by main.py's own functions, per case.

Arguments: a file of cases (JSON), which hold arguments of `gradients`, and the output file.
"""

import copy
import json
import sys
import weakref

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import main
import modeling_llama
from data import IGNORED_LABEL, open_source
from support import config, metrics, process, recompute

DEFAULTS = copy.deepcopy(config.sections())
# Small enough that a rank's tokens are several slices and a rest.
recompute.MLP_SLICE_SIZE = 1024 if torch.cuda.is_available() else 80
modeling_llama.LOSS_SLICE_SIZE = 900 if torch.cuda.is_available() else 70


class WholeParameters(TorchDispatchMode):
    """Counts how many tensors with the shape of a whole matrix are alive at the same time."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.alive, self.most = shapes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Tensor and out.shape in self.shapes and not out.is_meta:
            known = {ref() is not None and ref().data_ptr() for ref in self.alive}
            self.alive = [ref for ref in self.alive if ref() is not None]
            if out.data_ptr() not in known:  # in-place operations return the same again
                self.alive.append(weakref.ref(out))
            self.most = max(self.most, len(self.alive))
        return out


def gradients(
    overrides: list[str],
    ignored_from_row: int | None = None,
    lengths: list[list[int]] | None = None,
) -> dict:
    """Returns the losses, gradient norm, label count, and weights and gradients as full tensors.

    ignored_from_row: labels of the global batch's rows from there on do not count.
    lengths: of the documents, for each micro-batch of a dp rank, instead of those that it has.
    """
    config.restore(DEFAULTS)  # nothing of the case before
    config.resolve(overrides, dist.get_world_size())
    if main.parallel_config["context_parallel_backend"] == "auto":
        main.parallel_config["context_parallel_backend"] = "native"
    mesh = main.build_mesh()
    model = main.build_llama_model()
    assert all(p.is_meta for p in model.parameters())
    wholes = {p.shape for p in model.parameters() if p.ndim == 2}
    shards = {torch.Size([rows // dist.get_world_size(), columns]) for rows, columns in wholes}
    with WholeParameters(wholes - shards) as whole:
        main.parallelize_model(model, mesh)
    prepare_data = main.prepare_data

    def changed_data(source, mesh, train_iter):
        micro_batches = prepare_data(source, mesh, train_iter)
        row = mesh["dp"].get_local_rank() * main.data_config["batch_size"] // mesh["dp"].size()
        for _, labels, _ in micro_batches:
            for row_labels in labels.view(-1, main.data_config["seqlen"]):
                if ignored_from_row is not None and row >= ignored_from_row:
                    row_labels[:] = IGNORED_LABEL
                row += 1
        if lengths is not None:
            bounds = [torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in lengths]
            micro_batches = [(*m[:2], b) for m, b in zip(micro_batches, bounds, strict=True)]
        return micro_batches

    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    main.prepare_data = changed_data
    source = open_source("train", model.config.vocab_size, 1, **main.data_config)
    batch = main.prepare_batch(source, mesh, model.config, stream, 1)
    main.prepare_data = prepare_data
    loss = 0
    for input_ids, labels, position_ids, key in batch.micro_batches:
        token_losses = model(input_ids, position_ids, key, labels)
        main.loss_func(token_losses, batch.num_labels, mesh).backward()
        loss += token_losses.detach().double().sum() / batch.num_labels
    dist.all_reduce(loss)
    optimizer, _ = main.build_optimizer(model, main.train_config["optimizer_config"])
    grad_norm = main.clip_gradients(model, optimizer, loss)
    evaluation = {}
    if main.data_config["validation_source"]:
        held_out = open_source("validation", model.config.vocab_size, 2, **main.data_config)
        evaluation = metrics._evaluation(main.evaluate(model, held_out, mesh))
    assert all(isinstance(p, DTensor) for p in model.parameters()), "sharded, as before"
    return {
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "evaluation": evaluation,
        "num_labels": batch.num_labels,
        "area": batch.area,
        "gathers": [getattr(key, "gathers", None) for *_, key in batch.micro_batches],
        "whole_parameters": whole.most,
        "local_parameters": sum(p.to_local().numel() for p in model.parameters()),
        "weights": {n: p.detach().full_tensor() for n, p in model.named_parameters()},
        "gradients": {n: p.grad.full_tensor() for n, p in model.named_parameters()},
    }


if __name__ == "__main__":
    cases = json.load(open(sys.argv[1]))
    main.init_env()
    results = [gradients(**case) for case in cases]
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[2])
    process.end_process()
