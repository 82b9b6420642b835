"""Distillation of a trained diffusion head into one that needs few diffusion steps; all other parts of the model rest.

The sampler of `K` diffusion steps visits the nodes `t_0 > ... > t_K` (data). Between two nodes the teacher, a frozen copy of the
head at the start, solves its equation in `teacher_substeps` steps of its own; the student learns the one step that ends at the
same point. With the step `x' = c_x x + c_v v`, its target is `v* = (x' - c_x x) / c_v`: on the straight path of flow matching the
mean velocity between the nodes (trajectory distillation as in arXiv 2202.00512, with all K students in one head and the
teacher's points as in multistep consistency models, arXiv 2403.06807).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from orthus import diffusion
from orthus.diffusion_head import DiffusionHead
from orthus.modeling import OrthusForConditionalGeneration
from orthus.sampling import Sampling

SAMPLER: dict[str, Any] = {"solver": "ddim", "spacing": "trailing"}


@dataclass(frozen=True)
class DistillationSettings:
    """What the student becomes and how it learns.

    num_diffusion_steps: of the student.
    teacher_substeps: steps of the teacher for one of the student.
    start: where a step begins: `"trajectory"`, on the teacher's way from noise; `"noised"`, at the true latent with noise;
        `"student"`, on the student's own way from noise, where it will be when it draws.
    num_draws: ways from noise per latent in one training forward.
    guidance: null: the student imitates the teacher for each stream by itself and is guided like it. A number: it imitates the
        teacher guided with this weight within `guidance_interval`, and draws with guidance 1, that is without further streams.
    """

    num_diffusion_steps: int = 4
    teacher_substeps: int = 8
    start: Literal["trajectory", "noised", "student"] = "trajectory"
    num_draws: int = 4
    guidance: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("num_diffusion_steps", "teacher_substeps", "num_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval={self.guidance_interval} is no interval within [0, 1]")


@dataclass
class DistillationOutput(ModelOutput):
    """Sums and counts of the loss, as `fit` wants them."""

    loss_sums: dict[str, Tensor] | None = None
    loss_counts: dict[str, int] | None = None


class Table(NamedTuple):
    """First-order steps `x' = c_x x + c_v v` of a sampler, at `times` `(S,)`."""

    times: Tensor
    c_x: list[float]
    c_v: list[float]


def first_order_table(head: DiffusionHead, num_diffusion_steps: int) -> Table:
    """The head's DDIM (or Euler) steps: those of `k * n` steps visit all nodes of those of `k` steps."""
    steps = head.sampler_steps(Sampling(num_diffusion_steps=num_diffusion_steps, **SAMPLER))
    c_x, c_v, _ = steps.state.unbind(-1)
    return Table(steps.times, c_x.tolist(), c_v.tolist())


