"""LoRA and QLoRA: what trains, what stays, merged = unmerged, saved = loaded, resumed = uninterrupted, refusals."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from golden_files import write_published_folder
from safetensors.torch import load_file
from test_modeling import packed_and_padded
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from orthus.adapters import add_lora, has_lora, merge_lora, quantization
from orthus.conversion import read_tensor_shapes, save_published
from orthus.modeling import OrthusForConditionalGeneration
from orthus.training.checkpoint import TrainState, latest, load_checkpoint
from orthus.training.fit import fit
from orthus.training.optim import build_optimizers, freeze, start_ema
from orthus.training.settings import OptimSettings, RunSettings, load_settings
from orthus.training.stages import LoraSettings, load_model
from train import posttrain

pytest.importorskip("peft")
pytest.importorskip("torchao")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
KINDS = ["no", "int8", "int4"]
DRAWS = {"timesteps": torch.randint(0, 1000, (4,), generator=torch.Generator().manual_seed(1)), "noise": torch.ones(4, 3)}
FAST = OptimSettings(peak_lr=1e-2, warmup_steps=2)
WIDTHS = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def base_model(model_type: str = "llama", **text: Any) -> OrthusForConditionalGeneration:
    """Widths that are multiples of 32, the group of int4."""
    fields = {"model_type": model_type, "vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 96, **WIDTHS, **text}
    return tiny_model(text_config=fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(path)
    return path


def load(folder: Path, kind: str) -> OrthusForConditionalGeneration:
    options = {} if kind == "no" else {"quantization_config": quantization(kind)}
    return OrthusForConditionalGeneration.from_pretrained(folder, **options)


def adapted(folder: Path, kind: str = "no", **options: Any) -> OrthusForConditionalGeneration:
    """With adapters that have an effect: B starts at zero."""
    torch.manual_seed(2)
    model = add_lora(load(folder, kind), rank=4, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a backbone without adapters, quantised ones as numbers, under their usual names."""
    weights = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    return {name: value.dequantize() if "torchao" in str(type(value)) else value.clone() for name, value in weights.items()}


def train(model: OrthusForConditionalGeneration, num_steps: int) -> list[float]:
    batch, draws = ({key: value.to(model.device) for key, value in d.items()} for d in (packed_and_padded()[0], DRAWS))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(**batch, **draws).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# -- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_in_the_backbone_only_adapters_and_embeddings_learn(model_type: str) -> None:
    """The rest trains as before, unless it is frozen; the autoencoder has no gradient in either case."""
    model = add_lora(base_model(model_type), rank=4)
    freeze(model, ["autoencoder", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    batch, _ = packed_and_padded()
    model(**batch, **DRAWS).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    linears = {n for n, module in base_model(model_type).backbone.named_modules() if isinstance(module, nn.Linear)}
    adapters = {f"backbone.{name}.lora_{part}.default.weight" for name in linears for part in "AB"}
    table = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    others = {name for name, _ in model.named_parameters() if name.startswith(("latent_embedding.", "diffusion_head."))}
    assert learning == adapters | {table} | others
    assert learning == {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_change_nothing_at_first(folder: Path) -> None:
    batch, _ = packed_and_padded()
    plain = load(folder, "no")
    found = add_lora(load(folder, "no"))(**batch, **DRAWS)
    torch.testing.assert_close(found.last_hidden_state, plain(**batch, **DRAWS).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lower_the_loss_and_leave_the_backbone_alone(folder: Path, kind: str) -> None:
    model = adapted(folder, kind)
    before, others = whole(model.backbone.state_dict()), copy.deepcopy(model.latent_embedding.state_dict())
    losses = train(model, 20)
    assert losses[-1] < 0.5 * losses[0]
    after = whole(model.backbone.state_dict())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["embed_tokens.weight"]
    assert not torch.equal(others["codebook"], model.latent_embedding.codebook)


@pytest.mark.gpu
def test_four_bit_weights_of_bitsandbytes_carry_adapters(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = OrthusForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map={"": "cuda"})
    model = add_lora(base, rank=4)
    losses = train(model, 20)
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[0, 10, 11, 6]])
    expected = model(input_ids=ids.cuda()).logits.cpu()
    torch.testing.assert_close(load(tmp_path, "no")(input_ids=ids).logits, expected, rtol=0.05, atol=0.05)


def test_targets_name_the_layers(folder: Path) -> None:
    model = adapted(folder, targets=("q_proj", "mlp.up_proj", "layers.1.self_attn.o_proj"))
    found = {name.split(".lora_")[0] for name, _ in model.backbone.named_parameters() if ".lora_" in name}
    assert found == {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")} | {
        "layers.1.self_attn.o_proj"
    }


# -- merging and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [None, ("q_proj",)], ids=["all", "some"])
def test_merged_saved_and_loaded_equals_unmerged(folder: Path, tmp_path: Path, kind: str, targets: Any) -> None:
    """fp32; the tolerance is the rounding of `W x + B A x` against `(W + B A) x`, which grows from latent to latent.
    Saving leaves the model as it was."""
    model, (batch, _) = adapted(folder, kind, targets=targets), packed_and_padded()
    prompt = {"input_ids": torch.tensor([[0, 10, 11, 6]]), "modality": "image", "noise": torch.ones(1, 1, 4, 3)}
    unmerged, drawn = model(**batch, **DRAWS), model.generate(**prompt)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model(**batch, **DRAWS).last_hidden_state, unmerged.last_hidden_state, rtol=0, atol=0)
    loaded = OrthusForConditionalGeneration.from_pretrained(tmp_path)
    merged = merge_lora(model)
    assert type(merged) is OrthusForConditionalGeneration and not has_lora(merged)
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {"orthus", "torch", "transformers"}
    trains = {name: parameter.requires_grad for name, parameter in merged.named_parameters()}
    assert trains == {name: not name.startswith("autoencoder.") for name in trains}
    state = load(folder, "no").state_dict()
    assert merged.state_dict().keys() == state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in merged.state_dict().items())
    for found in (merged, loaded):
        torch.testing.assert_close(found(**batch, **DRAWS).loss, unmerged.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.generate(**prompt).image_latents, drawn.image_latents, rtol=1e-2, atol=1e-2)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert configs[1].keys() == configs[0].keys() and "quantization_config" not in configs[1]
    merged.save_pretrained(tmp_path / "again")
    assert all(
        torch.equal(value, load_file(tmp_path / "model.safetensors")[name])
        for name, value in load_file(tmp_path / "again" / "model.safetensors").items()
    )


