"""Which optimiser moves which parameter, the schedule, the averaged weights and the metrics file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel
from torch import nn

from orthus.training.metrics import MetricsLog, plot_curves, read_metrics
from orthus.training.optim import averaged, build_optimizers, lr_factor, start_ema, update_ema
from orthus.training.settings import OptimSettings

ADAMW, MUON = OptimSettings(), OptimSettings(optimizer="muon")


# -- optimisers, schedule, average ---------------------------------------------------------------------------------


def test_who_moves_what() -> None:
    model = TinyModel()
    model.diffusion_head.output.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = build_optimizers(model, MUON)
    blocks = "diffusion_head.blocks.0"
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        "backbone.layers.0.up.weight",
        "backbone.layers.0.down.weight",
        f"{blocks}.mlp.weight",
    }
    decayed, plain = adamw.param_groups
    assert {names[id(p)] for p in decayed["params"]} == {
        "lm_head.weight",
        "diffusion_head.input_proj.weight",
        f"{blocks}.adaln.weight",
        "never_used.weight",
    }
    assert plain["weight_decay"] == 0.0
    assert {"codebook", "backbone.embed_tokens.weight", "backbone.layers.0.norm.weight", "lm_head.bias"} < {
        names[id(p)] for p in plain["params"]
    }
    moved = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert len(moved) == len({id(p) for p in moved}) == sum(p.requires_grad for p in model.parameters())


def test_parts_with_rates_of_their_own() -> None:
    model, factors = TinyModel(), {"diffusion_head": 2.0, "diffusion_head.output": 0.5}
    rates = {}
    for optimizer in build_optimizers(model, OptimSettings(optimizer="muon", peak_lr=1e-3, muon_lr=0.02, lr_factors=factors)):
        for group in optimizer.param_groups:
            rates |= {id(p): group["peak_lr"] for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["diffusion_head.blocks.0.mlp.weight"] == 0.04 and by_name["diffusion_head.output.bias"] == 5e-4
    assert by_name["diffusion_head.input_proj.weight"] == 2e-3 and by_name["lm_head.weight"] == by_name["codebook"] == 1e-3
    with pytest.raises(ValueError, match="lr_factors names 'head', which the model lacks; it has backbone"):
        build_optimizers(model, OptimSettings(lr_factors={"head": 2.0}))
    with pytest.raises(ValueError, match=r"lr_factors is \{'head': 0.0\}; give numbers above 0"):
        OptimSettings(lr_factors={"head": 0.0})


def test_tied_table_is_not_decayed_and_impossible_requests_are_refused() -> None:
    model = TinyModel()
    model.lm_head.weight = model.backbone.embed_tokens.weight
    (optimizer,) = build_optimizers(model, ADAMW)
    assert all(p is not model.lm_head.weight for p in optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="use optim.optimizer=adamw"):
        build_optimizers(nn.Linear(2, 2), MUON)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizers(nn.Linear(2, 2).requires_grad_(False), ADAMW)


def test_schedule_corners() -> None:
    settings = OptimSettings(warmup_steps=4, decay_fraction=0.5, final_lr_fraction=0.1)
    factors = [lr_factor(step, 20, settings) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert lr_factor(20, 20, settings) == 0.1
    cosine = OptimSettings(warmup_steps=0, decay="cosine", decay_fraction=1.0)
    assert [lr_factor(step, 4, cosine) for step in range(5)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert lr_factor(0, 1, OptimSettings(warmup_steps=0, decay_fraction=0.0)) == 1.0


def test_average_is_the_recursion_and_goes_back() -> None:
    model = nn.Linear(3, 2)
    ema = start_ema(model)
    expected = ema["weight"].clone()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(1.0)
        update_ema(ema, model, decay=0.6, step=step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema["weight"], expected)
    kept = model.weight.detach().clone()
    with averaged(model, ema):
        assert torch.equal(model.weight, ema["weight"])
        assert not model.training
    assert torch.equal(model.weight, kept)
    assert model.training


# -- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_cut_at_the_resumed_step_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step, "seconds": 0.1})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    MetricsLog(path, resumed_step=2).write({"step": 3, "loss": 0.5, "loss/image": 0.1})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[-1]["loss"] == 0.5
    assert plot_curves(path).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no metric"):
        plot_curves(MetricsLog(path).path)
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)
