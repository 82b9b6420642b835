"""The parts of a build (tokenizer, latents, pictures, output folder) and every input that is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_building import SMALL
from tiny_backbones import (
    FAMILIES,
    byte_tokenizer,
    gemma_tokenizer,
    write_backbone,
    write_chameleon,
    write_patch_autoencoder,
    write_pictures,
)
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from orthus.autoencoder import PatchAutoencoder, VQGANAutoencoder, VQGANAutoencoderConfig
from orthus.autoencoder_loading import load_autoencoder
from orthus.backbones import load_backbone, take_apart
from orthus.building import build_orthus, fitting_temperature, measure_latents, starting_codebook
from orthus.data.pictures import FolderPictures
from orthus.image_processing import OrthusImageProcessor
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.tokenization import num_token_ids, prepare_tokenizer
from train import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, an autoencoder, pictures and a Chameleon."""
    folder = tmp_path_factory.mktemp("parts")
    write_backbone(folder / "language", "llama")
    write_patch_autoencoder(folder / "autoencoder")
    write_pictures(folder / "pictures", 30)
    write_chameleon(folder / "chameleon")
    return folder


def arguments(folder: Path, output: Path, **changes: str | None) -> list[str]:
    """Of a build that works, with changes; None leaves an argument out."""
    given = {"backbone": "language", "autoencoder": "autoencoder", "images": "pictures"}
    named = {"output": output, **{name: folder / place for name, place in given.items()}, **changes}
    return [text for name, value in named.items() if value is not None for text in (f"--{name}", str(value))] + SMALL


# ---------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_added_once(family: str) -> None:
    names = FAMILIES[family][2]
    tokenizer = gemma_tokenizer(names) if family.startswith("gemma") else byte_tokenizer(names)
    size, old = num_token_ids(tokenizer), {name: getattr(tokenizer, name) for name in names}
    new_ids = prepare_tokenizer(tokenizer)
    assert new_ids == list(range(size, size + len(new_ids))) and len(new_ids) == 4 + ("pad_token" not in names) + (not names)
    assert prepare_tokenizer(tokenizer) == [] and num_token_ids(tokenizer) == size + len(new_ids)
    assert {name: getattr(tokenizer, name) for name in names} == old
    assert None not in (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_a_tokenizer_without_the_special_tokens_is_not_given_the_unknown_one(folder: Path) -> None:
    autoencoder, tokenizer = load_autoencoder(folder / "autoencoder"), gemma_tokenizer(FAMILIES["gemma3"][2])
    with pytest.raises(ValueError, match="the tokenizer lacks boi_token_id, eoi_token_id, image_token_id, separator_token_id"):
        build_orthus(autoencoder, tokenizer, {}, {}, {"num_codes": 4}, torch.zeros(1, 16, 6))


def test_what_a_tokenizer_lacks() -> None:
    qwen, bare = byte_tokenizer(FAMILIES["qwen3"][2]), byte_tokenizer({})
    prepare_tokenizer(qwen)
    assert (qwen.bos_token, qwen.pad_token, qwen.eos_token) == ("<|endoftext|>", "<|endoftext|>", "<|im_end|>")
    prepare_tokenizer(bare)
    assert (bare.bos_token, bare.pad_token, bare.eos_token) == ("<s>", "<pad>", "<sep>")


def test_runs_of_blanks_that_are_added_tokens_stay_text() -> None:
    tokenizer = gemma_tokenizer(FAMILIES["gemma3"][2])
    prepare_tokenizer(tokenizer)
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "separator_token": "<sep>", "image_token": "<image>"}
    processor = OrthusProcessor(OrthusImageProcessor(size=32), tokenizer, num_image_tokens=16, **names)
    text = "(  )\n\n<bos> red <sep>"
    ids = processor.encode_text(text)
    assert tokenizer.decode(list(ids)) == text
    assert not {tokenizer.bos_token_id, processor.separator_token_id} & set(ids)
    assert tokenizer.convert_tokens_to_ids("\u2581\u2581") in ids


# ---------------------------------------------------------------------- latents, codebook, temperature


def test_latents_are_measured(folder: Path) -> None:
    """Mean 0 and variance 1 afterwards, in the returned latents and in what the autoencoder says from then on."""
    autoencoder = load_autoencoder(folder / "autoencoder")
    pictures = FolderPictures(folder / "pictures", OrthusImageProcessor(size=32), limit=30)
    batches = list(pictures)
    before = autoencoder.decode(autoencoder.encode(batches[0]["pixel_values"]))
    latents = measure_latents(autoencoder, batches)
    std, mean = torch.std_mean(latents, dim=(0, 1))
    torch.testing.assert_close((mean, std), (torch.zeros(6), torch.ones(6)), atol=1e-5, rtol=1e-5)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(autoencoder.encode(pixels), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(latents[:8]), before, atol=1e-4, rtol=1e-4)  # the decoder takes it back
    with pytest.raises(ValueError, match="constant latent channel"):
        measure_latents(autoencoder, [{"pixel_values": torch.zeros(2, 3, 32, 32)}])
    with pytest.raises(ValueError, match="no pictures"):
        measure_latents(autoencoder, [])


