"""Joining the process group that torchrun describes in the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(device: str = "cpu") -> Iterator[tuple[int, int]]:
    """(rank, world size) for the duration of the block; one process without torchrun is (0, 1). On "cuda" each process takes
    the GPU of its local rank."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device={device} is not available here; use run.device=cpu, or a machine with a GPU and its driver")
    if device != "cpu" and ":" in device and "RANK" in os.environ:
        raise ValueError(f"run.device={device} names one device for all processes; use run.device={device.split(':')[0]}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
