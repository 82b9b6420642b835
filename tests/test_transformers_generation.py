"""What `generate` takes over from `transformers`: its text loop, its options, its caches; and what the two loops share."""

import pytest
import torch
from conftest import tiny_model
from test_generation import IMG, LATENTS, PROMPTS, SEP, eager_to_draw, left_padded
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.continuation import RandomChoice
from orthus.generation import OrthusGenerateOutput
from orthus.image_processing import load_image


class Recorder:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.latents: list[tuple[int, torch.Tensor]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def put_latents(self, rows: list[int], latents: torch.Tensor) -> None:
        self.latents += zip(rows, latents, strict=True)

    def end(self) -> None:
        self.has_ended = True


class StopAfter:
    """A stopping criterion: a row ends when it has so many ids."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def text(model, ids, mask, **options) -> OrthusGenerateOutput:
    return model.generate(ids, mask, image_latents=LATENTS, modality="text", max_new_tokens=9, **options)


def in_our_loop(model, ids, mask, **options) -> OrthusGenerateOutput:
    """The same text from the loop that may also draw, with drawing forbidden."""
    return model.generate(ids, mask, image_latents=LATENTS, modality="interleaved", max_images=0, max_new_tokens=9, **options)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01}])
def test_both_loops_write_the_same(sampled: dict) -> None:
    model = tiny_model()
    ids, mask = left_padded(PROMPTS)

    def seeds() -> dict:
        return {"generator": [torch.Generator().manual_seed(row) for row in range(3)]} if sampled else {}

    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), NoBadWordsLogitsProcessor([[20], [21, 22]])])
    for extra in ({}, {"logits_processor": processors}, {"stopping_criteria": StoppingCriteriaList([StopAfter(17)])}):
        one, other = (loop(model, ids, mask, **sampled, **seeds(), **extra) for loop in (text, in_our_loop))
        assert one.sequences.tolist() == other.sequences.tolist()
        assert [len(latents) for latents in one.image_latents] == [0, 0, 0]
    assert one.sequences.shape[1] == 17 - ids.shape[1]


def test_text_of_a_row_with_its_own_generator_does_not_depend_on_the_batch() -> None:
    model = tiny_model()
    ids, mask = left_padded(PROMPTS)
    seeds = [torch.Generator().manual_seed(row) for row in range(3)]
    together = text(model, ids, mask, do_sample=True, generator=seeds).sequences
    alone = model.generate(torch.tensor([PROMPTS[2]]), modality="text", max_new_tokens=9, do_sample=True,
                           generator=[torch.Generator().manual_seed(2)]).sequences  # fmt: skip
    assert together[2, : alone.shape[1]].tolist() == alone[0].tolist()
    assert together.tolist() != text(model, ids, mask).sequences.tolist()


def test_random_choice_draws_from_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20_000, -1)
    drawn = RandomChoice(torch.Generator().manual_seed(0))(torch.empty(0), scores).argmax(-1)
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, scores[0].softmax(-1), atol=0.012, rtol=0)  # three standard errors
    assert frequency[2] == 0


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_static_cache_writes_what_a_dynamic_one_writes(cache: str) -> None:
    model = tiny_model()
    ids, mask = left_padded(PROMPTS)
    expected = text(model, ids, mask).sequences.tolist()
    options = {} if cache == "dynamic" else {"disable_compile": True}
    assert text(model, ids, mask, cache_implementation=cache, **options).sequences.tolist() == expected
    assert text(model, ids, mask, use_cache=False).sequences.tolist() == expected


def test_beams_keep_the_pictures_of_their_row() -> None:
    model = tiny_model()
    rows = [PROMPTS[1], PROMPTS[0], [*PROMPTS[1][:-1], *PROMPTS[1][4:]]]
    latents = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    ids, mask = left_padded(rows)
    options = {"modality": "text", "max_new_tokens": 5, "num_beams": 3}
    together = model.generate(ids, mask, image_latents=latents, **options).sequences
    for row, given in ((0, latents[:1]), (2, latents[1:])):
        alone = model.generate(torch.tensor([rows[row]]), image_latents=given, **options).sequences[0].tolist()
        assert together[row, : len(alone)].tolist() == alone


def test_the_loop_of_transformers_runs_on_its_own() -> None:
    model = tiny_model()
    ids = torch.tensor([PROMPTS[1]])
    output = GenerationMixin.generate(model, ids, image_latents=LATENTS, max_new_tokens=4, do_sample=False)
    assert output.shape[0] == 1 and output[0, : ids.shape[1]].tolist() == PROMPTS[1]
    assert model.generation_config.eos_token_id == [SEP, 2]


def test_several_continuations_of_each_prompt() -> None:
    model = eager_to_draw(tiny_model(), 3.0)
    ids, mask = left_padded(PROMPTS)
    noise = torch.randn(6, 1, 4, 3)
    negative = torch.tensor([[0, 20, SEP], [0, 21, SEP], [0, 22, SEP]])
    options = {"modality": "image", "guidance": 2.0}
    output = model.generate(
        ids, mask, image_latents=LATENTS, noise=noise, num_return_sequences=2, negative_input_ids=negative, **options
    )
    assert len(output.image_latents) == 6
    for row in range(6):
        prompt, given = PROMPTS[row // 2], LATENTS if IMG in PROMPTS[row // 2] else None
        alone = model.generate(torch.tensor([prompt]), image_latents=given, noise=noise[row : row + 1],
                               negative_input_ids=negative[row // 2 : row // 2 + 1], **options)  # fmt: skip
        torch.testing.assert_close(output.image_latents[row], alone.image_latents[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("modality", ["text", "image", "interleaved"])
def test_a_streamer_hears_everything_in_order(modality: str) -> None:
    model, recorder = eager_to_draw(tiny_model(), 3.0), Recorder()
    ids, mask = left_padded(PROMPTS)
    options = {"max_new_tokens": 24, "max_images": 2} if modality == "interleaved" else {}
    output = model.generate(ids, mask, image_latents=LATENTS, modality=modality, streamer=recorder, **options)
    assert recorder.has_ended and recorder.puts[0] == ids.tolist()
    heard = torch.tensor(recorder.puts[1:]).T
    assert heard.tolist() == output.sequences.tolist()
    for row, latents in enumerate(output.image_latents):
        told = [latent for index, latent in recorder.latents if index == row]
        assert len(told) == 4 * len(latents)
        if told:
            assert torch.equal(torch.stack(told), latents.flatten(0, 1))


def test_pixels_stand_for_latents_that_are_unknown() -> None:
    model = tiny_model()
    ids, mask = left_padded([PROMPTS[1], PROMPTS[1]])
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.cat([torch.full((1, 4, 3), torch.nan), LATENTS])
    whole = torch.cat([model.get_image_latents(pixels), LATENTS])
    torch.testing.assert_close(model(ids, mask, pixels, known).logits, model(ids, mask, image_latents=whole).logits)
    with pytest.raises(ValueError, match="2 pictures but 1 of 2"):
        model(ids, mask, pixels.repeat(2, 1, 1, 1), known)


class Ruled:
    """A processor that wants token 20 in even rows of the batch, 21 in odd ones."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores) == 3
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 20 + row % 2] = 99.0 if input_ids[row, -1] != 20 + row % 2 else -99.0
        return scores


