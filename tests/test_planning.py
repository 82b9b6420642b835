"""`--dry-run` says what a run takes: parameters and state exactly, the rest near what is measured, and what cannot be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from golden_files import published_config, shapes_of_7b
from test_published_layout import SIZES_OF_7B
from torch.utils.flop_counter import FlopCounterMode

import train.distil as distil
import train.posttrain as posttrain
import train.pretrain as pretrain
from orthus.configuration import OrthusConfig
from orthus.conversion import config_from_published
from orthus.data.packing import PackedLoader
from orthus.data.world.dataset import WorldDataset
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training import checkpoint, operations, planning
from orthus.training.checkpoint import TrainState
from orthus.training.optim import build_optimizers, freeze, start_ema
from orthus.training.settings import OptimSettings, RunSettings
from orthus.training.stages import DataSettings, SampleSettings, check_stage, load_model

ROOT = Path(__file__).parent.parent
SMALL = str(ROOT / "checkpoints/orthus-small")
STAGE = str(ROOT / "configs/small/posttrain.yaml")
RESTING = ("autoencoder",)
FROZEN = ("autoencoder", "backbone.layers", "backbone.norm", "lm_head")
RUN = RunSettings("runs/none", 10)
DATA = DataSettings(tasks={"t2i": 1.0}, rows_per_batch=4, row_length=216)


@pytest.fixture(scope="module")
def folder_of_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config alone, as `train.build` leaves it in fp32."""
    folder = tmp_path_factory.mktemp("7b")
    config = OrthusConfig.from_dict(config_from_published({**published_config(), **SIZES_OF_7B}, shapes_of_7b()))
    config.dtype = "float32"
    config.save_pretrained(folder)
    return str(folder)


def small() -> OrthusForConditionalGeneration:
    return planning.meta_model(planning.config_in(SMALL))


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("frozen", [RESTING, FROZEN], ids=["all", "base"])
def test_parameters_are_those_of_the_loaded_model(frozen: tuple[str, ...]) -> None:
    planned, real = small(), load_model(SMALL, frozen, None, 0)
    freeze(planned, frozen)
    assert all(p.is_meta for p in planned.parameters())
    described = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (planned, real)]
    assert described[0] == described[1]
    counts = planning.parameter_counts(planned)
    assert counts == planning.parameter_counts(real)
    assert sum(total for total, _ in counts.values()) == real.num_parameters()
    assert sum(trainable for _, trainable in counts.values()) == real.num_parameters(only_trainable=True)
    assert counts["autoencoder"] == (real.autoencoder.num_parameters(), 0)


@pytest.mark.parametrize("frozen", [RESTING, FROZEN], ids=["all", "base"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_a_step_leaves(optimizer: Any, frozen: tuple[str, ...]) -> None:
    if optimizer == "muon" and frozen == FROZEN:
        frozen = ("autoencoder", "lm_head")
    optim, planned, real = OptimSettings(optimizer), small(), load_model(SMALL, frozen, None, 0)
    freeze(planned, frozen)
    optimizers, ema = build_optimizers(real, optim), start_ema(real)
    for p in real.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for moved in optimizers:
        moved.step()
    slots = [slot for moved in optimizers for state in moved.state.values() for slot in state.values()]
    assert planning.state_bytes(planned, RUN, optim, processes=4) == {
        "weights": sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers())),
        "gradients": sum(p.grad.nbytes for p in real.parameters() if p.grad is not None),
        "optimiser states": sum(slot.nbytes for slot in slots),
        "averaged weights (EMA)": sum(tensor.nbytes for tensor in ema.values()),
    }


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_shares_are_those_of_fsdp(processes: int) -> None:
    """It cuts dimension 0 into chunks, the first of which are the largest."""
    model, run = small(), RunSettings("runs/none", 10, sharding="full", lanes=24)
    learned = [p for p in model.parameters() if p.requires_grad]
    share = sum(p.chunk(processes)[0].nbytes for p in learned)
    found = planning.state_bytes(model, run, OptimSettings(), processes)
    assert found["gradients"] == found["averaged weights (EMA)"] == share
    assert found["optimiser states"] == 2 * share + 4 * len(learned)


def test_the_7b_model(folder_of_7b: str) -> None:
    model = planning.meta_model(planning.config_in(folder_of_7b))
    freeze(model, FROZEN)
    counts = planning.parameter_counts(model)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters()) == 7_132_365_443
    assert counts["embeddings, codebook"] == (270_532_608, 270_532_608) and counts["diffusion head"] == (49_980_160, 49_980_160)
    assert round(sum(trainable for _, trainable in counts.values()) / 1e9, 1) == 0.3  # as the paper says of its base stage
    shares = planning.state_bytes(model, RunSettings("runs/none", 1, sharding="full"), OptimSettings(), 8)
    assert shares["weights"] - sum(b.nbytes for b in model.buffers()) == pytest.approx(4 * 7_132_365_443 / 8, rel=1e-4)


