"""Weights from a seed, and Hugging Face folders: `config.json` and `*.safetensors`."""

import contextlib
import fnmatch
import functools
import json
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import configuration_llama
from configuration_llama import LlamaConfig

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
FLOATS = ("F64", "F32", "F16", "BF16")


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
        config = LlamaConfig.from_hf(_configs(folder)[0])
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"model_config.init_from={folder!r}: {error}") from None
    return config.override(overrides)


def sliding_window(folder: str) -> int | None:
    """Returns the tokens that the folder's model attends to, None for all of them."""
    return configuration_llama.sliding_window(_configs(folder)[0])


def special_tokens(folder: str) -> dict[str, Any]:
    """Returns the folder's ids of special tokens, as transformers' `generate` takes them."""
    config, generation = _configs(folder)
    defaults = {"bos_token_id": 1, "eos_token_id": 2}  # of a Llama, where the file has none
    ids = {key: config.get(key, defaults.get(key)) for key in SPECIAL_TOKENS}
    return ids | {key: generation[key] for key in ids if generation.get(key) is not None}


@functools.cache  # the folder may disappear after the start
def _configs(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the content of config.json, and of generation_config.json, which may be missing."""
    optional = "generation_config.json"
    has_optional = os.path.exists(os.path.join(folder, optional))
    return read_json(folder, "config.json"), read_json(folder, optional) if has_optional else {}


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Returns the JSON object in a folder's file. Raises ValueError if it cannot be read."""
    path = os.path.abspath(os.path.join(folder, name))
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {_hint(path) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _hint(path: str) -> str:
    """Returns what to do if the file is a pointer of Git LFS."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(42).startswith(b"version https://git-lfs.github.com/spec/"):
            return "it is a pointer of Git LFS; get the file with `git lfs pull`"
    return ""


class Stored(NamedTuple):
    """A tensor in a file. name: in the file. dtype: in safetensors' words, such as BF16."""

    path: str
    name: str
    shape: list[int]
    dtype: str


def stored_tensors(folder: str) -> dict[str, Stored]:
    """Returns the tensors that transformers loads from the folder, by the model's names.

    It reads model.safetensors, or else the files that model.safetensors.index.json names.
    """
    found = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # A `LlamaModel` was saved without its head, and without this prefix.
                    is_base = name.partition(".")[0] in ("embed_tokens", "layers", "norm")
                    ours, tensor = f"model.{name}" if is_base else name, file.get_slice(name)
                    if ours in found:
                        raise ValueError(f"{path} and {found[ours].path} both hold {ours}")
                    found[ours] = Stored(path, name, tensor.get_shape(), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            reason = _hint(path) or f"{error}; it is damaged or incomplete, so get it again"
            raise ValueError(f"{path} cannot be read: {reason}") from None
    return found


def _weight_files(folder: str) -> list[str]:
    single, index = (os.path.join(folder, name) for name in (SAFETENSORS, INDEX))
    if os.path.isfile(single):
        return [single]
    if not os.path.isfile(index):
        names = sorted(os.listdir(folder))
        old = [name for name in names if fnmatch.fnmatch(name, "pytorch_model*.bin*")]
        raise ValueError(
            f"it has neither {SAFETENSORS} nor {INDEX}; "
            + (
                f"convert its {old[0]} with transformers: load the folder with "
                f"AutoModelForCausalLM.from_pretrained, and save it with save_pretrained"
                if old
                else "give a folder that transformers' save_pretrained wrote"
            )
        )
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; get the file again")
    files = []
    for name in weight_map.values():
        if not isinstance(name, str) or os.path.isabs(name) or ".." in name.split(os.sep):
            raise ValueError(f"{index} names {name!r}, which is not a file of the folder")
        files.append(os.path.join(folder, name))
    files = sorted(set(files))
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(f"{index} names {path}, which is missing; get the file")
    return files


def check_weights(model: nn.Module, folder: str) -> None:
    """Raises ValueError if the folder's tensors do not match the model's.

    It reads no weights, except those of a head that may differ from the embedding it is tied to.
    """
    try:
        _check_weights(model, stored_tensors(folder))
    except ValueError as error:
        raise ValueError(f"model_config.init_from={folder!r}: {error}") from None


def _check_weights(model: nn.Module, found: dict[str, Stored]) -> None:
    wanted = {name: list(tensor.size()) for name, tensor in model_state(model).items()}
    head = found.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    for name in sorted(found.keys() | wanted.keys()):
        if name.endswith("rotary_emb.inv_freq"):  # stored by old versions, not a weight
            continue
        stored = found[name].shape if name in found else "none"
        if stored != wanted.get(name, "none"):
            raise ValueError(
                f"the shape of {name} in its *.safetensors is {stored}, in the model "
                f"{wanted.get(name, 'none')}; give another folder or other model_config.overrides"
            )
        if found[name].dtype not in FLOATS:
            raise ValueError(
                f"{name} is stored as {found[name].dtype}, but must be one of {', '.join(FLOATS)}; "
                f"give a folder that is not quantized"
            )
    if head is not None and not _are_equal(head, found["model.embed_tokens.weight"]):
        raise ValueError(
            "its lm_head.weight differs from its embedding, though its config.json ties them; set "
            "model_config.overrides.tie_word_embeddings=false"
        )


def _are_equal(a: Stored, b: Stored) -> bool:
    """Compares two matrices, some rows at a time."""
    if a.shape != b.shape:
        return False
    with safe_open(a.path, framework="pt") as file_a, safe_open(b.path, framework="pt") as file_b:
        slices = file_a.get_slice(a.name), file_b.get_slice(b.name)
        return all(
            torch.equal(*(part[start : start + 4096].float() for part in slices))
            for start in range(0, a.shape[0], 4096)
        )


@torch.no_grad()
def load_weights(model: nn.Module, folder: str) -> None:
    """Fills a model, sharded by rows, from the folder, which may have another dtype.

    Each rank reads only its own rows of each tensor.
    """
    stored = stored_tensors(folder)
    for name, tensor in model_state(model).items():
        start = 0
        if isinstance(tensor, DTensor):  # FSDP deals rows as `torch.chunk` does
            shard = tensor.device_mesh.ndim - 1  # the dimension before it holds replicas
            assert tensor.placements[shard] == Shard(0), tensor.placements
            rows = -(-len(tensor) // tensor.device_mesh.size(shard))
            start = tensor.device_mesh.get_local_rank(shard) * rows
            tensor = tensor.to_local()
        if tensor.numel():
            with safe_open(stored[name].path, framework="pt") as file:
                tensor.copy_(file.get_slice(stored[name].name)[start : start + len(tensor)])


def write_folder(
    folder: str,
    config: LlamaConfig,
    sizes: dict[str, torch.Size],
    fill: Callable[[dict[str, torch.Tensor]], None],
    dtype: torch.dtype,
    max_file_bytes: int,
    special_tokens: dict[str, Any],
    copy_tokenizer: Callable[[str], None],
) -> int:
    """Writes a folder that transformers' `from_pretrained` reads; returns the number of its files.

    sizes: each weight's, by name. fill: fills the empty tensors that it is given. It is called once
    per file, so at most max_file_bytes (or one tensor) is in memory. special_tokens: their ids.
    copy_tokenizer: copies the tokenizer's files into the folder that it is given.
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
            with open(os.path.join(temporary, INDEX), "w") as file:
                json.dump(index, file, indent=2)
        hf_config = {**config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")}
        for name, content in (
            ("config.json", {**hf_config, **special_tokens}),  # null: not Llama's default
            ("generation_config.json", special_tokens),
        ):
            with open(os.path.join(temporary, name), "w") as file:
                json.dump(content, file, indent=2)
        copy_tokenizer(temporary)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder!r} cannot be written ({error}); free its disk, or give another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none
    return len(groups)
