"""What the published code does for each latent, written plainly: one image at a time, nothing kept that could be computed again.

Per latent: all latents so far are embedded again, for each guidance stream by itself; the backbone advances both streams by one
position; the LM head runs although nothing is written; and every diffusion step is one whole forward of the head, time and
condition embeddings and modulations included, followed by a step of a `diffusers` scheduler. The maths are those of `generate`
(tests/test_speed.py holds the two equal), so a ratio of times is the savings alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.speed_clock import Clock
from orthus.configuration import DiffusionHeadConfig
from orthus.modeling import OrthusForConditionalGeneration


@dataclass(frozen=True)
class Scheduler:
    """A `diffusers` scheduler and what the head wants for each of its timesteps."""

    scheduler: Any
    start: Callable[[], Any]  # sets the timesteps of one latent
    head_time: Callable[[Tensor], Tensor]


def make_scheduler(config: DiffusionHeadConfig, num_diffusion_steps: int, device: torch.device) -> Scheduler:
    """The published DDIM, or Euler's steps for flow matching. ValueError without `diffusers`."""
    try:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ValueError("the reference loop needs diffusers; run: pip install 'orthus[eval]'") from error
    scheduler: Any
    if config.objective == "flow_matching":
        sigmas = torch.linspace(1, 0, num_diffusion_steps + 1)[:-1].tolist()
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=1.0)
        return Scheduler(
            scheduler,
            lambda: scheduler.set_timesteps(sigmas=sigmas, device=device),
            lambda timestep: timestep / config.num_train_timesteps,
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return Scheduler(scheduler, lambda: scheduler.set_timesteps(num_diffusion_steps, device=device), lambda timestep: timestep)


def embed_all(model: OrthusForConditionalGeneration, latents: Tensor) -> Tensor:
    """Embeddings `(P, D)` of all latents `(P, C)` of an image so far, by the formula as published."""
    layer, code_embeddings = model.latent_embedding, model.code_embeddings()
    if layer.kind != "softmax" or layer.positions is not None:
        return layer(latents.unsqueeze(0), code_embeddings)[0]
    codebook: Tensor = layer.codebook
    if layer.fp32_distances:
        codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    z = latents.to(codebook.dtype)
    squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)  # (P, K)
    distances = squares - 2 * torch.einsum("bd,dn->bn", z, codebook.T)
    weights = torch.softmax(-distances / layer.temperature, dim=1)
    return weights.to(code_embeddings.dtype) @ code_embeddings


def draw_latent(
    model: OrthusForConditionalGeneration, scheduler: Scheduler, cond: Tensor, noise: Tensor, guidance: float
) -> Tensor:
    """One raw latent `(1, C)` from hidden states `(streams, D)` and noise `(1, C)`."""
    head = model.diffusion_head
    dtype, streams = head.input_proj.weight.dtype, len(cond)
    x = noise.to(torch.promote_types(dtype, torch.float32))
    scheduler.start()
    for timestep in scheduler.scheduler.timesteps:
        times = scheduler.head_time(timestep).repeat(streams)
        v = head(x.to(dtype).repeat(streams, 1), times, cond.to(dtype)).to(x.dtype)  # (streams, C)
        if streams == 2:
            v = v[1:] + guidance * (v[:1] - v[1:])
        x = scheduler.scheduler.step(v, timestep, x).prev_sample
    return x / head.config.latent_scale