def test_a_quantisers_codebook_is_copied_only_where_it_fits() -> None:
    config = VQGANAutoencoderConfig(
        embed_dim=4, num_embeddings=7, latent_channels=4, resolution=32, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, attn_type="none",
    )  # fmt: skip
    autoencoder = VQGANAutoencoder(config)
    autoencoder.quantizer_codebook.normal_()
    assert torch.equal(starting_codebook(autoencoder, None, 7), autoencoder.quantizer_codebook)
    with pytest.raises(ValueError, match="brings no codebook of 8 codes"):
        starting_codebook(autoencoder, None, 8)
    assert starting_codebook(autoencoder, torch.randn(2, 16, 4), 8).shape == (8, 4)


def test_the_temperature_spreads_a_latent_over_the_share_that_was_asked_for() -> None:
    torch.manual_seed(0)
    latents, codebook = torch.randn(40, 16, 4), torch.randn(200, 4)
    for scale in (1.0, 10.0):
        tau = fitting_temperature(latents * scale, codebook * scale, 0.2)
        weights = torch.softmax(-(torch.cdist(latents.flatten(0, 1) * scale, codebook * scale) ** 2) / tau, -1)
        num_used = torch.special.entr(weights).sum(-1).exp().mean()
        assert abs(float(num_used) - 40) < 4
    assert abs(tau / fitting_temperature(latents, codebook, 0.2) - 100) < 6  # tau scales as the square of the latents


def test_pictures_of_a_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pictures", tmp_path / "p")
    (tmp_path / "p" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "p" / "more" / "lab.tiff").write_bytes((tmp_path / "p" / "broken.jpg").read_bytes())
    (tmp_path / "p" / "words.txt").write_text("words")
    Image.new("RGB", (9, 4000)).save(tmp_path / "p" / "narrow.png")  # enlarged it would have 64 million pixels
    processor = OrthusImageProcessor(size=32, max_pixels=400_000)
    pictures = FolderPictures(tmp_path / "p", processor, limit=100, batch_size=8)
    sizes = [len(batch["pixel_values"]) for batch in pictures]
    assert sizes == [8, 8, 8, 6] and (pictures.num_read, pictures.num_unreadable) == (30, 3)
    some = FolderPictures(tmp_path / "p", processor, limit=10, batch_size=8, seed=1)
    first, again = ([batch["pixel_values"] for batch in some] for _ in range(2))
    assert [len(batch) for batch in first] == [8, 2] and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="no folder"):
        FolderPictures(tmp_path / "nowhere", processor, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable picture among 0 picture files"):
        list(FolderPictures(tmp_path / "empty", processor, 4))


# ---------------------------------------------------------------------- output


def test_output_is_whole_or_absent(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "runs" / "base"
    build.main([*arguments(folder, output), "--dtype", "bfloat16"])
    said = capsys.readouterr().out
    assert "30 read" in said and "centres by k-means" in said and "code rows 307..346" in said and "<boi>=303" in said
    assert json.loads((output / "build.json").read_text())["num_codes"] == 40
    assert OrthusForConditionalGeneration.from_pretrained(output).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"base exists.*--overwrite"):
        build.main(arguments(folder, output))
    with pytest.raises(ValueError, match="cannot load the backbone"):
        build.main([*arguments(folder, output, backbone="./nowhere"), "--overwrite"])
    assert OrthusForConditionalGeneration.from_pretrained(output).dtype == torch.bfloat16  # the old one is still there
    build.main([*arguments(folder, output), "--overwrite"])
    assert OrthusForConditionalGeneration.from_pretrained(output).dtype == torch.float32
    assert [path.name for path in output.parent.iterdir()] == ["base"]


def test_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(folder / "language", dtype=torch.bfloat16)
    backbone = Path(shutil.copytree(folder / "language", tmp_path / "language"))
    stored.save_pretrained(backbone)
    options = "--dtype auto --objective v_prediction --temperature 3 --image-loss-weight 7 --num-codes 30 --seed 5".split()
    argv = arguments(folder, tmp_path / "base", backbone=str(backbone))
    build.main([*argv, *options])
    model = OrthusForConditionalGeneration.from_pretrained(tmp_path / "base")
    config, head = model.config, model.config.head_config
    assert model.dtype == torch.bfloat16 and (head.objective, head.width, head.num_blocks) == ("v_prediction", 32, 2)
    assert (config.soft_vq_temperature, config.image_loss_weight, config.num_codes) == (3.0, 7.0, 30)
    build.main([*argv, *options, "--overwrite"])
    again = OrthusForConditionalGeneration.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())  # a seed is a seed


