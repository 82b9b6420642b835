"""Noise schedules, training targets and sampler steps: pure functions, in the space of scaled latents.

Two objectives share one sampler form. A noised latent is `x_t = a_t x_0 + b_t eps`, the head regresses a target that is
linear in `(x_0, eps)`, and every step of a deterministic solver is linear in the state, the head's output and one memory, with
numbers known in advance: a solver is a table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("ddim", "euler", "dpm++2m", "heun")
SPACINGS = ("trailing", "log_snr")
CUSTOMARY = {"ddim": ("trailing", 100), "euler": ("trailing", 100), "dpm++2m": ("log_snr", 20), "heun": ("trailing", 50)}
"""Spacing and number of evaluations of a solver when nothing else is said (docs/LOG.md)."""
MIN_LOG_SNR_STEPS = 10  # with fewer evaluations the noisy part, which "log_snr" takes in one step, needs some of them
LOG_SNR_RANGE = (-3.0, 3.5)  # log(signal / spread) of the second and the last node of "log_snr" (docs/LOG.md)


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


def check_num_steps(num_diffusion_steps: int, num_train_timesteps: int) -> None:
    if not 1 <= num_diffusion_steps <= num_train_timesteps:
        raise ValueError(f"num_diffusion_steps must lie in 1..{num_train_timesteps}, got {num_diffusion_steps}")


def trailing_timesteps(num_diffusion_steps: int, num_train_timesteps: int) -> Tensor:
    """Integer timesteps `(S,)`, falling, the last training step first (999, 989, ..., 9 for 100 of 1000)."""
    check_num_steps(num_diffusion_steps, num_train_timesteps)
    spacing = num_train_timesteps / num_diffusion_steps
    steps = torch.arange(num_train_timesteps, 0, -spacing, dtype=torch.float64)[:num_diffusion_steps]
    return steps.round().long() - 1


@dataclass(frozen=True)
class Nodes:
    """Where a sampler evaluates the head: `times` `(S,)` as the head wants them, `signal` and `spread` `(S,)` of
    `x = signal x_0 + spread eps` there, `next_signal` and `next_spread` where each step leads; the last leads to data (1, 0).
    `data` and `noise` `(S, 2)` are the coefficients of `(x, v)` in what `v` says about `x_0` and `eps`. All in float64."""

    times: Tensor
    signal: Tensor
    spread: Tensor
    next_signal: Tensor
    next_spread: Tensor
    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Steps:
    """A sampler run as a table: `times` `(S,)`, and at each evaluation `v` of the head, with state `x` and memory `m` (first 0),
    `x' = state . (x, v, m)` and `m' = memory . (x, v, m)`, both `(S, 3)`."""

    times: Tensor
    state: Tensor
    memory: Tensor


def v_prediction_nodes(alphas_cumprod: Tensor, num_diffusion_steps: int, spacing: str = "trailing") -> Nodes:
    """Nodes among the training steps of a variance-preserving schedule, the first in pure noise.

    `"trailing"`: evenly spaced steps, as published; `"log_snr"`: evenly spaced in log(signal / spread) (arXiv 2206.00927).
    """
    num_train = len(alphas_cumprod)
    check_num_steps(num_diffusion_steps, num_train)
    alphas = alphas_cumprod.double()
    if spacing == "trailing":
        times = trailing_timesteps(num_diffusion_steps, num_train)
    else:
        wanted = torch.linspace(LOG_SNR_RANGE[0], LOG_SNR_RANGE[1], num_diffusion_steps - 1, dtype=torch.float64)
        log_snr = 0.5 * (alphas / (1 - alphas)).log()
        nearest = (log_snr - wanted.unsqueeze(-1)).abs().argmin(-1)
        times = torch.cat([torch.tensor([num_train - 1]), nearest])
        for index in range(1, num_diffusion_steps):  # each training step at most once
            times[index] = min(int(times[index]), int(times[index - 1]) - 1)
        times = torch.maximum(times, torch.arange(num_diffusion_steps - 1, -1, -1))
    # Where `num_diffusion_steps` does not divide the training steps, `diffusers` steps to `time - floor(spacing)` and then
    # evaluates somewhere else; each step leads to the next node here, also then.
    alpha, next_alpha = alphas[times], torch.cat([alphas[times[1:]], torch.ones(1, dtype=torch.float64)])
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    data, noise = torch.stack([signal, -spread], -1), torch.stack([spread, signal], -1)
    return Nodes(times.float(), signal, spread, next_alpha.sqrt(), (1 - next_alpha).sqrt(), data, noise)


def flow_nodes(num_diffusion_steps: int, spacing: str = "trailing") -> Nodes:
    """Nodes of the straight path from t = 1 (noise) to t = 0 (data) for flow matching (arXiv 2210.02747)."""
    if num_diffusion_steps < 1:
        raise ValueError(f"num_diffusion_steps must be at least 1, got {num_diffusion_steps}")
    if spacing == "trailing":
        times = torch.linspace(1.0, 0.0, num_diffusion_steps + 1, dtype=torch.float64)
    else:
        wanted = torch.linspace(LOG_SNR_RANGE[0], LOG_SNR_RANGE[1], num_diffusion_steps - 1, dtype=torch.float64)
        ends = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        times = torch.cat([ends[0], torch.sigmoid(-wanted), ends[1]])
    t, one = times[:-1], torch.ones(num_diffusion_steps, dtype=torch.float64)
    data, noise = torch.stack([one, -t], -1), torch.stack([one, 1 - t], -1)
    return Nodes(t.float(), 1 - t, t, 1 - times[1:], times[1:], data, noise)


def ddim_steps(nodes: Nodes) -> Steps:
    """`x' = a' x_0 + b' eps` (DDIM with eta 0, arXiv 2010.02502, eq. 12); on the straight path this is Euler's step."""
    state = nodes.next_signal.unsqueeze(-1) * nodes.data + nodes.next_spread.unsqueeze(-1) * nodes.noise
    zeros = torch.zeros(len(state), 1, dtype=state.dtype)
    return Steps(nodes.times, torch.cat([state, zeros], -1), torch.zeros(len(state), 3, dtype=state.dtype))


