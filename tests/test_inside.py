"""What the demo shows of the inside is what the model computes: checked against its own embedding, forward and generate."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from demo.inside import Look, Microscope, attended, entropy_bits, words_of
from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.data.schema import Segment, Turn
from orthus.sampling import Sampling
from orthus.serving import Engine, Options

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"
PROMPT = "a photo of a red circle above two blue stars"
GUIDANCE, SAMPLING = 2.0, Sampling(guidance_interval=(0.0, 0.85))


@pytest.fixture(scope="module")
def model() -> OrthusForConditionalGeneration:
    return OrthusForConditionalGeneration.from_pretrained(str(CHECKPOINT)).eval()


@pytest.fixture(scope="module")
def processor() -> OrthusProcessor:
    return OrthusProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def microscope(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> Microscope:
    return Microscope(model, processor)


@pytest.fixture(scope="module")
def drawn(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> tuple[list[Turn], torch.Tensor]:
    """A conversation that ends with a picture, and the noise `(L, C)` from which it was drawn."""
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    asked = [Turn("user", (PROMPT,))]
    streams = processor.guidance_streams([asked], GUIDANCE, text_guidance=3.0)
    output = model.generate(
        **processor(turns=asked), **streams, noise=noise, max_images=1, force_image=True, guidance_interval=(0.0, 0.85)
    )
    segments: list[Segment] = processor.decode_segments(output)[0]
    return [*asked, Turn("assistant", tuple(segments))], noise[0, 0]


@pytest.fixture(scope="module")
def look(microscope: Microscope, drawn: tuple[list[Turn], torch.Tensor]) -> Look:
    return microscope.look(drawn[0])


def test_entropy_has_its_known_values() -> None:
    assert entropy_bits(torch.eye(4)).abs().max() < 1e-6
    assert torch.allclose(entropy_bits(torch.full((2, 512), 1 / 512)), torch.full((2,), 9.0))


def test_the_assignment_is_the_one_that_embeds(microscope: Microscope, look: Look) -> None:
    model = microscope.model
    assignment = microscope.assignment(look.latents)
    assert torch.allclose(assignment.sum(-1), torch.ones(16), atol=1e-5)
    embedded = model.embed_image_latents(look.latents[None])[0]
    positions = model.latent_embedding.positions
    mixed = assignment @ model.code_embeddings() + (0 if positions is None else positions)
    assert torch.allclose(mixed, embedded, atol=1e-5)


def test_the_pass_is_the_models_own(microscope: Microscope, drawn: tuple[list[Turn], torch.Tensor], look: Look) -> None:
    model, processor = microscope.model, microscope.processor
    ids = torch.tensor([processor.render(drawn[0]).input_ids])
    hidden = model(input_ids=ids, image_latents=look.latents[None]).last_hidden_state[0]
    assert torch.allclose(look.sources, hidden[look.first - 1 : look.first + 15], atol=1e-4)
    assert model.backbone.config._attn_implementation != "eager"
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.backbone.modules())


@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_trajectory_ends_at_the_latent_that_generate_drew(
    microscope: Microscope, drawn: tuple[list[Turn], torch.Tensor], look: Look, place: int
) -> None:
    noise = drawn[1][place]
    states = microscope.trajectory(look, place, noise, GUIDANCE, SAMPLING)
    scale = microscope.model.diffusion_head.config.latent_scale
    assert torch.allclose(states[0] * scale, noise) and len(states) == 21
    assert torch.allclose(states[-1], look.latents[place], atol=1e-3)


def test_patches_are_those_of_the_picture(microscope: Microscope, drawn: tuple[list[Turn], torch.Tensor], look: Look) -> None:
    picture = drawn[0][-1].segments[-1]
    (patch,) = microscope.patches(look, 6, look.latents[6:7])
    assert patch.tobytes() == picture.crop((32, 16, 48, 32)).tobytes()  # type: ignore[union-attr]


def test_attention_adds_up_and_sees_no_later_patch(look: Look) -> None:
    for layer in (None, 0, 5):
        found = attended(look, 5, layer)
        assert sum(found.words) + float(found.latents.sum()) + found.rest == pytest.approx(1.0, abs=1e-4)
        assert found.latents[5:].abs().max() == 0 and found.latents[:5].min() > 0


def test_words_stand_where_the_prompt_has_them(processor: OrthusProcessor, drawn: tuple[list[Turn], torch.Tensor]) -> None:
    words = words_of(processor, drawn[0])
    ids = processor.render(drawn[0]).input_ids
    assert words.texts[:10] == tuple(PROMPT.split()) and words.roles[9:11] == ("user", "assistant")
    for text, (start, end) in zip(words.texts, words.spans, strict=True):
        assert processor.tokenizer.decode(ids[start:end]).strip() == text


def test_looking_needs_a_picture_and_a_codebook(microscope: Microscope) -> None:
    with pytest.raises(ValueError, match="no picture"):
        microscope.look([Turn("user", (PROMPT,))])
    linear = tiny_model(latent_embedding="linear")
    with pytest.raises(ValueError, match="no codebook"):
        Microscope(linear, microscope.processor).assignment(torch.zeros(4, 3))


def test_a_serving_model_can_be_looked_into(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> None:
    from demo.views.inside import draws

    asked = [Turn("user", (PROMPT,))]
    options = Options(guidance=GUIDANCE, text_guidance=3.0, max_images=1, force_image=True, seed=3, guidance_interval=(0.0, 0.85))
    with Engine(model, processor) as engine:
        microscope = Microscope(model, processor)
        segments = engine.submit(asked, options).result(60).segments
        look = microscope.look([*asked, Turn("assistant", segments)])
        states = microscope.trajectory(look, 9, draws(3, look.latents)[9], GUIDANCE, options.sampling)
    assert torch.allclose(states[-1], look.latents[9], atol=1e-3)  # the noise is the one that the engine drew from
