"""The one training loop, for the autoencoder, the base model and post-training.

The loss of an optimiser step is  sum over terms k of  weight_k * (sum of term k) / (number of its targets),  with both
taken over every batch of the step in every process. A step has one batch from each *lane*, a stream of batches of its own;
process r of W (where layers are split: the r-th of W groups) runs lanes r, r + W, ..., and the noise of a batch is seeded by
(seed, step, lane): how many processes there are changes nothing, and a run goes on with any number that divides its lanes.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from orthus.adapters import is_quantized
from orthus.training.checkpoint import (
    Checkpoints,
    Loader,
    TrainState,
    check_shared,
    latest,
    load_checkpoint,
    num_lanes,
)
from orthus.training.distributed import barrier, rank, waiting_group, world_size
from orthus.training.evaluation import Evaluation, evaluator
from orthus.training.folders import save_model
from orthus.training.metrics import MetricsLog
from orthus.training.optim import averaged, build_optimizers, start_ema
from orthus.training.reporting import TrainingFlops, report
from orthus.training.settings import OptimSettings, RunSettings, differences, read, to_dict
from orthus.training.sharding import prepare
from orthus.training.step import Batch, loss_weights, train_step
from orthus.training.tensor_parallel import make_mesh, reads_data, shared_batches

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
    evaluation: Evaluation | None = None,
    training_flops: TrainingFlops | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train until `run.num_steps`, then write the averaged weights to `output_dir/final`.

    The same call again resumes from the newest checkpoint of `output_dir`. SIGTERM writes a checkpoint and raises
    SystemExit(143). `on_sample(model, step)` gets the averaged weights every `sample_every` steps in the first process;
    what it draws does not touch the run. `evaluation` is asked every `eval_every` steps and at the end; `training_flops` is for
    MFU. `settings` (plain values; default: run and optim) are kept with each checkpoint, and a resumed run says which of them
    have changed.
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
    evaluate = evaluator(evaluation, run)
    log = _open_log(run, state.step, settings)
    streams = {lane: _endless(loader) for lane, loader in state.loaders.items()}
    is_terminal = sys.stderr.isatty()
    bar = tqdm(total=run.num_steps, initial=state.step, disable=rank() > 0, unit="step", mininterval=0.5 if is_terminal else 30)
    checkpoints = Checkpoints(run.output_dir, settings, run.keep_checkpoints, run.async_checkpoints)
    with _sigterm() as terminated, bar, log or nullcontext(), checkpoints:
        while state.step < run.num_steps:
            started = time.perf_counter()
            batches = shared_batches({lane: next(stream) for lane, stream in streams.items()}, state.mesh)
            record = train_step(state, batches, run, optim)
            state.seconds += time.perf_counter() - started
            report(state, record, run, log, bar, training_flops)
            if on_sample is not None and run.sample_every and state.step % run.sample_every == 0:
                _sample(state, on_sample)
            if evaluate is not None and evaluate.is_due(state.step):
                _write(log, {"step": state.step, **evaluate(state)})
            stop = _any_process(terminated.is_set() or checkpoints.has_failed)
            if stop or state.step % run.save_every == 0 or state.step == run.num_steps:
                checkpoints.save(state)
            if stop and state.step < run.num_steps:
                checkpoints.wait()
                _say(f"terminated: saved step {state.step} of {run.num_steps}; the same command resumes")
                raise SystemExit(EXIT_TERMINATED)
    save_model(model, state.ema, final, state.waiting)
    if state.waiting is not None:
        dist.destroy_process_group(state.waiting)
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
    mesh = make_mesh(run)
    num_groups = world_size() // run.tensor_parallel  # each of which runs other lanes
    lanes = run.lanes or (num_groups if newest is None else num_lanes(newest))
    if lanes % num_groups:
        groups = f"{num_groups} " + ("processes" if mesh is None else f"groups of {run.tensor_parallel} processes")
        raise ValueError(f"{lanes} lanes cannot be shared by {groups}; set run.lanes to a multiple of them, or "
                         f"start as many as divide {lanes}")  # fmt: skip
    check_shared(newest, run.output_dir)
    model.to(run.device).train()
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_quantized(tensor):  # those come from the same folder in every process and never change
                dist.broadcast(tensor.detach(), src=0)
    prepare(model, run, mesh)
    mine = range(rank() // run.tensor_parallel, lanes, num_groups) if reads_data(mesh) else ()
    loaders = {lane: make_loader(lane, lanes) for lane in mine}
    loss_weights(model, run)
    ema = start_ema(model) if run.ema_decay else {}
    state = TrainState(model, ema, build_optimizers(model, optim), loaders, lanes, mesh=mesh, waiting=waiting_group())
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


def _open_log(run: RunSettings, step: int, settings: dict[str, Any]) -> MetricsLog | None:
    """In the first process."""
    if rank() > 0:
        return None
    return MetricsLog(Path(run.output_dir) / "metrics.jsonl", resumed_step=step, tracker=run.tracker, settings=settings)


def _write(log: MetricsLog | None, record: dict[str, Any]) -> None:
    if log is not None:
        log.write(record)


def _sample(state: TrainState, on_sample: Callable[[nn.Module, int], None]) -> None:
    if rank() == 0:
        with averaged(state.model, state.ema) as model, torch.no_grad():
            on_sample(model, state.step)
    barrier(state.waiting)


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
