"""The reference loop equals `generate`; `python -m eval.speed` measures both and says what it measured."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from eval import speed
from eval.reference_loop import draw_latents
from eval.sampling_tables import speed_section
from eval.speed_clock import PARTS, Clock, watched
from eval.speed_costs import bandwidth, costs, matrix_rate, per_image, reference_costs, sizes
from eval.speed_measure import Run, window
from eval.speed_presets import PRESETS, preset_config, random_latents, random_prompts

PROMPT, NEGATIVE = torch.tensor([0, 10, 11, 12, 6]), torch.tensor([0, 20, 6])
CPU = torch.device("cpu")


def ours(model, guidance, noise, num_diffusion_steps):
    negative = {} if guidance == 1.0 else {"negative_input_ids": NEGATIVE[None]}
    solver = "euler" if model.config.head_config.objective == "flow_matching" else "ddim"
    output = model.generate(
        PROMPT[None], modality="image", noise=noise[None, None], guidance=guidance, solver=solver,
        num_diffusion_steps=num_diffusion_steps, **negative,
    )  # fmt: skip
    return output.image_latents[0][0]


def reference(model, guidance, noise, **options):
    return draw_latents(model, [PROMPT] if guidance == 1.0 else [PROMPT, NEGATIVE], noise, guidance=guidance, **options)


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("num_diffusion_steps", [5, 20])  # divisors of 1000, as `diffusers` needs them
def test_the_reference_loop_draws_what_generate_draws(objective: str, guidance: float, num_diffusion_steps: int) -> None:
    pytest.importorskip("diffusers")
    model, noise = tiny_model(head={"objective": objective}), torch.randn(4, 3)
    expected = reference(model, guidance, noise, num_diffusion_steps=num_diffusion_steps)
    torch.testing.assert_close(ours(model, guidance, noise, num_diffusion_steps), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"latent_embedding": "argmin"}, {"latent_embedding": "linear"}, {"use_latent_positions": True}]
)
def test_the_reference_loop_embeds_as_the_model_does(changes: dict) -> None:
    pytest.importorskip("diffusers")
    model, noise = tiny_model(**changes), torch.randn(4, 3)
    expected = reference(model, 3.0, noise, num_diffusion_steps=5)
    torch.testing.assert_close(ours(model, 3.0, noise, 5), expected, atol=2e-4, rtol=1e-3)


def test_the_reference_loop_continues_an_image(model) -> None:
    pytest.importorskip("diffusers")
    noise, clock = torch.randn(4, 3), Clock(CPU)
    whole = reference(model, 3.0, noise)
    torch.testing.assert_close(reference(model, 3.0, noise, prefix=whole[:2]), whole[2:], atol=2e-4, rtol=1e-3)
    some = reference(model, 3.0, noise, prefix=whole[:1], num_latents=2, clock=clock)
    torch.testing.assert_close(some, whole[1:3], atol=2e-4, rtol=1e-3)
    (cycle,) = clock.cycles()
    assert all(cycle[part] > 0 for part in PARTS) and 0 <= cycle["overhead"] < cycle["total"]
    with pytest.raises(ValueError, match="3 known and 2 new latents"):
        reference(model, 3.0, noise, prefix=whole[:3], num_latents=2)
    with pytest.raises(ValueError, match=r"guidance=3.0 with 1 prompts"):
        draw_latents(model, [PROMPT], noise, guidance=3.0)


def test_without_diffusers_the_reference_loop_says_what_to_install(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'orthus\[eval\]'"):
        reference(model, 1.0, torch.randn(4, 3))


def test_measuring_leaves_the_model_as_it_was_and_sees_every_part(model) -> None:
    clock, forward = Clock(CPU), model.backbone.forward
    with watched(model, clock):
        clock.mark()
        latents = model.generate(PROMPT[None], modality="image", on_position=lambda done: clock.mark()).image_latents[0]
    assert latents.shape == (1, 4, 3) and model.backbone.forward == forward and "forward" not in vars(model.lm_head)
    cycles = clock.cycles()
    assert len(cycles) == 5 and all(cycle["backbone"] > 0 for cycle in cycles)
    assert all(cycle["head"] > 0 for cycle in cycles[1:]) and all(cycle["embedding"] > 0 for cycle in cycles[1:-1])
    assert cycles[0]["head"] == 0 and all(cycle["lm_head"] == 0 for cycle in cycles)


def test_windows_end_at_their_place() -> None:
    exact, plain = (Run(name, 1, 5.0, "float32", (1,), 15, 1) for name in ("exact", "reference"))
    assert window(exact, 1024, 1024) == (1007, 15) and window(plain, 1024, 1024) == (1008, 15)
    assert window(exact, 1, 1024) == (0, 15) and window(exact, 4, 4) == (0, 3)


def test_seconds_per_image_are_the_integral_over_places() -> None:
    assert per_image({1: 2.0}, 10) == pytest.approx(20)
    line = {1: 1.0, 5: 5.0, 10: 10.0}  # seconds grow as the place
    assert per_image(line, 10) == pytest.approx(1 + (10**2 - 1**2) / 2)


def test_costs_count_each_weight_where_it_is_read(model) -> None:
    size = sizes(model)
    head = sum(parameter.numel() for parameter in model.diffusion_head.parameters())
    assert size.sequential + size.modulation + size.cond_embed + size.time_embed == head
    few, many = costs(size, 10, 1, 2, 5, None), costs(size, 10, 1, 2, 10, None)
    assert many["weight_bytes"] - few["weight_bytes"] == 5 * 4 * size.sequential
    assert costs(size, 10, 1, 2, 10, 5)["weight_bytes"] == few["weight_bytes"]
    assert costs(size, 10, 4, 2, 5, None)["flops"] == 4 * few["flops"]
    plain = reference_costs(size, 10, 3, 2, 5)
    assert plain["flops"] > few["flops"] and plain["weight_bytes"] > few["weight_bytes"]
    assert bandwidth(CPU, 2**16) > 0 and matrix_rate(CPU, torch.float32, 16) > 0


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_together(name: str) -> None:
    config, preset = preset_config(name), PRESETS[name]
    assert max(preset.positions) == config.num_latents and 1 in preset.batches
    assert all(int(ids[-1]) == config.separator_token_id for ids in random_prompts(config))
    assert random_latents(config, 2, 3).shape == (2, 3, config.head_config.latent_dim)
    if name != "tiny":
        head = config.head_config
        assert (config.num_latents, head.latent_dim, head.width, head.num_blocks, config.num_codes) == (1024, 256, 1536, 3, 8192)
        settings = speed.Settings(preset=name)
        runs = speed.plan(settings, preset, config.num_latents)
        assert {run.name for run in runs} == {"exact", "default", "grid", "reference"}


def test_a_tiny_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    speed.main(["--preset", "tiny", "--json", str(tmp_path / "speed.json")])
    found = json.loads((tmp_path / "speed.json").read_text())
    for name in ("exact_ratio_batch1", "exact_ratio_batch2", "bf16_ratio_batch2", "default_ratio_batch1", "position_ratio_4_1",
                 "bandwidth_floor_ratio"):  # fmt: skip
        assert found[name] > 0, name
    assert found["max_abs_image_difference"] < 2e-3
    assert {"command", "commit", "versions", "hardware", "threads", "method", "ceilings"} <= set(found)
    assert [one["name"] for one in found["configurations"]] == [
        "reference", "exact", "exact", "default", "grid", "exact", "reference"
    ]  # fmt: skip
    assert found["exact_ratio_batch1"] == pytest.approx(
        min(found["reference_seconds_per_image"]) / found["configurations"][1]["seconds_per_image"]
    )
    for one in found["configurations"]:
        assert set(one["positions"]) == {"1", "4"} and one["seconds_per_image"] > 0 and one["peak_memory_bytes"] > 0
        for cell in one["positions"].values():
            assert cell["total"] == pytest.approx(sum(cell[part] for part in (*PARTS, "overhead")))
            assert {"flops", "weight_bytes", "cache_bytes", "bandwidth_fraction", "rate_fraction"} <= set(cell)
    assert "exact_ratio_batch1" in capsys.readouterr().out
    section = "\n".join(speed_section("tiny", found))
    assert "| published sampler, batch 1 |" in section and "first 4 latents" in section and "reference loop: ddim" in section


def test_a_checkpoint_and_chosen_configurations(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    arguments = "--preset tiny --no-ratios --no-guidance --batch 1,2 --steps 2,3 --solvers ddim --positions 3 --repeats 1"
    found = speed.evaluate(speed.parse(["--model", str(tmp_path / "model"), *arguments.split()]))
    assert [(one["batch"], one["num_diffusion_steps"]) for one in found["configurations"]] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert all(one["guidance"] == 1.0 and set(one["positions"]) == {"1", "3"} for one in found["configurations"])
    assert len(found["weights_sha256"]) == 64


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "huge"], "preset 'huge' is unknown; use one of tiny"),
        (["--preset", "tiny", "--positions", "1,5"], r"position 5 lies outside the 1..4 latents"),
        (["--preset", "tiny", "--batch", "0"], "batch=0; give at least 1"),
        (["--preset", "tiny", "--steps", "ten"], "'ten' is no list of whole numbers"),
        (["--preset", "tiny", "--solvers", "ddmi"], "solver 'ddmi' is unknown"),
        (["--preset", "tiny", "--dtype", "fp8"], "dtype 'fp8' is unknown"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        speed.main(arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_preset_for_cuda_needs_cuda() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not available here"):
        speed.main(["--preset", "gpu-7b"])
