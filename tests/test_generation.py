"""The decoding loop: cached = uncached, batch = one at a time, streams, limits, refusals."""

import pytest
import torch
from conftest import tiny_model

from orthus.modeling import OrthusForConditionalGeneration

BOI, EOI, SEP, IMG = 4, 5, 6, 7
PROMPTS = [[0, 10, SEP], [0, 11, 12, 13, BOI, IMG, IMG, IMG, IMG, EOI, 14, SEP], [0, 15, 16, SEP]]
LATENTS = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(3))


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def eager_to_draw(model: OrthusForConditionalGeneration, bonus: float) -> OrthusForConditionalGeneration:
    """A model whose begin-of-image and separator are likely enough to occur in random text."""
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[BOI] = hidden * bonus / hidden.norm() ** 2
    return model


def reference_image(model, prompt, uncond, guidance, noise):
    """No cache, one row: run the whole sequence again for every latent."""
    latents = torch.empty(0, 3)
    streams = [prompt] if uncond is None else [prompt, uncond]
    for k in range(4):
        conds = []
        for ids in streams:
            given = torch.cat([LATENTS[0] if IMG in ids else torch.empty(0, 3), latents])
            tokens = torch.tensor([ids + [BOI] + [IMG] * k])
            embedded = model.get_input_embeddings()(tokens)
            where = tokens == IMG
            if len(given):
                rows = model.latent_embedding(given.unsqueeze(0), model.code_embeddings())[0]
                embedded = embedded.masked_scatter(where.unsqueeze(-1), rows)
            conds.append(model.backbone(inputs_embeds=embedded).last_hidden_state[:, -1])
        options = {} if uncond is None else {"uncond": conds[1], "guidance": guidance}
        latent = model.diffusion_head.sample(conds[0], noise=noise[k : k + 1], num_diffusion_steps=5, **options)
        latents = torch.cat([latents, latent])
    return latents


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_batched_and_cached_equals_one_at_a_time_without_cache(objective: str, guidance: float) -> None:
    model = tiny_model(head={"objective": objective})
    ids, mask = left_padded(PROMPTS)
    noise = torch.randn(3, 1, 4, 3)
    negative = {} if guidance == 1 else {"negative_input_ids": torch.tensor([[0, 20, SEP]])}
    output = model.generate(ids, mask, image_latents=LATENTS, modality="image", guidance=guidance, noise=noise, **negative)
    for row, prompt in enumerate(PROMPTS):
        uncond = None if guidance == 1 else [0, 20, SEP]
        expected = reference_image(model, prompt, uncond, guidance, noise[row, 0])
        torch.testing.assert_close(output.image_latents[row][0], expected, atol=2e-4, rtol=1e-3)
        assert output.sequences[row].tolist() == [BOI, IMG, IMG, IMG, IMG, EOI]
    assert output.pixel_values[0].shape == (1, 3, 8, 8)


def reference_words(model, prompt, negative, guidance, steps):
    """No cache, one row: both prompts run again with all that was written, until begin-of-image."""
    written: list[int] = []
    while len(written) < steps and BOI not in written:
        given, uncond = (
            model.lm_head(model(torch.tensor([ids + written])).last_hidden_state[0, -1]).log_softmax(-1)
            for ids in (prompt, negative)
        )
        scores = uncond + guidance * (given - uncond)
        scores[[IMG, EOI, 1, 0, *range(model.config.code_offset, model.config.code_offset + model.config.num_codes)]] = -torch.inf
        written.append(int(scores.argmax()))
    return written


