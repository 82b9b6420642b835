"""A pretrained language model as the backbone of a new Orthus: how it is loaded, how its vocabulary grows, and the proof that
a model built from it says what it said."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from orthus import loading
from orthus.configuration import reject_typos
from orthus.modeling import OrthusForConditionalGeneration

NUM_PROBE_TOKENS = 12
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative root mean square; lower precisions: the next
TOLERANCE_HALF = 5e-2
NOT_OF_A_BACKBONE = ("quantization_config", "architectures", "auto_map", "transformers_version", "_name_or_path")
LAYOUT = "a folder or hub name in the layout of transformers: config.json, *.safetensors and a tokenizer"


@dataclass(frozen=True)
class Backbone:
    """Decoder and LM head of a language model, and what it says to a few tokens.

    Args:
        tensors: `backbone.*` and, unless it is tied, `lm_head.*`, as in the state dict of an Orthus.
        tables: which of them have a row per token: embeddings first.
        input_ids, logits: `(1, T)` and `(1, T, V)`.
    """

    name: str
    text_config: PreTrainedConfig
    tensors: dict[str, Tensor]
    tables: tuple[str, ...]
    input_ids: Tensor
    logits: Tensor

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings, of which a tokenizer may use fewer."""
        return len(self.tensors[self.tables[0]])

    def grown(self, num_rows: int, new_ids: Iterable[int]) -> dict[str, Tensor]:
        """The tensors with tables of `num_rows` rows. Those of `new_ids` and all after the old ones are drawn with the mean and
        the standard deviation of the rows in use, per channel."""
        inside = [token_id for token_id in new_ids if token_id < self.vocab_size]  # rows that no token used
        num_known = min([self.vocab_size, *inside])
        grown = {name: _grow(self.tensors[name], num_rows, num_known, inside) for name in self.tables}
        return {**self.tensors, **grown}


@torch.no_grad()
def _grow(table: Tensor, num_rows: int, num_known: int, new_rows: list[int]) -> Tensor:
    std, mean = torch.std_mean(table[:num_known].float(), dim=0)
    drawn = mean + std * torch.randn(num_rows - len(table) + len(new_rows), *table.shape[1:])
    grown = torch.cat([table, drawn[len(new_rows) :].to(table.dtype)])
    grown[new_rows] = drawn[: len(new_rows)].to(table.dtype)
    return grown


# ---------------------------------------------------------------------- loading


def load_config(name: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """The config of a model; ValueError where there is none to be had, or no language model's."""
    folder = Path(name)
    if folder.is_dir() and gguf_file is None and not (folder / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
        raise ValueError(f"{name} holds no config.json but {found}; give {LAYOUT}, or --gguf-file")
    if gguf_file is not None and folder.is_dir() and not (folder / gguf_file).is_file():
        raise ValueError(f"{folder / gguf_file} does not exist; give the name of a GGUF file in {name}")
    try:
        config = AutoConfig.from_pretrained(name, gguf_file=gguf_file, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found("backbone", name, error) from error
    if config.model_type == "orthus":
        raise ValueError(f"{name} is an Orthus already; train it with train.posttrain, or build from its language model")
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}); give a decoder-only language model")
    return config


def load_tokenizer(name: str, gguf_file: str | None = None) -> Tokenizer:
    """The tokenizer of a language model; ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_found("tokenizer", name, error) from error


def load_backbone(name: str, gguf_file: str | None = None, dtype: torch.dtype | str = torch.float32) -> Backbone:
    """Decoder and LM head of a language model: a folder, a hub name, or a GGUF file in one of them, whose weights are unpacked.

    Of a model with further inputs the text decoder is taken. `dtype="auto"` keeps that of the files.

    Raises:
        ValueError: nothing there or no access, another layout, pickles, incomplete or quantised weights, no decoder-only language
            model, or one whose decoder or LM head does not fit a backbone's.
    """
    config = load_config(name, gguf_file)
    if gguf_file is None:
        loading.refuse_pickles(name)
        loading.refuse_missing_shards(name)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    options |= {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except SafetensorError as error:
        raise loading.damaged(error, name) from error
    except (OSError, ValueError, KeyError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{name} is of type {config.model_type!r}, which AutoModelForCausalLM does not load; "
                             "give a decoder-only language model") from error  # fmt: skip
        raise _not_found("backbone", name, error) from error
    except RuntimeError as error:
        raise ValueError(f"{name}: weights and config.json do not belong together: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} tensors, among them {', '.join(missing[:4])}; the files are incomplete")
    return take_apart(name, model)


@torch.no_grad()
def take_apart(name: str, model: Any) -> Backbone:
    """The parts of a language model that `transformers` has loaded; ValueError for parts that a backbone cannot have."""
    text_config = copy.deepcopy(model.config.get_text_config(decoder=True))
    decoder_class = MODEL_MAPPING.get(type(text_config), None)
    decoder = next((module for module in model.modules() if type(module) is decoder_class), None)
    if decoder is None:
        raise ValueError(f"{name}: {type(model).__name__} has no text decoder that AutoModel would build from its config")
    table, lm_head = decoder.get_input_embeddings(), model.get_output_embeddings()
    shape = (len(table.weight), text_config.hidden_size)
    if not isinstance(lm_head, nn.Linear) or tuple(table.weight.shape) != shape or tuple(lm_head.weight.shape) != shape:
        found = None if lm_head is None else tuple(lm_head.weight.shape)
        raise ValueError(f"{name}: embeddings {tuple(table.weight.shape)} and LM head {found}, expected {shape} for both")
    is_tied = lm_head.weight is table.weight
    tensors = {f"backbone.{key}": value for key, value in decoder.state_dict().items()}
    if not is_tied:
        tensors["lm_head.weight"] = lm_head.weight.detach()
    if lm_head.bias is not None:
        tensors["lm_head.bias"] = lm_head.bias.detach()
    packed = [key for key, value in tensors.items() if type(value) is not Tensor or not value.is_floating_point()]
    if packed:
        raise ValueError(f"{name} has quantised weights ({packed[0]}, ...); give the plain ones")
    embeddings = next(key for key, value in tensors.items() if value.data_ptr() == table.weight.data_ptr())
    text_config.vocab_size, text_config.tie_word_embeddings = len(table.weight), is_tied
    input_ids = (torch.arange(NUM_PROBE_TOKENS) * 7919 % max(len(table.weight) // 2, 1)).unsqueeze(0)
    logits = _logits(name, text_config.model_type, model, input_ids=input_ids, use_cache=False)
    tables = (embeddings, *(key for key in tensors if key.startswith("lm_head.")))
    return Backbone(name, _plain_config(text_config), tensors, tables, input_ids, logits)


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config without what belongs to a file rather than to a model, and without keys that Orthus would take for misspelt."""
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_OF_A_BACKBONE}
    for key in [key for key in fields if key != "model_type"]:
        try:
            reject_typos("text_config", config.model_type, {key: fields[key]})
        except ValueError:
            del fields[key]
    return AutoConfig.for_model(**fields)


