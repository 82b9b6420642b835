"""Tiny random language models on disk, with the tokenizer habits of their families; all made here, nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from golden_files import image_code_names
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from orthus.autoencoder import PatchAutoencoder, PatchAutoencoderConfig, VQGANAutoencoder, VQGANAutoencoderConfig
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor

CORPUS = ["a photo of a red circle", "a photo of three blue stars and a heart  above a square", "two green rings, one moon"] * 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WORLD = WorldConfig(image_size=32)

# family -> model type, fields, names of special tokens that its tokenizers have
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("llama", {}, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "qwen3": ("qwen3", {"head_dim": 8}, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "gemma2": ("gemma2", {"head_dim": 8}, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "gemma3": ("gemma3_text", {"head_dim": 8}, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "smollm": (
        "llama", {"tie_word_embeddings": True}, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, {"eos_token": "<|end_of_text|>"}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, {}),
}  # fmt: skip
PADDED_ROWS = {"qwen3": 40, "gemma3": 3}  # of the embeddings, beyond the tokenizer


def byte_tokenizer(names: dict[str, str], more: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as most families have it; `more` are further special tokens, which take the first ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*(more or []), *names.values()]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def gemma_tokenizer(names: dict[str, str]) -> PreTrainedTokenizerFast:
    """SentencePiece-like: blanks are U+2581, unknown characters are bytes, runs of blanks are added tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*names.values(), "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    corpus = [*CORPUS, *["a  b    c"] * 20]  # two blanks are a piece of the vocabulary, too
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    stored = json.loads(backend.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(stored))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names)
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=False), AddedToken("\n\n", normalized=False)])
    return tokenizer


def write_backbone(folder: Path, family: str, **changes: Any) -> Path:
    """A random model of `family` with its tokenizer, in the layout of transformers."""
    torch.manual_seed(1)
    model_type, fields, names = FAMILIES[family]
    tokenizer = gemma_tokenizer(names) if family.startswith("gemma") else byte_tokenizer(names)
    if family == "qwen3":
        tokenizer.chat_template = "{{ messages }}"
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    missing = {name: None for name in ("bos_token_id", "pad_token_id", "eos_token_id") if name not in ids}
    vocab_size = len(tokenizer) + PADDED_ROWS.get(family, 0)
    sizes = {**SIZES, "vocab_size": vocab_size, "max_position_embeddings": 512, **missing, **ids, **fields, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    strengthen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def strengthen(model: torch.nn.Module) -> None:
    """Weights large enough that every part has an effect on the logits."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def write_patch_autoencoder(folder: Path, **changes: Any) -> Path:
    """16 latents of 6 channels per picture of 32 x 32."""
    torch.manual_seed(2)
    config = PatchAutoencoderConfig(
        **{"image_size": 32, "patch_size": 8, "latent_dim": 6, "hidden_dim": 16, "num_layers": 1, **changes}
    )
    PatchAutoencoder(config).save_pretrained(folder)
    return folder


VQ = {
    "embed_dim": 32, "num_embeddings": 24, "latent_channels": 32, "resolution": 32, "base_channels": 32,
    "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "attn_type": "none",
}  # fmt: skip


def write_chameleon(folder: Path, lacking: str = "", **changes: Any) -> Path:
    """A random Chameleon as transformers saves it, without image decoder: 64 latents per picture of 32 x 32, 24 codes, published
    names of tokens. `lacking` is left out of the vocabulary map."""
    torch.manual_seed(3)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = [*names.values(), *image_code_names(VQ["num_embeddings"]), "<eoss>", "<racm3:break>", "<reserved08706>", "<image>"]
    tokenizer = byte_tokenizer(names, more)
    vocabulary = {token: tokenizer.convert_tokens_to_ids(token) for token in more if token != lacking}
    config = ChameleonConfig(
        **{**SIZES, "num_key_value_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **changes},
        vocabulary_map=vocabulary, vq_config=VQ, bos_token_id=1, pad_token_id=1, eos_token_id=2,  # bos: the trap of the release
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    strengthen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    OrthusImageProcessor(size=32).save_pretrained(folder)
    return folder


def write_vqgan(folder: Path, like: Path | None = None) -> Path:
    """Our VQGAN autoencoder with an image decoder; with the encoder of the Chameleon `like`, or another one."""
    torch.manual_seed(4)
    autoencoder = VQGANAutoencoder(VQGANAutoencoderConfig(**VQ))
    strengthen(autoencoder)
    if like is not None:
        chameleon = ChameleonForConditionalGeneration.from_pretrained(like)
        autoencoder.encoder.load_state_dict(chameleon.model.vqmodel.encoder.state_dict())
        autoencoder.quant_conv.load_state_dict(chameleon.model.vqmodel.quant_conv.state_dict())
        autoencoder.quantizer_codebook.copy_(chameleon.model.vqmodel.quantize.embedding.weight)
    autoencoder.save_pretrained(folder)
    return folder


def write_pictures(folder: Path, number: int = 24) -> Path:
    """Noisy pictures of several sizes and formats, half of them one folder down."""
    generator = torch.Generator().manual_seed(5)
    (folder / "more").mkdir(parents=True)
    for index in range(number):
        coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
        ending = ("png", "jpg")[index % 2]
        picture = Image.fromarray(coarse).resize((40 + index, 48), Image.Resampling.NEAREST)
        picture.save(folder / ("more" if index % 3 else ".") / f"{index}.{ending}")
    return folder
