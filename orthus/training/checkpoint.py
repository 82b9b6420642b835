"""Training checkpoints: whole folders that appear atomically, and the model folder that `from_pretrained` reads.

`checkpoints/step-00000500/` holds the tensors (torch.distributed.checkpoint, whole or sharded), one `lane-*.pt` per lane (its
loader's position), `settings.yaml` and, written last, the marker `complete.json`. Any number of processes may read it.
[`Checkpoints`] writes it, at once or in a thread from a copy in the memory of the CPU.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthus.adapters import is_quantized
from orthus.training import settings as settings_file
from orthus.training.distributed import rank, world_size
from orthus.training.folders import discard, publish, remove_leftovers

MARKER = "complete.json"
TENSORS = "tensors"


class Loader(Protocol):
    """An iterable of batches that knows its position: after `load_state_dict(state)` a new iterator goes on from there.

    `state_dict()` is asked between batches and must describe the next batch; plain Python values and tensors only.
    """

    def __iter__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class TrainState:
    """All that changes during a run."""

    model: nn.Module
    ema: dict[str, Tensor]
    optimizers: list[Optimizer]
    loaders: dict[int, Loader]  # by lane: those that this process reads
    num_lanes: int = 1  # of all processes
    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent training, over all restarts
    window: dict[str, float] = dataclasses.field(default_factory=dict)  # sums since the last logged step
    mesh: DeviceMesh | None = None  # of the processes, (data, tensor), where layers are split
    waiting: dist.ProcessGroup | None = None  # all processes, where they wait for what the first does alone


class Checkpoints:
    """Writes the checkpoints of a run, in a `with` block that ends when the last one is on the disk. Every process has one, and
    calls it in the same steps.

    `is_async`: `save` copies the tensors to the memory of the CPU and returns, and a thread writes while training goes on; one
    checkpoint at a time. What `save`, `wait` and the end of the block raise is then of an earlier `save`. Weights that do not
    train are not copied, and of what all processes hold each copies and writes a part.
    """

    def __init__(self, output_dir: str | os.PathLike[str], settings: dict[str, Any], keep: int, is_async: bool = False) -> None:
        self.output_dir, self.settings, self.keep = Path(output_dir), settings, keep
        self.group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None  # the thread's own
        on_gpu = torch.cuda.is_initialized()
        copying = StagingOptions(on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu)
        self.stager = DefaultStager(copying)  # keeps its memory, pinned where there is a GPU, from one save to the next
        gpu = torch.cuda.current_device() if on_gpu else -1  # -1: none; a new thread would use GPU 0
        self.thread = ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (gpu,)) if is_async else None
        self.writing: Future[None] | None = None
        _silence_single_process()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            if self.thread is not None:
                self.thread.shutdown()
            self.stager.close()
            if self.group is not None:
                dist.destroy_process_group(self.group)

    def save(self, state: TrainState) -> None:
        """Write `checkpoints/step-*`, then delete all but the newest `keep`.

        Raises OSError if that fails in any process, as on a full disk, in all of them; what was half written is removed, and
        earlier checkpoints stay.
        """
        self.wait()
        marker = {"step": state.step, "seconds": state.seconds, "window": state.window, "lanes": state.num_lanes}
        marker |= {"torch": str(torch.__version__)}
        files = {f"lane-{lane:05d}.pt": _position(loader) for lane, loader in state.loaders.items()}
        if self.thread is None:
            self._write(state.step, _tensors(state), files, json.dumps(marker))
        else:
            changing, resting = _to_write(state)
            tensors = cast(dict[str, Tensor], self.stager.stage(changing)) | resting
            self.writing = self.thread.submit(self._write, state.step, tensors, files, json.dumps(marker))

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    @property
    def has_failed(self) -> bool:
        """Whether the next call will raise. Some processes may know it a moment before others."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def _write(self, step: int, tensors: dict[str, Tensor], files: dict[str, bytes], marker: str) -> None:
        final = self.output_dir / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            self._agreed(lambda: _begin(temporary))
            self._agreed(lambda: [(temporary / name).write_bytes(content) for name, content in files.items()])
            writer = FileSystemWriter(temporary / TENSORS)
            save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            self._agreed(lambda: self._finish(temporary, final, marker))
        except (OSError, CheckpointException) as error:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            last, reason = latest(self.output_dir), (str(error).strip() or repr(error)).splitlines()[-1]
            raise OSError(
                f"{final} could not be written ({reason}); if its disk is full, free space; the same command goes on from "
                f"{'the beginning' if last is None else last}"
            ) from error

    def _finish(self, temporary: Path, final: Path, marker: str) -> None:
        if rank() > 0:
            return
        settings_file.save(self.settings, temporary / "settings.yaml")
        (temporary / MARKER).write_text(marker, encoding="utf-8")
        publish(temporary, final)
        for _, old in _finished(self.output_dir)[: -self.keep]:
            discard(old)

    def _agreed(self, work: Callable[[], object]) -> None:
        """Work in every process, which waits for the others and raises the first OSError of any."""
        errors: list[OSError | None] = [None]
        try:
            work()
        except OSError as error:
            errors = [error]
        if self.group is not None:
            (mine,), errors = errors, [None] * world_size()
            dist.all_gather_object(errors, mine, group=self.group)
        for first in filter(None, errors):
            raise first


