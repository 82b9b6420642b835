"""The serving engine: alone = beside others = `generate`; queue, limits, cancelling, failures, memory."""

import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from PIL import Image, ImageChops

from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.backbone_rows import BackboneRows, GrowingLayer, Prompt, lines_may_join
from orthus.data.schema import Turn
from orthus.decoding import DecodingLoop
from orthus.image_processing import latents_of
from orthus.processing import _encode_known, build_processor
from orthus.sampling import Sampling
from orthus.serving import Answer, Done, Engine, Job, Options, PromptTooLong, QueueFull, RequestFailed, TooManyRequests
from orthus.serving_queue import FairQueue, MovingMean, Rate
from orthus.serving_requests import MAX_PREVIEWS
from orthus.streaming import ImagePreview, TextPiece

CHECKPOINT = "checkpoints/orthus-small"
TEXT_TOKENS, NUM_CODES = 300, 24
WORDS = {"guidance_interval": (0.0, 0.85), "max_images": 1, "force_image": True, "num_diffusion_steps": 5}
Request = tuple[list[Turn], Options]


def served_model(**changes: Any) -> OrthusForConditionalGeneration:
    text_config = {**tiny_config().text_config.to_dict(), "vocab_size": TEXT_TOKENS + NUM_CODES, "max_position_embeddings": 256}
    return tiny_model(code_offset=TEXT_TOKENS, text_config={**text_config, **changes})


@pytest.fixture(scope="module")
def tiny() -> tuple[OrthusForConditionalGeneration, OrthusProcessor]:
    return served_model(), build_processor(["draw a red circle", "what is it"] * 20, TEXT_TOKENS, 8, 4, "Generate an image.")


@pytest.fixture(scope="module")
def small() -> tuple[OrthusForConditionalGeneration, OrthusProcessor]:
    return OrthusForConditionalGeneration.from_pretrained(CHECKPOINT).eval(), OrthusProcessor.from_pretrained(CHECKPOINT)


def user(*segments: Any) -> list[Turn]:
    return [Turn("user", segments)]


