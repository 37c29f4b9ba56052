"""Which checkpoint a run begins with, and whether its config fits: by paths and manifests alone."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from .format import STEP_NAME, CheckpointError, checkpoints, read_manifest

# Keys, or their beginnings, that may not change on resume. All others may.
FIXED = ("data", "data_config.", "llama_config.", "train_config.seed")
# Except these, if a checkpoint has the fingerprints of its corpora: the files may have moved.
CORPORA = ("data", "data_config.source", "data_config.validation_source")
# Keys of a run's place and its log. They do not change its training.
PLACE = (
    "machine.",
    "tokenizer.",
    "branch_of",
    "train_config.output_dir",
    "train_config.resume",
    "train_config.continue_from",
    "train_config.log_interval",
    "train_config.wandb_project",
    "model_config.init_from",
)
# Fields of the model that a new stage may change: no weight depends on them.
FREE_FIELDS = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "initializer_range",
    "is_causal",
)


def find(config: dict[str, Any], restarts: int) -> tuple[list[str], bool]:
    """Returns the checkpoints that a run may load, the newest first, and whether it resumes them.

    There are none if the run starts anew. It does not resume checkpoints of
    `train_config.continue_from`: a new run begins with their weights and optimizer state.

    config: the run's. restarts: the number of restarts by torchrun; a restarted run ignores
    `resume` if it has checkpoints of its own.
    Raises CheckpointError if the run would lose or mix up files in output_dir.
    """
    train_config = config["train_config"]
    resume, output_dir = train_config["resume"], train_config["output_dir"]
    continue_from, own = train_config["continue_from"], checkpoints(output_dir)
    if re.fullmatch(STEP_NAME, os.path.basename(os.path.normpath(output_dir))):
        raise CheckpointError(
            f"train_config.output_dir={output_dir!r} has the name of a checkpoint; give a folder "
            f"of another name"
        )
    if continue_from:
        if resume not in ("auto", "never"):
            raise CheckpointError(
                f"train_config.resume={resume!r} and continue_from={continue_from!r} exclude each "
                f"other: the first resumes a run, the second begins a new one; give one"
            )
        path = os.path.realpath(continue_from)
        if os.path.realpath(output_dir) in (path, os.path.dirname(path)):
            raise CheckpointError(
                f"train_config.continue_from={continue_from!r} lies in train_config.output_dir, "
                f"but begins a new run; give another output_dir"
            )
    if own and (resume == "auto" or restarts):
        return own, True
    if resume == "never":
        if not restarts and (own or os.path.exists(os.path.join(output_dir, "metrics.jsonl"))):
            raise CheckpointError(
                f"train_config.resume='never', but train_config.output_dir={output_dir!r} holds a "
                f"run; give another output_dir, remove this one, or set resume='auto'"
            )
    if resume in ("auto", "never"):
        found = checkpoints(continue_from) if continue_from else []
        if continue_from and not found:
            raise CheckpointError(
                f"train_config.continue_from={continue_from!r} holds no checkpoint; give the "
                f"output_dir of a run, or one step-... folder in it"
            )
        return found, False
    if _began_with(own, resume):
        return own, True
    found = checkpoints(resume)
    if not found:
        raise CheckpointError(
            f"train_config.resume={resume!r} holds no checkpoint; it must be 'auto', 'never', the "
            f"output_dir of a run, or one step-... folder in it (looked in "
            f"{os.path.abspath(resume)})"
        )
    if own and not os.path.samefile(own[0], found[0]):
        raise CheckpointError(
            f"train_config.resume={resume!r}, but the newest checkpoint in train_config.output_dir "
            f"is {own[0]}; give another output_dir, or set resume='auto' to resume from it"
        )
    return found, True


def _began_with(own: list[str], resume: str) -> bool:
    """Returns whether a run, by its newest checkpoint, is a branch that began with `resume`."""
    _, manifest = _newest_manifest(own)
    return bool(manifest) and manifest["config"].get("branch_of") == os.path.realpath(resume)


def _newest_manifest(paths: list[str]) -> tuple[str, dict[str, Any]]:
    """Returns the first of the checkpoints whose manifest can be read, and that; or "" and {}."""
    for path in paths:
        try:
            return path, read_manifest(path)
        except CheckpointError:
            continue  # `Checkpointer.resume` warns of it
    return "", {}


def find_weights(config: dict[str, Any]) -> list[str]:
    """Returns the checkpoints that `--evaluate` may load, the newest first: of `resume`, if it is
    a path, or of output_dir, or of `continue_from`.
    """
    train_config = config["train_config"]
    if train_config["resume"] not in ("auto", "never"):
        if found := checkpoints(train_config["resume"]):
            return found
        raise CheckpointError(f"train_config.resume={train_config['resume']!r} holds no checkpoint")
    source = train_config["continue_from"]
    return checkpoints(train_config["output_dir"]) or (checkpoints(source) if source else [])


def check_resume(config: dict[str, Any], restarts: int = 0) -> None:
    """Raises CheckpointError if a run with this config cannot resume, or cannot continue from its
    `continue_from`. It reads only manifests.
    """
    paths, resumes = find(config, restarts)
    path, manifest = _newest_manifest(paths)
    if path:
        (config_changes if resumes else check_model)(path, manifest, config)


def config_changes(
    path: str, manifest: dict[str, Any], config: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns (key, saved value, new value) of each key that differs from the checkpoint's config.

    Keys that only one of the two has come from another version and are ignored.
    Raises CheckpointError for a key that may not change.
    """
    changes = list(differences(manifest["config"], json.loads(json.dumps(config))))
    has_fingerprints = "fingerprints" in manifest["config"]
    for key, saved, new in changes:
        if key.startswith("fingerprints."):
            source = "source" if key == "fingerprints.train" else "validation_source"
            raise CheckpointError(
                f"data_config.{source}={config['data_config'][source]!r} does not hold the "
                f"documents of {path}; restore them, or give another train_config.output_dir"
            )
        may_differ = key in CORPORA and (has_fingerprints or os.path.expanduser(saved) == new)
        if key.startswith(FIXED) and not may_differ:
            raise CheckpointError(
                f"{key}={new!r}, but {path} was trained with {saved!r}, and a run may not change "
                f"this key; set it back, or give another train_config.output_dir"
            )
    if manifest["step"] > config["train_config"]["train_iters"]:
        raise CheckpointError(
            f"train_config.train_iters={config['train_config']['train_iters']}, but {path} has "
            f"more steps; raise train_iters, or give another train_config.output_dir"
        )
    return changes


