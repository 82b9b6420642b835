"""Events while text and pictures form, and generated pictures in later turns."""

import copy
import time

import pytest
import torch
from PIL import Image

from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.data.schema import Turn
from orthus.streaming import Finished, ImagePreview, SegmentStreamer, TextPiece, stream

CHECKPOINT = "checkpoints/orthus-small"
PROMPTS = ["a photo of a red circle", "Draw a blue ring, a pink star, then add a brown diamond, then describe the picture."]


@pytest.fixture(scope="module")
def model() -> OrthusForConditionalGeneration:
    return OrthusForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor() -> OrthusProcessor:
    return OrthusProcessor.from_pretrained(CHECKPOINT)


def request(processor: OrthusProcessor, prompts: list[str]) -> dict:
    inputs = processor(turns=[[Turn("user", (prompt,))] for prompt in prompts])
    return {**inputs, "max_images": 2, "num_diffusion_steps": 3,
            "generator": [torch.Generator().manual_seed(row) for row in range(len(prompts))]}  # fmt: skip


def test_events_add_up_to_the_segments(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> None:
    events = list(stream(model, processor, preview_every=6, **request(processor, PROMPTS)))
    assert isinstance(events[-1], Finished) and sum(isinstance(event, Finished) for event in events) == 1
    expected = processor.decode_segments(model.generate(**request(processor, PROMPTS)))
    assert sum(isinstance(segment, Image.Image) for segment in expected[1]) == 2, "the story drew too little to test anything"
    for row, segments in enumerate(expected):
        heard: list = [""]
        for event in events:
            if isinstance(event, TextPiece) and event.row == row:
                heard[-1] += event.text
            elif isinstance(event, ImagePreview) and event.row == row and event.is_final:
                heard += [event.picture, ""]
        heard = [part.strip() if isinstance(part, str) else part for part in heard]
        heard = [part for part in heard if part != ""]
        assert len(heard) == len(segments)
        for part, segment in zip(heard, segments, strict=True):
            assert part == segment if isinstance(segment, str) else part.tobytes() == segment.tobytes()
    previews = [event for event in events if isinstance(event, ImagePreview) and event.row == 0]
    assert [(event.num_drawn, event.is_final) for event in previews] == [(6, False), (12, False), (16, True)]
    first, last = previews[0].picture, previews[-1].picture
    assert first.crop((0, 0, 64, 16)).tobytes() == last.crop((0, 0, 64, 16)).tobytes()  # four patches of the first row are drawn
    assert set(first.crop((0, 32, 64, 64)).getdata()) == {(128, 128, 128)}  # of the last rows nothing is


def test_errors_and_early_ends_reach_the_other_thread(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> None:
    with pytest.raises(ValueError, match="modality='song'"):
        list(stream(model, processor, modality="song", **request(processor, PROMPTS[:1])))
    with pytest.raises(ValueError, match="preview_every=-1"):
        list(stream(model, processor, preview_every=-1, **request(processor, PROMPTS[:1])))
    events = stream(model, processor, **request(processor, PROMPTS))
    assert isinstance(next(events), TextPiece)
    started = time.perf_counter()
    events.close()  # type: ignore[attr-defined]  # a generator
    assert time.perf_counter() - started < 2


def test_a_generated_picture_in_a_later_turn_is_not_encoded_again(
    model: OrthusForConditionalGeneration, processor: OrthusProcessor
) -> None:
    output = model.generate(**request(processor, PROMPTS[:1]))
    segments = processor.decode_segments(output)[0]
    picture = next(segment for segment in segments if isinstance(segment, Image.Image))
    chat = [Turn("user", (PROMPTS[0],)), Turn("assistant", tuple(segments)), Turn("user", ("Describe the picture.",))]
    inputs = processor(turns=chat)
    assert "pixel_values" not in inputs
    torch.testing.assert_close(inputs["image_latents"], output.image_latents[0], atol=0, rtol=0)
    # What follows is what follows when the conversation is simply continued.
    written = output.sequences[0][: int((output.sequences[0] != model.config.pad_token_id).sum())]
    rest = processor(turns=[chat[2]])["input_ids"][0, 1:]
    first = processor(turns=[chat[0]])["input_ids"][0]
    assert inputs["input_ids"][0].tolist() == [*first.tolist(), *written.tolist(), *rest.tolist()]
    repeated = processor.decode_segments(model.generate(**request(processor, PROMPTS[:1])))[0]
    again = next(segment for segment in repeated if isinstance(segment, Image.Image))
    assert picture == again and picture == copy.deepcopy(picture) and picture in [again]
    changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    outside = Image.new("RGB", (64, 64), "white")
    for other in (changed, outside, picture.resize((80, 80)), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        assert "image_latents" not in processor(segments=[other, "Describe the picture."])
    assert "image_latents" not in OrthusProcessor.from_pretrained(CHECKPOINT)(segments=[picture, "What is it?"])
    mixed = processor(turns=[[Turn("user", (outside, "Describe the picture."))], chat])
    assert mixed["pixel_values"].shape[0] == 1 and mixed["image_latents"].isnan().flatten(1).all(-1).tolist() == [True, False]
    answers = model.generate(**mixed, modality="text", max_new_tokens=12).sequences
    alone = model.generate(**inputs, modality="text", max_new_tokens=12).sequences[0]
    assert answers[1, : len(alone)].tolist() == alone.tolist()
    edit = [*chat[:2], Turn("user", ("change red to blue",))]
    streams = processor.guidance_streams([edit], 2.0, image_guidance=1.0)
    edited = model.generate(**processor(turns=edit), **streams, max_images=1, force_image=True, num_diffusion_steps=2)
    assert len(edited.image_latents[0]) == 1


def test_a_streamer_can_be_used_again(model: OrthusForConditionalGeneration, processor: OrthusProcessor) -> None:
    events: list = []
    streamer = SegmentStreamer(model, processor, events.append)
    for _ in range(2):
        model.generate(streamer=streamer, **request(processor, PROMPTS[:1]))
    assert len(events) % 2 == 0 and [type(e) for e in events[: len(events) // 2]] == [type(e) for e in events[len(events) // 2 :]]


def test_an_image_that_is_begun_streams_from_its_beginning(
    model: OrthusForConditionalGeneration, processor: OrthusProcessor
) -> None:
    options = {**request(processor, PROMPTS[:1]), "modality": "image", "max_images": 1}
    whole = model.generate(**options)
    options["generator"] = [torch.Generator().manual_seed(5)]
    events = list(stream(model, processor, preview_every=2, image_prefix=whole.image_latents[0][:, :3], **options))
    previews = [event for event in events if isinstance(event, ImagePreview)]
    assert [event.num_drawn for event in previews] == list(range(2, 17, 2)) and previews[-1].is_final
    assert isinstance(events[-1], Finished) and torch.equal(events[-1].output.sequences, whole.sequences)
    assert torch.equal(events[-1].output.image_latents[0][:, :3], whole.image_latents[0][:, :3])
