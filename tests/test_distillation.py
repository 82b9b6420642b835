"""Few-step heads: what the student should do is known in closed form for a Gaussian, and nothing but the head moves."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.configuration import DiffusionHeadConfig
from orthus.diffusion_head import DiffusionHead
from orthus.training.distillation import Distillation, DistillationSettings
from orthus.training.fit import fit
from orthus.training.settings import OptimSettings, RunSettings, load_settings
from train import distil

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
OBJECTIVES, STARTS = ("flow_matching", "v_prediction"), ("trajectory", "noised", "student")
NUM_LATENTS, CHANNELS, HIDDEN = 4, 3, 32
UNCONDITIONAL = [0, 9, 10, 6]  # begin-of-text, two words, separator


def distillation(objective: str = "flow_matching", **settings: Any) -> Distillation:
    model = tiny_model(head={"objective": objective, "latent_scale": 0.5}, use_latent_positions=True)
    return Distillation(model, DistillationSettings(**settings), UNCONDITIONAL)


def example(*prompt: int) -> list[int]:
    """A prompt and the picture that answers it."""
    return [0, *prompt, 6, 4, *[7] * NUM_LATENTS, 5, 6]


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two rows of two examples each; the second one of the first row has the unconditional prompt."""
    generator = torch.Generator().manual_seed(seed)
    word = int(torch.randint(8, 40, (1,), generator=generator))
    rows = [[example(word), example(9, 10)], [example(word, 12), example(13)]]
    ids = torch.tensor([[token for entry in row for token in entry] for row in rows])
    positions = torch.tensor([[place for entry in row for place in range(len(entry))] for row in rows])
    labels = torch.where(ids == 7, 7, -100)
    latents = torch.randn(4, NUM_LATENTS, CHANNELS, generator=generator)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "image_latents": latents}


class Batches:
    """An endless loader that knows its place."""

    place = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.place += 1
            yield batch(self.place)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


# -- closed forms --------------------------------------------------------------------------------------------------