def requests_of_all_kinds(size: int) -> list[Request]:
    """Text, image, words first, an edit (three streams), several pictures, sampled words; few diffusion steps, for speed."""
    picture = Image.new("RGB", (size, size), "white")
    picture.paste((200, 20, 20), (0, 0, size // 2, size // 2))
    return [
        (user(picture, "Describe the picture."), Options(modality="text", max_new_tokens=24)),
        (user("a photo of a red circle"), Options(modality="image", guidance=2.0, num_diffusion_steps=5, seed=3)),
        (user("a photo of two blue stars"), Options(guidance=2.0, text_guidance=3.0, seed=4, **WORDS)),
        (user(picture, "make the circle green"), Options(guidance=2.0, image_guidance=1.0, seed=5, **WORDS)),
        (user("Draw a blue circle, then add a yellow heart, then describe the picture."),
         Options(guidance=2.0, force_image=True, max_images=2, max_new_tokens=90, num_diffusion_steps=4, seed=6)),
        (user("a photo of a ring"), Options(do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=40, seed=7, max_images=1)),
        (user("a pink moon"), Options(modality="image", num_diffusion_steps=5, solver="heun", max_images=2, seed=8)),
        (user("a photo of a cross"), Options(guidance=3.0, negative_prompt="a star", max_new_tokens=60, seed=9, **WORDS)),
    ]  # fmt: skip


def generated(model: OrthusForConditionalGeneration, processor: OrthusProcessor, request: Request) -> list[Any]:
    turns, options = request
    return processor.decode_segments(model.generate(**options.arguments(processor, turns)))[0]


def assert_same(processor: OrthusProcessor, given: Any, expected: Any) -> None:
    assert [type(part) is str for part in given] == [type(part) is str for part in expected]
    for part, other in zip(given, expected, strict=True):
        if isinstance(part, str):
            assert part == other
            continue
        latents, wanted = (latents_of(picture, processor._identity) for picture in (part, other))
        assert latents is not None and wanted is not None
        torch.testing.assert_close(latents, wanted, atol=2e-4, rtol=1e-3)
        assert max(high for _, high in ImageChops.difference(part, other).getextrema()) <= 1


@pytest.fixture(params=["tiny", pytest.param("small", id="shipped")])
def served(request: pytest.FixtureRequest) -> tuple[OrthusForConditionalGeneration, OrthusProcessor, int]:
    return *request.getfixturevalue(request.param), 8 if request.param == "tiny" else 64


def test_alone_and_beside_others_that_join_and_leave_is_what_generate_gives(served: Any) -> None:
    model, processor, size = served
    asked = requests_of_all_kinds(size)
    expected = [generated(model, processor, request) for request in asked]
    assert sum(isinstance(part, Image.Image) for row in expected for part in row) >= 6, "too little was drawn to test anything"
    with Engine(model, processor, max_rows=8) as engine:
        for request, segments in zip(asked, expected, strict=True):
            assert_same(processor, engine.submit(*request).result(60).segments, segments)
        filler = (user("something else, for a while"), Options(do_sample=True, max_new_tokens=150, modality="text", seed=1))
        jobs, fillers = [], []
        for request in asked:  # each joins when the one before it has begun, some beside one that is taken away
            fillers.append(engine.submit(*filler))
            jobs.append(engine.submit(*request))
            next(jobs[-1].events())
            fillers[-1].cancel()
        for job, segments in zip(jobs, expected, strict=True):
            answer = job.result(60)
            assert_same(processor, answer.segments, segments)
            assert answer.finish_reason in ("stop", "length") and answer.num_new_tokens > 0
    stats = engine.stats()
    assert stats.served + stats.cancelled == 3 * len(asked) and stats.failed == stats.running == stats.waiting == 0
    assert stats.latents_per_second > 0 and stats.tokens_per_second > 0


def test_events_add_up_to_the_answer(small: Any) -> None:
    with Engine(*small) as engine:
        job = engine.submit(user("a photo of a red circle"), Options(guidance=2.0, preview_every=5, **WORDS))
        events, again = list(job.events()), list(job.events())
    assert again == events and isinstance(events[-1], Done) and job.result() is events[-1].answer
    said, picture = job.result().segments
    assert "".join(event.text for event in events if isinstance(event, TextPiece)).strip() == said
    previews = [event for event in events if isinstance(event, ImagePreview)]
    assert [(event.num_drawn, event.is_final) for event in previews] == [(5, False), (10, False), (15, False), (16, True)]
    assert previews[-1].picture.tobytes() == picture.tobytes()
    assert job.result().finish_reason == "stop" and job.result().num_prompt_tokens > 3 and job.place() == 0 == job.estimate()


def test_no_answer_goes_to_somebody_else(tiny: Any) -> None:
    model, processor = tiny
    asked: list[Request] = []
    for number in range(32):
        kind = {"modality": "image", "guidance": 1.0 + number % 3} if number % 2 else {"do_sample": True, "modality": "text"}
        asked.append((user(f"draw {number} of them"), Options(**kind, max_new_tokens=5 + number, seed=number)))
    with Engine(model, processor, max_rows=7, max_waiting=32) as engine:
        jobs: list[Job | None] = [None] * len(asked)

        def submit(first: int) -> None:
            for number in range(first, len(asked), 4):
                jobs[number] = engine.submit(*asked[number], user=str(first) if number < 16 else "")

        threads = [threading.Thread(target=submit, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [job.result(60) for job in jobs if job is not None]
    assert len({repr(answer.segments[0]) for answer in answers}) == 32
    for request, answer in zip(asked, answers, strict=True):
        assert_same(processor, answer.segments, generated(model, processor, request))


def slow(model: OrthusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> list[int]:
    """Let every position take a while; how many lines the backbone was fed."""
    lines: list[int] = []
    forward = model.backbone.forward

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        lines.append(len(options["inputs_embeds"]))
        return forward(*args, **options)

    monkeypatch.setattr(model.backbone, "forward", slowly)
    return lines


DRAW = Options(modality="image", preview_every=1)
LONG = replace(DRAW, max_images=20)
LONG_TEXT = Options(modality="text", do_sample=True, max_new_tokens=60, seed=2)


def test_cancelling_frees_the_row_in_the_middle_of_a_picture(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = slow(tiny[0], monkeypatch)
    with Engine(*tiny, max_rows=1) as engine:
        first, second, third = (engine.submit(user("draw"), options) for options in (LONG, DRAW, DRAW))
        event = next(first.events())
        assert (second.place(), third.place()) == (1, 2) and third.estimate() is None
        assert isinstance(event, ImagePreview) and event.num_drawn == 1 and first.place() == 0
        third.cancel()
        assert third.result(0).finish_reason == "cancelled" and third.result().segments == () and third.place() == 0
        first.cancel()
        cancelled = first.result(5)
        fed = len(lines)
        assert cancelled.finish_reason == "cancelled" and cancelled.segments == () and 1 < cancelled.num_new_tokens < 8
        assert len(second.result(5).segments) == 1 and len(lines) < fed + 12
        assert second.result().seconds_waited > 0 and engine.stats().seconds_per_request is not None
        first.cancel()  # twice, and when it is over: nothing
        fourth, fifth = engine.submit(user("draw"), LONG), engine.submit(user("draw"), DRAW)
        next(fourth.events())
        estimates = fourth.estimate(), fifth.estimate()
        fourth.cancel()
        assert fifth.result(5).finish_reason == "stop"
    assert all(seconds is not None and seconds > 0 for seconds in estimates) and estimates[1] > estimates[0]  # type: ignore[operator]
    assert engine.stats().cancelled == 3 and engine.stats().served == 2


def test_queue_limits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny[0], monkeypatch)
    with Engine(*tiny, max_rows=1, max_waiting=2, max_per_user=2) as engine:
        jobs = [engine.submit(user("draw"), LONG, user="ann") for _ in range(2)]
        next(jobs[0].events())
        with pytest.raises(TooManyRequests, match="2 requests of this user") as refused:
            engine.submit(user("draw"), DRAW, user="ann")
        assert refused.value.retry_after >= 1
        jobs.append(engine.submit(user("draw"), DRAW, user="bob"))
        with pytest.raises(QueueFull, match="full: 1 requests are running and 2 waiting") as full:
            engine.submit(user("draw"), DRAW, user="cat")
        assert type(full.value) is QueueFull and full.value.retry_after >= 1
        for job in jobs:
            job.cancel()
        assert [job.result(5).finish_reason for job in jobs] == ["cancelled"] * 3
        assert engine.submit(user("draw"), DRAW, user="ann").result(5).finish_reason == "stop"


def test_close_and_time_limit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny[0], monkeypatch)
    engine = Engine(*tiny, max_rows=2)
    quick, long, waiting = (engine.submit(user("draw"), options) for options in (DRAW, LONG, DRAW))
    next(long.events())
    engine.close(0.5)
    assert quick.result(0).finish_reason == "stop" and waiting.result(0) == replace(waiting.result(), segments=(), seconds=0.0)
    assert (long.result(0).finish_reason, waiting.result(0).finish_reason) == ("shutdown", "shutdown")
    assert len(long.result().segments) >= 1, "pictures that were whole by then are lost"
    with pytest.raises(QueueFull, match="closed"):
        engine.submit(user("draw"), DRAW)
    engine.close()
    with Engine(*tiny, max_seconds=0.3) as late:
        answer = late.submit(user("draw"), LONG).result(5)
    assert answer.finish_reason == "timeout" and 0.3 <= answer.seconds < 2


def test_a_failure_concerns_its_own_request(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny
    encode, feed = model._resolve_latents, DecodingLoop.advance
    picture = Image.new("RGB", (8, 8), "red")
    with Engine(model, processor) as engine:
        monkeypatch.setattr(
            model, "_resolve_latents", lambda pixels, latents: 1 / 0 if pixels is not None else encode(None, None)
        )
        jobs = [engine.submit(user("draw"), DRAW), engine.submit(user(picture, "draw"), DRAW), engine.submit(user("dra"), DRAW)]
        with pytest.raises(RequestFailed, match="division by zero") as failed:
            jobs[1].result(5)
        assert isinstance(failed.value.__cause__, ZeroDivisionError)
        assert [len(jobs[place].result(5).segments) for place in (0, 2)] == [1, 1]
        with pytest.raises(RequestFailed):
            list(jobs[1].events())

        decode = model.decode_image_latents
        monkeypatch.setattr(model, "decode_image_latents", lambda latents: 1 / 0 if len(jobs) == 3 else decode(latents))
        with pytest.raises(RequestFailed, match="division by zero"):
            engine.submit(user("draw"), DRAW).result(5)
        jobs.clear()

        monkeypatch.setattr(DecodingLoop, "advance", lambda loop: 1 / 0)  # of all rows: nobody knows whose fault it is
        with pytest.raises(RequestFailed):
            engine.submit(user("draw"), DRAW).result(5)
        monkeypatch.setattr(DecodingLoop, "advance", feed)
        assert engine.submit(user("draw"), DRAW).result(5).finish_reason == "stop"
    assert engine.stats().failed == 3 and engine.stats().served == 3


@pytest.mark.parametrize("place", [0, 1])
def test_a_request_that_finds_no_memory_to_join_fails_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """`place`: the layer at which memory ends; the others have grown by then."""
    slow(tiny[0], monkeypatch)
    expected = generated(*tiny, (user("draw"), LONG_TEXT))
    joined, calls = GrowingLayer.joined, list[GrowingLayer]()

    def ends(layer: GrowingLayer, other: GrowingLayer) -> Any:
        calls.append(layer)
        if len(calls) == place + 1:
            raise MemoryError("no room")
        return joined(layer, other)

    with Engine(*tiny) as engine:
        first = engine.submit(user("draw"), LONG_TEXT)
        next(first.events())
        monkeypatch.setattr(GrowingLayer, "joined", ends)
        late = engine.submit(user("a much longer prompt that comes later"), DRAW)
        with pytest.raises(RequestFailed, match="no room"):
            late.result(5)
        third = engine.submit(user("draw"), DRAW)
        assert len(third.result(5).segments) == 1 and len(calls) > place + 1, "nothing joined after the failure"
        assert_same(tiny[1], first.result(5).segments, expected)
    assert (engine.stats().failed, engine.stats().served) == (1, 2)


def test_several_answers_are_taken_together_or_not_at_all(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = slow(tiny[0], monkeypatch)
    with Engine(*tiny, max_rows=1, max_waiting=3, max_per_user=3) as engine:
        with pytest.raises(ValueError, match="5 answers at once; at most 4"):
            engine.submit_all(user("draw"), [DRAW] * 5)
        with pytest.raises(ValueError, match="4 answers at once; at most 3"):
            engine.submit_all(user("draw"), [DRAW] * 4, "ann")
        engine.submit_all(user("draw"), [DRAW, replace(DRAW, seed=1)], "ann")[1].result(5)
        jobs = engine.submit_all(user("draw"), [LONG, LONG], "ann")
        next(jobs[0].events())
        with pytest.raises(TooManyRequests) as refused:
            engine.submit_all(user("draw"), [DRAW] * 2, "ann")
        with pytest.raises(QueueFull):
            engine.submit_all(user("draw"), [DRAW] * 3, "bob")
        assert engine.stats().running + engine.stats().waiting == 2 and lines
        estimates = [job.estimate() for job in jobs]
        for job in jobs:
            job.cancel()
    assert estimates[0] is not None and refused.value.retry_after == pytest.approx(max(1.0, estimates[0]), abs=1.0)


def test_who_asks_too_much_waits_for_requests_of_his_own(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(*tiny, max_per_user=2) as engine:
        left = {}
        monkeypatch.setattr(engine, "_estimate", lambda job: left[job.id])
        slow(tiny[0], monkeypatch)
        jobs = [engine.submit(user("draw"), LONG, name) for name in ("ann", "ann", "bob")]
        left |= dict(zip((job.id for job in jobs), (30.0, 20.0, 1.0), strict=True))
        for number, seconds in ((1, 20.0), (2, 30.0)):
            with pytest.raises(TooManyRequests) as refused:
                engine.submit_all(user("draw"), [DRAW] * number, "ann")
            assert refused.value.retry_after == seconds
        for job in jobs:
            job.cancel()


def test_a_long_prompt_is_refused_before_its_pictures_are_looked_at(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny[1], "_pictures", lambda pictures: 1 / 0)
    with Engine(*tiny) as engine, pytest.raises(PromptTooLong, match="exceed the backbone's limit of 256") as refused:
        engine.submit(user("draw " * 300, Image.new("RGB", (8, 8))))
    assert refused.value.length > 300 and refused.value.limit == 256


def test_what_users_write_is_not_kept(tiny: Any) -> None:
    _encode_known.cache_clear()
    with Engine(*tiny) as engine:
        engine.submit(user("my secret"), Options(guidance=2.0, max_new_tokens=1)).result(5)
    assert _encode_known.cache_info().currsize == 0
    tiny[1].render([Turn("user", ("training",)), Turn("assistant", ("data " * 99,))])
    assert _encode_known.cache_info().currsize == 1, "short texts of training are kept, long ones are not"


def test_memory_is_flat_over_many_requests(tiny: Any) -> None:
    model, processor = tiny
    columns: list[int] = []
    with Engine(model, processor, max_rows=8, max_waiting=600) as engine:

        def serve(number: int) -> int:
            """Serves them in a loop that is never empty, and counts the tensors that are left."""
            options = [Options(modality="text", max_new_tokens=1 + n % 4, seed=n) for n in range(number)]
            options = [replace(one, modality="image", guidance=2.0) if n % 25 == 0 else one for n, one in enumerate(options)]
            jobs = [engine.submit(user(f"{n % 7} circles"), one) for n, one in enumerate(options)]
            for job in jobs:
                job.result(60)
                backbone = engine._loop.backbone
                columns.append(0 if backbone is None else backbone.mask.shape[1])
            del jobs, job
            engine.submit(user("last"), Options(modality="text", max_new_tokens=1)).result(60)
            gc.collect()
            return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

        before = serve(50)
        assert serve(500) <= before + 10
    assert engine._loop.backbone is None and not engine._loop.members and engine.stats().served == 552
    assert max(columns) < 60, "columns that nobody sees are kept"


@pytest.mark.parametrize(
    "turns, options, message",
    [
        (user("draw " * 300), {}, "exceed the backbone's limit of 256"),
        (user("draw"), {"image_guidance": 2.0}, "image_guidance .* no picture"),
        ([Turn("assistant", ("draw",))], {}, "last turn is the assistant's"),
        ([], {}, "empty prompt"),
        (user("draw"), {"modality": "image", "max_images": 0}, "needs max_images of at least 1"),
        (user("draw"), {"num_diffusion_steps": 101}, "num_diffusion_steps=101; at most 100"),
        (user("draw"), {"solver": "euler"}, "needs objective=flow_matching"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(tiny: Any, turns: Any, options: dict, message: str) -> None:
    with Engine(*tiny) as engine, pytest.raises(ValueError, match=message):
        engine.submit(turns, Options(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"modality": "song"}, {"guidance": -1.0}, {"guidance": float("nan")}, {"text_guidance": 1e9}, {"image_guidance": -2.0},
        {"max_images": -1}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"preview_every": -1}, {"temperature": 0.0},
        {"temperature": 1e-40},
        {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"seed": 2**64}, {"seed": "1"},
        {"negative_prompt": " "}, {"solver": "unipc"}, {"num_diffusion_steps": 0}, {"guidance_interval": (0.5, 0.2)},
    ],
)  # fmt: skip
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Options(**options)


def test_generate_refuses_a_temperature_whose_scores_overflow(tiny: Any) -> None:
    with pytest.raises(ValueError, match="temperature=1e-40 is below 0.0001"):
        tiny[0].generate(torch.tensor([[1, 9]]), max_new_tokens=2, do_sample=True, temperature=1e-40)


@pytest.mark.parametrize(
    "limits", [{"max_diffusion_steps": 0}, {"max_rows": 0}, {"max_waiting": -1}, {"max_per_user": 0}, {"max_seconds": 0.0}]
)
def test_limits_of_the_engine_are_checked(tiny: Any, limits: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Engine(*tiny, **limits)


def test_sliding_windows_are_served_one_at_a_time(tiny: Any) -> None:
    window = {"model_type": "mistral", "sliding_window": 64}
    model = served_model(**window)
    asked = [(user("a circle"), Options(modality="image", seed=1)), (user("two"), Options(modality="text", max_new_tokens=9))]
    with pytest.warns(UserWarning, match="one at a time"), Engine(model, tiny[1]) as engine:
        jobs = [engine.submit(*request) for request in asked]
        for job, request in zip(jobs, asked, strict=True):
            assert_same(tiny[1], job.result(30).segments, generated(model, tiny[1], request))


@pytest.mark.parametrize(
    "changes, may",
    [({}, True), ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, True),
     ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
     ({"model_type": "mistral", "sliding_window": 64}, False)],
)  # fmt: skip
def test_which_backbones_let_requests_share_a_cache(changes: dict, may: bool) -> None:
    assert lines_may_join(served_model(**changes).config.text_config) == may


def test_lines_that_join_and_leave_see_what_they_would_see_alone(tiny: Any) -> None:
    """The backbone alone, with prompts of several lengths, against one that is fed everything at once."""
    model, _ = tiny
    prompts = [torch.randint(8, TEXT_TOKENS, (1, width), generator=torch.Generator().manual_seed(width)) for width in (3, 9, 5)]
    more = torch.randint(8, TEXT_TOKENS, (3, 12), generator=torch.Generator().manual_seed(0))
    lines = [BackboneRows(model, [Prompt(ids, torch.ones_like(ids), None)], 12) for ids in prompts]
    fed: list[list[int]] = [[], [], []]
    with torch.no_grad():
        for one in lines:
            one.read_prompts()
        shared, here = lines[0], [0]
        for position in range(9):
            if position in (2, 4):  # a longer prompt joins a shorter one, and the other way round
                here.append(position // 2)
                shared.join(lines[here[-1]])
            if position == 6:
                shared.keep([1, 2])
                here = here[1:]
                assert shared.num_columns == len(prompts[1][0]) + 4, "columns that only the first one saw are kept"
            ids = more[here, position]
            for line, token in zip(here, ids.tolist(), strict=True):
                fed[line].append(token)
            hidden = shared.feed(model.get_input_embeddings()(ids).unsqueeze(1), torch.ones(len(here), dtype=torch.long))
            for line, found in zip(here, hidden, strict=True):
                alone = model(torch.tensor([prompts[line][0].tolist() + fed[line]])).last_hidden_state[0, -1]
                torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_samplers_are_found_by_their_settings_whatever_holds_an_interval() -> None:
    assert hash(Sampling(guidance_interval=[0.0, 0.5])) == hash(Sampling(guidance_interval=(0.0, 0.5)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_sixteen_drawings_together_take_a_third_of_the_time_at_most(small: Any) -> None:
    asked = [(user(f"a photo of {n} stars"), Options(guidance=2.0, text_guidance=3.0, seed=n, max_images=1, force_image=True))
             for n in range(16)]  # fmt: skip
    with Engine(*small) as engine:
        seconds = []
        for together in (True, False, True):
            started = time.perf_counter()
            jobs = []
            for request in asked:
                jobs.append(engine.submit(*request))
                if not together:
                    jobs[-1].result()
            assert all(job.result().finish_reason == "stop" for job in jobs)
            seconds.append(time.perf_counter() - started)
    assert seconds[1] >= 3 * min(seconds[0], seconds[2])


def drain(queue: FairQueue[str]) -> Iterator[str]:
    while (item := queue.take()) is not None:
        yield item


def test_users_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    order = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [queue.place(lambda item, name=name: item == name) for name in order] == [1, 2, 3, 4, 5, 6]  # type: ignore[misc]
    assert queue.place(lambda item: item == "d1") == 0 and (len(queue), queue.items("a"), queue.items("d")) == (
        6,
        ("a1", "a2", "a3"),
        (),
    )
    assert queue.take() == "a1"
    assert [queue.place(lambda item, name=name: item == name) for name in order[1:]] == [1, 2, 3, 4, 5]  # type: ignore[misc]
    assert queue.remove(lambda item: item == "c1") == "c1" and queue.remove(lambda item: item == "c1") is None
    queue.put("d", "d1")
    assert list(drain(queue)) == ["b1", "a2", "d1", "b2", "a3"] and len(queue) == 0


def test_rates_and_means() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    for _ in range(50):
        now[0] += 0.1
        rate.add(2)
    assert rate.per_second() == pytest.approx(20, rel=0.05)
    now[0] += 600
    assert rate.per_second() < 0.01
    mean = MovingMean()
    assert mean.value is None
    for value in [1.0] + [3.0] * 40:
        mean.add(value)
    assert mean.value == pytest.approx(3.0, abs=0.01)


def test_a_job_keeps_few_previews_for_those_who_come_late() -> None:
    job = Job("", lambda job: 0, lambda job: None)
    picture = Image.new("RGB", (8, 8))
    live = job.events()
    heard = 0
    for number in range(3 * MAX_PREVIEWS):
        job.emit(TextPiece(0, str(number)))
        job.emit(ImagePreview(0, 0, number, False, picture))
        heard += isinstance(next(live), TextPiece) + isinstance(next(live), ImagePreview)
    job.emit(ImagePreview(0, 0, 4, True, picture))
    job.emit(Done(Answer((picture,), "stop", 1, 1, 0.0, 0.0)))
    assert heard == 6 * MAX_PREVIEWS and [type(event) for event in live] == [ImagePreview, Done]
    late = list(job.events())
    assert sum(isinstance(event, ImagePreview) for event in late) == MAX_PREVIEWS + 1 and isinstance(late[-1], Done)
    assert sum(isinstance(event, TextPiece) for event in late) == 3 * MAX_PREVIEWS


def test_a_result_that_is_not_there_yet(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny[0], monkeypatch)
    with Engine(*tiny) as engine:
        job = engine.submit(user("draw"), LONG)
        with pytest.raises(TimeoutError, match="not done after 0.01 s"):
            job.result(0.01)
        job.cancel()
        assert isinstance(job.result(5), Answer)
