"""The one training loop, for the autoencoder, the base model and post-training.

The loss of an optimiser step is  sum over terms k of  weight_k * (sum of term k) / (number of its targets),  with both
taken over every batch of the step in every process. A step has one batch from each *lane*, a stream of batches of its own;
process r of W runs lanes r, r + W, ..., and the noise of a batch is seeded by (seed, step, lane): how many processes there are
changes nothing, and a run goes on with any number that divides its lanes.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from orthus.adapters import is_quantized
from orthus.training.checkpoint import (
    Loader,
    TrainState,
    barrier,
    check_shared,
    latest,
    load_checkpoint,
    num_lanes,
    rank,
    save_checkpoint,
    save_model,
    world_size,
)
from orthus.training.metrics import MetricsLog
from orthus.training.optim import averaged, build_optimizers, lr_factor, set_lr, start_ema, update_ema
from orthus.training.settings import OptimSettings, RunSettings, differences, read, to_dict
from orthus.training.sharding import forget_touched, full_value, is_sharded, loss_factor, prepare, reached, touch

Batch = dict[str, Any]
MakeLoader = Callable[[int, int], Loader]
"""From a lane and the number of lanes to that lane's loader."""
EXIT_TERMINATED = 128 + signal.SIGTERM


class Trainable(Protocol):
    """What `fit` asks of a model besides being an `nn.Module`."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term; its keys are the terms."""
        ...

    def count_targets(self, batch: Batch) -> dict[str, int]:
        """Number of targets of each loss term in a batch, known before the forward."""
        ...

    def save_pretrained(self, save_directory: Path) -> Any:
        """Also with `state_dict`, the weights to write, if it is to be sharded."""
        ...

    def __call__(self, **batch: Any) -> Any:
        """An output with `loss_sums` and `loss_counts`: per term, the sum over all targets and their number."""
        ...