class ReferenceLoop:
    """One image of one prompt, with the unconditional prompt as a second row when there is guidance."""

    def __init__(self, model: OrthusForConditionalGeneration, prompts: Sequence[Tensor], clock: Clock) -> None:
        config, device = model.config, model.lm_head.weight.device
        self.model, self.clock, self.num_streams = model, clock, len(prompts)
        width = max(map(len, prompts))
        self.ids = torch.full((len(prompts), width), config.pad_token_id, device=device)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):
            self.ids[row, width - len(prompt) :] = prompt.to(device)
            self.mask[row, width - len(prompt) :] = 1
        self.cache = DynamicCache(config=config.text_config)

    def token_rows(self, ids: Tensor) -> Tensor:
        """Embeddings `(streams, T, D)` of ids `(streams, T)`."""
        return self.model.get_input_embeddings()(ids)

    def begin_of_image(self) -> Tensor:
        """`(streams, 1, D)`."""
        return self.token_rows(torch.full_like(self.ids[:, :1], self.model.config.boi_token_id))

    def latent_rows(self, latents: Tensor, last: int) -> Tensor:
        """Embeddings `(streams, last, D)` of the last ones of all latents so far `(P, C)`."""
        streams = [embed_all(self.model, latents)[-last:] for _ in range(self.num_streams)]
        return torch.stack(streams).to(self.model.code_embeddings().dtype)

    def advance(self, embeddings: Tensor) -> Tensor:
        """Feed embeddings `(streams, T, D)`; hidden states `(streams, D)` at the last position."""
        fed = self.cache.get_seq_length()
        new = fed + embeddings.shape[1] - self.mask.shape[1]
        self.mask = torch.nn.functional.pad(self.mask, (0, new), value=1)
        with self.clock.part("backbone"):
            hidden = self.model.backbone(
                inputs_embeds=embeddings,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, fed:],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        with self.clock.part("lm_head"):
            self.model.lm_head(hidden).float()
        return hidden


@torch.no_grad()
def draw_latents(
    model: OrthusForConditionalGeneration,
    prompts: Sequence[Tensor],
    noise: Tensor,
    *,
    guidance: float = 1.0,
    num_diffusion_steps: int | None = None,
    prefix: Tensor | None = None,
    num_latents: int | None = None,
    clock: Clock | None = None,
) -> Tensor:
    """The next latents `(num_latents, C)` of an image of which `prefix` `(P, C)` is known.

    Args:
        prompts: ids `(P',)` of the prompt and, when `guidance` is not 1, of the unconditional prompt.
        noise: `(L, C)` standard normal, one row per latent of the whole image.
        num_latents: how many to draw; None draws up to the end of the image.
        clock: gets a mark after the prompt (without a prefix) and after each latent, and the seconds of the parts.
    """
    known = 0 if prefix is None else len(prefix)
    total, num_latents = model.config.num_latents, model.config.num_latents - known if num_latents is None else num_latents
    if known + num_latents > total or num_latents < 1:
        raise ValueError(f"{known} known and {num_latents} new latents do not make 1..{total} latents of an image")
    if len(prompts) != (1 if guidance == 1.0 else 2):
        raise ValueError(f"guidance={guidance} with {len(prompts)} prompts; give one, and the unconditional one for guidance")
    device = model.lm_head.weight.device
    clock = clock or Clock(device)
    head = model.config.head_config
    scheduler = make_scheduler(head, num_diffusion_steps or head.num_diffusion_steps, device)
    loop = ReferenceLoop(model, prompts, clock)
    if prefix is None or not known:
        loop.advance(loop.token_rows(loop.ids))
        clock.mark()
        hidden, latents = loop.advance(loop.begin_of_image()), noise.new_empty(0, noise.shape[-1], device=device)
    else:
        latents = prefix.to(device)
        parts = [loop.token_rows(loop.ids), loop.begin_of_image(), loop.latent_rows(latents, known)]
        hidden = loop.advance(torch.cat(parts, dim=1))
    for place in range(known, known + num_latents):
        if place > known:
            with clock.part("embedding"):
                newest = loop.latent_rows(latents, 1)
            hidden = loop.advance(newest)
        with clock.part("head"):
            latent = draw_latent(model, scheduler, hidden, noise[place : place + 1].to(device), guidance)
        latents = torch.cat([latents, latent.to(latents.dtype)])
        clock.mark()
    return latents[known:]
