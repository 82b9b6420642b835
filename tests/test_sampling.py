"""Fast ways of drawing latents against plain ones: look-ahead, chunks, packed weights, groups of rows, static cache, compiled."""

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from orthus import acceleration, backbone_rows, sampling
from orthus.backbone_rows import BackboneRows, Prompt
from orthus.diffusion_head import DiffusionHead
from orthus.sampling import LatentSampler, Sampling

BOI, EOI, SEP, IMG = 4, 5, 6, 7
PROMPTS = torch.tensor([[0, 10, SEP], [0, 11, SEP], [0, 10, SEP]])
UNCOND = torch.tensor([[0, 20, SEP]])


def plain_loop(head: DiffusionHead, options: Sampling, streams: Tensor, x: Tensor, guidance: float, share: float) -> Tensor:
    """One step after the other, everything computed anew."""
    steps, memory = head.sampler_steps(options), torch.zeros_like(x)
    low, high = options.guidance_interval
    unit = 1.0 if head.config.objective == "flow_matching" else 1000.0
    for time, row, kept in zip(steps.times, steps.state.tolist(), steps.memory.tolist(), strict=True):
        vs = [head(x, time.expand(len(x)), cond) for cond in streams]
        v = vs[0]
        if len(vs) > 1 and low <= float(time) / unit <= high:
            v = vs[1] + guidance * (vs[0] - vs[1])
            v = v * (share * vs[0].std(-1, keepdim=True) / v.std(-1, keepdim=True) + 1 - share)
        x, memory = (c[0] * x + c[1] * v + c[2] * memory for c in (row, kept))
    return x / head.config.latent_scale


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"num_diffusion_steps": 20},
        {"num_diffusion_steps": 20, "solver": "dpm++2m"},
        {"num_diffusion_steps": 9, "solver": "heun", "spacing": "log_snr"},
        {"num_diffusion_steps": 20, "guidance_interval": (0.2, 0.7), "guidance_rescale": 0.5},
    ],
)
@torch.no_grad()
def test_looking_ahead_equals_the_plain_loop(objective: str, num_rows: int, options: dict) -> None:
    head = tiny_model(head={"objective": objective, "latent_scale": 1.0}).diffusion_head
    streams, noise = torch.randn(2, num_rows, 32), torch.randn(num_rows, 3)
    sampler = LatentSampler(head, Sampling(**options))
    expected = plain_loop(head, sampler.sampling, streams, noise, 3.0, options.get("guidance_rescale", 0.0))
    torch.testing.assert_close(sampler.draw(streams, noise, 3.0), expected, atol=2e-5, rtol=1e-4)
    assert sampler.num_passes < options["num_diffusion_steps"], "nothing was looked ahead, so nothing is tested"


@torch.no_grad()
def test_looking_ahead_makes_a_step_each_pass_however_wrong_the_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny_model().diffusion_head
    streams, noise = torch.randn(1, 1, 32), torch.randn(1, 3)
    expected = LatentSampler(head, Sampling(num_diffusion_steps=10)).draw(streams, noise)
    monkeypatch.setattr(sampling, "LOOKAHEAD_TOLERANCE", -1.0)
    sampler = LatentSampler(head, Sampling(num_diffusion_steps=10))
    torch.testing.assert_close(sampler.draw(streams, noise), expected, atol=1e-4, rtol=1e-4)
    assert sampler.num_passes == 10