def latest(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, None without one. Half-written folders do not count."""
    finished = _finished(output_dir)
    return finished[-1][1] if finished else None


def check_shared(newest: Path | None, output_dir: str) -> None:
    """ValueError where processes see different checkpoints."""
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, newest and newest.name)
    if len(set(found)) > 1:
        raise ValueError(f"processes find different checkpoints in {output_dir} ({found}); put it on storage that all share")


def load_checkpoint(state: TrainState, path: str | os.PathLike[str]) -> None:
    """Fill `state` from a checkpoint folder, written by any number of processes.

    Raises ValueError, before anything has changed, if the folder is not a complete checkpoint or does not fit the
    model, the trainable parameters, the optimisers or the number of lanes.
    """
    folder = Path(path)
    if not (folder / MARKER).is_file():
        raise ValueError(f"{folder} has no {MARKER}: it is not a complete checkpoint; resume from another one")
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if num_lanes(folder) != state.num_lanes:
        raise ValueError(
            f"{folder} has {num_lanes(folder)} lanes and this run has {state.num_lanes}, so the loaders' positions do not fit; "
            f"set run.lanes={num_lanes(folder)}, or start a new output_dir"
        )
    _silence_single_process()
    reader = FileSystemReader(folder / TENSORS)
    stored = _stored_tensors(reader, folder, marker["torch"])
    slots = _optimizer_slots(state, stored, folder)
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(state.model).items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    _check_tensors(tensors, {n: m for n, m in stored.items() if not n.startswith("optimizer.")}, folder)
    tensors |= slots
    load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    for name, (optimizer, parameter) in _optimized(state).items():
        owner = f"optimizer.{name}"
        saved = {key.rpartition(".")[2]: slot for key, slot in slots.items() if key.rpartition(".")[0] == owner}
        if saved:
            optimizer.state[parameter] = saved
    state.step, state.seconds, state.window = marker["step"], marker["seconds"], marker["window"]
    for lane, loader in state.loaders.items():
        loader.load_state_dict(torch.load(folder / f"lane-{lane:05d}.pt", weights_only=True))


# -- tensors -------------------------------------------------------------------------------------------------------


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor; a quantised weight is there as its parts, which are plain tensors."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name in [name for name, value in tensors.items() if is_quantized(value)]:
        weight: Any = tensors.pop(name)
        tensors |= {f"{name}.{part}": getattr(weight, part) for part in weight.__tensor_flatten__()[0]}
    return tensors


def _optimized(state: TrainState) -> dict[str, tuple[Optimizer, nn.Parameter]]:
    """Name -> the optimiser that moves this parameter, and the parameter."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    return {
        names[id(p)]: (optimizer, p)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the run, flat, under its parameter's name: no order of parameters or groups enters."""
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(state.model).items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.items()}
    for name, (optimizer, parameter) in _optimized(state).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def _to_write(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the run's tensors those that this process is to write: what training changes, and weights that rest. Of whole tensors,
    which all processes hold alike, each has about as many bytes; of shared ones, its own part."""
    frozen = {f"model.{name}" for name, p in state.model.named_parameters() if not p.requires_grad}
    written: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    loads = [0] * world_size()
    for name, tensor in sorted(_tensors(state).items(), key=lambda item: -item[1].nbytes):
        writer = rank()
        if not isinstance(tensor, DTensor):
            writer = min(range(world_size()), key=loads.__getitem__)
            loads[writer] += tensor.nbytes
        if writer == rank():  # a quantised weight is there as its parts
            written[name in frozen or name.rpartition(".")[0] in frozen][name] = tensor
    return written


def _stored_tensors(reader: FileSystemReader, folder: Path, written_by: str) -> dict[str, Any]:
    try:
        return reader.read_metadata().state_dict_metadata
    except Exception as error:  # the list of tensors is a pickle: older torch fails on newer in many ways
        raise ValueError(
            f"{folder} was written by torch {written_by} and torch {torch.__version__} cannot read it ({error!r}); "
            "resume with the torch that wrote it, or start from the weights in final/"
        ) from error


def _optimizer_slots(state: TrainState, stored: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Empty tensors for the stored optimiser state, made like their parameters."""
    wanted = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
    optimized = _optimized(state)
    slots: dict[str, Tensor] = {}
    for key, metadata in stored.items():
        if not key.startswith("optimizer."):
            continue
        name, _, slot = key.removeprefix("optimizer.").rpartition(".")
        optimizer, parameter = optimized.get(name, (None, None))
        if optimizer is None or parameter is None or slot not in wanted[type(optimizer)]:
            raise ValueError(
                f"{folder} holds {slot!r} of {name!r}, which this run's optimiser ({type(optimizer).__name__}) does "
                "not have; keep optim.optimizer and the frozen parts as they were, or start a new output_dir"
            )
        if metadata.size == parameter.shape:
            slots[key] = torch.zeros_like(parameter.detach(), dtype=metadata.properties.dtype)
        elif slot == "step":
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            slots[key] = torch.zeros((), dtype=metadata.properties.dtype, device=device)
        else:
            raise ValueError(_misshapen(key, metadata.size, parameter.shape, folder))
    return slots


def _check_tensors(tensors: dict[str, Tensor], stored: dict[str, Any], folder: Path) -> None:
    for verb, names in (("lacks", tensors.keys() - stored.keys()), ("has unknown", stored.keys() - tensors.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{folder} {verb} {len(names)} tensors ({shown}{', ...' if len(names) > 3 else ''}); keep the model "
                "and its frozen parts as they were, or start a new output_dir"
            )
    for name, tensor in tensors.items():
        metadata = stored[name]
        if not isinstance(metadata, TensorStorageMetadata) or metadata.size != tensor.shape:
            raise ValueError(_misshapen(name, getattr(metadata, "size", ()), tensor.shape, folder))


def _misshapen(name: str, stored: Any, wanted: Any, folder: Path) -> str:
    return (
        f"{folder} holds {name} of shape {tuple(stored)} and the model wants {tuple(wanted)}; "
        "keep the model's config as it was, or start a new output_dir"
    )


# -- the loaders' positions ----------------------------------------------------------------------------------------


def num_lanes(folder: Path) -> int:
    """Lanes of the run that wrote a checkpoint. ValueError for one of an earlier version."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if "lanes" not in marker:
        raise ValueError(f"{folder} was written by an earlier version, without lanes; start a new output_dir from its final/")
    return int(marker["lanes"])


def _position(loader: Loader) -> bytes:
    """What `lane-*.pt` holds."""
    buffer = io.BytesIO()
    torch.save(loader.state_dict(), buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the state_dict() of {type(loader).__name__} cannot be read back ({error}); "
            "build it from plain Python values and tensors"
        ) from error
    return buffer.getvalue()


# -- files ---------------------------------------------------------------------------------------------------------


def _finished(output_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    found = []
    for folder in (Path(output_dir) / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d{8,})", folder.name)
        if match and (folder / MARKER).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def _begin(temporary: Path) -> None:
    if rank() == 0:
        remove_leftovers(temporary.parent, "step-*")
        temporary.mkdir(parents=True)


def _silence_single_process() -> None:
    """No notice that torch.distributed.checkpoint works in a single process, which is the usual case here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
