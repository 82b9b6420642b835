"""Drawing latents: the options of a sampler, and the object that runs one over the images of a batch.

`LatentSampler` computes once what does not depend on the latents (solver tables, embedded times, packed weights); per latent what
does not depend on the noised state (the modulations of all diffusion steps, in a few products); the rest is one short loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthus import diffusion
from orthus.acceleration import Graphs, compiled, packed_copy

if TYPE_CHECKING:
    from orthus.diffusion_head import DiffusionHead

STEP_SCHEDULES = ("constant", "linear", "cosine")
GUIDANCE_SCHEDULES = ("constant", "linear")
NUM_PLATEAUS = 5  # different numbers of diffusion steps over an image
MAX_MODULATION_BYTES = 96 * 2**20  # at a time; on a CPU larger ones are slower, for their memory is new each time
LOOKAHEAD_ROWS = 16  # rows up to which a CPU evaluates the head in the time of one
LOOKAHEAD_TOLERANCE = 1e-5  # of a guessed state, in scaled latents
LOOKAHEAD_TOLERANCE_ROUNDED = 1e-4  # the same for a head in bf16, whose rounding moves a state more than that in one step


def _require_one(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(str(choice) for choice in choices if choice is not None)}")


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn. None: as the head's config says; beside another solver than its, as is customary for that solver.

    Args:
        solver: `"ddim"`, `"euler"` (flow matching; the same step), `"dpm++2m"`, `"heun"`.
        num_diffusion_steps: evaluations of the head per latent.
        spacing: of the diffusion times: `"trailing"` (even, published) or `"log_snr"`.
        step_schedule: `"constant"`, or how the number of evaluations falls over an image to `last_diffusion_steps`: `"linear"` or
            `"cosine"` (slow at first), in a few plateaus (arXiv 2505.20297).
        guidance_interval: part of the diffusion time, 0 (data) to 1 (noise), in which guidance acts (arXiv 2404.07724).
        guidance_schedule: `"constant"`, or `"linear"`: guidance grows from 1 at the first latent to its value at the last.
        guidance_rescale: 0..1, how far a guided prediction is scaled back to the spread of the conditional one
            (arXiv 2305.08891, section 3.4).
    """

    solver: str | None = None
    num_diffusion_steps: int | None = None
    spacing: str | None = None
    step_schedule: str = "constant"
    last_diffusion_steps: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: str = "constant"
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        _require_one("solver", self.solver, (None, *diffusion.SOLVERS))
        _require_one("spacing", self.spacing, (None, *diffusion.SPACINGS))
        _require_one("step_schedule", self.step_schedule, STEP_SCHEDULES)
        _require_one("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        for name in ("num_diffusion_steps", "last_diffusion_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if (self.step_schedule == "constant") != (self.last_diffusion_steps is None):
            raise ValueError("step_schedule='linear' or 'cosine' and last_diffusion_steps come together; give both or neither")
        if self.guidance_interval is None or len(self.guidance_interval) != 2:
            raise ValueError(f"guidance_interval={self.guidance_interval} is no pair of numbers; (0, 1) guides throughout")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # a list would have no hash
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval={self.guidance_interval} is no interval within [0, 1]")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale={self.guidance_rescale} is outside 0..1")


EXACT = Sampling(solver="ddim", num_diffusion_steps=100, spacing="trailing")
"""The published sampler."""


@dataclass(frozen=True)
class _Plan:
    """A sampler run in numbers: embedded times `(S, W)`, coefficients per evaluation, and where guidance acts."""

    times: Tensor
    state: list[list[float]]
    memory: list[list[float]]
    guided: list[bool]


