"""Joining the process group that torchrun describes in the environment, and the place of this process in it."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

JOIN_SECONDS = 1800.0  # as torch waits for a store
WAIT = timedelta(days=7)  # NCCL gives up after ten minutes, others after thirty: too soon for an evaluation, or a slow disk


def rank() -> int:
    """This process's number in the group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def waiting_group() -> dist.ProcessGroup | None:
    """All processes, for a [`barrier`] at which most wait long for one; None for a single process. Every process calls this."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=WAIT)) if world_size() > 1 else None


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for every process, on `group` (None: all) and as long as that waits."""
    if world_size() > 1:
        dist.barrier(group)


@contextmanager
def joined(device: str = "cpu") -> Iterator[tuple[int, int]]:
    """(rank, world size) for the duration of the block; one process without torchrun is (0, 1). On "cuda" each process takes
    the GPU of its local rank."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device} is not available here; use device=cpu, or a machine with a GPU and its driver")
    if device != "cpu" and ":" in device and "RANK" in os.environ:
        raise ValueError(f"device={device} names one device for all processes; use device={device.split(':')[0]}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    store, number, size = next(dist.rendezvous("env://"))
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_unused_part(store, number, size), rank=number, world_size=size)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _unused_part(store: dist.Store, number: int, size: int) -> dist.Store:
    """A part of the store that exactly these processes agree on, so that nothing in it is left from earlier ones.

    torchrun keeps its store when it starts processes again (`--max-restarts`), with the addresses of those that are gone; how
    often it did so may differ between machines. So each process puts a name of its own there, and a part is theirs when all
    have said that they see the same names. Raises TimeoutError if that does not happen.
    """
    store.set(f"orthus/name/{number}", uuid.uuid4().hex)
    deadline, keys = time.monotonic() + JOIN_SECONDS, [f"orthus/name/{other}" for other in range(size)]
    while time.monotonic() < deadline:
        if store.check(keys):  # to get one that is missing waits as long as the store does
            part = f"orthus/{hashlib.sha256(b''.join(store.multi_get(keys))).hexdigest()}"
            store.set(f"{part}/seen/{number}", "")
            if store.check([f"{part}/seen/{other}" for other in range(size)]):
                return dist.PrefixStore(part, store)
        time.sleep(0.05)
    raise TimeoutError(f"process {number} of {size} waited {JOIN_SECONDS:g} s for the others; look for why one of them ended")