def _not_found(what: str, name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"cannot load the {what} of {name!r}: {reason} | Give {LAYOUT}. A gated repository needs a login, "
                      "a machine without network a folder")  # fmt: skip


# ---------------------------------------------------------------------- proof


@torch.no_grad()
def check_same_text(model: OrthusForConditionalGeneration, backbone: Backbone, new_ids: Iterable[int]) -> float:
    """Compares the logits of the model for the old tokens with those that the language model gave, packed examples with single
    ones, and runs a picture; returns the relative root mean square of the first difference.

    Args:
        new_ids: tokens that were not the language model's.

    Raises:
        ValueError: when the family does something to embeddings, hidden states or logits that Orthus does not, lets packed
            examples see each other, or takes no embeddings but those of tokens.
    """
    ids, kept = backbone.input_ids, torch.ones(backbone.vocab_size, dtype=torch.bool)
    kept[[token_id for token_id in new_ids if token_id < len(kept)]] = False
    expected = backbone.logits[..., kept]
    tolerance = TOLERANCES.get(model.dtype, TOLERANCE_HALF)
    family = backbone.text_config.model_type
    alone = _logits(backbone.name, family, model, input_ids=ids, use_cache=False)
    error = _difference(alone[..., : len(kept)][..., kept], expected)
    if not error <= tolerance:
        raise ValueError(
            f"{backbone.name}: {family} models compute their logits in a way that Orthus does not follow (relative difference "
            f"{error:.2g}): something between input embeddings, decoder and LM head; choose another family"
        )
    positions = torch.arange(ids.shape[1]).repeat(2).unsqueeze(0)
    other = ids.flip(-1)
    both = torch.cat([other, ids], dim=-1)
    together = _logits(backbone.name, family, model, input_ids=both, position_ids=positions, use_cache=False)
    leak = _difference(together[:, ids.shape[1] :, : len(kept)][..., kept], expected)
    if not leak <= tolerance:
        raise ValueError(
            f"{backbone.name}: in {family} models examples that are packed into one row see each other (relative difference "
            f"{leak:.2g}), and training packs them; choose another family"
        )
    config = model.config
    latents = torch.zeros(1, config.num_latents, config.head_config.latent_dim, dtype=model.dtype)
    picture = torch.tensor([[config.boi_token_id, *[config.image_token_id] * config.num_latents]])
    _logits(backbone.name, family, model, input_ids=picture, image_latents=latents, use_cache=False)
    return error


def _logits(name: str, family: str, model: Any, **inputs: Any) -> Tensor:
    """`(1, T, V)` in fp32; ValueError in place of what a model raises that cannot be run in this way."""
    try:
        return model(**inputs).logits.float()
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: {family} models do not run as a backbone ({type(error).__name__}: {reason}); "
                         "choose another family") from error  # fmt: skip


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
