"""The published implementation's own numbers, on its own random checkpoint. tests/goldens/README.md says what each item is."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import FOLDER, golden, golden_settings, noise_per_latent, write_published_folder
from PIL import Image
from torch import Tensor

from orthus.conversion import our_name
from orthus.image_processing import OrthusImageProcessor
from orthus.modeling import OrthusForConditionalGeneration
from orthus.sampling import EXACT

TRAINING = ["06_train_mmg_t2i", "06_train_mmg_edit", "06_train_interleave"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrthusForConditionalGeneration]:
    folder = write_published_folder(tmp_path_factory.mktemp("published"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield OrthusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def latents(published: OrthusForConditionalGeneration) -> Tensor:
    """`(2, L, C)`: the two pictures that most items use."""
    return published.get_image_latents(golden("01_vq_encode")["pixel_values"])


def assert_near(actual: Tensor, expected: Tensor, max_abs: float, rms: float | None = None) -> None:
    """Largest absolute deviation, and rms deviation relative to the rms of `expected`."""
    assert actual.shape == expected.shape
    deviation, scale = (actual.double() - expected.double()), expected.double().square().mean().sqrt()
    assert deviation.abs().max() <= max_abs
    assert rms is None or deviation.square().mean().sqrt() <= rms * scale


def assert_logits(
    actual: Tensor, expected: dict[str, Tensor], name: str, mask: Tensor | None = None, max_abs: float = 1e-4
) -> None:
    """Chosen columns, log-sum-exp and argmax of `(B, T, V)` logits where `mask` is 1."""
    keep = torch.ones(actual.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    actual = actual[keep]
    assert_near(actual[:, expected["columns"]], expected[f"{name}.logits"][keep], max_abs)
    assert_near(actual.double().logsumexp(-1), expected[f"{name}.logsumexp"][keep], max_abs)
    assert torch.equal(actual.argmax(-1), expected[f"{name}.argmax"][keep])


# ---------------------------------------------------------------------- autoencoder and soft VQ


def test_autoencoder_latents(published: OrthusForConditionalGeneration, latents: Tensor) -> None:
    expected = golden("01_vq_encode")
    assert_near(latents[:, expected["rows"]], expected["latents"], 5e-4)


def test_decoded_pixels(published: OrthusForConditionalGeneration, latents: Tensor) -> None:
    pixels = published.decode_image_latents(latents[:1])
    assert_near(pixels[..., ::4, ::4], golden("07_decode")["pixel_values"], 1e-4)


@pytest.mark.parametrize("scale", ["encoder", "generated"])
def test_soft_vq(published: OrthusForConditionalGeneration, scale: str) -> None:
    item = golden("02_soft_vq")
    embeddings = published.latent_embedding(item[f"latents_{scale}"][None], published.code_embeddings())
    assert_near(embeddings[0], item[f"embeddings_{scale}"], 1e-2, rms=1e-3)


# ---------------------------------------------------------------------- backbone


def test_text_logits(published: OrthusForConditionalGeneration) -> None:
    item = golden("03_text")
    with torch.no_grad():
        assert_logits(published(item["input_ids"]).logits, item, "single")
        mask = item["batch_attention_mask"]
        logits = published(item["batch_input_ids"], attention_mask=mask).logits
    assert mask.min() == 0
    assert_logits(logits, item, "batch", mask)


def test_interleaved_hidden_and_logits(published: OrthusForConditionalGeneration, latents: Tensor) -> None:
    item = golden("04_interleaved")
    rows, chosen = item["rows"], item["sel"]
    with torch.no_grad():
        embeddings = published.embed_inputs(item["input_ids"], latents[:1])
        output = published(item["input_ids"], image_latents=latents[:1], output_hidden_states=True)
    assert_near(embeddings[:, rows], item["inputs_embeds"], 1e-2, rms=5e-4)
    assert_near(output.last_hidden_state[:, rows], item["last_hidden"], 1e-2, rms=5e-4)
    assert_near(torch.stack([hidden[0, chosen] for hidden in output.hidden_states]), item["layer_hidden"], 1e-2, rms=5e-4)
    assert_logits(output.logits[:, chosen], item, "sel", max_abs=1e-2)


def test_interleaved_batch_with_left_padding(published: OrthusForConditionalGeneration, latents: Tensor) -> None:
    item = golden("04_interleaved")
    mask = item["batch_attention_mask"]
    with torch.no_grad():
        hidden = published(
            item["batch_input_ids"], attention_mask=mask, image_latents=latents, skip_logits=True
        ).last_hidden_state
    kept = mask[:, item["rows"]].bool()
    assert mask.min() == 0
    assert_near(hidden[:, item["rows"]][kept], item["batch_last_hidden"][kept], 1e-2, rms=5e-4)


# ---------------------------------------------------------------------- diffusion head


def test_head_network_and_schedule(published: OrthusForConditionalGeneration) -> None:
    item, head = golden("05_head"), published.diffusion_head
    with torch.no_grad():
        assert_near(head(item["fwd_x"], item["fwd_t"], item["fwd_c"]), item["fwd_out"], 1e-5)
        assert_near(head.embed_times(item["fwd_t"]), item["fwd_time_embed"], 1e-5)
    assert_near(head.alphas_cumprod, item["alphas_cumprod"], 1e-6)
    assert torch.equal(head.sampler_steps(EXACT).times.long(), item["timesteps_100"])


PUBLISHED_SAMPLER: dict[str, Any] = {"solver": "ddim", "spacing": "trailing", "num_diffusion_steps": 100}


@pytest.mark.parametrize(
    ("expected", "num_streams", "options"),
    [
        ("latent_single", 1, {}),
        ("latent_cfg3", 2, {"guidance": 3.0}),
        ("latent_cfg5", 2, {"guidance": 5.0}),
        ("latent_cfg5_steps50", 2, {"guidance": 5.0, "num_diffusion_steps": 50}),
        ("latent_cfg5_steps20", 2, {"guidance": 5.0, "num_diffusion_steps": 20}),
        ("latent_edit", 3, {"guidance": 7.5, "image_guidance": 1.5}),
    ],
)
def test_head_sampling(
    published: OrthusForConditionalGeneration, expected: str, num_streams: int, options: dict[str, float]
) -> None:
    item = golden("05_head")
    cond, *others = item["z"][:num_streams].split(1)
    names = ["image_cond", "uncond"][-len(others) :] if others else []
    streams = dict(zip(names, others, strict=True))
    latent = published.diffusion_head.sample(cond, noise=item["noise"], **streams, **{**PUBLISHED_SAMPLER, **options})
    assert_near(latent, item[expected], 1e-3)


# ---------------------------------------------------------------------- training losses


def training_labels(name: str, input_ids: Tensor, image_token: int, num_latents: int) -> Tensor:
    """All latents are targets, but in editing only those of the second picture."""
    is_target = input_ids == image_token
    if name.endswith("edit"):
        is_target &= is_target.cumsum(1) > num_latents
    return input_ids.where(is_target, -100)


def training_noise(name: str, shape: tuple[int, int]) -> Tensor:
    """All draws at once, as the published `randn_like` makes them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(golden_settings(name)["noise_seed"])))


