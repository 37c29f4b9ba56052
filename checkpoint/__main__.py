"""Commands for checkpoints.

    python -m checkpoint inspect RUN_OR_STEP          # checks it; prints step, sizes and config
    python -m checkpoint export RUN_OR_STEP OUT_DIR   # a folder for transformers' from_pretrained
    python -m checkpoint sample RUN_OR_STEP --prompt TEXT   # writes text after a prompt

RUN_OR_STEP is a run's output_dir, which means its newest checkpoint, or a `step-00000100` in it.
"""

import argparse
import json
import os
import sys

import torch

from configuration_llama import LlamaConfig

from . import newest_complete, weights
from .format import Reader, read_manifest


def export(path: str, out_dir: str, dtype: str, max_shard_gib: float) -> None:
    """Writes the weights of a checkpoint as a Hugging Face folder."""
    path = newest_complete(path)
    config = read_manifest(path)["config"]
    reader = Reader(path)
    saved = reader.metadata.state_dict_metadata
    sizes = {k.partition(".")[2]: x.size for k, x in saved.items() if k.startswith("model.")}

    def fill(weights: dict[str, torch.Tensor]) -> None:
        reader.load({"model": weights}, no_dist=True)

    files = weights.write_folder(
        out_dir,
        LlamaConfig(**config["llama_config"]),
        sizes,
        fill,
        getattr(torch, dtype),
        int(max_shard_gib * 2**30),
    )
    print(f"{path} -> {out_dir}: {len(sizes)} tensors in {dtype}, {files} files")


def sample(path: str, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Prints a prompt and what the model of a checkpoint writes after it.

    tokens: at the most; a text also ends with the end-of-text token. temperature: 0 takes the most
    likely token each time. transformers' own Llama writes, on the GPU if there is one.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{error}; to sample, `pip install transformers`") from None
    path = newest_complete(path)
    config = read_manifest(path)["config"]
    llama_config = LlamaConfig(**config["llama_config"])
    if not llama_config.is_causal:
        raise ValueError(f"{path} was trained with is_causal=False, and cannot write text")
    encode, decode, end = text_codec(path, config)
    if not (ids := encode(prompt)):
        raise ValueError("--prompt '' has no token; give a text")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config.to_hf()))
    parameters = {k: v.data for k, v in model.named_parameters()}  # a tied head has no name of its own
    Reader(path).load({"model": parameters}, no_dist=True)
    model.to(device := "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=device)
    written = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        eos_token_id=end,
        pad_token_id=end[0] if end else 0,
    )
    print(decode(written[0].tolist()))


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
    inspecting, exporting = commands.add_parser("inspect"), commands.add_parser("export")
    for command in (inspecting, exporting):
        command.add_argument("path", type=os.path.expanduser, metavar="RUN_OR_STEP")
    exporting.add_argument("out_dir", type=os.path.expanduser, metavar="OUT_DIR")
    exporting.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    exporting.add_argument("--max-shard-gib", type=float, default=5.0)
    options = vars(parser.parse_args())
    try:
        {"inspect": inspect, "export": export}[options.pop("command")](**options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