def test_a_decoder_inside_a_model_with_further_inputs() -> None:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 14})).eval()
    backbone = take_apart("gemma", model)
    assert backbone.text_config.model_type == "gemma3_text" and backbone.tables == ("backbone.embed_tokens.weight",)
    assert not any("vision" in name for name in backbone.tensors)


@pytest.mark.parametrize("options", [["timm_name=vit_tiny_patch16_224", "encoder_kwargs={img_size: 32}", "decoder_dim=24"], None])
def test_autoencoders_of_other_libraries(options: list[str] | None, folder: Path, tmp_path: Path) -> None:
    """timm by name, and a folder of diffusers; both are calibrated on the pictures."""
    changes: dict[str, str | None] = {"autoencoder": None}
    if options is None:
        diffusers = pytest.importorskip("diffusers")
        sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3, "sample_size": 16}
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "pipeline" / "vae")
        changes["autoencoder"] = str(tmp_path / "pipeline")
        options = ["subfolder=vae"]
    else:
        pytest.importorskip("timm")
    build.main([*arguments(folder, tmp_path / "base", **changes), "--autoencoder-options", *options])
    model, processor = (cls.from_pretrained(tmp_path / "base") for cls in (OrthusForConditionalGeneration, OrthusProcessor))
    image = Image.open(next((folder / "pictures").glob("*.png")))
    inputs = processor(segments=[["what is this?", image]])
    latents = model.get_image_latents(inputs["pixel_values"])
    assert latents.shape[1:] == (processor.num_image_tokens, model.config.head_config.latent_dim)
    assert 0.3 < float(latents.std()) < 3 and abs(model.config.head_config.latent_scale - 1) < 0.02
    output = model.generate(**inputs, modality="image", num_diffusion_steps=2)
    assert bool(torch.isfinite(output.pixel_values[0]).all())


# ---------------------------------------------------------------------- what is refused


def refused(argv: list[str], words: str, output: Path) -> None:
    """Refused with these words, and nothing is left behind."""
    with pytest.raises(ValueError, match=words):
        build.main(argv)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"autoencoder": None}, "give --autoencoder"),
        ({"images": None}, "PatchAutoencoder brings no codebook of 40 codes; give --images"),
        ({"images": "nowhere"}, "nowhere is no folder"),
        ({"image-size": "64"}, "image_size=64"),
        ({"gguf-file": "nothing.gguf"}, r"nothing\.gguf does not exist"),
        ({"autoencoder-options": "subfolder"}, "write key=value"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict, words: str, folder: Path, tmp_path: Path) -> None:
    refused(arguments(folder, tmp_path / "base", **changes), words, tmp_path / "base")


def test_a_hub_name_that_cannot_be_reached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = arguments(folder, tmp_path / "base", backbone="nobody/no-such-model")
    refused(argv, "cannot load the backbone of 'nobody/no-such-model'.*without network a folder", tmp_path / "base")

    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    refused(argv, "gated repo.*needs a login", tmp_path / "base")