def check_model(path: str, manifest: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises CheckpointError if the checkpoint's weights do not fit the config's model."""
    saved, new = manifest["config"]["llama_config"], config["llama_config"]
    for key, value, wanted in differences(saved, new):
        if key.partition(".")[0] not in FREE_FIELDS:
            raise CheckpointError(
                f"llama_config.{key}={wanted!r}, but {path} was trained with {value!r}; set "
                f"model_config to the checkpoint's, or give another checkpoint"
            )
    names = [c.get("tokenizer", {}).get("sha256") for c in (manifest["config"], config)]
    if all(names) and names[0] != names[1] and config["model_config"]["check_tokenizer"]:
        name = "bytes" if names[0] == "bytes" else f"{os.path.dirname(path)}/tokenizer"
        raise CheckpointError(
            f"{path} was trained on a corpus of another tokenizer; prepare this one with "
            f"--tokenizer {name}, or set model_config.check_tokenizer=false"
        )


def next_row(saved: dict[str, Any], config: dict[str, Any], step: int) -> int:
    """Returns the row of the data with which a run begins that continues from `step` of another.

    saved, config: of the other run, and of this one. With the same documents, seed and seqlen,
    the rows continue, so that none is trained on twice. Otherwise the first row is 0.
    """
    same = saved.get("fingerprints", {}).get("train") == config["fingerprints"]["train"] and all(
        saved["data_config"].get(key) == config["data_config"][key]
        for key in ("random_document_length", "validation_fraction", "seqlen", "seed")
    )
    batch_size = saved["data_config"]["batch_size"]
    return saved.get("first_row", 0) + step * batch_size if same else 0


def differences(saved: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the keys that both have with different values. rope_scaling counts as a whole, since
    its optional keys change the model.
    """
    for key in [key for key in saved if key in new and saved[key] != new[key]]:
        are_dicts = isinstance(saved[key], dict) and isinstance(new[key], dict)
        if are_dicts and key != "rope_scaling":
            yield from differences(saved[key], new[key], f"{prefix}{key}.")
        else:
            yield prefix + key, saved[key], new[key]