class Distillation(nn.Module):
    """`fit` trains this in place of a model: the model with the student as its head, and the teacher.

    Args:
        model: is changed: only its head trains from now on, and its config says `num_diffusion_steps` of the settings.
        unconditional_ids: the prompt that guidance pushes away from, up to the separator; needed with `settings.guidance`.
    """

    def __init__(
        self, model: OrthusForConditionalGeneration, settings: DistillationSettings, unconditional_ids: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if settings.guidance is not None and not len(unconditional_ids):
            raise ValueError(f"guidance={settings.guidance} needs unconditional_ids, the prompt that it pushes away from")
        self.settings, self.unconditional_ids = settings, list(unconditional_ids)
        self.model = model.requires_grad_(False)
        self.teacher: DiffusionHead = copy.deepcopy(model.diffusion_head)
        model.diffusion_head.requires_grad_(True)
        model.config.head_config.num_diffusion_steps = settings.num_diffusion_steps
        model.config.head_config.solver, model.config.head_config.spacing = SAMPLER["solver"], SAMPLER["spacing"]
        self.student_steps = first_order_table(self.teacher, settings.num_diffusion_steps)
        self.teacher_steps = first_order_table(self.teacher, settings.num_diffusion_steps * settings.teacher_substeps)
        if not torch.allclose(self.teacher_steps.times[:: settings.teacher_substeps], self.student_steps.times, atol=1e-4):
            raise ValueError(
                f"{settings.teacher_substeps} teacher_substeps for each of {settings.num_diffusion_steps} steps do not visit the "
                "student's nodes, for times are whole training steps; let their product divide head_config.num_train_timesteps"
            )
        self.guided = self.teacher.is_guided(self.teacher_steps.times, settings.guidance_interval)

    @property
    def loss_weights(self) -> dict[str, float]:
        """One term."""
        return {"image": 1.0}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def count_targets(self, batch: dict[str, Any]) -> dict[str, int]:
        """Number of latents that `batch` asks the model to predict."""
        return {"image": self.model.count_targets(batch)["image"]}

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write the model with the student as its head, without the teacher."""
        self.model.save_pretrained(save_directory, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Draw with the student, as the model does."""
        return self.model.generate(*args, **options)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_latents: Tensor | None = None,
    ) -> DistillationOutput:
        """Loss of the student at all latents that `labels` ask for; arguments as those of the model."""
        model = self.model
        image_token = model.config.image_token_id
        is_latent = labels[:, 1:] == image_token
        count = int(is_latent.sum())
        if count == 0:
            zero = torch.zeros((), device=labels.device)
            return DistillationOutput(loss_sums={"image": zero}, loss_counts={"image": 0})
        with torch.no_grad():
            latents = cast(Tensor, model._resolve_latents(pixel_values, image_latents))
            wanted = (labels == image_token)[input_ids == image_token].view(latents.shape[:2])  # (N, L)
            seen = cast(Tensor, model._noise_inputs(latents))
            hidden = self._hidden(input_ids, seen, position_ids=position_ids, attention_mask=attention_mask)
            streams = [hidden[:, :-1][is_latent]]
            if self.settings.guidance is not None:
                drawn = wanted.any(-1)
                streams.append(self._unconditional_hidden(seen[drawn])[wanted[drawn]])
        losses = self.latent_losses(torch.stack(streams), latents[wanted])
        return DistillationOutput(loss_sums={"image": losses.sum()}, loss_counts={"image": count})

    def _hidden(self, input_ids: Tensor, latents: Tensor, **where: Tensor | None) -> Tensor:
        embeddings = self.model.embed_inputs(input_ids, latents)
        output = self.model(inputs_embeds=embeddings, use_cache=False, skip_logits=True, **where)
        return cast(Tensor, output.last_hidden_state)

    def _unconditional_hidden(self, latents: Tensor) -> Tensor:
        """`(N, L, D)`: what predicts the latents `(N, L, C)` of each picture in the stream that sees only its prompt and them."""
        config, prompt = self.model.config, self.unconditional_ids
        ids = [*prompt, config.boi_token_id, *[config.image_token_id] * config.num_latents]
        hidden = self._hidden(torch.tensor([ids] * len(latents), device=latents.device), latents)
        return hidden[:, len(prompt) : -1]

    def latent_losses(self, streams: Tensor, latents: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Loss per latent `(N,)`: `mean_k (c_v,k^2 / mean_j c_v,j^2) |v_k - v*_k|^2 / C`, averaged over draws.

        With these weights an error in the end point `x'` of a step counts the same in all steps; on the straight path of flow
        matching all weights are 1.

        Args:
            streams: `(1 | 2, N, D)` hidden states, conditional [and unconditional].
            latents: `(N, C)` raw latents, which only `start="noised"` uses.
            noise: `(draws, N, C)` standard normal; drawn when None.
        """
        config, student = self.teacher.config, self.model.diffusion_head
        scaled = latents.float() * config.latent_scale
        if noise is None:
            noise = torch.randn(self.settings.num_draws, *scaled.shape, device=scaled.device)
        points, ends = self.segments(streams, scaled, noise.to(scaled))  # (K, draws, N, C) each
        c_x, c_v = (torch.tensor(c, device=scaled.device)[:, None, None, None] for c in self.student_steps[1:])
        dtype = student.input_proj.weight.dtype
        times = student.embed_times(self.student_steps.times.to(scaled.device))[:, None, None]  # (K, 1, 1, W)
        modulations = student.modulations(times + student.cond_embed(streams[0].to(dtype)))  # (K, 1, N, .)
        v = student.denoise(points.to(dtype), modulations).float()
        errors = (c_v * v - (ends - c_x * points)).square() / c_v.square().mean()
        return errors.mean(dim=(0, 1, 3))

    @torch.no_grad()
    def segments(self, streams: Tensor, scaled: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Where each of the K steps begins and where it should end, `(K, draws, N, C)` each, in scaled latents."""
        start, x, points, ends = self.settings.start, noise, [], []
        embedded = self.teacher.cond_embed(streams.to(self.teacher.input_proj.weight.dtype))  # (streams, N, W)
        for k in range(self.settings.num_diffusion_steps):
            if start == "noised":
                x = self._noised(scaled, noise, k)
            points.append(x)
            ends.append(self._teach(x, embedded, k))
            x = self._student_step(x, streams[0], k) if start == "student" else ends[-1]
        return torch.stack(points), torch.stack(ends)

    def _noised(self, scaled: Tensor, noise: Tensor, k: int) -> Tensor:
        """Points of the noising process at node `k`."""
        time = self.student_steps.times[k].to(scaled.device).reshape(1)
        if self.teacher.config.objective == "v_prediction":
            return diffusion.v_prediction_pair(scaled, noise, self.teacher.alphas_cumprod, time.long())[0]
        return diffusion.flow_matching_pair(scaled, noise, time)[0]

    def _teach(self, x: Tensor, embedded: Tensor, k: int) -> Tensor:
        """The teacher's way from `x` at node `k` to the next one."""
        teacher, steps, guidance = self.teacher, self.teacher_steps, self.settings.guidance
        dtype = teacher.input_proj.weight.dtype
        times = teacher.embed_times(steps.times.to(x.device))  # (S, W)
        for i in range(k * self.settings.teacher_substeps, (k + 1) * self.settings.teacher_substeps):
            used = embedded if self.guided[i] else embedded[:1]
            modulations = [m.unsqueeze(1) for m in teacher.modulations(times[i] + used)]  # (streams, 1, N, .)
            v = teacher.denoise(x.to(dtype).expand(len(used), *x.shape), modulations).float()
            x = steps.c_x[i] * x + steps.c_v[i] * diffusion.guide(v, guidance or 1.0, None)
        return x

    def _student_step(self, x: Tensor, cond: Tensor, k: int) -> Tensor:
        """Where the student, as it is now, would go from `x` at node `k`."""
        student, steps = self.model.diffusion_head, self.student_steps
        dtype = student.input_proj.weight.dtype
        time = student.embed_times(steps.times[k : k + 1].to(x.device))
        modulations = student.modulations(time + student.cond_embed(cond.to(dtype)))
        return steps.c_x[k] * x + steps.c_v[k] * student.denoise(x.to(dtype), modulations).float()