@pytest.mark.parametrize("name", TRAINING)
def test_training_loss_and_gradients(published: OrthusForConditionalGeneration, latents: Tensor, name: str) -> None:
    item, settings = golden(name), golden_settings(name)
    config, timesteps = published.config, item["timesteps"]
    noise = training_noise(name, (len(timesteps), latents.shape[-1]))
    labels = training_labels(name, item["input_ids"], config.image_token_id, config.num_latents)
    published.train()
    output = published(item["input_ids"], image_latents=latents, labels=labels, timesteps=timesteps, noise=noise)
    output.image_loss.backward()
    published.eval()
    gradients = {key: value.grad for key, value in published.named_parameters() if value.grad is not None}
    published.zero_grad()
    torch.testing.assert_close(output.image_loss, item["loss"][0], rtol=1e-5, atol=0)
    assert output.text_loss == 0
    norms = {our_name(key): norm for key, norm in json.loads(settings["gradient_norms"]).items()}
    found = {key: float(gradient.norm()) for key, gradient in gradients.items() if bool(gradient.any())}
    assert found == pytest.approx(norms, rel=1e-3)
    for key, expected in item.items():
        if key.startswith("grad."):
            actual = gradients[our_name(key.removeprefix("grad."))][: len(expected)]
            assert_near(actual, expected, float(expected.abs().max()) * 1e-3)


@pytest.mark.parametrize("name", TRAINING)
def test_training_pairs_and_text_logits(published: OrthusForConditionalGeneration, latents: Tensor, name: str) -> None:
    """The hidden states that condition the first latents, what the head sees and predicts there, and the text logits."""
    item, config = golden(name), published.config
    labels = training_labels(name, item["input_ids"], config.image_token_id, config.num_latents)
    with torch.no_grad():
        output = published(item["input_ids"], image_latents=latents)
        cond = output.last_hidden_state[:, :-1][labels[:, 1:] != -100][: len(item["cond"])]
        times = item["timesteps"][: len(cond)]
        predicted = published.diffusion_head(item["noised"], times, item["cond"])
    assert_near(cond, item["cond"], 1e-2)
    assert_near(predicted, item["predicted"], 1e-4)
    first = (latents[1:] if name.endswith("edit") else latents).flatten(0, 1)[: len(cond)]
    noise = training_noise(name, (len(item["timesteps"]), latents.shape[-1]))[: len(cond)]
    alpha = published.diffusion_head.alphas_cumprod[times].unsqueeze(-1)
    noised = alpha.sqrt() * config.head_config.latent_scale * first + (1 - alpha).sqrt() * noise
    assert_near(noised, item["noised"], 1e-5)
    if "sel" in item:
        assert_logits(output.logits[:, item["sel"]], item, "sel", max_abs=1e-2)


# ---------------------------------------------------------------------- generation