class GaussianHead(DiffusionHead):
    """Exact for latents of a normal distribution with standard deviation `spread` and mean 0, whatever the condition."""

    spread = 0.5

    def __init__(self, objective: str) -> None:
        super().__init__(DiffusionHeadConfig(latent_dim=CHANNELS, cond_dim=4, width=8, objective=objective, latent_scale=2.0))  # type: ignore[arg-type]
        nn.init.zeros_(self.cond_embed.weight)
        nn.init.zeros_(self.cond_embed.bias)

    def path(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and spread of noised latents."""
        if self.config.objective == "flow_matching":
            return 1 - times, times
        alpha = self.alphas_cumprod.double()[times.long()]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def embed_times(self, times: Tensor) -> Tensor:
        return times.unsqueeze(-1).expand(-1, self.config.width).float()

    def modulations(self, conditioning: Tensor) -> list[Tensor]:
        return [conditioning[..., :1]]

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        a, b = self.path(modulations[0].double())
        s2 = self.spread**2
        if self.config.objective == "flow_matching":
            return ((b - a * s2) / (a**2 * s2 + b**2) * x).float()
        return (a * b * (1 - s2) / (a**2 * s2 + b**2) * x).float()

    def width_at(self, times: Tensor) -> Tensor:
        """Standard deviation of the noised latents: what the exact solution scales a point by."""
        a, b = self.path(times.double())
        return (a**2 * self.spread**2 + b**2).sqrt()


class OneStepGaussianHead(GaussianHead):
    """The student that ends where the exact solution does."""

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        time, v = modulations[0].double(), torch.zeros_like(x)
        times, c_x, c_v = self.table  # type: ignore[has-type]
        ends = [*self.width_at(times[1:]).tolist(), self.spread]
        for node, begin, end, a, b in zip(times, self.width_at(times), ends, c_x, c_v, strict=True):
            v = torch.where((time - node).abs() < 1e-4, ((end / begin - a) / b * x).float(), v)
        return v


def gaussian(objective: str, head: type[GaussianHead] = GaussianHead, **settings: Any) -> Distillation:
    model = tiny_model(head={"objective": objective})
    model.diffusion_head = GaussianHead(objective)
    made = Distillation(model, DistillationSettings(**settings))
    model.diffusion_head = head(objective)
    model.diffusion_head.table = made.student_steps
    return made


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_of_an_exact_teacher_are_the_exact_solution(objective: str, start: str) -> None:
    """Each segment scales points by the ratio of the widths at its ends, and a student that does so in one step has no loss."""
    made = gaussian(objective, OneStepGaussianHead, num_diffusion_steps=4, teacher_substeps=250, start=start)
    streams, noise = torch.zeros(1, 6, 4), torch.randn(2, 6, CHANNELS)
    latents = torch.randn(6, CHANNELS) * GaussianHead.spread / 2
    begins, ends = made.segments(streams, latents * 2, noise)
    teacher: Any = made.teacher
    widths = torch.cat([teacher.width_at(made.student_steps.times), torch.tensor([GaussianHead.spread])])
    for k in range(4):
        torch.testing.assert_close(ends[k], begins[k] * (widths[k + 1] / widths[k]).float(), rtol=0, atol=0.01)
    assert float(made.latent_losses(streams, latents, noise=noise).detach().max()) < 1e-3
    worse = gaussian(objective, num_diffusion_steps=4, teacher_substeps=250, start=start)
    assert float(worse.latent_losses(streams, latents, noise=noise).detach().mean()) > 3e-3
    # What `generate` calls makes the same steps: pure noise comes out with the standard deviation of the data.
    drawn = made.model.diffusion_head.sample(streams[0], noise=noise[0], num_diffusion_steps=4, solver="ddim")
    torch.testing.assert_close(drawn * 2, GaussianHead.spread * noise[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teachers_steps_visit_the_students_nodes(objective: str, num_steps: int) -> None:
    """Chained segments are the teacher's own sampler: the last one ends where it does."""
    made = distillation(objective, num_diffusion_steps=num_steps, teacher_substeps=5, guidance=3.0, guidance_interval=(0.1, 0.8))
    torch.testing.assert_close(made.teacher_steps.times[::5], made.student_steps.times)
    streams, noise = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, CHANNELS)
    begins, ends = made.segments(streams, torch.zeros(5, CHANNELS), noise)
    assert torch.equal(begins[1:], ends[:-1]) and torch.equal(begins[0], noise)
    for draw in range(2):
        sampler = {"num_diffusion_steps": 5 * num_steps, "solver": "ddim"}
        options: dict[str, Any] = {"guidance": 3.0, "guidance_interval": (0.1, 0.8), **sampler}
        drawn = made.teacher.sample(streams[0], uncond=streams[1], noise=noise[draw], **options)
        torch.testing.assert_close(ends[-1, draw], drawn * 0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_loss_where_the_student_is_the_teacher_and_steps_as_it_does(objective: str, start: str) -> None:
    data = batch()
    for changes, is_zero in (({}, True), ({"teacher_substeps": 3}, False), ({"guidance": 2.0}, False)):
        settings = {"num_diffusion_steps": 2, "teacher_substeps": 1, "start": start, **changes}
        output = distillation(objective, **settings)(**data)
        assert output.loss_counts == {"image": 16}
        assert (float(output.loss_sums["image"].detach()) < 1e-8) == is_zero


def test_an_error_in_the_end_point_counts_the_same_in_every_step() -> None:
    """Uneven steps of v-prediction: the loss is `|error of x'|^2`, up to one factor for all steps."""
    made = distillation("v_prediction", num_diffusion_steps=3, teacher_substeps=1)
    streams, noise = torch.randn(1, 2, HIDDEN), torch.randn(1, 2, CHANNELS)
    c_v = torch.tensor(made.student_steps.c_v)
    assert float(c_v.abs().max() / c_v.abs().min()) > 1.05
    with torch.no_grad():
        made.model.diffusion_head.final_linear.bias += 0.2
    loss = made.latent_losses(streams, torch.zeros(2, CHANNELS), noise=noise).detach()
    torch.testing.assert_close(loss, torch.full((2,), 0.04))


# -- hidden states -------------------------------------------------------------------------------------------------


def test_the_unconditional_stream_is_an_example_with_the_unconditional_prompt() -> None:
    """In the batch, the second picture answers that very prompt: both streams are the same there and guidance does nothing."""
    made = distillation(guidance=5.0).eval()
    seen: list[Tensor] = []
    made.latent_losses = lambda streams, latents: seen.append(streams) or torch.zeros(len(latents))  # type: ignore[method-assign,func-returns-value]
    made(**batch())
    conditional, unconditional = seen[0].unflatten(1, (4, NUM_LATENTS))
    torch.testing.assert_close(conditional[1], unconditional[1], rtol=1e-4, atol=1e-5)
    for other in (0, 2, 3):
        assert float((conditional[other] - unconditional[other]).abs().max()) > 1e-2


def test_pictures_of_the_prompt_are_no_targets() -> None:
    data = batch()
    data["labels"][0, : len(example(9))] = -100  # now the first picture is only seen
    made = distillation(guidance=2.0)
    assert made.count_targets(data) == {"image": 12}
    seen: list[Tensor] = []
    made.latent_losses = lambda streams, latents: seen.append(latents) or torch.zeros(len(latents))  # type: ignore[method-assign,func-returns-value]
    assert made(**data).loss_counts == {"image": 12}
    assert torch.equal(seen[0], data["image_latents"][1:].flatten(0, 1))
    data["labels"].fill_(-100)
    assert made(**data).loss_counts == {"image": 0} and made.count_targets(data) == {"image": 0}


# -- training ------------------------------------------------------------------------------------------------------

FAST = OptimSettings(peak_lr=1e-2, warmup_steps=2)
SETTINGS = {"num_diffusion_steps": 2, "teacher_substeps": 3, "guidance": 2.0}


def run_settings(folder: Path, **changes: Any) -> RunSettings:
    fields = {"output_dir": str(folder), "num_steps": 6, "save_every": 3, "log_every": 2, "num_threads": 1}
    return RunSettings(**{**fields, **changes})


@pytest.mark.parametrize("start", ["trajectory", "student"])
def test_resumed_equals_uninterrupted(tmp_path: Path, start: str) -> None:
    """Also where the restart begins with another head: teacher and student come from the checkpoint."""

    class InterruptedRunError(RuntimeError):
        pass

    def interrupt(model: nn.Module, step: int) -> None:
        if step == 4:
            raise InterruptedRunError

    fit(distillation(**SETTINGS, start=start), lambda lane, num_lanes: Batches(), run_settings(tmp_path / "whole"), FAST)
    broken = run_settings(tmp_path / "broken", sample_every=1)
    with pytest.raises(InterruptedRunError):
        fit(distillation(**SETTINGS, start=start), lambda lane, num_lanes: Batches(), broken, FAST, on_sample=interrupt)
    made = distillation(**SETTINGS, start=start)
    with torch.no_grad():
        for parameter in [*made.teacher.parameters(), *made.model.diffusion_head.parameters()]:
            parameter.zero_()
    fit(made, lambda lane, num_lanes: Batches(), broken, FAST)
    whole, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_only_the_head_trains_and_the_result_is_a_plain_model(tmp_path: Path) -> None:
    made = distillation(**SETTINGS)
    before = copy.deepcopy(made.model.state_dict())
    teacher = copy.deepcopy(made.teacher.state_dict())
    fit(made, lambda lane, num_lanes: Batches(), run_settings(tmp_path, num_steps=3), FAST)
    assert all(torch.equal(value, teacher[name]) for name, value in made.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())
    model = OrthusForConditionalGeneration.from_pretrained(str(tmp_path / "final")).eval()
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"diffusion_head"}
    head = model.config.head_config
    assert (head.num_diffusion_steps, head.solver, head.spacing) == (2, "ddim", "trailing")
    ids, noise = torch.tensor([[0, 9, 6]]), torch.randn(1, 1, NUM_LATENTS, CHANNELS)
    given = model.generate(ids, modality="image", noise=noise, num_diffusion_steps=2).image_latents
    default = model.generate(ids, modality="image", noise=noise).image_latents
    assert torch.equal(given[0], default[0])


