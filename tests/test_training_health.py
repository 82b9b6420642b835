"""What a run says of its health: speed, MFU, held-out losses, graded pictures, trackers; and that saying so changes nothing."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model as tiny_orthus
from PIL import Image
from test_adapters import DRAWS, FAST, base_model
from test_modeling import packed_and_padded
from test_training import assert_equal, logged, run_settings, tiny_lanes, tiny_model, weights
from tiny_model import TinyLoader, TinyModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orthus.adapters import add_lora, merge_lora, resting_dtype
from orthus.data.sources import SourceSettings
from orthus.data.world.benchmark import ground_truth_scene, small_geneval_items
from orthus.data.world.render import picture
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training import operations
from orthus.training.evaluation import Evaluation, Evaluator
from orthus.training.fit import fit
from orthus.training.metrics import MetricsLog, open_tracker, plot_curves, read_metrics
from orthus.training.operations import Work
from orthus.training.optim import build_optimizers, freeze, start_ema
from orthus.training.reporting import known_peak, peak_flops, speed
from orthus.training.settings import RunSettings
from orthus.training.stages import DataSettings, LoraSettings, load_model, open_held_out, replace_head, training_flops
from orthus.training.step import noise_seed

ROOT = Path(__file__).parent.parent
SMALL = str(ROOT / "checkpoints/orthus-small")
CPU = RunSettings("runs/none", 1)


# -- speed ---------------------------------------------------------------------------------------------------------


def test_speed_of_a_constructed_window() -> None:
    window: dict[str, float] = {"tokens": 600.0, "real_tokens": 500.0, "pairs": 7.0, "count/text": 3.0, "images": 30.0}
    run = replace(CPU, peak_flops=1000.0)

    def flops(work: Work) -> float:
        assert work == Work(num_tokens=500, num_pairs=7, num_images=30, num_text_targets=3, num_latent_targets=0)
        return 3 * work.num_tokens

    assert speed(window, 2.0, run, flops) == {"tokens_per_second": 300.0, "images_per_second": 15.0, "mfu": 0.75}
    assert speed({"images": 30.0}, 2.0, run) == {"images_per_second": 15.0}  # an autoencoder; nobody knows its operations
    assert "mfu" not in speed(window, 2.0, CPU, flops)


def test_peaks_are_known_or_not_guessed() -> None:
    assert peak_flops(CPU) is None and peak_flops(replace(CPU, peak_flops=5e12)) == 5e12
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA A10": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "AMD Instinct": None,
    }
    assert {name: known_peak(name) for name in names} == names
    with pytest.raises(ValueError, match=r"RunSettings.peak_flops is 0; give null or operations per second"):
        RunSettings("runs/none", 1, peak_flops=0)


def drawn(num_before: int, num_after: int, is_taught: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of an example with one picture of 4 latents; `is_taught`: to predict its words, else its latents."""
    ids = [0, *range(8, 7 + num_before), 4, 7, 7, 7, 7, 5, *range(8, 8 + num_after)]
    return ids, [-100, *(i if (i == 7) != is_taught else -100 for i in ids[1:])]


def packed(*examples: tuple[list[int], list[int]], padding: int) -> dict[str, torch.Tensor]:
    """One row."""
    tail = ([1] * padding, [-100] * padding)
    rows = [[*range(len(ids))] for ids, _ in (*examples, tail)]
    ids, labels = ([token for example in (*examples, tail) for token in example[kind]] for kind in (0, 1))
    batch = {"input_ids": ids, "labels": labels, "position_ids": [place for row in rows for place in row]}
    return {name: torch.tensor([values]) for name, values in batch.items()} | {
        "pixel_values": torch.zeros(len(examples), 3, 8, 8)
    }