def test_bf16_weights_and_tied_embeddings_survive_merging(tmp_path: Path) -> None:
    """Adapters of a bf16 model are kept in fp32; their sum is rounded once, when it is merged."""
    base_model(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "merged")
    loaded = OrthusForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    name = "backbone.layers.0.mlp.up_proj"
    layer: Any = model.get_submodule(name)
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    torch.testing.assert_close(loaded.get_submodule(name).weight, expected.to(torch.bfloat16), rtol=0, atol=0)


# -- training ------------------------------------------------------------------------------------------------------


class Batches:
    """The same two examples with other latents each time, a pure function of the position."""

    position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.position += 1
            latents = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(self.position))
            yield {**packed_and_padded()[0], "image_latents": latents}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize(("kind", "optimizer"), [("no", "muon"), ("int8", "adamw"), ("int4", "adamw")])
def test_resumed_equals_uninterrupted_bit_for_bit(folder: Path, tmp_path: Path, kind: str, optimizer: Any) -> None:
    """Other adapters at the restart: all must come from the checkpoint. `final` is the merged, plain model."""
    optim = OptimSettings(optimizer=optimizer, peak_lr=1e-2, warmup_steps=2)

    def fresh(seed: int) -> OrthusForConditionalGeneration:
        torch.manual_seed(seed)
        model = add_lora(load(folder, kind), rank=4)
        freeze(model, ["autoencoder"])
        return model

    def interrupt(model: nn.Module, step: int) -> None:
        model.generate(torch.tensor([[0, 10, 11, 6]]), modality="image")
        if step == 4:
            raise KeyboardInterrupt

    settings = {"num_steps": 6, "save_every": 3, "log_every": 2, "ema_decay": 0.5}
    fit(fresh(0), lambda lane, num_lanes: Batches(), RunSettings(str(tmp_path / "whole"), **settings), optim)
    broken = RunSettings(str(tmp_path / "broken"), **settings, sample_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(fresh(0), lambda lane, num_lanes: Batches(), broken, optim, on_sample=interrupt)
    fit(fresh(7), lambda lane, num_lanes: Batches(), broken, optim)
    finals = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "broken")]
    assert finals[0].keys() == load(folder, "no").state_dict().keys()
    assert [name for name in finals[0] if not torch.equal(finals[0][name], finals[1][name])] == []
    assert load(tmp_path / "whole" / "final", "no")(input_ids=torch.tensor([[0, 9]])).logits.isfinite().all()


