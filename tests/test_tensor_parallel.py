"""Splitting the layers of the backbone over processes changes nothing: gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file
from test_sharding import LANES, MUON, STEPS, assert_same_run, spawn, train
from test_training import logged, run_settings
from test_training import tiny_model as tiny_stand_in

from orthus.adapters import add_lora
from orthus.modeling import OrthusForConditionalGeneration
from orthus.training import planning, tensor_parallel
from orthus.training.checkpoint import latest
from orthus.training.optim import build_optimizers
from orthus.training.settings import OptimSettings, RunSettings
from orthus.training.sharding import prepare
from orthus.training.stages import DataSettings

SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")


def text_config(family: str, **changes: Any) -> dict[str, Any]:
    """Of two layers, whose MLP gives an odd number of rows to each of two processes."""
    sizes = {name: getattr(tiny_config().text_config, name) for name in SIZES}
    return {
        "model_type": family, **sizes, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 50,
        "eos_token_id": 2, **changes,
    }  # fmt: skip


BACKBONES = {
    "llama": text_config("llama", attention_bias=True, mlp_bias=True),
    "qwen3": text_config("qwen3", head_dim=8),
    "gemma3": text_config("gemma3_text", head_dim=8),  # norms behind the transposition; a tied, scaled table
    "olmo2": text_config("olmo2"),  # norms over all heads
    "chameleon": text_config("chameleon", num_key_value_heads=4, vocabulary_map={"<image>": 7}),
}
CASES: dict[int, dict[str, dict[str, Any]]] = {  # by number of processes
    2: {"qwen3-norm-frozen": {"frozen": ("backbone.layers.0.self_attn.q_norm",)}, "chameleon": {}},
    4: {"gemma3-sharded": {"sharding": "full"}},
}
MORE_CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {"llama-sharded": {"sharding": "full"}, "qwen3": {}, "gemma3": {}, "olmo2": {}},
    4: {
        "llama": {},
        "llama-frozen-sharded": {"sharding": "full", "frozen": ("backbone.layers", "backbone.norm")},
        "qwen3-offloaded": {"sharding": "offload"},
        "olmo2-sharded": {"sharding": "full"},
        "chameleon-sharded": {"sharding": "full"},
    },
}


def case(name: str, **changes: Any) -> dict[str, Any]:
    return {"is_orthus": True, "text_config": BACKBONES[name.partition("-")[0]], **changes}


def split(cases: dict[str, dict[str, Any]], num_steps: int) -> list[tuple[str, int, dict[str, Any]]]:
    return [(name, num_steps, case(name, tensor_parallel=2, **changes)) for name, changes in cases.items()]


def check(cases: dict[str, dict[str, Any]], num_steps: int, folder: Path) -> None:
    """Against one process."""
    for name, changes in cases.items():
        train(folder / "alone" / name, num_steps, **case(name, **{k: v for k, v in changes.items() if k == "frozen"}))
        assert_same_run(folder / name, folder / "alone" / name)


def test_split_layers_change_nothing(tmp_path: Path) -> None:
    """One tensor group of two processes; one of the runs ends in one process."""
    spawn(2, tmp_path, [*split({"llama": {}}, 1), *split(CASES[2], 2)])
    check(CASES[2], 2, tmp_path)
    train(tmp_path / "llama", 2, **case("llama"))
    check({"llama": {}}, 2, tmp_path)


@pytest.mark.slow
def test_split_layers_of_sharded_groups_change_nothing(tmp_path: Path) -> None:
    """Two tensor groups of two processes, with shards; one of the runs begins in one group and ends in one process."""
    spawn(2, tmp_path, split({"llama": {}}, 2))
    sharded = {"sharding": "full", "checkpoint_activations": True}
    spawn(4, tmp_path, [*split({"llama": sharded}, 3), *split(CASES[4], 2)])
    check(CASES[4], 2, tmp_path)
    assert len(list((latest(tmp_path / "llama") or tmp_path).glob("lane-*.pt"))) == LANES
    train(tmp_path / "llama", 4, **case("llama"))
    check({"llama": {}}, 4, tmp_path)
    model = OrthusForConditionalGeneration.from_pretrained(tmp_path / "gemma3-sharded" / "final")  # a plain folder
    assert model.backbone.layers[0].mlp.up_proj.weight.shape == (50, 32)
    assert "lm_head.weight" not in load_file(tmp_path / "gemma3-sharded" / "final" / "model.safetensors")  # tied: once


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_split_layers_of_more_backbones(num_processes: int, tmp_path: Path) -> None:
    spawn(num_processes, tmp_path, split(MORE_CASES[num_processes], STEPS))
    check(MORE_CASES[num_processes], STEPS, tmp_path)


@pytest.mark.slow
def test_muon_on_split_layers(tmp_path: Path) -> None:
    """It orthogonalises in bf16, where the order of summation counts: shards without split layers differ as much."""
    spawn(4, tmp_path, split({"llama": {"optim": MUON, "sharding": "full", "async_checkpoints": True}}, STEPS))
    train(tmp_path / "alone", **case("llama", optim=MUON))
    for one, other in zip(logged(tmp_path / "llama"), logged(tmp_path / "alone"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    def styles(num_parts: int = 2, **changes: Any) -> dict[str, str]:
        return tensor_parallel.layer_styles(tiny_model(text_config=text_config("llama", **changes)), num_parts)

    assert styles()["layers.1.mlp.down_proj"] == "rowwise" and len(styles()) == 14
    with pytest.raises(
        ValueError, match=r"=4 does not divide the 4 heads and 2 key-value heads of .* 'llama'; give a divisor of 2"
    ):
        styles(4)
    with pytest.raises(ValueError, match=r"does not divide the 51 values at layers.0.mlp.gate_proj of the backbone 'llama'"):
        styles(intermediate_size=51)
    with pytest.raises(ValueError, match="no tensor-parallel plan for the backbone 'TinyModel'; use run.tensor_parallel=1"):
        tensor_parallel.layer_styles(tiny_stand_in(), 2)
    model = tiny_model(text_config=BACKBONES["qwen3"])
    plan = model.backbone.config.base_model_tp_plan
    model.backbone.config.base_model_tp_plan = {k: v for k, v in plan.items() if "q_norm" not in k}
    with pytest.raises(ValueError, match=r"the plan of the backbone 'qwen3' leaves layers.0.self_attn.q_norm.weight out"):
        tensor_parallel.layer_styles(model, 2)
    model.backbone.config.base_model_tp_plan = {**plan, "layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(ValueError, match=r"'qwen3' wants layers.0.mlp.up_proj 'packed_colwise', which is none of colwise, "):
        tensor_parallel.layer_styles(model, 2)
    model.backbone.config.base_model_tp_plan = {**plan, "layers.*.mlp.act_fn": "colwise"}
    with pytest.raises(ValueError, match=r"layers.0.mlp.act_fn of the backbone 'qwen3' is a SiLUActivation and no linear layer"):
        tensor_parallel.layer_styles(model, 2)
    model.backbone.config.base_model_tp_plan = None
    with pytest.raises(ValueError, match="no tensor-parallel plan for the backbone 'qwen3'"):
        tensor_parallel.layer_styles(model, 2)
    with pytest.raises(ValueError, match="tensor_parallel=2 needs processes to split layers over; start with torchrun"):
        train(tmp_path, **case("llama", tensor_parallel=2))
    with pytest.raises(ValueError, match=r"RunSettings.tensor_parallel is 0; give at least 1"):
        run_settings(tmp_path, tensor_parallel=0)


def test_what_no_group_can_run_is_refused(alone: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 processes are no multiple of run.tensor_parallel=2"):
        train(tmp_path, **case("llama", tensor_parallel=2))
    mesh, split = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor")), {"tensor_parallel": 2}
    with pytest.raises(ValueError, match=r"which no process holds with run.tensor_parallel=2; set it to 0"):
        prepare(tiny_model(), run_settings(tmp_path, sample_every=1, **split), mesh)
    with pytest.raises(ValueError, match="adapters"):
        prepare(add_lora(tiny_model()), run_settings(tmp_path, **split), mesh)


@pytest.mark.parametrize("sharding", ["no", "full"])
def test_the_plan_of_a_split_run(sharding: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What each of 2 groups of 2 keeps: of split weights a part, of the others as with 2 processes."""
    model, optim = tiny_model(text_config=text_config("llama")), OptimSettings()
    run = RunSettings("runs/none", 1, sharding=sharding, tensor_parallel=2)
    names = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    found, shares = planning.state_bytes(model, run, optim, 4)["gradients"], 1 if sharding == "no" else 2
    expected = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            dim = int(name.endswith(("o_proj.weight", "down_proj.weight")))
            part = p if not name.endswith(names) else p.chunk(2, dim)[0]
            expected += part.chunk(shares)[0].nbytes
    assert found == expected
    assert len(build_optimizers(model, optim)) == 1 and next(model.parameters()).device.type == "cpu"  # itself is as before
    assert planning.resolve(run, planning.Hardware()) == (2, 1)
    meta, data = planning.meta_model(model.config), DataSettings(tasks={"t2i": 1.0}, rows_per_batch=1, row_length=64)
    one, other = (planning.flops_per_step(meta, data, run, 1, num_parts=size) for size in (1, 2))
    assert other == {**one, "backbone": one["backbone"] / 2}  # also attention; heads and tables are not split
    gathered = planning.meta_model(tiny_model(text_config=BACKBONES["chameleon"]).config)
    one, other = (planning.flops_per_step(gathered, data, run, 1, num_parts=size)["backbone"] for size in (1, 2))
    scores = 3 * 4 * 64**2 * 32 * 2  # three passes through two layers, in which each process has all heads
    assert other - scores == (one - scores) / 2
    disks, seconds = set(), []
    for size in (1, 2):
        planning.dry_run(meta, data, replace(run, tensor_parallel=size), optim, "sdpa", planning.Hardware(4, 80.0, tflops=1e-6))
        printed = capsys.readouterr().out
        assert f"each of 4 processes, sharding={sharding}, tensor_parallel={size}" in printed
        disks.add(printed.partition("disk")[2])
        seconds.append(float(printed.partition("s with 4 processes")[0].split()[-1]))  # of one lane for each group
    assert len(disks) == 1 and 0.5 < seconds[1] / seconds[0] < 1  # the backbone is split, heads are not
    with pytest.raises(ValueError, match="3 processes are no multiple of run.tensor_parallel=2"):
        planning.resolve(run, planning.Hardware(processes=3))
    with pytest.raises(ValueError, match=r"3 lanes cannot be shared by 2 groups of 2 processes; .*--processes to 2 x a number"):
        planning.resolve(RunSettings("runs/none", 1, tensor_parallel=2, lanes=3), planning.Hardware(processes=4))