@torch.no_grad()
@pytest.mark.parametrize("share", [2, 10, 25])  # of 5 rows in 2 streams at 5 diffusion steps: a row, a step, two steps and a half
def test_rows_and_steps_in_chunks_equal_all_together(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny_model().diffusion_head
    streams, noise, guidance = torch.randn(2, 5, 32), torch.randn(5, 3), torch.rand(5, 1) * 4
    together = LatentSampler(head, Sampling()).draw(streams, noise, guidance)
    monkeypatch.setattr(sampling, "MAX_MODULATION_BYTES", share * head.modulation_dim * 4)
    torch.testing.assert_close(LatentSampler(head, Sampling()).draw(streams, noise, guidance), together, atol=1e-5, rtol=1e-4)


def test_step_schedules_fall_from_first_to_last_and_groups_equal_rows_alone() -> None:
    model = tiny_model()
    for schedule in ("linear", "cosine"):
        options = Sampling(num_diffusion_steps=50, step_schedule=schedule, last_diffusion_steps=5)
        numbers = [LatentSampler(model.diffusion_head, options).num_steps_at(place, 1024) for place in range(1024)]
        assert numbers[0] == 50 and numbers[-1] == 5 and numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 5
    noise = torch.randn(3, 1, 4, 3)
    options = {"modality": "image", "num_diffusion_steps": 8, "step_schedule": "linear", "last_diffusion_steps": 2}
    together = model.generate(PROMPTS, noise=noise, **options)
    constant = model.generate(PROMPTS, noise=noise, modality="image", num_diffusion_steps=8)
    assert not torch.allclose(together.image_latents[0], constant.image_latents[0])
    alone = model.generate(PROMPTS[1:2], noise=noise[1:2], **options)
    torch.testing.assert_close(together.image_latents[1], alone.image_latents[0], atol=2e-4, rtol=1e-3)


def test_guidance_schedule_ends_at_the_guidance() -> None:
    sampler = LatentSampler(tiny_model().diffusion_head, Sampling(guidance_schedule="linear"))
    assert [sampler.guidance_at(5.0, place, 4) for place in range(4)] == [2.0, 3.0, 4.0, 5.0]
    model, noise = tiny_model(), torch.randn(1, 1, 4, 3)
    options = {"modality": "image", "noise": noise, "guidance": 5.0, "negative_input_ids": UNCOND}
    rising = model.generate(PROMPTS[:1], guidance_schedule="linear", **options).image_latents[0][0]
    first = model.generate(PROMPTS[:1], **{**options, "guidance": 2.0}).image_latents[0][0]
    torch.testing.assert_close(rising[0], first[0], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(rising[1], first[1], atol=1e-2)


def test_exact_preset_is_the_published_sampler() -> None:
    model, noise = tiny_model(head={"num_diffusion_steps": 3, "solver": "dpm++2m"}), torch.randn(1, 1, 4, 3)
    options = {"modality": "image", "noise": noise}
    exact = model.generate(PROMPTS[:1], preset="exact", **options).image_latents[0]
    ddim = model.generate(PROMPTS[:1], solver="ddim", num_diffusion_steps=100, spacing="trailing", **options).image_latents[0]
    assert torch.equal(exact, ddim) and not torch.allclose(exact, model.generate(PROMPTS[:1], **options).image_latents[0])


def test_an_image_that_is_begun_goes_on_as_the_whole_one() -> None:
    model, noise = tiny_model(), torch.randn(3, 1, 4, 3)
    options = {"modality": "image", "noise": noise, "guidance": 3.0, "negative_input_ids": UNCOND}
    whole = model.generate(PROMPTS, **options)
    latents = torch.stack([images[0] for images in whole.image_latents])
    rest = model.generate(PROMPTS, image_prefix=latents[:, :3], **options)
    torch.testing.assert_close(torch.stack([images[0] for images in rest.image_latents]), latents, atol=2e-4, rtol=1e-3)
    assert torch.equal(rest.sequences, whole.sequences)


def test_equal_prompts_are_read_once() -> None:
    model = tiny_model()
    seen: list[int] = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: seen.append(len(output.last_hidden_state)))
    uncond = torch.tensor([[0, 20, SEP]]).repeat(3, 1)
    streams = [Prompt(PROMPTS, torch.ones_like(PROMPTS), None), Prompt(uncond, torch.ones_like(uncond), None)]
    with torch.no_grad():
        hidden = BackboneRows(model, streams, 8).read_prompts()
        alone = [model(row[None]).last_hidden_state[0, -1] for row in torch.cat([PROMPTS, uncond])]
    handle.remove()
    assert seen[0] == 3  # two different prompts and the unconditional one
    torch.testing.assert_close(hidden.flatten(0, 1), torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_prompts_that_differ_in_their_picture_only_are_both_read() -> None:
    model = tiny_model()
    ids = torch.tensor([[0, BOI, IMG, IMG, IMG, IMG, EOI, SEP]]).repeat(3, 1)
    latents = torch.randn(2, 4, 3)[[0, 1, 0]]
    with torch.no_grad():
        hidden = BackboneRows(model, [Prompt(ids, torch.ones_like(ids), latents)], 8).read_prompts()[0]
        alone = torch.cat([model(ids[:1], image_latents=latents[i : i + 1]).last_hidden_state[:, -1] for i in range(3)])
    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_equal_plain_ones_and_leave_no_trace(dtype: torch.dtype) -> None:
    layers = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False)).to(dtype)
    x = torch.randn(2, 3, 24, dtype=dtype)
    expected = layers(x)
    copy = acceleration.packed_copy(layers)
    assert isinstance(copy[0], acceleration.PackedLinear) and isinstance(layers[0], nn.Linear)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(copy(x), expected, atol=tolerance, rtol=tolerance)
    with acceleration.packed(layers):
        assert "forward" in layers[0].__dict__
        torch.testing.assert_close(layers(x), expected, atol=tolerance, rtol=tolerance)
    assert "forward" not in layers[0].__dict__ and torch.equal(layers(x), expected)


