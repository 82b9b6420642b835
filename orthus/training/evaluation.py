"""Small evaluations during a run, with the averaged weights: losses on held-out batches, and a score of what the model draws.

Held-out batch i of `run.eval_batches` is the first batch of lane i, and its noise is seeded by i alone: the same batches and
noise each time, in every run, with any number of processes. Nothing of it touches the run. Lane i has examples i,
i + eval_batches, ... of the data: where there are too few for a batch, it has them again, and they count as often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from orthus.training.checkpoint import TrainState
from orthus.training.distributed import barrier, rank, world_size
from orthus.training.operations import AMOUNTS
from orthus.training.optim import averaged
from orthus.training.settings import RunSettings
from orthus.training.step import Batch, batch_totals, loss_weights, noise_seed, to_device

SEED = 0  # of the noise and the order of held-out data


@dataclass(frozen=True)
class Evaluation:
    """`make_loader`: from a lane and the number of lanes to that lane's held-out data. `score`: metrics by name of what the model
    of a step draws; asked in the first process."""

    make_loader: Callable[[int, int], Iterable[Batch]]
    score: Callable[[nn.Module, int], dict[str, float]] | None = None


class Evaluator:
    """The held-out batches of this process; every process calls it at the same steps."""

    def __init__(self, evaluation: Evaluation, run: RunSettings) -> None:
        if evaluation.score is not None:
            check_scores(run)
        self.score, self.run = evaluation.score, run
        num_groups = world_size() // run.tensor_parallel  # of processes, each of which evaluates other batches
        self.batches: dict[int, Batch] = {}  # as many in each process, for sharded layers; those beyond the number do not count
        for place in range(rank() // run.tensor_parallel, -(-run.eval_batches // num_groups) * num_groups, num_groups):
            loader = evaluation.make_loader(place % run.eval_batches, run.eval_batches)
            self.batches[place] = next(iter(loader))

    def is_due(self, step: int) -> bool:
        return step % self.run.eval_every == 0 or step == self.run.num_steps

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`eval/*` of the step: `eval/loss` and `eval/loss/*`, what `score` says, and the seconds it took."""
        started = time.perf_counter()
        with averaged(state.model, state.ema) as model, _untouched(model, self.run.device), torch.no_grad():
            found = held_out_losses(model, self.batches, self.run)
            if self.score is not None:
                found |= self.score(model, state.step) if rank() == 0 else {}
                barrier(state.waiting)
        return {**found, "eval/seconds": time.perf_counter() - started}


def check_scores(run: RunSettings) -> None:
    """ValueError where no process could draw the pictures that are scored."""
    if run.shares_weights:
        raise ValueError(
            "scores are of pictures that a whole model draws, and no process holds a shared one; set samples.num_graded=0"
        )


def evaluator(evaluation: Evaluation | None, run: RunSettings) -> Evaluator | None:
    """None for a run that never evaluates. ValueError for one that has nothing to evaluate on."""
    if not run.eval_every:
        return None
    if evaluation is None:
        raise ValueError(f"run.eval_every={run.eval_every} needs held-out data, of which there is none here; set it to 0")
    return Evaluator(evaluation, run)


def held_out_losses(model: nn.Module, batches: dict[int, Batch], run: RunSettings) -> dict[str, float]:
    """Mean of each loss term over all targets of the batches of all processes, and their weighted sum."""
    weights, device = loss_weights(model, run), torch.device(run.device)
    totals = torch.zeros(2 * len(weights) + len(AMOUNTS), dtype=torch.float64, device=device)
    for place, batch in batches.items():
        torch.manual_seed(noise_seed(SEED, 0, place))
        with torch.autocast(device.type, torch.bfloat16, enabled=run.autocast == "bfloat16"):
            output = model(**to_device(batch, device))
        if place < run.eval_batches:
            totals += batch_totals(output, weights, batch, device)
    if world_size() > 1:
        dist.all_reduce(totals)
    sums, counts, _ = totals.split([len(weights), len(weights), len(AMOUNTS)])
    means = {k: total / count for k, total, count in zip(weights, sums.tolist(), counts.tolist(), strict=True) if count}
    if not means:
        raise ValueError(f"no held-out batch has a target for any of {list(weights)}; check their labels, or run.eval_every=0")
    whole = sum(weights[k] * mean for k, mean in means.items())
    return {"eval/loss": whole, **{f"eval/loss/{k}": mean for k, mean in means.items()}}


@contextmanager
def _untouched(model: nn.Module, device: str) -> Iterator[None]:
    """Random states are as before afterwards, and no gathered copy of the averaged weights stays in a sharded model."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device.startswith("cuda") else []):
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