@pytest.mark.parametrize(
    ("examples", "padding"),
    [
        ([drawn(30, 10, True), drawn(8, 30, True)], 0),  # attention is not over the row
        ([drawn(30, 4, False)], 0),  # the LM head has nothing to do, where the words are a prompt
        ([drawn(9, 0, True), drawn(4, 3, False)], 60),  # padding is not work
    ],
    ids=["packed", "targets", "padded"],
)
def test_operations_are_those_of_the_examples_alone(examples: Any, padding: int) -> None:
    """Of a packed row MFU counts what torch counts when each example has a row of its own, also where activations are computed
    again. Heads are wider together than the hidden states."""
    fields = {"model_type": "qwen3", "vocab_size": 664, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
              "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 96}  # fmt: skip
    model = tiny_orthus(text_config=fields, code_offset=640).train()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for example in examples:
            output = model(**packed(example, padding=0))
            (output.loss_sums["text"] + output.loss_sums["image"]).backward()
    data = DataSettings(tasks={"t2i": 1.0})
    flops = training_flops(model, data, replace(CPU, peak_flops=1e12, checkpoint_activations=True))
    assert flops is not None and training_flops(model, data, CPU) is None
    batch = packed(*examples, padding=padding)
    record = dict(zip(operations.AMOUNTS, operations.amounts(batch), strict=True))
    record |= {f"count/{name}": number for name, number in model.count_targets(batch).items()}
    assert flops(operations.work_of(record)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_lengths_of_examples() -> None:
    lengths = operations.example_lengths
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert lengths({"input_ids": ids}).tolist() == [5, 5]
    assert lengths({"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}).tolist() == [3, 5]
    places = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]])
    labels = torch.tensor([[-100, 3, -100, -100, 3], [-100, 3, 3, -100, -100]])  # the end of the second row is padding
    assert lengths({"input_ids": ids, "position_ids": places, "labels": labels}).tolist() == [2, 3, 3]
    assert operations.amounts({"input_ids": ids, "position_ids": places, "labels": labels}) == (10, 8, 4 + 9 + 9, 0)
    assert operations.amounts({"pixel_values": torch.zeros(3, 3, 8, 8)}) == (0, 0, 0, 3)


def test_a_run_logs_its_speed(tmp_path: Path) -> None:
    """Two lanes of 4 rows of 6 tokens in each step; operations chosen so that MFU is a number of tokens in a second of 1000."""
    run = run_settings(tmp_path, num_steps=4, lanes=2, peak_flops=1000.0)
    fit(tiny_model(), tiny_lanes(), run, FAST, training_flops=lambda work: work.num_tokens)
    records, seconds = read_metrics(tmp_path / "metrics.jsonl"), 0.0
    for record in records:
        assert record["tokens_per_second"] * (record["seconds"] - seconds) == pytest.approx(2 * 2 * 4 * 6)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] / 1000) and "images_per_second" not in record
        seconds = record["seconds"]


# -- held-out data -------------------------------------------------------------------------------------------------


def held_out_lanes(lane: int, num_lanes: int) -> TinyLoader:
    return TinyLoader(4, 1000 + lane, 2000)


def without_evaluations(folder: Path) -> list[dict[str, float]]:
    return [record for record in logged(folder) if "loss" in record]


