"""The files of a checkpoint: how they are written, checked and read.

A folder `step-00000100` holds the files of torch.distributed.checkpoint (DCP), in which each rank
writes its own shards of model, optimizer and random states. `manifest.json` holds the rest: step,
scheduler, config, versions, and the size and CRC-32 of each file. The step is also the position in
the data, since a batch is a function of (seed, step).

A checkpoint is complete or absent: it is written as `step-00000100.tmp`, fsynced and renamed.
"""

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorProperties

FORMAT = "llama-pretrain checkpoint 1"
STEP_NAME = r"step-\d{8}"  # sorts by step
FILE_NAME = r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|manifest\.json"
# The names in a `.metadata` of tensors.
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
    """A checkpoint cannot be read, written or resumed from; the message is one sentence."""


def checkpoints(path: str) -> list[str]:
    """Returns the checkpoints of a run, the newest first; or `path` itself if it is one.

    Raises CheckpointError if the run's folder cannot be read.
    """
    path = os.path.normpath(path)
    if re.fullmatch(STEP_NAME, os.path.basename(path)):
        return [path] if os.path.isdir(path) else []
    try:
        names = os.listdir(path) if os.path.isdir(path) else []
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); make it readable"
        ) from None
    steps = sorted((name for name in names if re.fullmatch(STEP_NAME, name)), reverse=True)
    return [os.path.join(path, name) for name in steps]


def read_manifest(path: str) -> dict[str, Any]:
    """Returns a checkpoint's manifest. Raises CheckpointError if it is missing or damaged."""
    try:
        with open(os.path.join(path, "manifest.json")) as file:
            manifest = json.load(file)
        if manifest.pop("crc32") == _manifest_crc(manifest) and manifest["format"] == FORMAT:
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its manifest.json cannot be read: {error!r}") from None
    raise CheckpointError("its manifest.json does not match its own checksum or format")