def test_processors_and_criteria_see_every_row_at_its_place() -> None:
    model = eager_to_draw(tiny_model(), 3.0)
    ids, mask = left_padded(PROMPTS)
    options = {"max_images": 1, "max_new_tokens": 12, "force_image": True, "logits_processor": [Ruled()]}
    output = model.generate(ids, mask, image_latents=LATENTS, **options)
    for row, tokens in enumerate(output.sequences.tolist()):
        assert 20 + row % 2 in tokens and 20 + (row + 1) % 2 not in tokens
    for modality, length in (("image", 3), ("interleaved", 2)):
        stopped = model.generate(ids, mask, image_latents=LATENTS, modality=modality, max_images=2,
                                 stopping_criteria=[StopAfter(ids.shape[1] + length)])  # fmt: skip
        assert stopped.sequences.shape[1] == length and all(len(latents) == 0 for latents in stopped.image_latents)


def test_options_of_transformers_count_in_text() -> None:
    model = tiny_model()
    ids, mask = left_padded(PROMPTS)
    options = {"image_latents": LATENTS, "modality": "text"}
    short = model.generate(ids, mask, generation_config=GenerationConfig(max_new_tokens=3), **options).sequences
    assert short.shape[1] == 3
    assert model.generate(ids, mask, max_length=ids.shape[1] + 4, **options).sequences.shape[1] == 4
    torch.manual_seed(0)
    drawn = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=9.0)
    assert model.generate(ids, mask, generation_config=drawn, **options).sequences.tolist() != short.tolist()
    beams = model.generate(ids, mask, num_beams=3, num_return_sequences=2, max_new_tokens=5, **options).sequences
    assert len(beams) == 6 and beams[0].tolist() != beams[1].tolist()
    with pytest.raises(ValueError, match="output_scores"):
        model.generate(ids, mask, output_scores=True, **options)