def test_guided_words_equal_two_streams_without_cache_and_leave_the_picture_alone() -> None:
    model, negative, noise = tiny_model(), [0, 20, SEP], torch.randn(2, 1, 4, 3)
    prompts = [PROMPTS[0], PROMPTS[2]]
    ids, mask = left_padded(prompts)
    options = {"negative_input_ids": torch.tensor([negative]), "max_images": 1, "max_new_tokens": 20, "force_image": True,
               "guidance": 3.0, "noise": noise}  # fmt: skip
    guided = model.generate(ids, mask, text_guidance=4.0, **options)
    assert guided.sequences.tolist() != model.generate(ids, mask, **options).sequences.tolist()
    for row, prompt in enumerate(prompts):
        tokens = guided.sequences[row].tolist()
        place = tokens.index(BOI)
        assert place > 0, "nothing was written before the picture, so nothing is tested"
        words = reference_words(model, prompt, negative, 4.0, place)
        assert words[:place] == tokens[:place]
        # The unconditional stream of the picture does not see the words.
        expected = reference_image(model, prompt + tokens[:place], negative, 3.0, noise[row, 0])
        torch.testing.assert_close(guided.image_latents[row][0], expected, atol=2e-4, rtol=1e-3)


def test_guided_words_need_the_unconditional_prompt() -> None:
    with pytest.raises(ValueError, match="negative_input_ids"):
        tiny_model().generate(torch.tensor([PROMPTS[0]]), text_guidance=2.0)


def test_interleaved_batch_equals_single_with_guidance() -> None:
    model = eager_to_draw(tiny_model(), 3.0)
    ids, mask = left_padded(PROMPTS)
    noise = torch.randn(3, 2, 4, 3)
    options = {"modality": "interleaved", "guidance": 2.0, "negative_input_ids": torch.tensor([[0, 20, SEP]]),
               "max_images": 2, "max_new_tokens": 24}  # fmt: skip
    together = model.generate(ids, mask, image_latents=LATENTS, noise=noise, **options)
    assert sum(len(images) for images in together.image_latents) >= 2
    for row, prompt in enumerate(PROMPTS):
        given = LATENTS if IMG in prompt else None
        alone = model.generate(torch.tensor([prompt]), image_latents=given, noise=noise[row : row + 1], **options)
        width = alone.sequences.shape[1]
        assert together.sequences[row, :width].tolist() == alone.sequences[0].tolist()
        torch.testing.assert_close(together.image_latents[row], alone.image_latents[0], atol=2e-4, rtol=1e-3)


def test_unconditional_stream_restarts_at_each_image() -> None:
    """The second image of a row depends on earlier ones through the full stream only."""
    model = tiny_model()
    prompt, noise = torch.tensor([PROMPTS[0]]), torch.randn(1, 2, 4, 3)
    negative = torch.tensor([[0, 20, SEP]])
    output = model.generate(prompt, modality="image", max_images=2, guidance=3.0, negative_input_ids=negative, noise=noise)
    first, second = output.image_latents[0]
    full = torch.tensor([[*PROMPTS[0], BOI, IMG, IMG, IMG, IMG, EOI, BOI]])
    cond = model(full, image_latents=first[None]).last_hidden_state[:, -1]
    uncond = model(torch.tensor([[0, 20, SEP, BOI]])).last_hidden_state[:, -1]
    expected = model.diffusion_head.sample(cond, uncond=uncond, guidance=3.0, noise=noise[0, 1, :1])
    torch.testing.assert_close(second[:1], expected, atol=2e-4, rtol=1e-3)