def test_text_to_image_teacher_forced(published: OrthusForConditionalGeneration) -> None:
    """One forward over prompt and recorded latents gives the recorded conditions; the head gives the recorded latents."""
    item, settings, config = golden("08_t2i"), golden_settings("08_t2i"), published.config
    recorded, rows = item["image_latents"], item["rows"]
    noise = noise_per_latent(int(settings["noise_seed"]), config.num_latents, config.head_config.latent_dim)[0, 0]
    padded = torch.zeros(2, config.num_latents, config.head_config.latent_dim)
    padded[:, : len(recorded)] = recorded
    image = torch.tensor([config.boi_token_id] + [config.image_token_id] * config.num_latents).expand(2, -1)
    mask = torch.cat([item["attention_mask"], torch.ones_like(image)], dim=1)
    with torch.no_grad():
        output = published(torch.cat([item["input_ids"], image], 1), attention_mask=mask, image_latents=padded, skip_logits=True)
    cond = output.last_hidden_state[:, item["input_ids"].shape[1] :][:, rows].transpose(0, 1)
    assert_near(cond, item["cond"], 3e-2, rms=2e-3)
    drawn = published.diffusion_head.sample(
        item["cond"][:, 0], uncond=item["cond"][:, 1], guidance=float(settings["guidance"]), noise=noise[rows],
        **PUBLISHED_SAMPLER,
    )  # fmt: skip
    assert_near(drawn, recorded[rows], 1e-3)


@pytest.mark.slow
def test_text_to_image_free_running(published: OrthusForConditionalGeneration) -> None:
    """A whole image, 100 diffusion steps per latent."""
    item, settings, config = golden("08_t2i"), golden_settings("08_t2i"), published.config
    ids, mask = item["input_ids"], item["attention_mask"]
    output = published.generate(
        ids[:1],
        attention_mask=mask[:1],
        modality="image",
        guidance=float(settings["guidance"]),
        negative_input_ids=ids[1:],
        negative_attention_mask=mask[1:],
        **{**PUBLISHED_SAMPLER, "num_diffusion_steps": int(settings["num_diffusion_steps"])},
        noise=noise_per_latent(int(settings["noise_seed"]), config.num_latents, config.head_config.latent_dim),
    )
    drawn = output.image_latents[0][0]
    assert_near(drawn[: len(item["image_latents"])], item["image_latents"], 5e-2, rms=5e-4)
    assert_near(drawn[-len(item["last_latents"]) :], item["last_latents"], 5e-2, rms=5e-4)
    assert_near(output.pixel_values[0][..., ::4, ::4], item["pixel_values"], 1e-3)


@pytest.mark.parametrize("name", ["09_interleave_nocfg", "09b_interleave_cfg3"])
def test_interleaved_generation(published: OrthusForConditionalGeneration, name: str) -> None:
    """Free running: text, a whole image, text; 10 diffusion steps per latent."""
    item, settings, config = golden(name), golden_settings(name), published.config
    output = published.generate(
        item["input_ids"],
        modality="interleaved",
        guidance=float(settings["guidance"]),
        negative_input_ids=item.get("uncond_input_ids"),
        **{**PUBLISHED_SAMPLER, "num_diffusion_steps": int(settings["num_diffusion_steps"])},
        max_new_tokens=int(settings["max_new_tokens"]),
        max_images=1,
        noise=noise_per_latent(int(settings["noise_seed"]), config.num_latents, config.head_config.latent_dim),
        decode=False,
    )
    assert output.sequences[0].tolist() == item["out_tokens"].tolist()
    assert len(output.image_latents[0]) == 1
    assert_near(output.image_latents[0][0][item["rows"]], item["image_latents"], 5e-2, rms=5e-4)


def test_understanding(published: OrthusForConditionalGeneration, latents: Tensor) -> None:
    item = golden("10_understanding")
    output = published.generate(item["input_ids"], image_latents=latents[:1], modality="text", max_new_tokens=20)
    assert output.sequences[0].tolist() == item["out_tokens"].tolist()
    assert output.sequences[0, -1] == published.config.separator_token_id


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["landscape", "portrait", "rgba"])
def test_image_processing(name: str) -> None:
    """At most one grey level from the published pixels (Pillow versions differ), and most of them equal."""
    item = golden("11_image_processing")
    picture = np.array(Image.open(FOLDER / f"11_{name}.png"))
    pixels = OrthusImageProcessor()(picture).pixel_values
    assert pixels.shape == (1, 3, 512, 512)
    levels = ((pixels + 1) / 0.0078)[..., ::4, ::4]
    difference = (levels - item[name]).abs()
    assert difference.max() < 1.01 and (difference < 0.01).float().mean() > 0.99
    assert_near(pixels[..., ::64, ::64], item[f"{name}_rows"], 1 / 127)


def test_image_postprocessing() -> None:
    item = golden("11_image_processing")
    picture = OrthusImageProcessor().postprocess(item["postprocess_in"])[0]
    difference = np.array(picture).astype(int) - item["postprocess_out"][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(difference).max() <= 1 and (difference == 0).mean() > 0.99
