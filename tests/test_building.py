"""`train.build`: five families and a Chameleon become an Orthus that says what they said, trains, generates, and loads again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import (
    WORLD,
    write_backbone,
    write_chameleon,
    write_patch_autoencoder,
    write_pictures,
    write_vqgan,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, ChameleonForConditionalGeneration

from orthus.conversion import save_published
from orthus.data.packing import PackedLoader
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.language import CaptionMix
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training.optim import freeze
from train import build, posttrain

TEXT = "a photo of a red circle  and three blue stars"
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "smollm", "smollm3", "granite")
TIED = ("gemma2", "gemma3", "smollm", "smollm3")
SMALL = ["--num-codes", "40", "--head-width", "32", "--head-blocks", "2"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch autoencoder and a folder of pictures, of which one is broken."""
    folder = tmp_path_factory.mktemp("parts")
    write_patch_autoencoder(folder / "autoencoder")
    write_pictures(folder / "pictures", 80)
    (folder / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "pictures" / "caption.txt").write_text("not a picture")
    return folder


def run_build(parts: Path, backbone: Path, *more: str, output: str = "built") -> Path:
    target = backbone.parent / output
    given = ["--autoencoder", str(parts / "autoencoder"), "--images", str(parts / "pictures"), *SMALL]
    build.main(["--backbone", str(backbone), "--output", str(target), *given, *more])
    return target


def load(folder: Path) -> tuple[OrthusForConditionalGeneration, OrthusProcessor]:
    return OrthusForConditionalGeneration.from_pretrained(folder), OrthusProcessor.from_pretrained(folder)


def batch_of(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> dict:
    """One row of packed examples, their pictures encoded."""
    dataset = WorldDataset("train", {"t2i": 1.0}, WORLD, captions=CaptionMix(1.0, 0, 0, 0, 0, 0, 0))
    batch = next(PackedLoader(dataset, processor, rows_per_batch=1, row_length=160, buffer_size=4))
    return {**batch, "pixel_values": None, "image_latents": model.get_image_latents(batch["pixel_values"])}


def train(model: OrthusForConditionalGeneration, batch: dict, lr: float = 3e-3) -> tuple[float, float]:
    """The loss of the batch before and after 20 steps, with the same noise."""

    def measured() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = measured()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(20):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measured()


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Family, folder of the language model, folder of what was built from it."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone = write_backbone(folder / "language", request.param)
    return request.param, backbone, run_build(parts, backbone)


def test_text_ability_is_kept_to_the_last_bit_of_rounding(built: tuple[str, Path, Path]) -> None:
    family, backbone, folder = built
    old, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), AutoTokenizer.from_pretrained(backbone)
    model, processor = load(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert list(processor.encode_text(TEXT)) == ids
    known = len(tokenizer)  # rows of a tokenizer; padding rows may have become new tokens
    inputs = torch.tensor([ids])
    with torch.no_grad():
        expected, found = old(inputs).logits[..., :known], model(inputs).logits[..., :known]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if family in ("gemma2", "granite"):  # neither soft cap nor divisor may be lost
        assert not torch.allclose(model.lm_head(torch.ones(32)), torch.ones(32) @ model.lm_head.weight.T, atol=1e-3)


def test_tokens_rows_and_ties(built: tuple[str, Path, Path]) -> None:
    family, backbone, folder = built
    old, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), AutoTokenizer.from_pretrained(backbone)
    model, processor = load(folder)
    config, table = model.config, model.get_input_embeddings().weight
    assert (model.lm_head.weight is table) == config.tie_word_embeddings == (family in TIED)
    old_table = old.get_input_embeddings().weight
    assert config.code_offset == max(len(processor.tokenizer), len(old_table))
    assert len(table) == config.code_offset + config.num_codes == config.text_config.vocab_size
    torch.testing.assert_close(table[: len(tokenizer)], old_table[: len(tokenizer)], atol=0, rtol=0)
    new = [config.boi_token_id, config.eoi_token_id, config.separator_token_id, config.image_token_id]
    assert len(set(new)) == 4 and all(len(tokenizer) <= token_id < config.code_offset for token_id in new)
    assert len({config.pad_token_id, config.boi_token_id, config.eoi_token_id, config.bos_token_id}) >= 3
    rows = table.detach()[[*new, *range(config.code_offset, len(table))]]
    assert 0.5 < float(rows.std()) / float(old_table.detach().std()) < 2.0  # drawn like the old ones
    assert processor.tokenizer.padding_side == "left" and not processor.tokenizer.chat_template
    assert processor.num_image_tokens == config.num_latents == 16