def test_three_stream_editing(model: OrthusForConditionalGeneration) -> None:
    prompt = torch.tensor([PROMPTS[1]])
    image_only, empty = torch.tensor([[0, BOI, IMG, IMG, IMG, IMG, EOI, SEP]]), torch.tensor([[0, 20, SEP]])
    noise = torch.randn(1, 1, 4, 3)
    output = model.generate(
        prompt, image_latents=LATENTS, modality="image", guidance=4.0, negative_input_ids=empty, image_guidance=1.5,
        image_negative_input_ids=image_only, noise=noise,
    )  # fmt: skip

    def hidden(ids: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        with_boi = torch.cat([ids, torch.tensor([[BOI]])], dim=1)
        return model(with_boi, image_latents=latents).last_hidden_state[:, -1]

    expected = model.diffusion_head.sample(
        hidden(prompt, LATENTS), uncond=hidden(empty, None), image_cond=hidden(image_only, LATENTS),
        guidance=4.0, image_guidance=1.5, noise=noise[:, 0, 0],
    )  # fmt: skip
    torch.testing.assert_close(output.image_latents[0][0, :1], expected, atol=2e-4, rtol=1e-3)


def test_limits_hold_and_images_are_never_cut() -> None:
    model = eager_to_draw(tiny_model(), 50.0)
    ids = torch.tensor([PROMPTS[0]])
    output = model.generate(ids, modality="interleaved", max_images=1, max_new_tokens=20)
    assert len(output.image_latents[0]) == 1 and output.sequences.shape[1] <= 20
    short = model.generate(ids, modality="interleaved", max_new_tokens=5)
    assert len(short.image_latents[0]) == 0 and (short.sequences != BOI).all()
    text = model.generate(ids, modality="text", max_new_tokens=8)
    assert not ({BOI, IMG} & set(text.sequences[0].tolist())) and len(text.image_latents[0]) == 0


def test_force_image() -> None:
    model = tiny_model()
    with torch.no_grad():  # a model that would stop at once
        hidden = model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[SEP] = hidden * 50 / hidden.norm() ** 2
    ids = torch.tensor([PROMPTS[0]])
    assert model.generate(ids, max_new_tokens=12).sequences.tolist() == [[SEP]]
    forced = model.generate(ids, max_new_tokens=12, force_image=True)
    assert forced.sequences[0, :6].tolist() == [BOI, IMG, IMG, IMG, IMG, EOI]


def test_force_image_also_when_the_text_never_ends() -> None:
    model = tiny_model()
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[10] = hidden * 50 / hidden.norm() ** 2
    forced = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, force_image=True)
    assert len(forced.image_latents[0]) == 1 and forced.sequences.shape[1] == 20


def test_generators_per_row_do_not_depend_on_the_batch(model: OrthusForConditionalGeneration) -> None:
    ids, mask = left_padded([PROMPTS[0], PROMPTS[2]])
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = model.generate(ids, mask, modality="image", generator=seeds)
    alone = model.generate(torch.tensor([PROMPTS[2]]), modality="image", generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together.image_latents[1], alone.image_latents[0], atol=2e-4, rtol=1e-3)


def test_refusals(model: OrthusForConditionalGeneration) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="modality='picture'"):
        model.generate(ids, modality="picture")
    with pytest.raises(ValueError, match="negative_input_ids"):
        model.generate(ids, modality="image", guidance=3.0)
    with pytest.raises(ValueError, match=r"expected \(num_rows"):
        model.generate(ids, modality="image", noise=torch.zeros(2, 1, 4, 3))
    with pytest.raises(ValueError, match="limit of 96"):
        model.generate(torch.full((1, 90), 10), modality="image", max_images=2)
    with pytest.raises(ValueError, match="solver='unipc'"):
        model.generate(ids, modality="image", solver="unipc")
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(torch.tensor([[0, 10, SEP, 1]]), torch.tensor([[1, 1, 1, 0]]), modality="text")
    with pytest.raises(ValueError, match=r"mask of input_ids has shape \(1, 5\)"):
        model.generate(ids, torch.ones(1, 5), modality="text")
    with pytest.raises(ValueError, match="at least one of each"):
        model.generate(torch.empty(1, 0, dtype=torch.long), modality="text")
    with pytest.raises(ValueError, match=r"expected \(num_rows"):
        model.generate(ids, modality="image", max_images=2, noise=torch.zeros(1, 1, 4, 3))
    with pytest.raises(ValueError, match="num_diffusion_steps must"):
        model.generate(ids, modality="image", num_diffusion_steps=0)
    with pytest.raises(ValueError, match="image_negative_input_ids"):
        model.generate(ids, modality="image", image_guidance=2.0)
