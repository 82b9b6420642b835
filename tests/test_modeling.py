"""The model: losses as sums and counts, what feeds which head, packing, saving, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import LlamaConfig

from orthus.configuration import OrthusConfig
from orthus.modeling import OrthusForConditionalGeneration, needs_one_row
from orthus.text_head import TextHead

BOI, EOI, SEP, IMG = 4, 5, 6, 7
IMAGE = [BOI, IMG, IMG, IMG, IMG, EOI]
DRAW = [0, 10, 11, SEP, *IMAGE, SEP]  # text -> picture
READ = [0, *IMAGE, 12, SEP, 13, 14, SEP]  # picture, question -> answer


def labels_of(ids: list[int], start: int) -> list[int]:
    return [-100 if i < start or token == EOI else token for i, token in enumerate(ids)]


def packed_and_padded() -> tuple[dict, dict]:
    """The same two examples in one row (positions restart) and in two left-padded rows."""
    latents = torch.randn(2, 4, 3)
    labels = [labels_of(DRAW, 4), labels_of(READ, 9)]
    rows, width = [DRAW, READ], max(len(DRAW), len(READ))
    pads = [width - len(row) for row in rows]
    padded = {
        "input_ids": torch.tensor([[1] * pad + row for pad, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]),
        "labels": torch.tensor([[-100] * pad + row for pad, row in zip(pads, labels, strict=True)]),
        "image_latents": latents,
    }
    packed = {
        "input_ids": torch.tensor([DRAW + READ]),
        "position_ids": torch.tensor([[*range(len(DRAW)), *range(len(READ))]]),
        "labels": torch.tensor([labels[0] + labels[1]]),
        "image_latents": latents,
    }
    return packed, padded


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
@pytest.mark.parametrize("embedding", ["softmax", "argmin", "linear"])
def test_losses_have_counts_and_gradients(objective: str, embedding: str) -> None:
    model = tiny_model(latent_embedding=embedding, use_latent_positions=True, head={"objective": objective})
    packed, _ = packed_and_padded()
    output = model(**packed)
    assert output.loss_counts == {"text": 2 + 3, "image": 4} == model.count_targets(packed)
    expected = output.text_loss + model.config.image_loss_weight * output.image_loss
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.image_loss, output.loss_sums["image"] / 4)
    output.loss.backward()
    for part in ("backbone", "lm_head", "diffusion_head", "latent_embedding"):
        grads = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        assert embedding == "argmin" and part == "latent_embedding" or any(g.abs().sum() > 0 for g in grads), part


def test_cross_entropy_in_parts_is_the_same_and_holds_the_logits_of_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    head = TextHead(SimpleNamespace(hidden_size=8, vocab_size=50, final_logit_softcapping=3.0)).train()
    hidden, targets = torch.randn(70, 8, requires_grad=True), torch.randint(50, (70,))
    whole = head.cross_entropy(hidden, targets)
    expected = torch.autograd.grad(whole, (hidden, head.weight))
    largest = []
    monkeypatch.setattr("orthus.text_head.MAX_LOGIT_BYTES", 4 * 50 * 16)
    head.register_forward_hook(lambda module, given, logits: largest.append(len(logits)))
    parts = head.cross_entropy(hidden, targets)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, (hidden, head.weight)), expected)
    assert max(largest) == 16 and len(largest) == 2 * 5  # each part again in the backward


def test_packed_equals_padded(model: OrthusForConditionalGeneration) -> None:
    packed, padded = packed_and_padded()
    draws = {"timesteps": torch.randint(0, 1000, (4,)), "noise": torch.randn(4, 3)}
    one, two = model(**packed, **draws), model(**padded, **draws)
    torch.testing.assert_close(one.text_loss, two.text_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.image_loss, two.image_loss, atol=1e-5, rtol=1e-5)


def test_rows_laid_end_to_end_for_flash_attention_change_nothing(
    model: OrthusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = packed_and_padded()
    rows = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in packed.items()}
    draws = {"timesteps": torch.randint(0, 1000, (8,)), "noise": torch.randn(8, 3)}
    expected = model(**rows, **draws, output_hidden_states=True)
    monkeypatch.setattr("orthus.modeling.needs_one_row", lambda config: True)
    found = model(**rows, **draws, output_hidden_states=True)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert [states.shape for states in found.hidden_states] == [states.shape for states in expected.hidden_states]


def test_which_back_ends_need_one_row() -> None:
    config = LlamaConfig()
    for name in ("eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn3"):
        config._attn_implementation_internal = name
        assert needs_one_row(config) is ("flash" in name)


def test_a_latent_is_predicted_by_the_position_before_it(model: OrthusForConditionalGeneration) -> None:
    packed, _ = packed_and_padded()
    draws = {"timesteps": torch.randint(0, 1000, (4,)), "noise": torch.randn(4, 3)}
    output = model(**packed, **draws)
    start = packed["input_ids"][0].tolist().index(BOI)
    cond = output.last_hidden_state[0, start : start + 4]
    expected = model.diffusion_head.loss(cond, packed["image_latents"][0], **draws)
    torch.testing.assert_close(output.image_loss, expected)


def test_soft_vq_limits() -> None:
    latents = torch.randn(2, 4, 3)
    cold, hard = tiny_model(soft_vq_temperature=1e-6), tiny_model(latent_embedding="argmin")
    hard.load_state_dict(cold.state_dict())
    torch.testing.assert_close(cold.embed_image_latents(latents), hard.embed_image_latents(latents))
    soft = tiny_model()
    codebook, table = soft.latent_embedding.codebook, soft.code_embeddings()
    expected = torch.softmax(-(torch.cdist(latents.flatten(0, 1), codebook) ** 2), -1) @ table
    torch.testing.assert_close(soft.embed_image_latents(latents).flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


def test_save_and_load_is_exact(model: OrthusForConditionalGeneration, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded, report = OrthusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_cods": 3}, "num_codes"),
        ({"latent_embedding": "softmaks"}, "softmax"),
        ({"soft_vq_temperature": 0.0}, "soft_vq_temperature"),
        ({"code_offset": 60}, "num_codes"),
        ({"head": {"objective": "v_predictoin"}}, "v_prediction"),
        ({"head": {"latent_dim": 5}}, "latent_dim=3"),
        ({"head": {"widht": 5}}, "width"),
        ({"text_config": {"model_type": "lama"}}, "lama"),
    ],
)
def test_config_errors_name_the_value_and_the_remedy(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(**change)


def test_input_errors(model: OrthusForConditionalGeneration) -> None:
    ids = torch.tensor([DRAW])
    with pytest.raises(ValueError, match="1 images of 4.*0 images"):
        model(ids)
    with pytest.raises(ValueError, match=r"\(1, 4, 5\), expected \(N, 4, 3\)"):
        model(ids, image_latents=torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match=r"expected \(N, 3, 8, 8\)"):
        model(ids, pixel_values=torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="limit of 96"):
        model(torch.full((1, 97), 10))
    with pytest.raises(ValueError, match="not both"):
        model(ids, pixel_values=torch.zeros(1, 3, 8, 8), image_latents=torch.zeros(1, 4, 3))


def test_the_autoencoder_rests_after_loading_too(model: OrthusForConditionalGeneration, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = OrthusForConditionalGeneration.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name, p in loaded.named_parameters() if not p.requires_grad} == {"autoencoder"}


def test_config_round_trip(tmp_path) -> None:
    config = tiny_config(use_latent_positions=True, head={"objective": "flow_matching", "latent_scale": 0.5})
    config.save_pretrained(tmp_path)
    assert OrthusConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_packed_examples_do_not_see_each_other_without_labels(model: OrthusForConditionalGeneration) -> None:
    packed, _ = packed_and_padded()
    del packed["labels"]
    together = model(**packed).logits[0, len(DRAW) :]
    alone = model(torch.tensor([READ]), image_latents=packed["image_latents"][1:]).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_back_ends_agree(attention: str) -> None:
    reference, other = tiny_model(), tiny_model()
    reference.set_attn_implementation("eager")
    other.set_attn_implementation(attention)
    ids, latents = torch.tensor([READ]), torch.randn(1, 4, 3)
    with torch.no_grad():
        expected, found = (m(ids, image_latents=latents).logits for m in (reference, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_bf16_model_computes_distances_in_fp32() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert model.latent_embedding.log_weights(torch.randn(1, 4, 3)).dtype == torch.float32
    assert model.latent_embedding.log_weights(torch.randn(1, 4, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_arguments_in_the_order_of_the_interface(model: OrthusForConditionalGeneration) -> None:
    ids, pixels = torch.tensor([READ]), torch.rand(1, 3, 8, 8)
    output = model(ids, torch.ones_like(ids), pixels, None, torch.tensor([labels_of(READ, 9)]), True)
    assert output.loss is not None and len(output.hidden_states) == 3
    as_tuple = model(ids, pixel_values=pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == (1, len(READ), 64)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "qwen3", "gemma2", "stablelm"])
def test_any_decoder_tied_or_not(model_type: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}
    names = {"gpt2": {"n_positions": 64}, "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32}, "gemma2": {"head_dim": 8}}
    text = {"model_type": model_type, **sizes, "intermediate_size": 48, "eos_token_id": 2, "pad_token_id": 1}
    text |= {"num_key_value_heads": 4} if model_type in ("qwen3", "gemma2", "stablelm") else {}
    model = tiny_model(text_config={**text, **names.get(model_type, {})})
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    output = model.generate(torch.tensor([[0, 10, SEP]]), modality="image")
    assert output.image_latents[0].shape == (1, 4, 3)


def test_misspelt_keys_of_sub_configs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text_config\.num_hiden_layers.*num_hidden_layers"):
        tiny_config(text_config={"model_type": "llama", "num_hiden_layers": 3})
    with pytest.raises(ValueError, match=r"autoencoder_config\.patch_sise.*patch_size"):
        tiny_config(autoencoder_config={"model_type": "orthus_patch_autoencoder", "patch_sise": 4})


def test_an_image_cannot_straddle_rows(model: OrthusForConditionalGeneration) -> None:
    ids = torch.tensor([[0, BOI, IMG, IMG, IMG, EOI, SEP, 1], [0, BOI, IMG, IMG, IMG, IMG, IMG, EOI]])
    with pytest.raises(ValueError, match=r"\[3, 5\] image placeholders, not multiples of 4"):
        model(ids, image_latents=torch.zeros(2, 4, 3))


def test_a_saved_config_does_not_tell_where_its_parts_came_from(model: OrthusForConditionalGeneration, tmp_path) -> None:
    model.autoencoder.save_pretrained(tmp_path / "private" / "autoencoder")
    autoencoder = type(model.autoencoder).from_pretrained(tmp_path / "private" / "autoencoder")
    config = tiny_config(autoencoder_config=autoencoder.config)
    config.save_pretrained(tmp_path / "public")
    assert "private" not in (tmp_path / "public" / "config.json").read_text()