def test_a_latent_at_a_centre_is_the_embedding_of_its_code(built: tuple[str, Path, Path]) -> None:
    """As the backbone sees it: Gemma scales the rows of its table, and both ways must do so."""
    model, _ = load(built[2])
    model.latent_embedding.temperature = 1e-6
    config = model.config
    codes = torch.arange(config.num_latents) + 3
    latents = model.latent_embedding.codebook[codes].unsqueeze(0)
    ids = torch.tensor([[config.bos_token_id, config.boi_token_id, *[config.image_token_id] * config.num_latents]])
    as_tokens = ids.clone()
    as_tokens[0, 2:] = config.code_offset + codes
    with torch.no_grad():
        embeddings = model.embed_inputs(ids, latents)
        torch.testing.assert_close(embeddings, model.get_input_embeddings()(as_tokens), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(ids, image_latents=latents).logits, model(as_tokens).logits, atol=1e-4, rtol=1e-4)


def test_trains_generates_saves_and_loads(built: tuple[str, Path, Path], tmp_path: Path) -> None:
    model, processor = load(built[2])
    before, after = train(model, batch_of(model, processor))
    assert after < 0.9 * before
    assert_same_after_saving(model, processor, tmp_path)


def assert_same_after_saving(model: OrthusForConditionalGeneration, processor: OrthusProcessor, folder: Path) -> None:
    """Saved and loaded, a model writes the same words and draws the same latents."""
    model.eval().save_pretrained(folder)
    again = OrthusForConditionalGeneration.from_pretrained(folder)
    prompt = processor(segments=[["two stars"], ["a red circle above a heart"]])
    options = {"max_new_tokens": model.config.num_latents + 8, "max_images": 1, "num_diffusion_steps": 3, "force_image": True}
    one, two = (m.generate(**prompt, **options, generator=torch.Generator().manual_seed(3)) for m in (model, again))
    assert torch.equal(one.sequences, two.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.image_latents, two.image_latents, strict=True))
    assert all(len(latents) == 1 and bool(torch.isfinite(latents).all()) for latents in one.image_latents)