def test_a_window_that_would_lose_the_guidance_prompt_is_refused() -> None:
    text_config = {"model_type": "mistral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text_config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "sliding_window": 20}
    model, ids = tiny_model(text_config=text_config), torch.tensor([PROMPTS[0]])
    guided = {"guidance": 2.0, "negative_input_ids": torch.tensor([[0, 20, SEP]]), "modality": "image"}
    assert len(model.generate(ids, max_images=2, **guided).image_latents[0]) == 2
    with pytest.raises(ValueError, match="sliding window.*of 20"):
        model.generate(ids, max_images=3, **guided)
    assert len(model.generate(ids, modality="image", max_images=3).image_latents[0]) == 3


def test_refusals() -> None:
    model, ids = tiny_model(), torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match=r"num_beams.*modality='text'"):
        model.generate(ids, modality="interleaved", num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2.*do_sample"):
        model.generate(ids, modality="text", num_beams=2, do_sample=True)
    with pytest.raises(ValueError, match="num_return_sequences=0"):
        model.generate(ids, num_return_sequences=0)
    with pytest.raises(ValueError, match="max_new_tokens of at least 6"):
        model.generate(ids, force_image=True, max_new_tokens=5)
    with pytest.raises(ValueError, match="temprature"):
        model.generate(ids, modality="text", temprature=0.5)


def test_a_quantised_cache_answers_the_same() -> None:
    pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    model = OrthusForConditionalGeneration.from_pretrained("checkpoints/orthus-small").eval()
    processor = OrthusProcessor.from_pretrained("checkpoints/orthus-small")
    questions = ["Is there a red circle in the picture?", "Describe the picture."]
    picture = load_image("demo/example.png")
    inputs = processor(segments=[[picture, question] for question in questions])
    plain = model.generate(**inputs, modality="text", max_new_tokens=96)
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 8}
    stored = model.generate(**inputs, modality="text", max_new_tokens=96, cache_implementation="quantized", cache_config=settings)
    assert processor.decode_segments(stored) == processor.decode_segments(plain)


def test_prompt_lookup_writes_the_same_in_fewer_calls() -> None:
    """Speculative decoding of `transformers`: what was written before is guessed to come again."""
    folder = "checkpoints/orthus-small"
    model, processor = OrthusForConditionalGeneration.from_pretrained(folder).eval(), OrthusProcessor.from_pretrained(folder)
    prompt = processor(segments=[["a photo of two blue stars"]])
    picture = model.generate(**prompt, modality="image", generator=torch.manual_seed(0))
    inputs = processor(segments=[[*processor.decode_segments(picture)[0], "Describe the picture."]])
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    plain = model.generate(**inputs, modality="text").sequences
    num_plain = len(calls)
    assert torch.equal(model.generate(**inputs, modality="text", prompt_lookup_num_tokens=4).sequences, plain)
    assert len(calls) - num_plain < num_plain
