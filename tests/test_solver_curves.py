"""`eval.solver_curves` on the shipped checkpoint: few points, the same command again, settings that cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import solver_curves
from eval.solver_curves import Settings, error_of, hidden_states, measured, neutral, score_options
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.sampling import Sampling

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"
needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint")
FEW = ["num_pictures=1", "reference_steps=30", "error_steps=[1, 3]", "error_guidance=[2.0]", "exact_steps=3", "num_per_task=4",
       "score_steps=[]", "score_guidance=[]", "last_steps=[]"]  # fmt: skip


@needs_checkpoint
def test_a_run_leaves_points_a_figure_and_results_and_resumes(tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = [f"model={CHECKPOINT}", f"output={tmp_path}", *FEW]
    solver_curves.main(arguments)
    lines = (tmp_path / "points.jsonl").read_text().splitlines()
    result = json.loads((tmp_path / "results.json").read_text())
    assert len(lines) == 12 + 2 == len(result["error"]) + len(result["score"]) and (tmp_path / "curves.png").stat().st_size > 1000
    assert result["command"].startswith("python -m eval.solver_curves ") and len(result["weights_sha256"]) == 64
    ddim = {p["num_diffusion_steps"]: p["rms"] for p in result["error"] if (p["solver"], p["spacing"]) == ("ddim", "trailing")}
    assert 0 < ddim[3] < ddim[1]  # more evaluations, less error
    assert result["score"][0]["key"] == "score/exact" and result["score"][0]["difference"]["value"] == 0
    assert "neutral: ddim trailing 3; the cheapest: ddim trailing 3" in capsys.readouterr().out

    (tmp_path / "points.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while it wrote
    monkeypatch.setattr(solver_curves.Errors, "point", lambda *arguments: pytest.fail("measured again"))
    solver_curves.main(arguments)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["error"] == result["error"] and [p["right"] for p in again["score"]] == [p["right"] for p in result["score"]]
    with pytest.raises(ValueError, match=r"num_pictures 1 -> 2.*another output="):
        solver_curves.main([*arguments, "num_pictures=2"])


@needs_checkpoint
def test_hidden_states_are_those_that_generate_draws_from() -> None:
    """Latents that `generate` draws after the first of a picture come from the hidden states of teacher forcing."""
    model = OrthusForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = OrthusProcessor.from_pretrained(CHECKPOINT)
    streams = hidden_states(model, processor, 1)
    turns = solver_curves.WorldDataset("validation", {"t2i": 1.0}, plans=1.0)[0].turns
    pixels = processor.image_processor.pixel_values(list(turns[-1].segments[-1:]))
    latents, noise = model.get_image_latents(pixels), torch.randn(1, 1, model.config.num_latents, 16)
    rendered = processor.render(turns)
    first = rendered.input_ids.index(model.config.boi_token_id)  # prompt and plan, without begin-of-image
    inputs = torch.tensor([rendered.input_ids[:first]])
    guided = processor.guidance_streams([turns[:1]], 2.0)
    drawn = model.generate(
        inputs, **guided, modality="image", image_prefix=latents[:, :-1], noise=noise, num_diffusion_steps=4, decode=False
    ).image_latents[0][0, -1]
    expected = model.diffusion_head.sample(
        streams[0, -1:], uncond=streams[1, -1:], guidance=2.0, noise=noise[0, 0, -1:], num_diffusion_steps=4
    )
    torch.testing.assert_close(drawn, expected[0], atol=1e-4, rtol=1e-4)


def test_points_that_exist_are_not_measured_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "points.jsonl", []

    def point(name: str):
        return lambda: calls.append(name) or {"name": name}

    assert measured(path, {"a": point("a")}, "t") == {"a": {"key": "a", "name": "a"}}
    found = measured(path, {"b": point("b"), "a": point("a")}, "t")
    assert list(found) == ["b", "a"] and calls == ["a", "b"]


def test_neutral_samplers_are_no_worse_in_error_and_score() -> None:
    settings = Settings("m", error_steps=(8, 15, 100), score_steps=(8, 15))
    rms = {("dpm++2m", "log_snr", 8): 0.2, ("dpm++2m", "log_snr", 15): 0.05, ("heun", "trailing", 15): 0.05}
    rms[("ddim", "trailing", 100)] = 0.1
    names = ("solver", "spacing", "num_diffusion_steps")
    errors = [{**dict(zip(names, sampler, strict=True)), "guidance": 2.0, "rms": value} for sampler, value in rms.items()]
    assert error_of(errors, settings, "heun", "log_snr", 15) == float("inf")

    def scored(sampler: tuple[str, str, int], value: float, key: str = "") -> dict:
        cell = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {**dict(zip(names, sampler, strict=True)), "key": key, "group": "steps", "score": cell}

    values = (0.9, 0.95, 0.5)  # as good as the exact one, better but with more error, worse with less
    samplers = (("dpm++2m", "log_snr", 15), ("dpm++2m", "log_snr", 8), ("heun", "trailing", 15))
    scores = [scored(("ddim", "trailing", 100), 0.9, "score/exact"), *map(scored, samplers, values)]
    found = [(p["solver"], p["num_diffusion_steps"]) for p in neutral(settings, errors, scores)]
    assert found == [("dpm++2m", 15), ("ddim", 100)]


def test_each_solver_is_scored_with_the_spacing_of_smaller_error() -> None:
    class Head:
        resolve = staticmethod(lambda sampling: Sampling("ddim", 20, "trailing"))

    class Model:
        diffusion_head = Head

    settings = Settings("m", error_steps=(4, 100), score_steps=(4,), score_guidance=(1.0,), last_steps=(2,))
    error = {"guidance": 2.0, "solver": "heun", "num_diffusion_steps": 4}
    options = score_options(
        Model, settings, [{**error, "spacing": "trailing", "rms": 2}, {**error, "spacing": "log_snr", "rms": 1}]
    )
    steps = ["exact", "ddim-trailing-4", "dpm++2m-trailing-4", "heun-log_snr-4"]
    assert list(options) == [*steps, "own-guidance-1", "own-guidance-2", "own-linear-2", "own-cosine-2"]
    assert options["own-cosine-2"]["num_diffusion_steps"] == 20 and options["own-cosine-2"]["last_diffusion_steps"] == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"parts": ("errors",)}, "part 'errors' is unknown; use some of error, score"),
        ({"num_pictures": 0}, "num_pictures=0; give at least 1"),
        ({"score_steps": (0,)}, "score_steps=0; give at least 1"),
        ({"score_steps": (7,)}, "error_steps lack 7, which score_steps or exact_steps need"),
        ({"guidance": 2.5}, r"error_guidance=\[1.0, 2.0, 5.0\] lacks guidance=2.5"),
        ({"num_per_task": 3}, "num_per_task=3; give a multiple of 4"),
        ({"guidance_interval": (0.5, 0.1)}, "guidance_interval"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(Settings("m"), **wrong)
    assert "\n" not in str(caught.value)