def fit(
    model: nn.Module,
    make_loader: MakeLoader,
    run: RunSettings,
    optim: OptimSettings,
    *,
    on_sample: Callable[[nn.Module, int], None] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train until `run.num_steps`, then write the averaged weights to `output_dir/final`.

    The same call again resumes from the newest checkpoint of `output_dir`. SIGTERM writes a checkpoint and raises
    SystemExit(143). `on_sample(model, step)` gets the averaged weights every `sample_every` steps in the first process;
    what it draws does not touch the run. `settings` (plain values; default: run and optim) are kept with
    each checkpoint, and a resumed run says which of them have changed.
    Raises FloatingPointError at a loss or gradient that is not finite, with the batches saved beside the checkpoints.
    """
    settings = settings or {"run": to_dict(run), "optim": to_dict(optim)}
    state = _start(model, make_loader, run, optim, settings)
    final = Path(run.output_dir) / "final"
    done = final.with_name("final.json")
    is_written = final.is_dir() and done.exists() and json.loads(done.read_text(encoding="utf-8"))["step"] == state.step
    if state.step >= run.num_steps and is_written:
        _say(f"{run.output_dir} is complete at step {state.step}; raise run.num_steps or choose another output_dir")
        return
    log = MetricsLog(Path(run.output_dir) / "metrics.jsonl", resumed_step=state.step) if rank() == 0 else None
    streams = {lane: _endless(loader) for lane, loader in state.loaders.items()}
    is_terminal = sys.stderr.isatty()
    bar = tqdm(total=run.num_steps, initial=state.step, disable=rank() > 0, unit="step", mininterval=0.5 if is_terminal else 30)
    with _sigterm() as terminated, bar:
        while state.step < run.num_steps:
            started = time.perf_counter()
            record = train_step(state, {lane: next(batches) for lane, batches in streams.items()}, run, optim)
            state.seconds += time.perf_counter() - started
            _report(state, record, run, log, bar)
            if on_sample is not None and run.sample_every and state.step % run.sample_every == 0:
                _sample(state, on_sample)
            stop = _any_process(terminated.is_set())
            if stop or state.step % run.save_every == 0 or state.step == run.num_steps:
                save_checkpoint(state, run.output_dir, settings, run.keep_checkpoints)
            if stop and state.step < run.num_steps:
                _say(f"terminated: saved step {state.step} of {run.num_steps}; the same command resumes")
                raise SystemExit(EXIT_TERMINATED)
    save_model(model, state.ema, final)
    if rank() == 0:
        done.write_text(json.dumps({"step": state.step}) + "\n", encoding="utf-8")



def train_step(state: TrainState, batches: dict[int, Batch], run: RunSettings, optim: OptimSettings) -> dict[str, float]:
    """One optimiser step on a batch of each lane; returns the global sums `sum/*`, `count/*`, `items`, and `grad_norm`."""
    model, device = state.model, torch.device(run.device)
    weights = loss_weights(model, run)
    counts = _global_counts(cast(Trainable, model), list(batches.values()))
    totals = torch.zeros(2 * len(weights) + 1, dtype=torch.float64, device=device)  # sums, counts, items
    watched = torch.zeros(len(diagnostics(model)), 2, dtype=torch.float64, device=device)
    used = reached(model, 0)
    for lane, batch in batches.items():
        torch.manual_seed(noise_seed(run.seed, state.step, lane))
        with torch.autocast(device.type, torch.bfloat16, enabled=run.autocast == "bfloat16"):
            output = model(**_to_device(batch, device))
        terms = [weights[k] / counts[k] * output.loss_sums[k] for k in weights if counts[k] and k in output.loss_sums]
        used = torch.maximum(used, reached(model, sum(terms)))
        loss = cast(Tensor, sum(terms, touch(model)))
        if isinstance(loss, Tensor) and loss.requires_grad:
            (loss * loss_factor(model)).backward()
        totals += _totals(output, weights, batch, device)
        watched += 0 if len(watched) == 0 else output.diagnostics.to(watched)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if world_size() > 1:
        _sum_gradients([p for p in parameters if not is_sharded(p)])
        dist.all_reduce(totals)
        dist.all_reduce(watched)
    forget_touched(model, used)
    is_logged = (state.step + 1) % run.log_every == 0 or state.step + 1 == run.num_steps
    by_part = grad_norms(model) if is_logged else {}
    grad_norm = full_value(nn.utils.clip_grad_norm_(parameters, optim.clip_norm))
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
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        if gradients:
            norms[f"grad_norm/{name}"] = float(full_value(nn.utils.get_total_norm(gradients)))
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


def _global_counts(model: Trainable, batches: list[Batch]) -> dict[str, int]:
    """Targets of each loss term in the whole step, over all processes. Raises ValueError if there is none at all."""
    per_batch = [model.count_targets(batch) for batch in batches]
    names = list(model.loss_weights)
    unknown = {name for counts in per_batch for name in counts} - set(names)
    if unknown:
        raise ValueError(f"count_targets names {sorted(unknown)}, but loss_weights has {names}; give each a weight")
    counts = torch.tensor([sum(int(c.get(name, 0)) for c in per_batch) for name in names], dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(counts)
    if not counts.any():
        raise ValueError(f"no batch of the step has a target for any of {names}; check the labels of the loader")
    return dict(zip(names, counts.tolist(), strict=True))


def _totals(output: Any, weights: dict[str, float], batch: Batch, device: torch.device) -> Tensor:
    """Loss sums, loss counts and items (tokens, or images without tokens) of one batch, in the order of `weights`."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = [output.loss_sums.get(k, zero) for k in weights]
    counts = [output.loss_counts.get(k, zero) for k in weights]
    values = [*sums, *counts, _num_items(batch)]
    return torch.stack([torch.as_tensor(v, device=device).detach().to(torch.float64) for v in values])


def _num_items(batch: Batch) -> int:
    if "input_ids" in batch:
        return int(batch["input_ids"].numel())
    return next((len(value) for value in batch.values() if isinstance(value, Tensor)), 0)


def _record(weights: dict[str, float], counts: dict[str, int], totals: list[float]) -> dict[str, float]:
    num_terms = len(weights)
    for name, counted in zip(weights, totals[num_terms : 2 * num_terms], strict=True):
        if math.isfinite(counted) and counted != counts[name]:
            raise ValueError(
                f"loss {name!r}: count_targets promised {counts[name]} targets and the forward counted {counted:g}; "
                "make the model's two counts agree"
            )
    record = {f"sum/{name}": total for name, total in zip(weights, totals, strict=False)}
    record |= {f"count/{name}": float(counts[name]) for name in weights}
    return record | {"items": totals[-2], "grad_norm": totals[-1]}


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over all processes; a parameter without a gradient in every process keeps none."""
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(has_gradient)
    used = [p for p, has in zip(parameters, has_gradient.tolist(), strict=True) if has]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in used])
    dist.all_reduce(flat)
    for p, summed in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad = summed.view_as(p).to(p.dtype)


def _refuse(state: TrainState, batches: list[Batch], record: dict[str, float], run: RunSettings) -> None:
    path = Path(run.output_dir) / f"not-finite-step-{state.step + 1}-process-{rank()}.pt"
    torch.save(batches, path)
    values = ", ".join(f"{name} {value:g}" for name, value in record.items() if not name.startswith("count/"))
    raise FloatingPointError(
        f"step {state.step + 1} is not finite ({values}); its batches are in {path}. "
        "Look at them, lower optim.peak_lr or optim.clip_norm, and resume with the same command"
    )


# -- around the steps ----------------------------------------------------------------------------------------------


def _start(
    model: nn.Module, make_loader: MakeLoader, run: RunSettings, optim: OptimSettings, settings: dict[str, Any]
) -> TrainState:
    """A state at step 0, or at the newest checkpoint; every process has the weights of the first."""
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    newest = latest(run.output_dir)
    lanes = run.lanes or (world_size() if newest is None else num_lanes(newest))
    if lanes % world_size():
        raise ValueError(f"{lanes} lanes cannot be shared by {world_size()} processes; set run.lanes to a multiple of them, or "
                         f"start as many processes as divide {lanes}")  # fmt: skip
    check_shared(newest, run.output_dir)
    model.to(run.device).train()
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_quantized(tensor):  # those come from the same folder in every process and never change
                dist.broadcast(tensor.detach(), src=0)
    prepare(model, run)
    loaders = {lane: make_loader(lane, lanes) for lane in range(rank(), lanes, world_size())}
    loss_weights(model, run)
    state = TrainState(model, start_ema(model) if run.ema_decay else {}, build_optimizers(model, optim), loaders, lanes)
    if newest is not None:
        load_checkpoint(state, newest)
        changed = differences(read(newest / "settings.yaml"), settings)
        _say(f"resumed from {newest}" + (f"; changed since: {', '.join(changed)}" if changed else ""))
    return state


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError(f"{type(loader).__name__} yields no batch; check its data set and batch size")


def _report(state: TrainState, record: dict[str, float], run: RunSettings, log: MetricsLog | None, bar: Any) -> None:
    """Add a step to the window and, every `log_every` steps, write the window's means."""
    bar.update(1)
    window = state.window
    for name, value in record.items():
        window[name] = value if name.startswith("grad_norm") else window.get(name, 0.0) + value
    if state.step % run.log_every and state.step != run.num_steps:
        return
    weights = loss_weights(state.model, run)
    means = {k: window[f"sum/{k}"] / window[f"count/{k}"] for k in weights if window[f"count/{k}"]}
    seconds = state.seconds - window.get("since", 0.0)
    metrics = {
        "step": state.step,
        "loss": sum(weights[k] * mean for k, mean in means.items()),
        **{f"loss/{k}": mean for k, mean in means.items()},
        "lr": state.optimizers[-1].param_groups[0]["lr"],
        **_watched_means(window),
        **{name: value for name, value in window.items() if name.startswith("grad_norm")},
        "items_per_second": window["items"] / max(seconds, 1e-9),
        "seconds": state.seconds,
    }
    metrics |= data_counts(state)
    state.window = {"since": state.seconds}
    if log is not None:
        log.write(metrics)
        shown = {"loss": metrics["loss"], **means}
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)