def find_damage(path: str, part: int = 0, parts: int = 1) -> str:
    """Returns a description of a checkpoint's damage, or "" if it is complete.

    It reads every `parts`-th file, beginning with number `part`, so that the ranks share the work.
    """
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[part::parts]:
            size, crc32 = files[name]
            found = _fingerprint(os.path.join(path, name))
            if found[0] != size:
                return f"{name} has {found[0]:,} bytes, not {size:,}"
            if found[1] != crc32:
                return f"{name} does not match its checksum"
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _manifest_crc(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _fingerprint(path: str | os.PathLike) -> tuple[int, int]:
    """Returns a file's size and CRC-32."""
    size = crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return size, crc32


def _sync(path: str) -> None:
    """Writes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def check_own(path: str | os.PathLike) -> None:
    """Raises CheckpointError if `path` is not a folder that holds only a checkpoint's files."""
    if os.path.islink(path) or not os.path.isdir(path):
        raise CheckpointError(f"{path} is a link or a file, not a checkpoint's folder; move it")
    for name in os.listdir(path):
        if not re.fullmatch(FILE_NAME, name):
            raise CheckpointError(f"{path} holds {name!r}, which is not a checkpoint's; move it")


def remove(path: str) -> None:
    """Removes a checkpoint. If `path` is a link, only the link is removed.

    The name disappears first, so a killed run leaves no part of it. Raises CheckpointError if the
    folder holds anything else.
    """
    if os.path.islink(path):
        os.unlink(path)
        return
    check_own(path)
    os.rename(path, path + ".removed")
    shutil.rmtree(path + ".removed")


def remove_partial(path: str, log: Callable[[str], None]) -> None:
    """Removes the partial checkpoint of a killed run or a failed save; warns if it cannot."""
    try:
        check_own(path)
        shutil.rmtree(path)
    except (CheckpointError, OSError) as error:
        log(f"warning: not removed: {error}")


def remove_leftovers(output_dir: str, log: Callable[[str], None]) -> None:
    """Removes the partial checkpoints of a killed run."""
    for name in os.listdir(output_dir):
        if re.fullmatch(STEP_NAME + r"\.(tmp|removed)", name):
            remove_partial(os.path.join(output_dir, name), log)


class Writer(dcp.FileSystemWriter):
    """Writes a checkpoint as `STEP.tmp`, and renames it to `STEP` when it is complete.

    In a background thread DCP calls `write_data` on every rank, and then `finish` on rank 0 with
    the results of all ranks. An error on any rank reaches all of them.
    """

    def __init__(self, keep_last: int, log: Callable[[str], None]) -> None:
        # Training waits for the copy to host memory, so its pinned buffers are kept.
        super().__init__("", cache_staged_state_dict=torch.cuda.is_available())
        self.keep_last, self.log = keep_last, log
        self.damaged: set[str] = set()  # names of checkpoints that `keep_last` does not count
        self.manifest: dict[str, Any] = {}  # the next checkpoint's, without its files

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        """Creates the folder; raises CheckpointError if there is one that is not a checkpoint's."""
        plan = super().prepare_local_plan(plan)
        check_own(self.path)
        return plan

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Writes and fsyncs this rank's file; returns DCP's results and the file's fingerprint."""
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save hides that the disk is full
                raise error.__context__ from None
            raise
        names = {result.storage_data.relative_path for result in results}
        future = torch.futures.Future()
        future.set_result((results, {name: _fingerprint(self.path / name) for name in names}))
        return future

    def finish(self, metadata: dcp.Metadata, results: list[tuple]) -> None:
        """Writes `.metadata` and the manifest, renames the folder, and removes old checkpoints."""
        super().finish(metadata, [rank_results for rank_results, _ in results])
        temporary = os.fspath(self.path)
        files = {name: found for _, of_rank in results for name, found in of_rank.items()}
        for name, (size, _) in files.items():
            file = os.path.join(temporary, name)
            if not os.path.exists(file) or os.path.getsize(file) != size:
                raise OSError(
                    f"rank 0 does not see {name} as its rank wrote it; put train_config.output_dir "
                    f"on a disk that all nodes share"
                )
        files[".metadata"] = _fingerprint(self.path / ".metadata")
        manifest = {"format": FORMAT, **self.manifest, "files": files}
        # The checksum covers the manifest as JSON returns it: tuples become lists.
        manifest = json.loads(json.dumps(manifest))
        manifest["crc32"] = _manifest_crc(manifest)
        with open(os.path.join(temporary, "manifest.json"), "w") as file:
            json.dump(manifest, file, indent=1)
        _sync(file.name)
        _sync(temporary)

        path = os.path.abspath(temporary.removesuffix(".tmp"))
        if os.path.lexists(path):  # damaged, or this run would have resumed from it
            remove(path)
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
        self.damaged.discard(os.path.basename(path))
        if self.keep_last:
            self.prune(os.path.dirname(path), self.keep_last)

    def prune(self, output_dir: str, keep_last: int) -> None:
        """Removes checkpoints before the run's newest complete one; the last complete ones stay."""
        run = checkpoints(output_dir)
        complete = [path for path in run if os.path.basename(path) not in self.damaged]
        for path in run[run.index(complete[0]) :] if complete else []:
            if path not in complete[:keep_last]:
                try:
                    remove(path)
                except (CheckpointError, OSError) as error:  # the newest is complete anyway
                    self.log(f"warning: not removed: {error}")


class _Unpickler(pickle._Unpickler):
    """Reads `.metadata`, a pickle that may be forged: it builds only DCP's records.

    It extends pickle's private reader in Python (3.11 to 3.14): the one in C has fixed opcodes.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in PICKLED_NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!r:.100}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Passes a record's attributes to its constructor, which refuses any others."""
        state, record = self.stack.pop(), self.stack[-1]
        if isinstance(record, TensorProperties):
            record.__setstate__(state)
        else:
            type(record).__init__(record, **state)

    def push_list(self, size: int) -> None:
        """Takes the place of tuples: hashing a deep tuple would overflow the C stack."""
        self.append([self.stack.pop(-i) for i in range(size, 0, -1)])

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    for n, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), start=1):
        dispatch[code[0]] = lambda self, n=n: self.push_list(n)


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's tensors, and runs no code that its files may hold.

    metadata: DCP's records of the tensors. DCP reads the tensors with `weights_only`.
    """

    def __init__(self, path: str) -> None:
        """Raises CheckpointError if `.metadata` is not the records of this checkpoint's tensors."""
        super().__init__(path)
        files = read_manifest(path)["files"]
        try:
            with open(self.path / ".metadata", "rb") as file:
                self.metadata = _Unpickler(file).load()
            for name, x in self.metadata.state_dict_metadata.items():
                tensor = torch.empty(x.size, dtype=x.properties.dtype, device="meta")
                fits = tensor.nbytes <= sum(size for size, _ in files.values())
                is_record = (x.size, x.properties.dtype) == (tensor.shape, tensor.dtype)
                if not (isinstance(name, str) and is_record and fits):
                    raise pickle.UnpicklingError("a tensor does not fit into the files")
            if not {x.relative_path for x in self.metadata.storage_data.values()} <= files.keys():
                raise pickle.UnpicklingError("it names a file that is not in manifest.json")
        except Exception as error:  # a forged pickle can raise any
            reason = error if isinstance(error, pickle.UnpicklingError) else type(error).__name__
            raise CheckpointError(
                f"{path}/.metadata cannot be read ({reason}); it may hold only DCP's records of "
                f"this checkpoint's tensors; use another checkpoint"
            ) from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        return self.metadata

    def load(self, state: dict[str, Any], **options: Any) -> None:
        """Fills the tensors of `state` in place. options: dcp.load's."""
        try:
            dcp.load(state, storage_reader=self, **options)
        except dcp.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise CheckpointError(
                f"{self.path} cannot be loaded ({f'{reason!r}':.200}); it must hold this model's "
                f"tensors; use another checkpoint"
            ) from None