def test_evaluations_change_nothing_and_are_exact(tmp_path: Path) -> None:
    """Weights and losses bit for bit; the last evaluation, by hand, with the weights of final/."""

    def score(model: nn.Module, step: int) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        return {"eval/score": float(step)}

    run = run_settings(tmp_path / "with", num_steps=7, lanes=2, eval_every=3, eval_batches=3)
    fit(tiny_model(), tiny_lanes(), replace(run, output_dir=str(tmp_path / "without"), eval_every=0), FAST)
    fit(tiny_model(), tiny_lanes(), run, FAST, evaluation=Evaluation(held_out_lanes, score))
    finals = [weights(tmp_path / name) for name in ("with", "without")]
    assert_equal(*({k: v for k, v in final.items() if k != "num_forwards"} for final in finals))
    assert without_evaluations(tmp_path / "with") == logged(tmp_path / "without")
    evaluations = [record for record in logged(tmp_path / "with") if "eval/loss" in record]
    assert [(record["step"], record["eval/score"]) for record in evaluations] == [(3, 3.0), (6, 6.0), (7, 7.0)]
    model = TinyModel().eval()
    model.load_state_dict(finals[0])
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for place in range(3):
        torch.manual_seed(noise_seed(0, 0, place))
        output = model(**held_out_lanes(place, 3).batch(0))
        for name in sums:
            sums[name] += output.loss_sums[name].item()
            counts[name] += int(output.loss_counts[name])
    means = {name: sums[name] / counts[name] for name in sums}
    expected = {"eval/loss": means["text"] + 2 * means["image"], **{f"eval/loss/{name}": mean for name, mean in means.items()}}
    assert {name: evaluations[-1][name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_random_states_and_training_weights_stay(tmp_path: Path) -> None:
    from orthus.training.checkpoint import TrainState

    model = tiny_model()
    state = TrainState(model, {name: p + 1 for name, p in start_ema(model).items()}, build_optimizers(model, FAST), {})
    before, kept = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    evaluate = Evaluator(Evaluation(held_out_lanes), run_settings(tmp_path, eval_every=1))
    first = evaluate(state)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    torch.manual_seed(5)
    again = evaluate(state)
    assert {k: v for k, v in first.items() if "second" not in k} == {k: v for k, v in again.items() if "second" not in k}


def test_curves_of_held_out_losses_stand_beside_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_settings(tmp_path, num_steps=4, eval_every=2, eval_batches=1)
    fit(tiny_model(), tiny_lanes(), run, FAST, evaluation=Evaluation(held_out_lanes, lambda model, step: {"eval/score": 1.0}))
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    plot_curves(tmp_path / "metrics.jsonl")
    drawn = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figures[0].axes}
    assert drawn["loss/text"] == ["loss/text", "eval/loss/text"] and drawn["eval/score"] == ["eval/score"]
    assert "eval/loss" not in drawn and "eval/seconds" not in drawn


def test_runs_without_held_out_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.eval_every=2 needs held-out data"):
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, eval_every=2), FAST)
    for name, value in (("eval_every", -1), ("eval_batches", 0)):
        with pytest.raises(ValueError, match=f"RunSettings.{name} is {value}"):
            run_settings(tmp_path, **{name: value})
    source = SourceSettings("text", str(tmp_path / "some.jsonl"))
    processor = OrthusProcessor.from_pretrained(SMALL)
    with pytest.raises(ValueError, match=r"some.jsonl' is in data.sources and in data.eval_sources"):
        DataSettings(sources=(source,), eval_sources=(source,))
    (tmp_path / "some.jsonl").write_text('{"text": "held out"}\n')
    held_out = open_held_out(DataSettings(tasks={"t2i": 1.0}, eval_sources=(source,)), processor)
    assert {held_out[i].task for i in range(20)} == {"text", "t2i"}
    empty = TinyLoader()
    empty.batch = lambda _: {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.full((1, 3), -100)}  # type: ignore[method-assign]
    run = run_settings(tmp_path / "b", eval_every=1)
    with pytest.raises(ValueError, match="no held-out batch has a target"):
        fit(tiny_model(), tiny_lanes(), run, FAST, evaluation=Evaluation(lambda lane, num_lanes: empty))
    with pytest.raises(ValueError, match=r"no process holds a shared one; set samples\.num_graded=0"):
        Evaluator(Evaluation(held_out_lanes, lambda model, step: {}), replace(run, sharding="full"))


def test_posttrain_evaluates_and_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import posttrain

    short = [
        "run.num_steps=1",
        "run.lanes=1",
        "data.rows_per_batch=1",
        "run.sample_every=0",
        "run.eval_every=1",
        "run.peak_flops=1e12",
    ]
    samples = ["run.eval_batches=2", "samples.num_graded=1", "samples.num_diffusion_steps=1", "samples.guidance=1.0"]
    folders = [f"model={SMALL}", f"run.output_dir={tmp_path}"]
    monkeypatch.setattr("orthus.training.stages.plot_curves", lambda path: path)  # takes seconds
    posttrain.main([str(ROOT / "configs/small/posttrain.yaml"), *folders, *short, *samples])
    trained, evaluated = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < trained["mfu"] < 1 and trained["images_per_second"] > 0
    assert 0 < evaluated["eval/loss/text"] < 1 and 0 < evaluated["eval/loss/image"] < 2 and 0 <= evaluated["eval/geneval"] <= 1


def test_the_judge_knows_right_from_wrong() -> None:
    import numpy as np

    from eval.small_tasks import shows

    items = small_geneval_items(1)
    drawn = [picture(ground_truth_scene(item, np.random.default_rng(0))) for item in items]
    assert all(shows(*pair) for pair in zip(items, drawn, strict=True))
    assert not shows(items[0], Image.new("RGB", (64, 64), "white"))


def test_an_autoencoder_evaluates_on_scenes_of_its_own(tmp_path: Path) -> None:
    from train import autoencoder

    options = ["batch_size=2", "run.num_steps=1", "run.lanes=1", "run.eval_every=1", "run.eval_batches=1"]
    autoencoder.main([str(ROOT / "configs/small/autoencoder.yaml"), f"run.output_dir={tmp_path}", *options])
    trained, evaluated = read_metrics(tmp_path / "metrics.jsonl")
    assert evaluated["eval/loss"] > 0 and trained["images_per_second"] > 0 and "tokens_per_second" not in trained