# ---------------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("attention", "autocast", "is_checkpointed"),
    [("eager", "no", False), ("sdpa", "no", True), ("sdpa", "bfloat16", False), ("sdpa", "bfloat16", True)],
)
def test_estimates_are_near_what_is_measured(
    attention: str, autocast: Any, is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd keeps after the forward, and the products of a step, on one batch; logits are not counted as activations."""
    model = load_model(SMALL, RESTING, None, 0).train()
    model.set_attn_implementation(attention)
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    world = WorldDataset("train", DATA.tasks, DATA.world)
    batch = next(PackedLoader(world, OrthusProcessor.from_pretrained(SMALL), DATA.rows_per_batch, DATA.row_length, seed=0))
    num_images = len(batch["pixel_values"])
    assert num_images <= planning.images_per_batch(model.config, DATA)
    monkeypatch.setattr(planning, "images_per_batch", lambda config, data: num_images)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
    run = RunSettings("runs/none", 10, autocast=autocast, checkpoint_activations=is_checkpointed)
    flops = sum(planning.flops_per_step(model, DATA, run, 1).values())
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    estimate = planning.activation_bytes(model, DATA, run, attention, is_checkpointed)
    if is_checkpointed:  # the layer that the backward computes again is not among what the forward keeps
        size = 2 if autocast == "bfloat16" else 4
        layer = planning.layer_bytes_per_token(model.config.text_config, residual=4, size=size)
        estimate -= batch["input_ids"].numel() * layer
    weights = planning.passing_bytes(model, run, 1)  # the copies of weights that autocast makes are among what is kept
    assert estimate + weights == pytest.approx(sum(size for _, size in kept.values()), rel=0.25)


def test_heads_may_be_wider_than_the_hidden_states() -> None:
    """Qwen3-0.6B: 16 heads of 128 on a width of 1024. By hand, of a row of 64 tokens."""
    fields = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    model = planning.meta_model(tiny_config(text_config=fields, head={"cond_dim": 1024}))
    weights = 1024 * (2 * 2048 + 2 * 1024) + 3 * 1024 * 3072
    data = DataSettings(tasks={"t2i": 1.0}, rows_per_batch=1, row_length=64)
    assert planning.flops_per_step(model, data, RUN, 1, 0)["backbone"] == 3 * 2 * (2 * 64 * weights + 4 * 64 * 64 * 2048)
    assert operations.attention_widths(model.config.text_config) == (2048, 1024)


def test_what_costs_more_is_said_to_cost_more() -> None:
    model = small()
    few, more = (
        planning.activation_bytes(model, DATA, RUN, "sdpa", True),
        planning.activation_bytes(model, DATA, RUN, "sdpa", False),
    )
    assert few < more < planning.activation_bytes(model, DATA, RUN, "eager", False)
    freeze(model, FROZEN)
    frozen = planning.flops_per_step(model, DATA, RUN, 2)["backbone"]
    assert 2 * planning.flops_per_step(model, DATA, RUN, 1)["backbone"] == frozen
    assert frozen < planning.flops_per_step(small(), DATA, RUN, 2)["backbone"]


# ---------------------------------------------------------------------- the command


def test_dry_run_prints_the_plan_and_nothing_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    posttrain.main(
        [STAGE, f"model={SMALL}", "--dry-run", "--processes", "2", "--memory", "4", "--tflops", "0.1", "data.rows_per_batch=5"]
    )
    said = capsys.readouterr().out
    for words in ("5,828,064", "10 rows (2 lanes of 5) of 216 = 2,160 tokens", "up to 90 images", "2 processes at 0.1 TFLOP/s",
                  "optimiser states", "averaged weights (EMA)", "(estimate)", "of 4.0 (--memory)", "disk, in GiB"):  # fmt: skip
        assert words in said, words
    assert not list(tmp_path.iterdir())


def test_a_head_and_adapters_count(capsys: pytest.CaptureFixture[str]) -> None:
    posttrain.main([STAGE, f"model={SMALL}", "--dry-run", "head.width=512", "lora.rank=4", "optim.optimizer=adamw"])
    said = capsys.readouterr().out
    assert "5,828,064" not in said
    backbone = next(line.split() for line in said.splitlines() if line.startswith("  backbone"))
    assert 0 < int(backbone[2].replace(",", "")) < 100_000


def test_a_new_model_is_planned_from_its_autoencoder(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/small/language.yaml")
    pretrain.main([config, f"autoencoder={SMALL}", "--dry-run", "--memory", "4"])
    said = capsys.readouterr().out
    assert "5,828,064" in said and "up to 0 images" in said  # words only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=runs/nowhere"], r"there is no runs/nowhere/config.json.*train.build"),
        (["--processes", "3", "run.lanes=8"], "8 lanes cannot be shared by 3 processes"),
        (["data.row_length=20"], r"data.row_length=20 is too short: 2 x 16 latents .* 40 tokens"),
        (["data.row_length=1024"], "data.row_length=1024 exceeds the 512 positions of the backbone"),
        (["--memory", "0.1"], r"do not fit in 0.1 GiB \(--memory\); set run.checkpoint_activations=true"),
        (["--memory", "0.1", "run.checkpoint_activations=true"], "lower data.rows_per_batch from 12"),
        (["run.sharding=full", "run.lanes=1", "run.sample_every=0"], "needs processes to shard over"),
        (["--memory", "-1"], "--memory -1.0 is not above 0"),
        (["lora.quantize=int8"], "does not know integer weights"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posttrain.main([STAGE, f"model={SMALL}", "--dry-run", *arguments])


SOURCES = ["data.tasks={}", "data.sources=[{kind: text, path: some.jsonl}]"]


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.tensor_parallel=2", "run.sample_every=5"], "which no process holds with run.tensor_parallel=2; set it to 0"),
        (["run.sharding=full", "run.sample_every=5"], "which no process holds with run.sharding=full; set it to 0"),
        (["run.tensor_parallel=2", "run.sample_every=0", "lora.rank=4"], "layers with adapters are not split"),
        (["run.sharding=full", "run.sample_every=0", "lora.quantize=int8"], "integer weights are not sharded"),
        (["run.eval_every=5", *SOURCES], r"needs data that is held out; give data\.eval_sources"),
        (
            ["run.eval_every=5", "samples.num_graded=1", "run.sharding=full", "run.sample_every=0"],
            r"no process holds a shared one; set samples\.num_graded=0",
        ),
        (
            ["run.eval_every=5", "samples.num_graded=1", "data.eval_sources=[{kind: text, path: a.jsonl}]", *SOURCES],
            "needs data.tasks of the small world",
        ),
        (["data.rows_per_batch=0"], "rows_per_batch=0, .* give at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_read(
    arguments: list[str], message: str, is_planned: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        posttrain.main([STAGE, "model=runs/nowhere", *arguments, *["--dry-run"] * is_planned])


def test_what_a_stage_knows_is_checked_too() -> None:
    run = RunSettings("runs/none", 10, eval_every=5)
    with pytest.raises(ValueError, match="and a stage that grades"):
        distil.main([str(ROOT / "configs/small/distil.yaml"), "model=runs/nowhere", "run.eval_every=5", "samples.num_graded=1"])
    check_stage(run, DATA, SampleSettings(num_graded=1))
    check_stage(RunSettings("runs/none", 10), DATA, SampleSettings(num_graded=1), can_grade=False)  # never asked to
    with pytest.raises(ValueError, match="run.loss_weights names 'txt'"):
        posttrain.main([STAGE, f"model={SMALL}", "--dry-run", "run.loss_weights.txt=2.0"])


@pytest.mark.parametrize("frozen", [RESTING, FROZEN], ids=["all", "base"])
def test_the_copy_of_a_checkpoint_is_planned(frozen: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """It is as large as what a process copies for the writer, in the memory of the CPU."""
    run, optim = RunSettings("runs/none", 10, async_checkpoints=True), OptimSettings()
    planned, real = small(), load_model(SMALL, frozen, None, 0)
    freeze(planned, frozen)
    for p in real.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizers = build_optimizers(real, optim)
    for moved in optimizers:
        moved.step()
    changing, _ = checkpoint._to_write(TrainState(real, start_ema(real), optimizers, {}))
    copied = planning.copied_bytes(planned, run, optim, 1)
    assert copied == pytest.approx(sum(tensor.nbytes for tensor in changing.values()), rel=1e-3)
    assert planning.copied_bytes(planned, run, optim, 4) == -(-copied // 4)
    assert planning.copied_bytes(planned, replace(run, sharding="full"), optim, 4) == pytest.approx(copied / 4, rel=0.05)
    assert planning.copied_bytes(planned, replace(run, async_checkpoints=False), optim, 1) == 0
    totals = []
    for device in ("cpu", "cuda"):
        for is_async in (False, True):
            asked = replace(run, device=device, async_checkpoints=is_async)
            planning.dry_run(planned, DATA, asked, optim, "sdpa", planning.Hardware(memory=8.0))
            said = capsys.readouterr().out
            assert ("copy of a checkpoint" in said) == is_async
            totals.append(float(said.partition("\n  all   ")[2].rpartition("\n  all   ")[2].split()[0]))
    assert totals[1] - totals[0] == pytest.approx(copied / planning.GIB, abs=0.011) and totals[2] == totals[3]


def test_assumptions_without_a_plan_are_refused() -> None:
    with pytest.raises(ValueError, match="add --dry-run"):
        posttrain.main([STAGE, f"model={SMALL}", "--memory", "80"])


def test_7b_stages_fit_eight_gpus_of_80_gib(folder_of_7b: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "instruct"):
        posttrain.main(
            [str(ROOT / f"configs/7b/{name}.yaml"), f"model={folder_of_7b}", "--dry-run", "--processes=8", "--memory=80"]
        )
    said = capsys.readouterr().out
    assert "7,132,365,443     320,512,768" in said and "note: weights train in" not in said
    with pytest.raises(ValueError, match=r"do not fit in 24.0 GiB .*give more processes"):
        arguments = ["--dry-run", "--processes=2", "--memory=24", "data.rows_per_batch=1"]
        posttrain.main([str(ROOT / "configs/7b/instruct.yaml"), f"model={folder_of_7b}", *arguments])
