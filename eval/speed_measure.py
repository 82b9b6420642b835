"""Seconds per latent of one configuration, of `generate` or of the reference loop."""

import gc
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.reference_loop import draw_latents
from eval.speed_clock import Clock, Seconds, watched
from eval.speed_costs import best_seconds, costs, peak_memory, per_image, reference_costs, sizes
from eval.speed_presets import random_latents, random_prompts
from orthus.modeling import OrthusForConditionalGeneration
from orthus.sampling import EXACT

DROPPED = 1  # latents of each call of `generate` that may pay for captures and first passes


@dataclass(frozen=True)
class Run:
    """One configuration.

    Args:
        name: "reference", "exact", "default" (what `generate` does when nothing is said) or "grid".
        solver, num_steps: of "grid".
        num_latents: consecutive latents per measurement, whose mean counts.
        repeats: measurements of each position, whose median counts.
    """

    name: str
    batch: int
    guidance: float
    dtype: str
    positions: tuple[int, ...]
    num_latents: int
    repeats: int
    solver: str | None = None
    num_steps: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `generate` is told about drawing."""
        if self.name == "grid":
            return {"solver": self.solver, "num_diffusion_steps": self.num_steps}
        return {"preset": "exact"} if self.name == "exact" else {}

    @property
    def label(self) -> str:
        sampler = f"{self.solver} {self.num_steps}" if self.name == "grid" else self.name
        return f"{sampler}, batch {self.batch}, {self.dtype}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Ceilings:
    """Of the machine: bytes and floating-point operations per second."""

    bandwidth: float
    rate: float


class Enough(Exception):
    """Raised inside `generate` when all that is measured was drawn."""


def window(run: Run, position: int, num_latents: int) -> tuple[int, int]:
    """Known latents and measured latents, the last of which is at raster place `position` (1 = first) or, near the beginning of
    the image, a little behind it."""
    dropped = 0 if run.name == "reference" else DROPPED
    measured = max(1, min(run.num_latents, num_latents - dropped))
    return max(0, position - 1 - dropped - measured), measured


def time_reference(model: OrthusForConditionalGeneration, run: Run, known: int, measured: int) -> Clock:
    clock, config = Clock(model.device), model.config
    prompts = random_prompts(config)[: 1 if run.guidance == 1.0 else 2]
    prefix = random_latents(config, 1, known)[0].to(model.device) if known else None
    noise = random_latents(config, 1, config.num_latents)[0].to(model.device)
    new = measured + (known > 0)
    clock.mark()
    draw_latents(
        model, prompts, noise, guidance=run.guidance, num_diffusion_steps=EXACT.num_diffusion_steps, prefix=prefix,
        num_latents=new, clock=clock,
    )  # fmt: skip
    return clock


def time_ours(model: OrthusForConditionalGeneration, run: Run, known: int, measured: int) -> Clock:
    """`generate`, broken off after the last measured latent."""
    clock, config, wanted = Clock(model.device), model.config, 2 + DROPPED + measured
    prompt, negative = (ids.to(model.device).unsqueeze(0) for ids in random_prompts(config))
    prefix = random_latents(config, run.batch, known).to(model.device) if known else None
    guided: dict[str, Any] = {} if run.guidance == 1.0 else {"negative_input_ids": negative}

    def on_position(done: int) -> None:
        clock.mark()
        if len(clock.marks) == wanted:
            raise Enough

    with watched(model, clock), suppress(Enough):
        clock.mark()
        model.generate(
            prompt.repeat(run.batch, 1), modality="image", guidance=run.guidance, image_prefix=prefix, decode=False,
            on_position=on_position, **guided, **run.options,
        )  # fmt: skip
    return clock


def measure(model: OrthusForConditionalGeneration, run: Run, ceilings: Ceilings, tell: Callable[[str], None]) -> dict[str, Any]:
    """All numbers of a configuration; `tell` is called before each measurement."""
    device, total = model.device, model.config.num_latents
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = time_reference if run.name == "reference" else time_ours
    is_first = Run(**{**vars(run), "num_latents": 1})
    tell(f"{run.label}: warm-up")
    timed(model, is_first, *window(is_first, 1, total))
    clocks: dict[int, list[Clock]] = {position: [] for position in sorted({1, *run.positions})}
    for repeat in range(run.repeats):
        for position, found in clocks.items():
            tell(f"{run.label}: latent {position}, {repeat + 1} of {run.repeats}")
            gc.collect()  # caches of the call before
            found.append(timed(model, run, *window(run, position, total)))
    positions = {position: _position(model, run, position, found, ceilings) for position, found in clocks.items()}
    prefill = statistics.median(_opening(clock, window(run, 1, total)[1]) for clock in clocks[1])
    latents = random_latents(model.config, run.batch, total).to(device)
    decode = best_seconds(lambda: model.decode_image_latents(latents), device, run.repeats)
    drawing = per_image({position: cell["total"] for position, cell in positions.items()}, total)
    return {
        "name": run.name, "batch": run.batch, "guidance": run.guidance, "dtype": run.dtype,
        "solver": run.solver or ("ddim" if run.name != "default" else None),
        "num_diffusion_steps": positions[1]["num_diffusion_steps"],
        "positions": {str(position): cell for position, cell in positions.items()},
        "seconds_per_latent": {str(position): cell["total"] / run.batch for position, cell in positions.items()},
        "prefill_seconds": prefill, "decode_seconds": decode,
        "seconds_per_image": (prefill + drawing + decode) / run.batch,
        "peak_memory_bytes": peak_memory(device),
    }  # fmt: skip


def _mean(clock: Clock, measured: int) -> Seconds:
    cycles = clock.cycles()[-measured:]
    return {name: statistics.fmean(cycle[name] for cycle in cycles) for name in cycles[0]}


def _opening(clock: Clock, measured: int) -> float:
    """Seconds of a call before the first latent, with what its first latents took longer than the measured ones."""
    cycles, mean = clock.cycles(), _mean(clock, measured)["total"]
    return sum(cycle["total"] for cycle in cycles) - mean * (len(cycles) - 1)


def _position(
    model: OrthusForConditionalGeneration, run: Run, position: int, clocks: list[Clock], ceilings: Ceilings
) -> dict[str, Any]:
    """Seconds in which every row gains a latent, of the median measurement, by part; costs, and fractions of the ceilings."""
    total, size = model.config.num_latents, sizes(model)
    _, measured = window(run, position, total)
    means = sorted((_mean(clock, measured) for clock in clocks), key=lambda mean: mean["total"])
    seconds, clock = means[(len(means) - 1) // 2], clocks[-1]
    streams, context = (1 if run.guidance == 1.0 else 2), len(random_prompts(model.config)[0]) + 1 + position
    num_steps, passes = EXACT.num_diffusion_steps or 0, None
    if run.name == "reference":
        cost = reference_costs(size, context, position, streams, num_steps)
    else:
        assert clock.sampler is not None, "generate drew nothing"
        num_steps = clock.sampler.num_steps_at(position - 1, total)
        passes = statistics.fmean(clock.passes[-measured:]) or None
        cost = costs(size, context, run.batch, streams, num_steps, passes)
    return {
        **seconds, "num_diffusion_steps": num_steps, "num_passes": passes, **cost,
        "bandwidth_fraction": cost["weight_bytes"] / seconds["total"] / ceilings.bandwidth,
        "rate_fraction": cost["flops"] / seconds["total"] / ceilings.rate,
    }  # fmt: skip


@torch.no_grad()
def image_difference(model: OrthusForConditionalGeneration, guidance: float, num_latents: int) -> float:
    """Largest difference of a pixel in [0, 1] between the reference loop and `generate` with the exact sampler, from the same
    noise: the first `num_latents` latents of an image, the others zero, through the autoencoder."""
    config, device = model.config, model.device
    noise = random_latents(config, 1, config.num_latents)[0].to(device)
    prompts = random_prompts(config)[: 1 if guidance == 1.0 else 2]
    expected = draw_latents(
        model, prompts, noise, guidance=guidance, num_diffusion_steps=EXACT.num_diffusion_steps, num_latents=num_latents
    )
    kept = _Keeper(num_latents)
    guided: dict[str, Any] = {} if guidance == 1.0 else {"negative_input_ids": prompts[1].to(device).unsqueeze(0)}
    with suppress(Enough):
        model.generate(
            prompts[0].to(device).unsqueeze(0), modality="image", guidance=guidance, noise=noise[None, None], decode=False,
            streamer=kept, preset="exact", **guided,
        )  # fmt: skip
    images = torch.zeros(2, config.num_latents, config.head_config.latent_dim, device=device)
    images[0, :num_latents], images[1, :num_latents] = expected, torch.cat(kept.latents)
    pixels = model.decode_image_latents(images).float()
    return float((pixels[0] - pixels[1]).abs().max() / 2)


class _Keeper:
    """A streamer that keeps the first latents and then ends the generation."""

    def __init__(self, num_latents: int) -> None:
        self.num_latents, self.latents = num_latents, list[Tensor]()

    def put(self, value: Tensor) -> None:
        pass

    def put_latents(self, rows: list[int], latents: Tensor) -> None:
        self.latents.append(latents)
        if len(self.latents) == self.num_latents:
            raise Enough

    def end(self) -> None:
        pass