# -- trackers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_line_and_go_on_with_their_run(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    lines: list[tuple[int, dict[str, float]]] = []
    fake = SimpleNamespace(
        init=lambda **options: begun.append(options),
        log=lambda record, step: lines.append((step, record)),
        finish=lambda **options: lines.append((-1, options)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    for num_steps in (2, 4):
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=num_steps, tracker=name), FAST, settings={"a": 1})
    assert [step for step, _ in lines] == [2, -1, 4, -1]
    assert [{"step": step, **record} for step, record in lines if step > 0] == read_metrics(tmp_path / "metrics.jsonl")
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow" and begun[0]["config"] == {"a": 1}
    assert begun[0]["project"] == "orthus" and begun[0]["name"].startswith(tmp_path.name)
    with pytest.raises(ZeroDivisionError), MetricsLog(tmp_path / "metrics.jsonl", resumed_step=4, tracker=name):
        raise ZeroDivisionError
    assert lines[-1] == (-1, {"exit_code": 1} if name == "wandb" else {})
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    other = tmp_path / "other"
    other.mkdir()
    open_tracker(name, other, {})
    assert begun[-1]["project"] == "mine" and begun[-1]["name"] != begun[0]["name"]


def test_a_tracker_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"run.tracker=wandb needs the package: pip install wandb, or set run.tracker=no"):
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, tracker="wandb"), FAST)
    assert open_tracker("no", tmp_path, {}) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written \(.*No space left.*\); .* free space"):
        log.write({"step": 1})
    log.path.unlink()
    log.write({"step": 1})
    (tmp_path / ".metrics.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written \(.*No space left.*\); .* free space"):
        MetricsLog(tmp_path / "metrics.jsonl", resumed_step=1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


# -- adapters of low-precision weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("bf16")
    base_model().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["no", "int8"])
@pytest.mark.parametrize("frozen", [(), ("backbone.embed_tokens", "lm_head")], ids=["all", "table-rests"])
def test_what_trains_beside_low_precision_is_in_fp32(
    bf16_folder: Path, tmp_path: Path, kind: Any, frozen: tuple[str, ...]
) -> None:
    """The rest stays as it is stored; training, drawing, merging and saving work without autocast and with it."""
    if kind == "int8":
        pytest.importorskip("torchao")
    model = load_model(str(bf16_folder), ["autoencoder", *frozen], LoraSettings(rank=2, quantize=kind), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert resting_dtype(model) == torch.bfloat16 and model.backbone.norm.weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == (torch.bfloat16 if frozen else torch.float32)
    batch, losses = packed_and_padded()[0], []
    for is_low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            loss = model(**batch, **DRAWS).loss
        loss.backward()
        losses.append(loss.item())
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    plain = load_model(str(bf16_folder), [], None, seed=0)(**batch, **DRAWS).loss.item()
    assert losses == pytest.approx([plain, plain], rel=0.05)
    model.eval().generate(torch.tensor([[0, 10, 11, 6]]), modality="image")
    model.save_pretrained(tmp_path)
    loaded = OrthusForConditionalGeneration.from_pretrained(tmp_path)
    merged = merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_equal(merged.state_dict(), loaded.state_dict())
    assert math.isfinite(merged(**batch, **DRAWS).loss.item())  # without the hook that lowered embeddings


def test_small_steps_are_not_lost(bf16_folder: Path) -> None:
    """A step of 1e-5 on weights of about 0.02 and 1 vanishes in bf16."""
    model = load_model(str(bf16_folder), ["autoencoder"], LoraSettings(rank=2), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.train()(**packed_and_padded()[0], **DRAWS).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.grad is not None and bool(p.grad.any()):
            assert bool((before[name] != p)[p.grad.abs() > 1e-6].all()), name


def test_a_new_head_beside_adapters_is_in_fp32(bf16_folder: Path) -> None:
    model = load_model(str(bf16_folder), ["autoencoder", "diffusion_head"], LoraSettings(rank=2), seed=0)
    assert model.diffusion_head.input_proj.weight.dtype == torch.bfloat16
    replace_head(model, {"objective": "v_prediction"}, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert math.isfinite(model(**packed_and_padded()[0], **DRAWS).loss.item())


def test_fp32_models_are_left_as_they_are() -> None:
    pytest.importorskip("peft")
    model = base_model()
    freeze(model, ["autoencoder"])
    add_lora(model, rank=2)
    assert not model.get_input_embeddings()._forward_hooks and not hasattr(model.backbone, "lowering")