def test_a_checkpoint_of_other_adapters_is_refused(folder: Path, tmp_path: Path) -> None:
    run = RunSettings(str(tmp_path), num_steps=1, save_every=1)
    fit(add_lora(load(folder, "no"), rank=4), lambda lane, num_lanes: Batches(), run, FAST)
    for model in (add_lora(load(folder, "no"), rank=8), load(folder, "no")):
        state = TrainState(model, start_ema(model), build_optimizers(model, FAST), {0: Batches()})
        with pytest.raises(ValueError, match=r"lora_|keep the model"):
            load_checkpoint(state, latest(tmp_path) or "")


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint yet")
def test_posttrain_leaves_a_merged_model(tmp_path: Path) -> None:
    short = ["run.num_steps=2", "run.save_every=2", "data.rows_per_batch=2", "lora.rank=4"]
    folders = [f"model={CHECKPOINT}", f"run.output_dir={tmp_path}"]
    posttrain.main([str(ROOT / "configs/small/posttrain.yaml"), *folders, *short, "lora.quantize=int8"])
    before, after = (OrthusForConditionalGeneration.from_pretrained(path) for path in (CHECKPOINT, tmp_path / "final"))
    assert after.config.text_config.to_dict() == before.config.text_config.to_dict()
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert any("q_proj" in name for name in changed) and "backbone.norm.weight" not in changed
    assert not any(name.startswith("autoencoder") for name in changed)


def test_adapters_train_where_the_backbone_rests(folder: Path) -> None:
    """Frozen parts are frozen before the adapters come, so that a base config with a frozen backbone can take `lora.rank=16`."""
    for frozen in (["backbone"], ["backbone.layers", "backbone.norm"], []):
        model = load_model(str(folder), ["lm_head", *frozen], LoraSettings(rank=2), seed=0)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("lora_" in name for name in trains) and not any("base_layer" in name for name in trains)
        assert "lm_head.weight" not in trains and ("backbone.embed_tokens.weight" in trains) == (frozen != ["backbone"])


def test_lora_settings_are_strict() -> None:
    yaml = ROOT / "configs/small/posttrain.yaml"
    assert load_settings(posttrain.PostStage, yaml, []).lora is None
    assert load_settings(posttrain.PostStage, yaml, ["lora={}"]).lora == LoraSettings()
    with pytest.raises(ValueError, match=r"did you mean 'lora\.rank'"):
        load_settings(posttrain.PostStage, yaml, ["lora.rnak=4"])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_or_merged_says_why(folder: Path) -> None:
    model = load(folder, "no")
    wrong = {("q_prj",): "did you mean 'q_proj'", ("zzz",): "the backbone has down_proj, gate_proj", (): "nothing to adapt"}
    for targets, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            add_lora(model, targets=targets)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(add_lora(model))


def test_packed_integers_cannot_be_adapted(folder: Path) -> None:
    """torchao has no gradient through its packed int4 kernels."""
    from torchao.quantization import Int4Tensor

    model = load(folder, "no")
    packed, scale = torch.zeros(32, 16, dtype=torch.int8), torch.ones(1, 32)
    weight = Int4Tensor(packed, scale, scale, [1, 32], torch.Size([32, 32]))
    model.backbone.layers[0].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj holds Int4Tensor.*quantization\('int8'\)"):
        add_lora(model)


def test_missing_packages_say_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, "no")
    for package, call in (("peft", lambda: add_lora(model)), ("torchao.quantization", lambda: quantization("int8"))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r"pip install 'orthus\[adapters\]'"):
                call()
    model.save_pretrained(folder)  # a model without adapters needs neither
    assert tiny_config().tie_word_embeddings is False


def test_the_published_layout_takes_neither_adapters_nor_integers(tmp_path: Path) -> None:
    source = write_published_folder(tmp_path)
    for kind in ("adapter", "int8"):
        options = {} if kind == "adapter" else {"quantization_config": quantization("int8")}
        model = OrthusForConditionalGeneration.from_pretrained(source, **options)
        if kind == "adapter":
            add_lora(model, rank=2)
        with pytest.raises(ValueError, match="adapter or a quantised weight"):
            save_published(model, tmp_path / kind)
        assert not (tmp_path / kind).exists()
    save_published(merge_lora(add_lora(OrthusForConditionalGeneration.from_pretrained(source), rank=2)), tmp_path / "merged")
    assert read_tensor_shapes(tmp_path / "merged") == read_tensor_shapes(source)