def test_stage_1_of_the_example_config(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebook, embeddings and head learn, the layers rest."""
    monkeypatch.setattr("orthus.training.stages.plot_curves", lambda path: None)
    folder = run_build(parts, write_backbone(tmp_path / "language", "smollm"))
    overrides = [
        f"model={folder}", f"run.output_dir={tmp_path / 'run'}", "run.num_steps=3", "run.num_threads=1", "run.autocast=no",
        "data.row_length=320", "data.rows_per_batch=1", "data.world.image_size=32", "optim.warmup_steps=0",
    ]  # fmt: skip
    posttrain.main(["configs/base/from_language_model.yaml", *overrides])
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"latent_embedding.codebook", "backbone.embed_tokens.weight", "diffusion_head.final_linear.weight"} <= changed
    assert not any(name.startswith(("backbone.layers.", "backbone.norm.", "autoencoder.")) for name in changed)
    OrthusProcessor.from_pretrained(tmp_path / "run" / "final")


def test_freezing_the_lm_head_leaves_the_embeddings(built: tuple[str, Path, Path]) -> None:
    model, _ = load(built[2])
    if model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="tied to the token embeddings"):
            freeze(model, ["lm_head"])
    else:
        freeze(model, ["lm_head"])
        assert not model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad


# ---------------------------------------------------------------------- Chameleon


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chameleon(tmp_path_factory.mktemp("chameleon") / "chameleon")


def test_chameleon_as_in_the_paper(chameleon: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build.main(["--backbone", str(chameleon), "--output", str(tmp_path / "base"), "--head-width", "32"])
    said = capsys.readouterr().out
    assert "copied from the quantiser" in said and "image decoder" in said and "MISSING" not in said
    model, processor = load(tmp_path / "base")
    old = ChameleonForConditionalGeneration.from_pretrained(chameleon)
    config = model.config
    assert torch.equal(model.latent_embedding.codebook, old.model.vqmodel.quantize.embedding.weight)
    assert (config.code_offset, config.num_codes, config.bos_token_id, config.soft_vq_temperature) == (4, 24, 0, 1.0)
    assert torch.equal(model.code_embeddings(), old.model.embed_tokens.weight[4:28])
    assert (config.head_config.objective, config.head_config.latent_scale) == ("v_prediction", 0.1)
    assert not model.diffusion_head.final_linear.weight.any() and model.diffusion_head.cond_embed.weight.any()
    assert (processor.image_token_id, processor.boi_token_id) == (config.image_token_id, config.boi_token_id)
    assert processor.image_processor.crop_size == {"height": 32, "width": 32} and processor.num_image_tokens == 64
    ids = torch.tensor([processor.encode_text(TEXT)])
    with torch.no_grad():
        expected, found = old(ids).logits[..., 32:], model(ids).logits[..., 32:]  # Chameleon masks its image codes
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        pixels = torch.rand(1, 3, 32, 32) * 2 - 1
        hard = old.model.get_image_tokens(pixels)
        model.latent_embedding.temperature = 1e-6
        soft = model.embed_image_latents(model.get_image_latents(pixels))
    torch.testing.assert_close(soft, old.model.embed_tokens(hard), atol=1e-5, rtol=1e-4)  # eq. 4 at tau -> 0 is Chameleon's VQ
    model.latent_embedding.temperature = 1.0
    before, after = train(model, batch_of(model, processor))
    assert after < 0.9 * before
    assert_same_after_saving(model, processor, tmp_path / "again")
    save_published(model, tmp_path / "published")


def test_image_decoder_from_the_given_autoencoder(chameleon: Path, tmp_path: Path) -> None:
    vqgan = write_vqgan(tmp_path / "vqgan", like=chameleon)
    arguments = ["--head-width", "32", "--autoencoder", str(vqgan)]
    build.main(["--backbone", str(chameleon), "--output", str(tmp_path / "base"), *arguments])
    model = OrthusForConditionalGeneration.from_pretrained(tmp_path / "base")
    given = load_file(vqgan / "model.safetensors")
    assert all(torch.equal(value, given[name]) for name, value in model.autoencoder.state_dict().items())
    assert torch.equal(model.latent_embedding.codebook, given["quantizer_codebook"])


def test_a_published_orthus_keeps_its_codebook_and_head(chameleon: Path, tmp_path: Path) -> None:
    build.main(["--backbone", str(chameleon), "--output", str(tmp_path / "base"), "--head-width", "32"])
    model, processor = load(tmp_path / "base")
    with torch.no_grad():
        for parameter in (*model.latent_embedding.parameters(), *model.diffusion_head.parameters()):
            parameter.add_(1.0)
    save_published(model, tmp_path / "published")
    processor.save_pretrained(tmp_path / "published")
    build.main(["--backbone", str(tmp_path / "published"), "--output", str(tmp_path / "again"), "--head-width", "32"])
    again = OrthusForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_chameleon_with_an_autoencoder_of_another_kind(chameleon: Path, parts: Path, tmp_path: Path) -> None:
    arguments = ["--head-width", "32", "--autoencoder", str(parts / "autoencoder")]
    with pytest.raises(ValueError, match="PatchAutoencoder brings no codebook of 24 codes; give --images"):
        build.main(["--backbone", str(chameleon), "--output", str(tmp_path / "none"), *arguments])
    build.main(["--backbone", str(chameleon), "--output", str(tmp_path / "base"), *arguments, "--images", "world"])
    model, processor = load(tmp_path / "base")
    assert model.config.head_config.latent_dim == 6 and model.latent_embedding.codebook.shape == (24, 6)
    assert model.config.code_offset == 4 and processor.num_image_tokens == 16
    before, after = train(model, batch_of(model, processor))
    assert after < 0.9 * before


def test_a_language_model_with_the_vqgan_of_a_chameleon(chameleon: Path, tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "language", "smollm")
    arguments = ["--autoencoder", str(chameleon), "--output", str(tmp_path / "base"), "--head-width", "32"]
    build.main(["--backbone", str(backbone), *arguments])
    model, processor = load(tmp_path / "base")
    quantizer = ChameleonForConditionalGeneration.from_pretrained(chameleon).model.vqmodel.quantize.embedding.weight
    assert torch.equal(model.latent_embedding.codebook, quantizer) and model.config.head_config.latent_dim == 32
    assert model.config.head_config.latent_scale == 0.1  # published, because there were no pictures to measure
    assert processor.num_image_tokens == 64
