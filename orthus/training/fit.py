"""The one training loop, for the autoencoder, the base model and post-training.

The loss of an optimiser step is  sum over terms k of  weight_k * (sum of term k) / (number of its targets),  with both
taken over every batch of the step in every process. A step has one batch from each *lane*, a stream of batches of its own;
process r of W runs lanes r, r + W, ..., and the noise of a batch is seeded by (seed, step, lane): how many processes there are
changes nothing, and a run goes on with any number that divides its lanes.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
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
from orthus.training.optim import averaged, build_optimizers, start_ema
from orthus.training.settings import OptimSettings, RunSettings, differences, read, to_dict
from orthus.training.sharding import prepare
from orthus.training.step import Batch, loss_weights, train_step

MakeLoader = Callable[[int, int], Loader]
"""From a lane and the number of lanes to that lane's loader."""
EXIT_TERMINATED = 128 + signal.SIGTERM


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


def _say(message: str) -> None:
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)
