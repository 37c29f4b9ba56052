"""Commands for checkpoints.

    python -m checkpoint inspect RUN_OR_STEP          # checks it; prints step, sizes and config
    python -m checkpoint export RUN_OR_STEP OUT_DIR   # a folder for transformers' from_pretrained
    python -m checkpoint sample RUN_OR_STEP --prompt TEXT   # writes text after a prompt

RUN_OR_STEP is a run's output_dir, which means its newest checkpoint, or a `step-00000100` in it.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from functools import partial

import torch

from configuration_llama import LlamaConfig

from . import tokenizer, weights
from .format import CheckpointError, Reader, checkpoints, find_damage, read_manifest


def newest_complete(path: str) -> str:
    """Returns the newest complete checkpoint at `path`; warns of damaged ones."""
    if not (found := checkpoints(path)):
        where = os.path.abspath(path)
        problem = f"holds no complete checkpoint (looked in {where})"
        if not os.path.lexists(path):
            problem = f"does not exist (looked for {where})"
        raise CheckpointError(
            f"{path!r} {problem}; give a run's output_dir, or one step-... folder in it"
        )
    for checkpoint in found:
        problem = find_damage(checkpoint)
        if not problem:
            return checkpoint
        print(f"warning: {checkpoint} is damaged and skipped: {problem}", file=sys.stderr)
    raise CheckpointError(
        f"{path!r} holds no complete checkpoint; give a run's output_dir, or one step-... folder"
    )


def export(path: str, out_dir: str, dtype: str, max_shard_gib: float) -> None:
    """Writes the weights of a checkpoint as a Hugging Face folder."""
    path = newest_complete(path)
    config = read_manifest(path)["config"]
    if not 0 < max_shard_gib < math.inf:
        raise ValueError(f"--max-shard-gib {max_shard_gib:g} must be a number above 0")
    reader = Reader(path)
    saved = reader.metadata.state_dict_metadata
    sizes = {k.partition(".")[2]: x.size for k, x in saved.items() if k.startswith("model.")}

    def fill(weights: dict[str, torch.Tensor]) -> None:
        reader.load({"model": weights}, no_dist=True)

    shape = LlamaConfig(**config["llama_config"])
    longest = max(shape.max_position_embeddings, config["data_config"]["seqlen"])
    name, special_tokens = tokenizer.of_checkpoint(path)
    files = weights.write_folder(
        out_dir,
        shape.override({"max_position_embeddings": longest}),
        sizes,
        fill,
        getattr(torch, dtype),
        int(max_shard_gib * 2**30),
        special_tokens,
        partial(tokenizer.copy, name),
    )
    print(f"{path} -> {out_dir}: {len(sizes)} tensors in {dtype}, {files} files")
    if not name:
        print("warning: the tokenizer is unknown; copy it into the folder", file=sys.stderr)


def sample(path: str, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Prints a prompt and the text that a checkpoint's model writes after it.

    tokens: how many at the most; the end-of-text token ends it too. temperature: 0 takes the most
    likely token each time. transformers' Llama writes, on a GPU if there is one.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{error}; to sample, `pip install transformers`") from None
    path = newest_complete(path)
    config = LlamaConfig(**read_manifest(path)["config"]["llama_config"])
    if not config.is_causal:
        raise ValueError(f"{path} was trained with is_causal=False, so it cannot write text")
    name, special_tokens = tokenizer.of_checkpoint(path)
    if not name:
        folder = os.path.join(os.path.dirname(path), "tokenizer")
        raise ValueError(f"the tokenizer of {path} is unknown; copy its files into {folder}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.copy(name, folder)
        try:
            codec = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of many types: a file is missing or damaged
            raise ValueError(f"the tokenizer {name} cannot be loaded: {error!r:.200}") from None
    # As in training: no token before the text.
    inputs = codec(prompt, return_tensors="pt", add_special_tokens=False)
    if not inputs["input_ids"].numel():
        raise ValueError(f"--prompt {prompt!r} has no token; give a text")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    model.generation_config = transformers.GenerationConfig(**special_tokens)
    parameters = {name: param.data for name, param in model.named_parameters()}
    Reader(path).load({"model": parameters}, no_dist=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    # top_k=0: all tokens, not transformers' default of 50.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    written = model.to(device).generate(**inputs.to(device), max_new_tokens=tokens, **sampling)
    print(codec.decode(written[0], skip_special_tokens=True))


def inspect(path: str) -> None:
    """Reads a checkpoint's files to check them, and prints its step, sizes and config."""
    path = newest_complete(path)
    manifest = read_manifest(path)
    saved = Reader(path).metadata.state_dict_metadata
    print(f"{path}: complete\nstep: {manifest['step']}")
    print(f"written by: {manifest['world_size']} processes")
    for part in ("model", "optimizer", "rng"):
        tensors = [x for name, x in saved.items() if name.startswith(f"{part}.")]
        size = sum(x.size.numel() * x.properties.dtype.itemsize for x in tensors)
        print(f"{part}: {len(tensors)} tensors, {size / 1e6:,.1f} MB")
    files = manifest["files"].values()
    print(f"on disk: {len(files)} files, {sum(size for size, _ in files) / 1e6:,.1f} MB")
    print(json.dumps(manifest["config"], indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting, exporting, sampling = map(commands.add_parser, ("inspect", "export", "sample"))
    for command in (inspecting, exporting, sampling):
        command.add_argument("path", type=os.path.expanduser, metavar="RUN_OR_STEP")
    exporting.add_argument("out_dir", type=os.path.expanduser, metavar="OUT_DIR")
    exporting.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    exporting.add_argument("--max-shard-gib", type=float, default=5.0)
    sampling.add_argument("--prompt", required=True, metavar="TEXT")
    sampling.add_argument("--tokens", type=int, default=100, help="to write, at the most")
    sampling.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    sampling.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone
    try:
        commands = {"inspect": inspect, "export": export, "sample": sample}
        commands[options.pop("command")](**options)
    except (ValueError, OSError, ImportError) as error:  # ImportError: a tokenizer's library
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
