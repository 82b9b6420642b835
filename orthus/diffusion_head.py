"""The diffusion head: an AdaLN MLP that owns the loss and the sampler of one image latent given one hidden state.

The modulations of a block depend on the diffusion time and the condition but never on the noised latent. Sampling
(`sampling.py`) therefore computes them for all diffusion steps in one product per block before the loop; what stays sequential is
the small part that sees `x`. Training and sampling call the same two functions, `modulations` and `denoise`.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from orthus import diffusion
from orthus.configuration import DiffusionHeadConfig
from orthus.sampling import LatentSampler, Sampling

MAX_PERIOD = 10_000


@lru_cache(maxsize=8)
def _alphas(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    with torch.device("cpu"):
        return diffusion.zero_terminal_snr_alphas(num_steps, beta_start, beta_end)


def sinusoids(times: Tensor, dim: int) -> Tensor:
    """Time features `(N, dim)`, cosines then sines, of `times` `(N,)` in units of training steps."""
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    angles = times.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: modulations and the last layer, so that every block starts as the identity."""


class TimeLinear(nn.Linear):
    """A linear layer of the time embedding, which starts small."""


def init_layer(layer: nn.Module) -> None:
    """Starting values of one layer of the head (a leaf: `transformers` visits only modules with tensors of their own)."""
    if isinstance(layer, ZeroLinear):
        init.zeros_(layer.weight)
    elif isinstance(layer, TimeLinear):
        init.normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.Linear):
        init.xavier_uniform_(layer.weight)
    elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
        init.ones_(layer.weight)
    if isinstance(layer, (nn.Linear, nn.LayerNorm)) and layer.bias is not None:
        init.zeros_(layer.bias)


