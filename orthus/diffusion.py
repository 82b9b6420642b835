"""Noise schedules, training targets and sampler steps: pure functions, in the space of scaled latents.

Two objectives share one sampler form. A noised latent is `x_t = a_t x_0 + b_t eps`, the head regresses a target that is
linear in `(x_0, eps)`, and every deterministic first-order step is `x' = c_x x + c_v v` with scalars known in advance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("ddim", "euler")


def zero_terminal_snr_alphas(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Cumulative alphas `(num_steps,)`, fp32, of the scaled-linear schedule rescaled to zero terminal SNR.

    Source: Lin et al. 2024 (arXiv 2305.08891), algorithm 1, as used by the published Orthus code.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float32) ** 2
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    # The published scheduler keeps alphas per step and multiplies them again; the same order gives the same rounding.
    alphas_bar = root**2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return torch.cumprod(1.0 - (1.0 - alphas), dim=0)


def trailing_timesteps(num_diffusion_steps: int, num_train_timesteps: int) -> Tensor:
    """Integer timesteps `(S,)`, falling, the last training step first (999, 989, ..., 9 for 100 of 1000)."""
    if not 1 <= num_diffusion_steps <= num_train_timesteps:
        raise ValueError(f"num_diffusion_steps must lie in 1..{num_train_timesteps}, got {num_diffusion_steps}")
    spacing = num_train_timesteps / num_diffusion_steps
    steps = torch.arange(num_train_timesteps, 0, -spacing, dtype=torch.float64)[:num_diffusion_steps]
    return steps.round().long() - 1


@dataclass(frozen=True)
class Steps:
    """The constants of a sampler run: `times` `(S,)` as the head wants them, and `x' = c_x x + c_v v` per step `(S,)`."""

    times: Tensor
    c_x: Tensor
    c_v: Tensor


def ddim_steps(alphas_cumprod: Tensor, num_diffusion_steps: int) -> Steps:
    """DDIM (eta 0) for v-prediction with trailing spacing; the step after the last one has alpha 1.

    With `x_0 = sqrt(a) x - sqrt(1-a) v` and `eps = sqrt(a) v + sqrt(1-a) x`, DDIM's `x' = sqrt(a') x_0 + sqrt(1-a') eps`
    (arXiv 2010.02502, eq. 12) is linear in `(x, v)`.
    """
    times = trailing_timesteps(num_diffusion_steps, len(alphas_cumprod))
    alpha = alphas_cumprod.double()[times]
    # The previous step is `times - spacing`, which for an uneven spacing is not the next entry of `times`.
    previous = times - len(alphas_cumprod) // num_diffusion_steps
    alpha_prev = torch.where(previous >= 0, alphas_cumprod.double()[previous.clamp(min=0)], 1.0)
    c_x = (alpha * alpha_prev).sqrt() + ((1 - alpha) * (1 - alpha_prev)).sqrt()
    c_v = (alpha * (1 - alpha_prev)).sqrt() - ((1 - alpha) * alpha_prev).sqrt()
    return Steps(times.float(), c_x.float(), c_v.float())


def euler_steps(num_diffusion_steps: int) -> Steps:
    """Euler steps of `dx/dt = v` from t = 1 (noise) to t = 0 (data) for flow matching (arXiv 2210.02747)."""
    if num_diffusion_steps < 1:
        raise ValueError(f"num_diffusion_steps must be at least 1, got {num_diffusion_steps}")
    times = torch.linspace(1.0, 0.0, num_diffusion_steps + 1)
    return Steps(times[:-1], torch.ones(num_diffusion_steps), times[1:] - times[:-1])


def v_prediction_pair(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and v targets, both `(N, C)`, at integer `timesteps` `(N,)` (arXiv 2202.00512, section 4)."""
    alpha = alphas_cumprod.to(latents.device)[timesteps].unsqueeze(-1)
    signal, spread = alpha.sqrt().to(latents.dtype), (1 - alpha).sqrt().to(latents.dtype)
    return signal * latents + spread * noise, signal * noise - spread * latents


def flow_matching_pair(latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the straight path and their velocity `noise - latents`, both `(N, C)`, at `times` `(N,)` in [0, 1]."""
    t = times.unsqueeze(-1).to(latents.dtype)
    return (1 - t) * latents + t * noise, noise - latents


def guide(v: Tensor, guidance: float | Tensor, image_guidance: float | Tensor | None) -> Tensor:
    """Classifier-free guidance over streams. `v` is `(streams, N, C)` in the order full, [image only,] unconditional."""
    if len(v) == 1:
        return v[0]
    if len(v) == 2:
        return v[1] + guidance * (v[0] - v[1])
    assert image_guidance is not None
    return v[2] + image_guidance * (v[1] - v[2]) + guidance * (v[0] - v[1])