def _exponential(nodes: Nodes) -> tuple[Tensor, Tensor]:
    """`(S,)` each: `x' = k_x x + k_d x_0` solves the step exactly for a constant `x_0` (arXiv 2211.01095, eq. 9)."""
    k_x = nodes.next_spread / nodes.spread
    return k_x, nodes.next_signal - nodes.signal * k_x


def multistep_steps(nodes: Nodes) -> Steps:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); the memory is the last `x_0`. First order where log-SNR is infinite: in
    the first step, in the second one of a schedule that starts in pure noise, and in the last one."""
    k_x, k_d = _exponential(nodes)
    log_snr = (nodes.signal / nodes.spread).log()
    num = len(k_x)
    state, memory = torch.zeros(num, 3, dtype=k_x.dtype), torch.zeros(num, 3, dtype=k_x.dtype)
    memory[:, :2] = nodes.data
    for i in range(num):
        old = 0.0  # weight of the last x_0 in the extrapolation
        if 0 < i < num - 1 and torch.isfinite(log_snr[i - 1]):
            old = float((log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])) / 2
        state[i, :2] = k_d[i] * (1 + old) * nodes.data[i]
        state[i, 0] += k_x[i]
        state[i, 2] = -k_d[i] * old
    return Steps(nodes.times, state, memory)


def heun_steps(nodes: Nodes, num_diffusion_steps: int) -> Steps:
    """Trapezoidal rule for `x_0` in the exponential form: two evaluations a step, the second one at its end; the last step, which
    has no end to evaluate at, and with an even number of evaluations the one before are of first order. The memory is the
    corrected part of the step. `nodes` are the `num_diffusion_steps // 2 + 1` begins of the steps."""
    k_x, k_d = _exponential(nodes)
    rows: list[tuple[float, list[float], list[float]]] = []
    for i, (time, (d_x, d_v)) in enumerate(zip(nodes.times.tolist(), nodes.data.tolist(), strict=True)):
        x, d = float(k_x[i]), float(k_d[i])
        full = [x + d * d_x, d * d_v, 0.0]
        if i >= num_diffusion_steps - len(k_x):
            rows.append((time, full, [0.0, 0.0, 0.0]))
            continue
        rows.append((time, full, [x + d / 2 * d_x, d / 2 * d_v, 0.0]))
        e_x, e_v = nodes.data[i + 1].tolist()
        rows.append((float(nodes.times[i + 1]), [d / 2 * e_x, d / 2 * e_v, 1.0], [0.0, 0.0, 0.0]))
    times, state, memory = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return Steps(times.float(), state, memory)


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