def test_distillation_learns(tmp_path: Path) -> None:
    """One step in place of twelve: on noise that was not trained on, the student comes nearer to where the teacher ends."""
    made = distillation(num_diffusion_steps=1, teacher_substeps=12)
    streams, noise = torch.randn(1, 32, HIDDEN), torch.randn(4, 32, CHANNELS)
    latents = torch.zeros(32, CHANNELS)
    optimizer = torch.optim.AdamW(made.model.diffusion_head.parameters(), lr=3e-3)
    before = float(made.latent_losses(streams, latents, noise=noise).mean().detach())
    for _ in range(60):
        made.latent_losses(streams, latents).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = float(made.latent_losses(streams, latents, noise=noise).mean().detach())
    assert math.isfinite(after) and after < before / 3


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_diffusion_steps=0"], "num_diffusion_steps=0; give at least 1"),
        (["teacher_substeps=0"], "teacher_substeps=0; give at least 1"),
        (["num_draws=0"], "num_draws=0; give at least 1"),
        (["start=data"], "start is 'data' .*; give one of 'trajectory'"),
        (["guidance_interval=[0.5, 0.1]"], r"guidance_interval=\(0.5, 0.1\) is no interval"),
        (["teacher_substep=3"], "unknown key 'teacher_substep'; did you mean 'teacher_substeps'"),
        (["run.num_setps=3"], "unknown key 'run.num_setps'"),
    ],
)
def test_bad_settings_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(distil.DistilStage, ROOT / "configs/small/distil.yaml", overrides)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_distilled_says_so() -> None:
    with pytest.raises(ValueError, match=r"guidance=2.0 needs unconditional_ids"):
        Distillation(tiny_model(), DistillationSettings(guidance=2.0))
    with pytest.raises(ValueError, match=r"num_diffusion_steps must lie in 1..1000, got 2000"):
        Distillation(tiny_model(), DistillationSettings(num_diffusion_steps=4, teacher_substeps=500))


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint yet")
@pytest.mark.parametrize("guidance", ["null", "2.0"])
def test_the_recipe_runs(tmp_path: Path, guidance: str) -> None:
    """From the command to a checkpoint that draws; guidance that is in the head is no longer asked for by the processor."""
    short = ["run.num_steps=2", "run.sample_every=2", "data.rows_per_batch=1", "teacher_substeps=1", "samples.prompts=[a star]"]
    folders = [f"model={CHECKPOINT}", f"run.output_dir={tmp_path}"]
    distil.main([str(ROOT / "configs/small/distil.yaml"), *folders, *short, f"guidance={guidance}", "num_diffusion_steps=3"])
    assert (tmp_path / "samples" / "step-00000002.png").is_file()
    processor = OrthusProcessor.from_pretrained(tmp_path / "final")
    assert processor.guidance == (2.0 if guidance == "null" else 1.0)
    model = OrthusForConditionalGeneration.from_pretrained(str(tmp_path / "final"))
    assert model.config.head_config.num_diffusion_steps == 3