class AdaLNBlock(nn.Module):
    """`x + gate * mlp(norm(x) * (1 + scale) + shift)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = ZeroLinear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Draws image latents `(N, C)` from hidden states `(N, D)`; latents are raw at every public method."""

    def __init__(self, config: DiffusionHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_embed = nn.Sequential(TimeLinear(config.time_embed_dim, width), nn.SiLU(), TimeLinear(width, width))
        self.cond_embed = nn.Linear(config.cond_dim, width)
        self.input_proj = nn.Linear(config.latent_dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = ZeroLinear(width, 2 * width)
        self.final_linear = ZeroLinear(width, config.latent_dim)

    @property
    def alphas_cumprod(self) -> Tensor:
        """`(num_train_timesteps,)` in fp32 on the CPU; only the v-prediction objective uses it."""
        config = self.config
        return _alphas(config.num_train_timesteps, config.beta_start, config.beta_end)

    def embed_times(self, times: Tensor) -> Tensor:
        """`(N, W)` for `times` `(N,)`: integer training steps (v-prediction) or [0, 1] (flow matching)."""
        if self.config.objective == "flow_matching":
            times = times.float() * self.config.num_train_timesteps
        features = sinusoids(times, self.config.time_embed_dim)
        return self.time_embed(features.to(self.input_proj.weight.dtype))

    def modulations(self, conditioning: Tensor) -> list[Tensor]:
        """Per block `(..., 3W)` and for the final layer `(..., 2W)`, from `y = time + cond` `(..., W)`."""
        activated = F.silu(conditioning)
        return [*(cast(AdaLNBlock, block).modulation(activated) for block in self.blocks), self.final_modulation(activated)]

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """Predicted target `(..., C)` for noised scaled latents `(..., C)`."""
        x = self.input_proj(x)
        for block, modulation in zip(self.blocks, modulations[:-1], strict=True):
            x = block(x, modulation)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        return self.final_linear(self.final_norm(x) * (1 + scale) + shift)

    def forward(self, x: Tensor, times: Tensor, cond: Tensor) -> Tensor:
        """Predicted target `(N, C)` for noised scaled latents `(N, C)` at `times` `(N,)` given `cond` `(N, D)`."""
        return self.denoise(x, self.modulations(self.embed_times(times) + self.cond_embed(cond)))

    def loss(self, cond: Tensor, latents: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Mean squared error of the target, a scalar; see [`latent_losses`]."""
        return self.latent_losses(cond, latents, timesteps=timesteps, noise=noise).mean()

    def latent_losses(
        self, cond: Tensor, latents: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of the target per latent `(N,)`, averaged over channels and noise draws; see [`draw_losses`]."""
        return self.draw_losses(cond, latents, timesteps=timesteps, noise=noise)[0].mean(dim=0)

    def draw_losses(
        self, cond: Tensor, latents: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the target, averaged over channels, of `M` noise draws for each latent `(M, N)`, and their
        diffusion times `(M, N)`, 0 (data) to 1 (noise).

        Args:
            cond: `(N, D)` hidden states at the positions that predict the latents.
            latents: `(N, C)` raw latents.
            timesteps: `(M * N,)` times of all draws, draw-major; drawn when None (`M = num_noise_draws`).
            noise: `(M * N, C)` standard normal; drawn when None.
        """
        num_latents, (config, dtype) = len(latents), (self.config, self.input_proj.weight.dtype)
        draws = self._num_draws(num_latents, timesteps, noise)
        scaled = (latents.float() * config.latent_scale).repeat(draws, 1)
        noise = torch.randn_like(scaled) if noise is None else noise.to(scaled)
        timesteps = self.draw_times(len(scaled), scaled.device) if timesteps is None else timesteps
        if config.objective == "v_prediction":
            noised, target = diffusion.v_prediction_pair(scaled, noise, self.alphas_cumprod, timesteps)
        else:
            noised, target = diffusion.flow_matching_pair(scaled, noise, timesteps)
        conditioning = self.embed_times(timesteps) + self.cond_embed(cond.to(dtype)).repeat(draws, 1)
        predicted = self.denoise(noised.to(dtype), self.modulations(conditioning))
        losses = (predicted.float() - target).square().mean(dim=-1)
        unit = timesteps if config.objective == "flow_matching" else timesteps / config.num_train_timesteps
        return losses.view(draws, num_latents), unit.view(draws, num_latents)

    def _num_draws(self, num_latents: int, timesteps: Tensor | None, noise: Tensor | None) -> int:
        """Noise draws per latent: those that were given, else the config's."""
        given = {"timesteps": timesteps, "noise": noise}
        lengths = {name: len(value) for name, value in given.items() if value is not None}
        for name, length in lengths.items():
            if num_latents == 0 or length % num_latents:
                raise ValueError(f"{name} has {length} entries, not a multiple of the {num_latents} latents")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"timesteps and noise have {lengths} entries; give one of each per draw and latent")
        limit = self.config.num_train_timesteps if self.config.objective == "v_prediction" else 1
        if timesteps is not None and len(timesteps) and not 0 <= float(timesteps.min()) <= float(timesteps.max()) <= limit:
            raise ValueError(f"timesteps reach from {float(timesteps.min()):g} to {float(timesteps.max()):g}, outside 0..{limit}")
        return next(iter(lengths.values()), self.config.num_noise_draws * num_latents) // max(num_latents, 1)

    def draw_times(self, num: int, device: torch.device) -> Tensor:
        """Training times `(num,)`: uniform integer steps, or logit-normal in [0, 1] for flow matching."""
        config = self.config
        if config.objective == "v_prediction":
            return torch.randint(0, config.num_train_timesteps, (num,), device=device)
        return torch.sigmoid(torch.randn(num, device=device) * config.time_logit_std + config.time_logit_mean)

    @property
    def modulation_dim(self) -> int:
        """Numbers per latent, stream and diffusion step that [`modulations`] gives."""
        return self.config.width * (3 * self.config.num_blocks + 2)

    def resolve(self, sampling: Sampling) -> Sampling:
        """`sampling` with what it leaves open taken from the config, or for another solver as is customary."""
        own, solver = self.config, sampling.solver or self.config.solver
        assert solver is not None
        is_own = solver == own.solver or {solver, own.solver} == {"ddim", "euler"}
        spacing, num = (own.spacing, own.num_diffusion_steps) if is_own else diffusion.CUSTOMARY[solver]
        num = sampling.num_diffusion_steps or num
        assert num is not None
        if spacing == "log_snr" and num < diffusion.MIN_LOG_SNR_STEPS:
            spacing = "trailing"
        spacing = sampling.spacing or spacing
        return replace(sampling, solver=solver, spacing=spacing, num_diffusion_steps=num)

    def sampler_steps(self, sampling: Sampling) -> diffusion.Steps:
        """Table of a sampler run. On the straight path of flow matching DDIM and Euler are the same step."""
        sampling = self.resolve(sampling)
        num, solver, spacing = sampling.num_diffusion_steps, sampling.solver, sampling.spacing
        assert num is not None and solver is not None and spacing is not None
        if self.config.objective != "flow_matching" and solver == "euler":
            raise ValueError("solver='euler' needs objective=flow_matching; this head has v_prediction: use ddim")
        if self.config.objective != "flow_matching":
            diffusion.check_num_steps(num, self.config.num_train_timesteps)
        num_nodes = num // 2 + 1 if solver == "heun" else num
        if self.config.objective == "flow_matching":
            nodes = diffusion.flow_nodes(num_nodes, spacing)
        else:
            nodes = diffusion.v_prediction_nodes(self.alphas_cumprod, num_nodes, spacing)
        if solver == "heun":
            return diffusion.heun_steps(nodes, num)
        return diffusion.multistep_steps(nodes) if solver == "dpm++2m" else diffusion.ddim_steps(nodes)

    def is_guided(self, times: Tensor, interval: tuple[float, float]) -> list[bool]:
        """Whether guidance acts at each of the sampler's `times` `(S,)`."""
        low, high = interval
        unit = 1.0 if self.config.objective == "flow_matching" else self.config.num_train_timesteps
        return [low <= time / unit <= high for time in times.tolist()]

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        *,
        guidance: float | Tensor = 1.0,
        uncond: Tensor | None = None,
        image_cond: Tensor | None = None,
        image_guidance: float | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw raw latents `(N, C)` for hidden states `cond` `(N, D)`.

        Args:
            guidance: classifier-free guidance weight, a number or `(N, 1)`; 1 uses `cond` alone.
            uncond: `(N, D)` hidden states of the unconditional stream, needed when guidance is not 1.
            image_cond: `(N, D)` of the stream that sees the picture but not the instruction (editing):
                `v = v_uncond + image_guidance (v_image - v_uncond) + guidance (v_cond - v_image)`.
            noise: `(N, C)` standard normal start, shared by the streams; drawn with `generator` when None.
            options: fields of [`Sampling`]: solver, num_diffusion_steps, guidance_interval, ...
        """
        if uncond is None and isinstance(guidance, (int, float)) and guidance != 1.0:
            raise ValueError(f"guidance={guidance} needs uncond, the hidden states of the unconditional stream")
        if image_cond is not None and (uncond is None or image_guidance is None):
            raise ValueError("image_cond needs both uncond and image_guidance (three-stream editing guidance)")
        streams = torch.stack([stream for stream in (cond, image_cond, uncond) if stream is not None])
        shape = (len(cond), self.config.latent_dim)
        if noise is None:
            dtype = torch.promote_types(self.input_proj.weight.dtype, torch.float32)
            noise = torch.randn(shape, generator=generator, device=cond.device, dtype=dtype)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape} (one row per latent)")
        return LatentSampler(self, Sampling(**options)).draw(streams, noise, guidance, image_guidance)