def test_other_layouts(folder: Path, tmp_path: Path) -> None:
    def case(name: str) -> Path:
        return Path(shutil.copytree(folder / "language", tmp_path / name))

    original = tmp_path / "original"
    original.mkdir()
    (original / "params.json").write_text("{}")
    (original / "consolidated.00.pth").write_bytes(b"")
    pickled, sparse, bare, mixed = (case(name) for name in ("pickled", "sparse", "bare", "mixed"))
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    tensors = load_file(sparse / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    for file in bare.glob("token*"):
        file.unlink()
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    cases = {
        original: r"holds no config\.json but consolidated\.00\.pth, params\.json",
        pickled: "a pickle can run code",
        sparse: r"lacks 1 tensors.*up_proj",
        bare: "cannot load the tokenizer",
        mixed: "do not belong together",
    }
    for path, words in cases.items():
        refused(arguments(folder, tmp_path / "base", backbone=str(path)), words, tmp_path / "base")


def test_models_that_are_no_backbone(folder: Path, tmp_path: Path) -> None:
    def case(name: str, fields: dict) -> Path:
        path = Path(shutil.copytree(folder / "language", tmp_path / name))
        (path / "config.json").write_text(json.dumps(fields))
        return path

    build.main(arguments(folder, tmp_path / "done"))
    cases = {
        case("t5", {"model_type": "t5"}): "encoder-decoder",
        case("code", {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}): "cannot load the backbone",
        case("siglip", {"model_type": "siglip"}): "'siglip', which AutoModelForCausalLM does not load",
        tmp_path / "done": "is an Orthus already",
        write_backbone(tmp_path / "short", "llama", max_position_embeddings=32): "32 positions, too few for a picture of 16",
        write_backbone(tmp_path / "small", "llama", vocab_size=200): "ids up to 301, the embeddings 200 rows",
    }
    for path, words in cases.items():
        refused(arguments(folder, tmp_path / "base", backbone=str(path)), words, tmp_path / "base")


def test_a_family_that_orthus_does_not_follow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom lets packed examples see each other, Mamba has no cache; a lost divisor of the logits is noticed."""
    backbone = write_backbone(tmp_path / "granite", "granite")
    monkeypatch.setattr("orthus.text_head.TextHead.forward", torch.nn.Linear.forward)
    refused(arguments(folder, tmp_path / "base", backbone=str(backbone)), "granite models compute", tmp_path / "base")
    monkeypatch.undo()
    for family, words in (("bloom", "see each other"), ("mamba", "do not run as a backbone")):
        monkeypatch.setitem(FAMILIES, family, (family, {}, {"bos_token": "<s>", "eos_token": "</s>"}))
        backbone = write_backbone(tmp_path / family, family)
        refused(arguments(folder, tmp_path / "base", backbone=str(backbone)), words, tmp_path / "base")


def test_more_tokens_than_rows_by_a_few_are_new_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone = write_backbone(tmp_path / "language", "llama", vocab_size=300)
    build.main(arguments(folder, tmp_path / "base", backbone=str(backbone)))
    assert "no rows for the last 2 of its tokens" in capsys.readouterr().out
    assert OrthusForConditionalGeneration.from_pretrained(tmp_path / "base").config.code_offset == 307


def test_a_bias_of_the_lm_head_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "phi", ("phi", {}, {"bos_token": "<s>", "eos_token": "</s>"}))
    backbone = write_backbone(tmp_path / "phi", "phi")
    build.main(arguments(folder, tmp_path / "base", backbone=str(backbone)))
    model, old = OrthusForConditionalGeneration.from_pretrained(tmp_path / "base"), load_backbone(str(backbone))
    assert torch.equal(model.lm_head.bias[:302], old.tensors["lm_head.bias"])
    torch.testing.assert_close(model(old.input_ids).logits[..., :302], old.logits, atol=1e-5, rtol=1e-5)


def test_chameleons_that_are_refused(folder: Path, tmp_path: Path) -> None:
    def argv(backbone: Path) -> list[str]:
        return ["--backbone", str(backbone), "--output", str(tmp_path / "base")]

    lacking = write_chameleon(tmp_path / "ids", lacking="<reserved08706>")
    refused(argv(lacking), "vocabulary_map.*lacks <reserved08706>", tmp_path / "base")
    refused([*argv(folder / "chameleon"), "--num-codes", "9"], "has 24 image codes", tmp_path / "base")
    refused([*argv(folder / "chameleon"), "--image-size", "64"], "--image-size 64 is for another autoencoder", tmp_path / "base")
    bare = Path(shutil.copytree(folder / "chameleon", tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    refused(argv(bare), "cannot load the processor", tmp_path / "base")
    for name, words in (("model.layers.0.mlp.up_proj.weight", "lacks 1 tensors"), ("quantize.embedding", "neither a codebook")):
        sparse = Path(shutil.copytree(folder / "chameleon", tmp_path / name))
        tensors = load_file(sparse / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if name not in k}, sparse / "model.safetensors", metadata={"format": "pt"})
        refused(argv(sparse), words, tmp_path / "base")


def test_a_plain_chameleon_is_not_trained_with_a_random_codebook(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"train\.build` makes an Orthus-base of a Chameleon"):
        OrthusForConditionalGeneration.from_pretrained(folder / "chameleon")
    with caplog.at_level("WARNING"):
        OrthusForConditionalGeneration.from_pretrained(folder / "chameleon", allow_missing=True)
    assert "train.build` makes an Orthus-base of it, with the codebook of its quantiser" in caplog.text


def test_too_few_pictures_for_the_codes(folder: Path, tmp_path: Path) -> None:
    argv = [*arguments(folder, tmp_path / "base"), "--num-codes", "1000"]
    refused(argv, "480 latents are too few for 1000 codes", tmp_path / "base")
    assert isinstance(load_autoencoder(folder / "autoencoder"), PatchAutoencoder)
