"""Schedules, targets and samplers against closed forms."""

import pytest
import torch
from conftest import tiny_model

from orthus import diffusion
from orthus.configuration import DiffusionHeadConfig
from orthus.diffusion_head import DiffusionHead, init_layer
from orthus.sampling import Sampling

MEAN, STD = 1.5, 0.4


def head(objective: str, **fields) -> DiffusionHead:
    config = DiffusionHeadConfig(
        latent_dim=2, cond_dim=4, width=8, num_blocks=1, time_embed_dim=8, objective=objective, latent_scale=0.5, **fields
    )
    return DiffusionHead(config).apply(init_layer)


def exact_velocity(module: DiffusionHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the network by the best possible one for scaled latents that are N(MEAN, STD^2). Modulations are the times."""

    def denoise(self: DiffusionHead, x: torch.Tensor, modulations: list[torch.Tensor]) -> torch.Tensor:
        t = modulations[0][..., :1]
        if module.config.objective == "flow_matching":
            a, b = 1 - t, t
        else:
            alpha = module.alphas_cumprod.double()[t.long()]
            a, b = alpha.sqrt(), (1 - alpha).sqrt()
        gain = (x - a * MEAN) / (a**2 * STD**2 + b**2)
        x0, eps = MEAN + a * STD**2 * gain, b * gain  # posterior means
        return eps - x0 if module.config.objective == "flow_matching" else a * eps - b * x0

    monkeypatch.setattr(DiffusionHead, "embed_times", lambda self, times: times.double().unsqueeze(-1))
    monkeypatch.setattr(DiffusionHead, "modulations", lambda self, conditioning: [conditioning])
    monkeypatch.setattr(DiffusionHead, "denoise", denoise)
    module.double()
    for parameter in module.cond_embed.parameters():
        torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "heun"])
def test_sampler_recovers_a_known_gaussian(solver: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = head(objective)
    exact_velocity(module, monkeypatch)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = torch.zeros(20_000, 4, dtype=torch.float64)
    options = {"num_diffusion_steps": 301, "solver": solver, "spacing": "trailing"}
    latents = module.sample(cond, noise=noise, **options) * module.config.latent_scale
    assert abs(latents.mean().item() - MEAN) < 0.02
    assert abs(latents.std().item() - STD) < 0.02


@pytest.mark.parametrize("spacing", ["trailing", "log_snr"])
@pytest.mark.parametrize("solver", ["dpm++2m", "heun"])
def test_second_order_solvers_beat_the_first_order_one(solver: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the straight path, where times are not rounded to training steps, against the closed form of the ODE's solution."""
    module = head("flow_matching")
    exact_velocity(module, monkeypatch)
    noise = torch.linspace(-2, 2, 18, dtype=torch.float64).view(9, 2)
    exact = MEAN + STD * noise  # the ODE of a Gaussian maps quantile to quantile

    def error(**options) -> float:
        latents = module.sample(torch.zeros(9, 4, dtype=torch.float64), noise=noise, spacing=spacing, **options)
        return float((latents * module.config.latent_scale - exact).abs().max())

    first = error(solver="ddim", num_diffusion_steps=25)
    second = error(solver=solver, num_diffusion_steps=25)
    assert second < first / 1.3
    assert error(solver=solver, num_diffusion_steps=51) < max(second / 2, 2e-3)  # the last step of "log_snr" stays as it is


@pytest.mark.parametrize("num", [1, 2, 3, 4, 20])
def test_every_solver_evaluates_the_head_as_often_as_asked(num: int) -> None:
    for objective in ("v_prediction", "flow_matching"):
        for solver in ("ddim", "dpm++2m", "heun"):
            for spacing in diffusion.SPACINGS:
                steps = head(objective).sampler_steps(Sampling(solver=solver, num_diffusion_steps=num, spacing=spacing))
                assert len(steps.times) == num and bool(torch.isfinite(steps.state).all())
                assert bool((steps.times.diff() < 0).all()) or solver == "heun"


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
        steps = diffusion.ddim_steps(diffusion.flow_nodes(1))
        noised, target = diffusion.flow_matching_pair(x0, eps, steps.times)
    else:
        alphas = diffusion.zero_terminal_snr_alphas(1000, 0.00085, 0.012)
        steps = diffusion.ddim_steps(diffusion.v_prediction_nodes(alphas, 1))
        noised, target = diffusion.v_prediction_pair(x0, eps, alphas, steps.times.long())
    torch.testing.assert_close((steps.state[0, 0] * noised + steps.state[0, 1] * target).float(), x0, atol=1e-5, rtol=1e-4)


def test_hoisted_modulations_equal_the_plain_forward() -> None:
    module = tiny_model().diffusion_head
    cond, noise = torch.randn(3, 32), torch.randn(3, 3)
    steps = module.sampler_steps(Sampling("ddim", 5))
    x = noise
    for time, (c_x, c_v, _) in zip(steps.times, steps.state.tolist(), strict=True):
        x = c_x * x + c_v * module(x, time.expand(3), cond)
    expected = x / module.config.latent_scale
    drawn = module.sample(cond, noise=noise, num_diffusion_steps=5, solver="ddim")
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


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