def _watched_means(window: dict[str, float]) -> dict[str, float]:
    names = [name.removeprefix("watched/") for name in window if name.startswith("watched/")]
    counts = {name: window[f"watched_count/{name}"] for name in names}
    return {f"loss/{name}": window[f"watched/{name}"] / counts[name] for name in names if counts[name]}


def data_counts(state: TrainState) -> dict[str, float]:
    """`data/*`: what the loaders of all processes have handed out and dropped so far, and the share of tokens that are not
    padding; {} for loaders that do not count."""
    mine: Counter[str] = Counter()
    for loader in state.loaders.values():
        mine.update(loader.counts() if hasattr(loader, "counts") else {})
    everyones: list[Any] = [mine]
    if world_size() > 1:
        everyones = [None] * world_size()
        dist.all_gather_object(everyones, mine)
    total: Counter[str] = sum(everyones, Counter())
    num_tokens, num_real = total.pop("num_tokens", 0), total.pop("num_real_tokens", 0)
    fill = {"data/fill": num_real / num_tokens} if num_tokens else {}
    return {**fill, **{f"data/{name}": float(number) for name, number in sorted(total.items())}}


def _sample(state: TrainState, on_sample: Callable[[nn.Module, int], None]) -> None:
    if rank() == 0:
        with averaged(state.model, state.ema) as model, torch.no_grad():
            on_sample(model, state.step)
    barrier()


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (handlers exist in the main thread only)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def _any_process(flag: bool) -> bool:
    if world_size() == 1:
        return flag
    total = torch.tensor(float(flag))
    dist.all_reduce(total)
    return bool(total.item())


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _say(message: str) -> None:
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)