class LatentSampler:
    """Draws latents with one head and one set of options; weights must not change while it is in use.

    core: that of another sampler of the same head and acceleration, so that weights are packed once.
    """

    def __init__(
        self, head: "DiffusionHead", sampling: Sampling, acceleration: str = "packed", core: "DiffusionHead | None" = None
    ) -> None:
        self.head, self.asked, self.sampling = head, sampling, head.resolve(sampling)
        self.may_look_ahead = acceleration == "packed" and head.input_proj.weight.device.type == "cpu"
        self.core: DiffusionHead = core or (packed_copy(head) if acceleration == "packed" else head)
        self.denoise = compiled(head.denoise) if acceleration == "compile" else self.core.denoise
        is_captured = acceleration == "graph" or (acceleration == "compile" and head.input_proj.weight.is_cuda)
        self.graphs = Graphs() if is_captured else None
        self.plans: dict[int, _Plan] = {}
        self.num_passes = 0  # evaluations of the head so far, a look-ahead of several steps counting once
        self.plan(self.num_steps_at(0, 1))
        if sampling.last_diffusion_steps is not None:  # refused now rather than in the middle of a picture
            self.plan(sampling.last_diffusion_steps)

    def num_steps_at(self, place: int, num_latents: int) -> int:
        """Evaluations of the head for the latent at raster index `place` of an image of `num_latents`."""
        first, last = self.sampling.num_diffusion_steps, self.sampling.last_diffusion_steps
        assert first is not None
        if last is None or num_latents == 1:
            return first
        share = (place * NUM_PLATEAUS // num_latents) / (NUM_PLATEAUS - 1)
        if self.sampling.step_schedule == "cosine":
            share = 1 - torch.cos(torch.tensor(share * torch.pi / 2)).item()
        return max(1, round(first + (last - first) * share))

    def guidance_at(self, guidance: float, place: int, num_latents: int) -> float:
        """Guidance weight for the latent at raster index `place`."""
        if self.sampling.guidance_schedule == "constant":
            return guidance
        return 1 + (guidance - 1) * (place + 1) / num_latents

    def plan(self, num_steps: int) -> _Plan:
        """The tables of a run of `num_steps` evaluations."""
        if num_steps not in self.plans:
            steps = self.head.sampler_steps(replace(self.asked, num_diffusion_steps=num_steps))
            times = self.head.embed_times(steps.times.to(self.head.cond_embed.weight.device))
            guided = self.head.is_guided(steps.times, self.sampling.guidance_interval)
            self.plans[num_steps] = _Plan(times, steps.state.tolist(), steps.memory.tolist(), guided)
        return self.plans[num_steps]

    @torch.no_grad()
    def draw(
        self,
        streams: Tensor,
        noise: Tensor,
        guidance: float | Tensor = 1.0,
        image_guidance: float | Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Raw latents `(N, C)` from hidden states `(streams, N, D)` in the order full, [image only,] unconditional, and standard
        normal noise `(N, C)`; `guidance`, `image_guidance`: numbers or `(N, 1)`."""
        plan = self.plan(num_steps or self.num_steps_at(0, 1))
        dtype = self.head.input_proj.weight.dtype
        size = max(1, min(len(noise), MAX_MODULATION_BYTES // (len(streams) * self._modulation_bytes())))
        chunks = [
            self._draw_rows(plan, streams[:, start : start + size].to(dtype), noise[start : start + size],
                            _rows(guidance, start, size), _rows(image_guidance, start, size))
            for start in range(0, len(noise), size)
        ]  # fmt: skip
        return torch.cat(chunks)

    def _draw_rows(
        self, plan: _Plan, streams: Tensor, noise: Tensor, guidance: float | Tensor, image_guidance: float | Tensor | None
    ) -> Tensor:
        x = noise.to(torch.promote_types(streams.dtype, torch.float32))
        if self.graphs is None:
            return self._run(plan, streams, x, guidance, image_guidance) / self.head.config.latent_scale
        given = 0.0 if image_guidance is None else image_guidance
        weights = [torch.as_tensor(w, device=x.device).to(x).expand(len(x), 1) for w in (guidance, given)]

        def run(streams: Tensor, x: Tensor, guidance: Tensor, image_guidance: Tensor) -> Tensor:
            return self._run(plan, streams, x, guidance, image_guidance) / self.head.config.latent_scale

        return self.graphs(id(plan), run, streams, x, *weights)

    def _run(
        self, plan: _Plan, streams: Tensor, x: Tensor, guidance: float | Tensor, image_guidance: float | Tensor | None
    ) -> Tensor:
        """The loop over diffusion steps, in scaled latents `(N, C)`.

        Several steps are evaluated at once where that costs no more than one: their states are guessed with the last velocities
        known, and steps are kept up to the first whose state, with the new velocities, moves by more than the tolerance. The
        first of them is never a guess, so that each pass makes at least one step.
        """
        cond, memory = self.core.cond_embed(streams), torch.zeros_like(x)
        guesses: list[Tensor] = []  # velocities of steps to come as far as they were evaluated; the last one stands for the rest
        modulations: list[Tensor] = []  # (block, streams in use, N, .) of the diffusion steps from `start` to `stop`
        start = stop = done = used = 0
        while done < len(plan.guided):
            if done == stop:
                start, used = done, len(streams) if plan.guided[done] else 1
                stop = self._block_end(plan, start, used * len(x))
                modulations = self.core.modulations(plan.times[start:stop, None, None] + cond[:used])
            end = min(done + (self._window(x, used) if guesses else 1), stop)
            states = [(x, memory)]
            for i in range(done, end - 1):
                states.append(_step(plan, i, *states[-1], guesses[min(i - done, len(guesses) - 1)]))
            v = self._velocity(torch.stack([state for state, _ in states]), [m[done - start : end - start] for m in modulations])
            velocities, kept = self._guide(v.to(x.dtype), guidance, image_guidance), 0
            while kept == 0 or (kept < len(states) and self._is_near(x, states[kept][0])):
                x, memory = _step(plan, done + kept, x, memory, velocities[kept])
                kept += 1
            done, guesses = done + kept, list(velocities[kept:] if kept < len(states) else velocities[-1:])
        return x

    def _block_end(self, plan: _Plan, start: int, rows: int) -> int:
        """End of the diffusion steps from `start` on that are guided alike and whose modulations, for as many rows of all
        streams, are made in one product."""
        size, end = max(1, MAX_MODULATION_BYTES // (rows * self._modulation_bytes())), start + 1
        while end < min(start + size, len(plan.guided)) and plan.guided[end] == plan.guided[start]:
            end += 1
        return end

    def _modulation_bytes(self) -> int:
        """Of one row at one diffusion step."""
        return self.head.modulation_dim * self.head.input_proj.weight.dtype.itemsize

    def _window(self, x: Tensor, used: int) -> int:
        """How many diffusion steps are evaluated at once."""
        return max(1, LOOKAHEAD_ROWS // (len(x) * used)) if self.may_look_ahead else 1

    def _is_near(self, x: Tensor, guess: Tensor) -> bool:
        tolerance = LOOKAHEAD_TOLERANCE if self.head.input_proj.weight.dtype == torch.float32 else LOOKAHEAD_TOLERANCE_ROUNDED
        return bool((x - guess).abs().max() <= tolerance)

    def _velocity(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """Head outputs `(streams, steps, N, C)` for states `(steps, N, C)`."""
        self.num_passes += 1
        used = modulations[0].shape[1]
        dtype = self.head.input_proj.weight.dtype
        return self.denoise(x.to(dtype).unsqueeze(1).expand(-1, used, -1, -1), modulations).transpose(0, 1)

    def _guide(self, v: Tensor, guidance: float | Tensor, image_guidance: float | Tensor | None) -> Tensor:
        """Guided velocities of head outputs `(streams, ..., C)`."""
        guided = diffusion.guide(v, guidance, image_guidance)
        share = self.sampling.guidance_rescale
        if share == 0 or len(v) == 1:
            return guided
        scale = v[0].std(-1, keepdim=True) / guided.std(-1, keepdim=True)
        return guided * (share * scale + (1 - share))


def _step(plan: _Plan, index: int, x: Tensor, memory: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """State and memory after evaluation `index` gave `v`; terms with coefficient 0 are left out."""
    new = []
    for row in (plan.state[index], plan.memory[index]):
        terms = [c * value for c, value in zip(row, (x, v, memory), strict=True) if c != 0]
        new.append(torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0]) if terms else memory)
    return new[0], new[1]


def _rows(value: Any, start: int, size: int) -> Any:
    return value[start : start + size] if isinstance(value, Tensor) and value.ndim else value
