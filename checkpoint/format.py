"""What a checkpoint is on the disk: its files, its manifest, and how it becomes whole at once.

A folder `step-00000100` holds what torch.distributed.checkpoint (DCP) writes, each rank its own
shards of model, optimizer and generators, and a `manifest.json` with the rest: step, scheduler,
config, versions, and the size and CRC-32 of every file. The position in the data is the step, since
a batch is a function of (seed, step).

The folder is written as `step-00000100.tmp`, and renamed when all of it is on the disk. DCP's
`.metadata` is a pickle: it is read only beside a manifest of this program that fits it, and only
DCP's own records are built from it.
"""

import json
import os
import pickle
import re
import shutil
import zlib
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

FORMAT = "llama-pretrain checkpoint 1"
STEP_NAME = r"step-\d{8}"  # ordered by name as by step
# The names that a `.metadata` of tensors consists of.
PICKLED_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size float64 float32 bfloat16 float16 int64 int32 uint8 bool",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or gone on from, in one sentence for a person."""


def checkpoints(path: str) -> list[str]:
    """Returns the folders of the checkpoints at `path`, the newest first: itself, or a run's."""
    path = os.path.normpath(path)
    if re.fullmatch(STEP_NAME, os.path.basename(path)):
        return [path]
    names = os.listdir(path) if os.path.isdir(path) else []
    steps = sorted((name for name in names if re.fullmatch(STEP_NAME, name)), reverse=True)
    return [os.path.join(path, name) for name in steps]


def read_manifest(path: str) -> dict[str, Any]:
    """Returns a checkpoint's manifest. Raises CheckpointError if it is missing or damaged."""
    try:
        with open(os.path.join(path, "manifest.json")) as file:
            manifest = json.load(file)
        if manifest.pop("crc32") == _manifest_crc(manifest) and manifest["format"] == FORMAT:
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its manifest.json cannot be read: {error!r}") from None
    raise CheckpointError("its manifest.json does not fit its own checksum or format")


def damage(path: str, part: int = 0, parts: int = 1) -> str:
    """Returns what is wrong with a checkpoint, "" if nothing.

    It reads every `parts`-th file whole, from the part-th on: the ranks share the work.
    """
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[part::parts]:
            size, crc32 = files[name]
            found = _fingerprint(os.path.join(path, name))
            if found[0] != size:
                return f"{name} has {found[0]:,} bytes, not {size:,}"
            if found[1] != crc32:
                return f"{name} does not fit its checksum"
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _manifest_crc(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _fingerprint(path: str | os.PathLike) -> tuple[int, int]:
    """Returns a file's size and CRC-32, which takes about 0.3 s per GB."""
    size = crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return size, crc32


def _sync(path: str) -> None:
    """Makes a file's content, or a folder's entries, outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: str) -> None:
    """Removes a checkpoint that is never seen half removed."""
    os.rename(path, path + ".removed")
    shutil.rmtree(path + ".removed")


def remove_leftovers(output_dir: str) -> None:
    """Removes what was half written or half removed when a run was killed."""
    for name in os.listdir(output_dir):
        if re.fullmatch(STEP_NAME + r"\.(tmp|removed)", name):
            shutil.rmtree(os.path.join(output_dir, name))


class Writer(dcp.FileSystemWriter):
    """Writes into `STEP.tmp`, and renames it to `STEP` once it is whole and on the disk.

    DCP calls `write_data` on every rank, gathers what that returns, and calls `finish` with it on
    rank 0. An error on any rank reaches all of them. It all happens in DCP's background thread.
    """

    def __init__(self, keep_last: int) -> None:
        # It makes the copy in host memory, too, that training waits for: for a GPU a pinned one,
        # which is kept for the next.
        super().__init__("", cache_staged_state_dict=torch.cuda.is_available())
        self.keep_last = keep_last
        self.manifest: dict[str, Any] = {}  # of the next checkpoint, without its files

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Writes and fsyncs this rank's file; returns DCP's results and the file's fingerprint."""
        results = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in results}
        future = torch.futures.Future()
        future.set_result((results, {name: _fingerprint(self.path / name) for name in names}))
        return future

    def finish(self, metadata: dcp.Metadata, results: list[tuple]) -> None:
        super().finish(metadata, [rank_results for rank_results, _ in results])
        temporary = os.fspath(self.path)
        files = {name: found for _, of_rank in results for name, found in of_rank.items()}
        for name, (size, _) in files.items():
            file = os.path.join(temporary, name)
            if not os.path.exists(file) or os.path.getsize(file) != size:
                raise OSError(
                    f"rank 0 does not see {name} as its rank wrote it; train_config.output_dir has "
                    f"to be on a disk that all nodes share"
                )
        files[".metadata"] = _fingerprint(self.path / ".metadata")
        manifest = {"format": FORMAT, **self.manifest, "files": files}
        # As JSON gives it back: floats and tuples, too, fit the checksum.
        manifest = json.loads(json.dumps(manifest))
        manifest["crc32"] = _manifest_crc(manifest)
        with open(os.path.join(temporary, "manifest.json"), "w") as file:
            json.dump(manifest, file, indent=1)
        _sync(file.name)
        _sync(temporary)

        path = os.path.abspath(temporary.removesuffix(".tmp"))
        if os.path.exists(path):  # damaged, or this run would have gone on from it
            remove(path)
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
        if self.keep_last:
            run = checkpoints(os.path.dirname(path))
            for older in run[run.index(path) :][self.keep_last :]:
                try:
                    remove(older)
                except OSError as error:  # the new one stands all the same
                    print(f"warning: {older} could not be removed: {error}", flush=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in PICKLED_NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads only tensors (torch.load with weights_only); of the pickle, only DCP's records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        with open(self.path / ".metadata", "rb") as file:
            return _Unpickler(file).load()