def test_weights_too_large_to_keep_twice_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Linear(24, 40))
    monkeypatch.setattr(acceleration, "MAX_PACKED_BYTES", 100)
    with acceleration.packed(layers):
        assert "forward" not in layers[0].__dict__


class Replaying:
    """Stands in for captured graphs where there is no GPU: runs the function, with the side effects of a capture."""

    def __init__(self) -> None:
        self.captured: dict = {}

    def capture(self, key, function, *arguments) -> None:
        for _ in range(4):
            function(*arguments)
        self.captured[key] = function

    def __call__(self, key, function, *arguments):
        if key not in self.captured:
            self.capture(key, function, *arguments)
        return self.captured[key](*arguments)


BACKBONES: dict[str, dict] = {
    "llama": {},
    "chameleon": {"vocabulary_map": {"<image>": 7}, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 8, "max_position_embeddings": 96, "num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.5, "max_position_embeddings": 96},
}


def draw_twice(monkeypatch: pytest.MonkeyPatch, way: str, family: str = "llama", **options) -> tuple[Tensor, Tensor]:
    """Latents of three rows and two images drawn plainly and in another way."""
    fields = {"model_type": family, **SIZES, **BACKBONES[family]}
    if family == "chameleon":
        fields["vq_config"] = {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 8, "embed_dim": 4}
    model, noise = tiny_model(**({} if family == "llama" else {"text_config": fields})), torch.randn(3, 2, 4, 3)
    options = {"max_images": 2, "noise": noise, "guidance": 3.0, "negative_input_ids": UNCOND, "solver": "ddim", **options}
    options = {"modality": "image", **options}
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    plain = model.generate(PROMPTS, mask, acceleration="none", **options)
    if way == "graph":
        standing_in(monkeypatch)
    fast = model.generate(PROMPTS, mask, acceleration=way, **options)
    return torch.stack(plain.image_latents), torch.stack(fast.image_latents)


@pytest.mark.parametrize("family", BACKBONES)
def test_static_cache_and_replayed_steps_equal_the_plain_loop(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_rows, "STATIC_BLOCK", 6)  # so that the cache grows, twice
    plain, fast = draw_twice(monkeypatch, "graph", family)
    torch.testing.assert_close(fast, plain, atol=2e-4, rtol=1e-3)


def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`acceleration="auto"` as on a GPU."""
    monkeypatch.setattr(acceleration, "Graphs", Replaying)
    monkeypatch.setattr(sampling, "Graphs", Replaying)
    monkeypatch.setattr(acceleration, "resolve", lambda asked, device: "graph")


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER_CACHES = {
    "sliding": {"model_type": "mistral", **SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32},
    "recurrent": {"model_type": "lfm2", **SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", OTHER_CACHES)
def test_backbones_with_other_caches_draw_without_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = tiny_model(text_config=OTHER_CACHES[kind]), torch.randn(2, 1, 4, 3)
    prompts, options = PROMPTS[:1].repeat(2, 1), {"modality": "image", "noise": noise, "solver": "ddim"}  # equal prompts too
    plain = torch.stack(model.generate(prompts, acceleration="none", **options).image_latents)
    alone = [model.generate(prompts[:1], **{**options, "noise": noise[i : i + 1]}).image_latents[0] for i in range(2)]
    torch.testing.assert_close(plain, torch.stack(alone), atol=2e-4, rtol=1e-3)
    standing_in(monkeypatch)
    torch.testing.assert_close(torch.stack(model.generate(prompts, **options).image_latents), plain, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{"modality": "interleaved", "max_new_tokens": 2}, {"modality": "image"}])
def test_calls_before_a_capture_have_room(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache is about to be full, or has just grown."""
    model = tiny_model()
    expected = model.generate(PROMPTS, acceleration="none", noise=torch.zeros(3, 1, 4, 3), **options)
    standing_in(monkeypatch)
    monkeypatch.setattr(backbone_rows, "STATIC_BLOCK", 1)
    found = model.generate(PROMPTS, noise=torch.zeros(3, 1, 4, 3), **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_autocast_and_watched_layers_run_unpacked() -> None:
    model, seen = tiny_model(), []
    handle = model.diffusion_head.blocks[0].mlp[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(PROMPTS, modality="image", num_diffusion_steps=2)
    handle.remove()
    assert seen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(model.generate(PROMPTS, modality="image", num_diffusion_steps=2).image_latents) == 3


def test_few_evaluations_are_spaced_evenly() -> None:
    """Where "log_snr" would cross all of the noise in one step; also at the end of a step schedule."""
    head = tiny_model(head={"solver": None, "num_diffusion_steps": None}).diffusion_head
    assert (head.config.solver, head.config.spacing, head.config.num_diffusion_steps) == ("dpm++2m", "log_snr", 20)
    assert head.resolve(Sampling(num_diffusion_steps=9)).spacing == "trailing"
    assert head.resolve(Sampling(num_diffusion_steps=9, spacing="log_snr")).spacing == "log_snr"
    assert head.resolve(Sampling("heun")).num_diffusion_steps == 50 and head.resolve(Sampling("ddim")).spacing == "trailing"
    sampler = LatentSampler(head, Sampling(step_schedule="linear", last_diffusion_steps=2))
    assert sampler.plan(2).times[0].equal(LatentSampler(head, Sampling("ddim", 2)).plan(2).times[0])
    even = head.sampler_steps(Sampling("ddim", 2)).times
    assert head.sampler_steps(Sampling(num_diffusion_steps=2)).times.equal(even)
    assert len(set(head.sampler_steps(Sampling(num_diffusion_steps=1000)).times.tolist())) == 1000


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = draw_twice(monkeypatch, "compile")
    torch.testing.assert_close(fast, plain, atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graph", "compile"])
def test_captured_equals_eager_on_a_gpu(way: str) -> None:
    model, noise = tiny_model().to("cuda"), torch.randn(3, 1, 4, 3)
    options = {"modality": "image", "noise": noise, "guidance": 3.0, "negative_input_ids": UNCOND.cuda()}
    plain = model.generate(PROMPTS.cuda(), acceleration="none", **options)
    fast = model.generate(PROMPTS.cuda(), acceleration=way, **options)
    torch.testing.assert_close(torch.stack(fast.image_latents), torch.stack(plain.image_latents), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceleration": "fast"}, "acceleration='fast' is not one of"),
        ({"acceleration": "graph"}, "needs a CUDA device"),
        ({"num_inference_steps": 9}, "num_inference_steps is num_diffusion_steps here"),
        ({"num_diffusion_steps": 10.0}, "must be a whole number of at least 1, got 10.0"),
        ({"guidance_interval": None}, "guidance_interval=None is no pair"),
        ({"preset": "quick"}, "preset='quick' is unknown"),
        ({"preset": "exact", "num_diffusion_steps": 5}, "preset='exact' sets num_diffusion_steps"),
        ({"step_schedule": "linear"}, "come together"),
        ({"last_diffusion_steps": 3}, "come together"),
        ({"spacing": "even"}, "spacing='even' is not one of trailing, log_snr"),
        ({"guidance_schedule": "up"}, "guidance_schedule='up'"),
        ({"guidance_rescale": 2.0}, r"guidance_rescale=2.0 is outside 0\.\.1"),
        ({"solver": "euler"}, "needs objective=flow_matching"),
        ({"num_diffusion_steps": 2000}, r"must lie in 1\.\.1000"),
        ({"image_prefix": torch.zeros(1, 2, 5)}, r"image_prefix has shape \(1, 2, 5\)"),
        ({"image_prefix": torch.zeros(1, 4, 3)}, "holds 4 latents of an image, expected 1 to 3"),
        ({"image_prefix": torch.zeros(1, 2, 3), "modality": "interleaved"}, "needs modality='image'"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(PROMPTS[:1], **{"modality": "image", **options})
