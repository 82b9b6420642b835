"""Schedules, targets and samplers against closed forms."""

import math

import pytest
import torch
from conftest import tiny_model

from orthus import diffusion
from orthus.configuration import DiffusionHeadConfig
from orthus.diffusion_head import DiffusionHead, init_layer

MEAN, STD = 1.5, 0.4


def head(objective: str, **fields) -> DiffusionHead:
    config = DiffusionHeadConfig(
        latent_dim=2, cond_dim=4, width=8, num_blocks=1, time_embed_dim=8, objective=objective, latent_scale=0.5, **fields
    )
    return DiffusionHead(config).apply(init_layer)


def exact_velocity(module: DiffusionHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the network by the best possible one for scaled latents that are N(MEAN, STD^2)."""
    times: list[float] = []
    original = module.sampler_steps

    def steps(*args):
        result = original(*args)
        times[:] = result.times.tolist()
        return result

    def denoise(x: torch.Tensor, modulations: list[torch.Tensor]) -> torch.Tensor:
        t = times.pop(0)
        if module.config.objective == "flow_matching":
            a, b = 1 - t, t
        else:
            alpha = float(module.alphas_cumprod[int(t)])
            a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        gain = (x - a * MEAN) / (a**2 * STD**2 + b**2)
        x0, eps = MEAN + a * STD**2 * gain, b * gain  # posterior means
        return eps - x0 if module.config.objective == "flow_matching" else a * eps - b * x0

    monkeypatch.setattr(module, "sampler_steps", steps)
    monkeypatch.setattr(module, "denoise", denoise)


@pytest.mark.parametrize(("objective", "tolerance"), [("v_prediction", 0.02), ("flow_matching", 0.02)])
def test_sampler_recovers_a_known_gaussian(objective: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = head(objective)
    exact_velocity(module, monkeypatch)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    latents = module.sample(torch.zeros(20_000, 4), noise=noise, num_diffusion_steps=500) * module.config.latent_scale
    assert abs(latents.mean().item() - MEAN) < tolerance
    assert abs(latents.std().item() - STD) < tolerance


def test_schedule_ends_in_pure_noise() -> None:
    alphas = diffusion.zero_terminal_snr_alphas(1000, 0.00085, 0.012)
    assert alphas[-1] == 0 and abs(alphas[0].item() - (1 - 0.00085)) < 1e-6
    assert bool((alphas[1:] < alphas[:-1]).all())
    assert diffusion.trailing_timesteps(100, 1000).tolist() == list(range(999, 0, -10))


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
def test_one_step_from_a_point_mass(objective: str) -> None:
    """For a data set of one point the path is straight: the exact target leads from any time to the point in one step."""
    x0, eps = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.7, 0.1]])
    if objective == "flow_matching":
        steps = diffusion.euler_steps(1)
        noised, target = diffusion.flow_matching_pair(x0, eps, steps.times)
    else:
        alphas = diffusion.zero_terminal_snr_alphas(1000, 0.00085, 0.012)
        steps = diffusion.ddim_steps(alphas, 1)
        noised, target = diffusion.v_prediction_pair(x0, eps, alphas, steps.times.long())
    torch.testing.assert_close(steps.c_x[0] * noised + steps.c_v[0] * target, x0, atol=1e-5, rtol=1e-4)


def test_hoisted_modulations_equal_the_plain_forward() -> None:
    module = tiny_model().diffusion_head
    cond, noise = torch.randn(3, 32), torch.randn(3, 3)
    steps = module.sampler_steps(5, None)
    x = noise
    for time, c_x, c_v in zip(steps.times, steps.c_x, steps.c_v, strict=True):
        x = c_x * x + c_v * module(x, time.expand(3), cond)
    expected = x / module.config.latent_scale
    torch.testing.assert_close(module.sample(cond, noise=noise, num_diffusion_steps=5), expected, atol=1e-5, rtol=1e-5)


def test_guidance_interval() -> None:
    module = tiny_model(head={"objective": "flow_matching"}).diffusion_head
    cond, uncond, noise = torch.randn(3, 32), torch.randn(3, 32), torch.randn(3, 3)
    options = {"noise": noise, "num_diffusion_steps": 5}
    guided = module.sample(cond, uncond=uncond, guidance=4.0, **options)
    torch.testing.assert_close(module.sample(cond, uncond=uncond, guidance=4.0, guidance_interval=(0.0, 1.0), **options), guided)
    never = module.sample(cond, uncond=uncond, guidance=4.0, guidance_interval=(0.01, 0.02), **options)
    torch.testing.assert_close(never, module.sample(cond, **options))
    late = module.sample(cond, uncond=uncond, guidance=4.0, guidance_interval=(0.0, 0.5), **options)
    assert not torch.allclose(late, guided) and not torch.allclose(late, never)
    with pytest.raises(ValueError, match="guidance_interval"):
        module.sample(cond, uncond=uncond, guidance=4.0, guidance_interval=(0.5, 0.2), **options)


def test_losses_are_averages_over_draws() -> None:
    module = tiny_model().diffusion_head
    cond, latents = torch.randn(3, 32), torch.randn(3, 3)
    times, noise = torch.randint(0, 1000, (6,)), torch.randn(6, 3)
    per_latent = module.latent_losses(cond, latents, timesteps=times, noise=noise)
    first = module.loss(cond, latents, timesteps=times[:3], noise=noise[:3])
    second = module.loss(cond, latents, timesteps=times[3:], noise=noise[3:])
    torch.testing.assert_close(per_latent.mean(), (first + second) / 2)


def test_refusals() -> None:
    module = head("v_prediction")
    with pytest.raises(ValueError, match="needs uncond"):
        module.sample(torch.zeros(1, 4), guidance=2.0)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3\), expected \(1, 2\)"):
        module.sample(torch.zeros(1, 4), noise=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="num_diffusion_steps must lie in 1..1000"):
        module.sample(torch.zeros(1, 4), num_diffusion_steps=2000)
    with pytest.raises(ValueError, match="use ddim"):
        module.sample(torch.zeros(1, 4), solver="euler")
    with pytest.raises(ValueError, match="noise has 5 entries, not a multiple"):
        module.loss(torch.zeros(2, 4), torch.zeros(2, 2), noise=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"outside 0\.\.1000"):
        module.loss(torch.zeros(2, 4), torch.zeros(2, 2), timesteps=torch.tensor([3, 4000]))
    with pytest.raises(ValueError, match="not a multiple"):
        module.loss(torch.zeros(2, 4), torch.zeros(2, 2), timesteps=torch.zeros(3, dtype=torch.long))
