"""One optimiser step: the losses of a batch of each lane, their gradients summed over all processes, and the update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orthus.training.checkpoint import TrainState
from orthus.training.distributed import rank, world_size
from orthus.training.operations import AMOUNTS, amounts
from orthus.training.optim import lr_factor, set_lr, update_ema
from orthus.training.settings import OptimSettings, RunSettings
from orthus.training.sharding import by_mesh, forget_touched, gradient_norm, loss_factor, reached, sum_gradients, touch
from orthus.training.tensor_parallel import data_group

Batch = dict[str, Any]


class Trainable(Protocol):
    """What [`fit`] asks of a model besides being an `nn.Module`."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term; its keys are the terms."""

    def count_targets(self, batch: Batch) -> dict[str, int]:
        """Number of targets of each loss term in a batch, known before the forward."""

    def save_pretrained(self, save_directory: Path) -> Any:
        """Also with `state_dict`, the weights to write, if it is to be sharded."""

    def __call__(self, **batch: Any) -> Any:
        """An output with `loss_sums` and `loss_counts`: per term, the sum over all targets and their number."""


def train_step(state: TrainState, batches: dict[int, Batch], run: RunSettings, optim: OptimSettings) -> dict[str, float]:
    """One optimiser step on a batch of each lane; returns the global sums `sum/*`, `count/*` and `operations.AMOUNTS`, and
    `grad_norm`."""
    model, device = state.model, torch.device(run.device)
    weights = loss_weights(model, run)
    group = data_group(state.mesh)
    counts = _global_counts(cast(Trainable, model), list(batches.values()), group)
    totals = torch.zeros(2 * len(weights) + len(AMOUNTS), dtype=torch.float64, device=device)  # sums, counts, amounts
    watched = torch.zeros(len(diagnostics(model)), 2, dtype=torch.float64, device=device)
    used = reached(model, 0)
    for lane, batch in batches.items():
        torch.manual_seed(noise_seed(run.seed, state.step, lane))
        with torch.autocast(device.type, torch.bfloat16, enabled=run.autocast == "bfloat16"):
            output = model(**to_device(batch, device))
        terms = [weights[k] / counts[k] * output.loss_sums[k] for k in weights if counts[k] and k in output.loss_sums]
        used = torch.maximum(used, reached(model, sum(terms)))
        loss = cast(Tensor, sum(terms, touch(model)))
        if isinstance(loss, Tensor) and loss.requires_grad:
            (loss * loss_factor(model, run)).backward()
        totals += batch_totals(output, weights, batch, device)
        watched += 0 if len(watched) == 0 else output.diagnostics.to(watched)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if world_size() > 1:
        sum_gradients(model, group)
        dist.all_reduce(totals, group=group)
        dist.all_reduce(watched, group=group)
    forget_touched(model, used)
    is_logged = (state.step + 1) % run.log_every == 0 or state.step + 1 == run.num_steps
    by_part = grad_norms(model) if is_logged else {}
    grad_norm = gradient_norm(parameters)
    for shared_alike in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(shared_alike, optim.clip_norm, grad_norm)
    record = _record(weights, counts, [*totals.tolist(), float(grad_norm)]) | by_part
    for name, (total, count) in zip(diagnostics(model), watched.tolist(), strict=True):
        record |= {f"watched/{name}": total, f"watched_count/{name}": count}
    if not all(math.isfinite(value) for value in record.values()):
        _refuse(state, list(batches.values()), record, run)
    set_lr(state.optimizers, lr_factor(state.step, run.num_steps, optim))
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if state.ema:
        update_ema(state.ema, model, run.ema_decay, state.step)
    state.step += 1
    return record


def diagnostics(model: nn.Module) -> tuple[str, ...]:
    """Names of what the model's outputs count besides losses in `diagnostics` `(names, 2)`: a sum and a number each."""
    return tuple(getattr(model, "diagnostics", ()))


def grad_norms(model: nn.Module) -> dict[str, float]:
    """`grad_norm/*`: norms of the gradients of the model's parts before they are clipped."""
    norms = {}
    for name, part in model.named_children():
        if any(p.grad is not None for p in part.parameters()):
            norms[f"grad_norm/{name}"] = float(gradient_norm(part.parameters()))
    return norms


def loss_weights(model: nn.Module, run: RunSettings) -> dict[str, float]:
    """The model's weights, with those that the run names in their place. ValueError for a term that the model lacks."""
    own = cast(Trainable, model).loss_weights
    for name in run.loss_weights:
        if name not in own:
            raise ValueError(f"run.loss_weights names {name!r}; the losses of {type(model).__name__} are {', '.join(own)}")
    return {**own, **run.loss_weights}


def noise_seed(seed: int, step: int, lane: int) -> int:
    """Seed of all that is drawn in the forward of a lane's batch."""
    return int(np.random.SeedSequence([seed, step, lane]).generate_state(1, np.uint64)[0] >> 1)


# -- the parts of a step -------------------------------------------------------------------------------------------


def _global_counts(model: Trainable, batches: list[Batch], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Targets of each loss term in the whole step, over all processes. Raises ValueError if there is none at all."""
    per_batch = [model.count_targets(batch) for batch in batches]
    names = list(model.loss_weights)
    unknown = {name for counts in per_batch for name in counts} - set(names)
    if unknown:
        raise ValueError(f"count_targets names {sorted(unknown)}, but loss_weights has {names}; give each a weight")
    counts = torch.tensor([sum(int(c.get(name, 0)) for c in per_batch) for name in names], dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(counts, group=group)
    if not counts.any():
        raise ValueError(f"no batch of the step has a target for any of {names}; check the labels of the loader")
    return dict(zip(names, counts.tolist(), strict=True))


def batch_totals(output: Any, weights: dict[str, float], batch: Batch, device: torch.device) -> Tensor:
    """Loss sums and loss counts of one batch in the order of `weights`, and its `operations.AMOUNTS`."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = [output.loss_sums.get(k, zero) for k in weights]
    counts = [output.loss_counts.get(k, zero) for k in weights]
    values = [*sums, *counts, *amounts(batch)]
    return torch.stack([torch.as_tensor(v, device=device).detach().to(torch.float64) for v in values])


def _record(weights: dict[str, float], counts: dict[str, int], totals: list[float]) -> dict[str, float]:
    num_terms = len(weights)
    *totals, grad_norm = totals
    for name, counted in zip(weights, totals[num_terms : 2 * num_terms], strict=True):
        if math.isfinite(counted) and counted != counts[name]:
            raise ValueError(
                f"loss {name!r}: count_targets promised {counts[name]} targets and the forward counted {counted:g}; "
                "make the model's two counts agree"
            )
    record = {f"sum/{name}": total for name, total in zip(weights, totals, strict=False)}
    record |= {f"count/{name}": float(counts[name]) for name in weights}
    return record | dict(zip(AMOUNTS, totals[2 * num_terms :], strict=True)) | {"grad_norm": grad_norm}


def _refuse(state: TrainState, batches: list[Batch], record: dict[str, float], run: RunSettings) -> None:
    path = Path(run.output_dir) / f"not-finite-step-{state.step + 1}-process-{rank()}.pt"
    torch.save(batches, path)
    values = ", ".join(f"{name} {value:g}" for name, value in record.items() if not name.startswith("count/"))
    raise FloatingPointError(
        f"step {state.step + 1} is not finite ({values}); its batches are in {path}. "
        "Look at them, lower optim.peak_lr or optim.clip_norm, and resume with the same command"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
