"""A tiny random model, built in memory, that every test of the interface shares."""

from typing import Any

import pytest
import torch

from orthus.autoencoder import PatchAutoencoderConfig
from orthus.configuration import OrthusConfig
from orthus.modeling import OrthusForConditionalGeneration

TEXT_TOKENS, NUM_CODES = 40, 24


def tiny_config(**changes: Any) -> OrthusConfig:
    """4 latents of 3 channels per 8 x 8 picture; ids 0..7 special, 8..39 text, 40..63 codes."""
    head = {"width": 16, "num_blocks": 2, "num_diffusion_steps": 5, "time_embed_dim": 8, "latent_dim": 3, "cond_dim": 32}
    fields: dict[str, Any] = {
        "text_config": {
            "model_type": "llama", "vocab_size": TEXT_TOKENS + NUM_CODES, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
        },
        "autoencoder_config": PatchAutoencoderConfig(image_size=8, patch_size=4, latent_dim=3, hidden_dim=16, num_layers=1),
        "head_config": {**head, **changes.pop("head", {})},
        "num_codes": NUM_CODES, "code_offset": TEXT_TOKENS, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "boi_token_id": 4, "eoi_token_id": 5, "separator_token_id": 6, "image_token_id": 7,
    }  # fmt: skip
    return OrthusConfig(**{**fields, **changes})


def tiny_model(**changes: Any) -> OrthusForConditionalGeneration:
    """Random weights, the zero-initialised ones included, so that every part has an effect."""
    torch.manual_seed(0)
    model = OrthusForConditionalGeneration(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> OrthusForConditionalGeneration:
    return tiny_model()
