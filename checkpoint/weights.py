"""Weights from a seed, and Hugging Face folders: `config.json` and `*.safetensors`."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from configuration_llama import LlamaConfig


@torch.no_grad()
def init_weights(model: nn.Module, initializer_range: float, seed: int) -> None:
    """Fills the parameters: norms with 1, matrices from N(0, initializer_range^2).

    Every rank draws each full matrix from the matrix's own seed and keeps its shard. So the weights
    do not depend on the layout, and at most one full matrix is in memory.
    """
    for index, param in enumerate(model.parameters()):
        if param.ndim == 1:
            param.fill_(1.0)
            continue
        generator = torch.Generator(param.device).manual_seed(seed * 1_000_003 + index)
        full = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        full.normal_(0.0, initializer_range, generator=generator)
        if isinstance(param, DTensor):  # src_data_rank=None: each rank cuts its own copy
            full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(full)


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the model's own tensors by Hugging Face's names.

    A tied head is left out, as in Hugging Face's files: it is the embedding.
    """
    state = get_model_state_dict(model)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def read_config(folder: str, overrides: dict[str, Any]) -> LlamaConfig:
    """Returns the model's shape from the folder's config.json, with `overrides` applied.

    Raises ValueError if the file, or an override, is not valid.
    """
    try:
        config = _folder_config(folder)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"model_config.init_from={folder!r}: {error}") from None
    return config.override(overrides)


@functools.cache  # the folder may disappear after the start
def _folder_config(folder: str) -> LlamaConfig:
    with open(os.path.abspath(os.path.join(folder, "config.json"))) as file:
        return LlamaConfig.from_hf(json.load(file))


def check_weights(model: nn.Module, folder: str) -> None:
    """Raises ValueError if the folder's tensors do not match the model's. It reads no weights."""
    metadata = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    found = {name: tensor.size for name, tensor in metadata.items()}
    wanted = {name: tensor.size() for name, tensor in model_state(model).items()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    for name in sorted(found.keys() | wanted.keys()):
        if name.endswith("rotary_emb.inv_freq"):  # stored by old versions, not a weight
            continue
        shapes = [list(shape[name]) if name in shape else "none" for shape in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model_config.init_from={folder!r}: the shape of {name} in its *.safetensors is "
                f"{shapes[0]}, in the model {shapes[1]}; give another folder or other "
                f"model_config.overrides"
            )


def load_weights(model: nn.Module, folder: str) -> None:
    """Fills a sharded model from the folder, which may have another dtype.

    Each rank reads only its own rows of each tensor. A collective over all ranks.
    """
    dcp.load(model_state(model), storage_reader=HuggingFaceStorageReader(folder))


def write_folder(
    folder: str,
    config: LlamaConfig,
    sizes: dict[str, torch.Size],
    fill: Callable[[dict[str, torch.Tensor]], None],
    dtype: torch.dtype,
    max_file_bytes: int,
) -> int:
    """Writes a folder that transformers' `from_pretrained` reads; returns the number of its files.

    sizes: each weight's, by name. fill: fills the empty tensors that it is given. It is called once
    per file, so at most max_file_bytes (or one tensor) is in memory.
    The folder is complete or absent. Raises ValueError if it exists or cannot be written.
    """
    if os.path.lexists(folder):
        raise ValueError(f"{folder!r} exists; give the name of a new folder")
    groups, room = [], 0
    for name, size in sizes.items():
        num_bytes = size.numel() * dtype.itemsize
        if num_bytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= num_bytes

    temporary = f"{os.path.normpath(folder)}.tmp"
    try:
        os.makedirs(temporary)
    except OSError as error:  # nothing that is there is removed
        raise ValueError(
            f"{temporary!r} cannot be created ({error.strerror}); remove it if a killed export "
            f"left it, or give another folder than {folder!r}"
        ) from None
    try:
        weight_map = {}
        for number, names in enumerate(groups, start=1):
            weights = {name: torch.empty(sizes[name], dtype=dtype) for name in names}
            fill(weights)
            part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            file = f"model{part}.safetensors"
            save_file(weights, os.path.join(temporary, file), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(groups) > 1:
            total_size = sum(size.numel() for size in sizes.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            with open(os.path.join(temporary, "model.safetensors.index.json"), "w") as file:
                json.dump(index, file, indent=2)
        hf_config = {**config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")}
        with open(os.path.join(temporary, "config.json"), "w") as file:
            json.dump(hf_config, file, indent=2)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder!r} cannot be written ({error}); free its disk, or give another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none
    return len(groups)
