"""What a run says of itself at each logged step: mean losses, speed, use of the device, what the loaders have counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from orthus.training.checkpoint import TrainState
from orthus.training.distributed import world_size
from orthus.training.metrics import MetricsLog
from orthus.training.operations import Work, work_of
from orthus.training.settings import RunSettings
from orthus.training.step import loss_weights

TrainingFlops = Callable[[Work], float]
"""Operations that a model needs to train on so much, without what a run computes twice."""

PEAK_FLOPS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"GB200"}), 2500e12),
    (frozenset({"B200"}), 2250e12),
    (frozenset({"GH200"}), 989e12),
    (frozenset({"H200", "NVL"}), 835e12),
    (frozenset({"H200"}), 989e12),
    (frozenset({"H100", "PCIE"}), 756e12),
    (frozenset({"H100", "NVL"}), 835e12),
    (frozenset({"H100"}), 989e12),
    (frozenset({"A100"}), 312e12),
    (frozenset({"L40S"}), 362e12),
    (frozenset({"L4"}), 121e12),
)
"""Dense bfloat16 operations per second (NVIDIA's data sheets) of a device whose name has these words; the first match counts."""


def peak_flops(run: RunSettings) -> float | None:
    """Operations per second of one device at best; None where neither the run nor the table knows."""
    if run.peak_flops is not None:
        return run.peak_flops
    if not run.device.startswith("cuda"):
        return None
    return known_peak(torch.cuda.get_device_name(run.device))


def known_peak(device_name: str) -> float | None:
    """Of a whole GPU of this name, None if it is not in the table."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((peak for needed, peak in PEAK_FLOPS if needed <= words), None)


def report(
    state: TrainState,
    record: dict[str, float],
    run: RunSettings,
    log: MetricsLog | None,
    bar: Any,
    training_flops: TrainingFlops | None = None,
) -> None:
    """Add a step to the window and, every `log_every` steps, write the window's means."""
    bar.update(1)
    window = state.window
    for name, value in record.items():
        window[name] = value if name.startswith("grad_norm") else window.get(name, 0.0) + value
    if state.step % run.log_every and state.step != run.num_steps:
        return
    weights = loss_weights(state.model, run)
    means = {k: window[f"sum/{k}"] / window[f"count/{k}"] for k in weights if window[f"count/{k}"]}
    seconds = max(state.seconds - window.get("since", 0.0), 1e-9)
    metrics = {
        "step": state.step,
        "loss": sum(weights[k] * mean for k, mean in means.items()),
        **{f"loss/{k}": mean for k, mean in means.items()},
        "lr": state.optimizers[-1].param_groups[0]["lr"],
        **_watched_means(window),
        **{name: value for name, value in window.items() if name.startswith("grad_norm")},
        **speed(window, seconds, run, training_flops),
        "seconds": state.seconds,
    }
    metrics |= data_counts(state)
    state.window = {"since": state.seconds}
    if log is not None:
        log.write(metrics)
        shown = {"loss": metrics["loss"], **means}
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)


def speed(
    window: dict[str, float], seconds: float, run: RunSettings, training_flops: TrainingFlops | None = None
) -> dict[str, float]:
    """`tokens_per_second` (padding too) and `images_per_second` of all processes together, where there are any; and `mfu`, the
    share of the devices' peak that the model's own operations take (arXiv 2204.02311, appendix B), where both are known.

    `mfu` counts the matrix products that the examples need, forward and backward: layers at each token that is not padding,
    attention between the tokens of an example (also those that a causal mask or a window hides), the LM head at text targets, the
    diffusion head at latent targets, soft VQ and encoder for each picture. Nothing counts twice, whatever is computed again.
    Seconds are those of reading batches and of steps, not of evaluating, drawing, or what a save makes training wait.
    """
    counts = {f"{name}_per_second": window.get(name, 0.0) for name in ("tokens", "images")}
    found = {name: count / seconds for name, count in counts.items() if count}
    peak = None if training_flops is None else peak_flops(run)
    if training_flops is not None and peak is not None:
        found["mfu"] = training_flops(work_of(window)) / seconds / (world_size() * peak)
    return found


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
