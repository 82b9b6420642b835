"""What an Orthus model is made of: a backbone, an autoencoder, a diffusion head and the ids that join them."""

import difflib
import os
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from orthus import remote_code
from orthus.conversion import config_from_published, is_published, read_tensor_shapes
from orthus.diffusion import CUSTOMARY, SOLVERS

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
LATENT_EMBEDDINGS = ("softmax", "argmin", "linear")
IGNORE_INDEX = -100  # a label that asks for nothing
OBJECTIVES = ("v_prediction", "flow_matching")


class DiffusionHeadConfig(PreTrainedConfig):
    """Configuration of the diffusion head (an AdaLN MLP that draws one image latent at a time).

    Args:
        latent_dim: channels `C` of a latent.
        cond_dim: width `D` of the backbone's hidden states that condition the head.
        width: width `W` of the residual blocks.
        num_blocks: number of residual blocks.
        objective: `"v_prediction"` (published: 1000 steps, scaled-linear betas rescaled to zero terminal SNR) or
            `"flow_matching"` (straight path from data to noise, velocity target).
        latent_scale: raw latents are multiplied by this before they are noised and divided by it after sampling.
        num_noise_draws: noise draws per latent in one training forward ("batch multiplier").
        num_train_timesteps, beta_start, beta_end: noise schedule of `"v_prediction"`.
        time_logit_mean, time_logit_std: training times of `"flow_matching"` are sigmoid(normal(mean, std)).
        num_diffusion_steps, solver, spacing: how latents are drawn by default; see [`orthus.sampling.Sampling`]. None:
            `"dpm++2m"` for `"v_prediction"`, `"ddim"` for `"flow_matching"`, and what is customary for the solver.
    """

    model_type = "orthus_diffusion_head"

    latent_dim: int = 256
    cond_dim: int = 4096
    width: int = 1536
    num_blocks: int = 3
    time_embed_dim: int = 256
    objective: Literal["v_prediction", "flow_matching"] = "v_prediction"
    latent_scale: float = 0.1
    num_noise_draws: int = 8
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    time_logit_mean: float = 0.0
    time_logit_std: float = 1.0
    num_diffusion_steps: int | None = None
    solver: str | None = None
    spacing: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        reject_unknown_keys(self, kwargs)
        require_choice("head_config.objective", self.objective, OBJECTIVES)
        self.solver = self.solver or ("ddim" if self.objective == "flow_matching" else "dpm++2m")
        require_choice("head_config.solver", self.solver, SOLVERS)
        spacing, num_steps = CUSTOMARY[self.solver]
        self.spacing, self.num_diffusion_steps = self.spacing or spacing, self.num_diffusion_steps or num_steps
        super().__post_init__(**kwargs)


class OrthusConfig(PreTrainedConfig):
    """Configuration of [`OrthusForConditionalGeneration`].

    Args:
        text_config: config of the backbone, any `transformers` decoder (a config object, or a dict with `model_type`).
        autoencoder_config: config of the autoencoder (a dict with the `model_type` of any in `autoencoder.py` or
            `foreign_autoencoders.py`).
        head_config: config of the diffusion head; `latent_dim` and `cond_dim` must fit the two above.
        latent_embedding: how latents enter the backbone: `"softmax"` (soft VQ, eq. 4), `"argmin"` (hard VQ) or
            `"linear"`; the last two are the paper's ablation.
        soft_vq_temperature: tau of eq. 4; towards 0 it becomes `"argmin"`.
        soft_vq_fp32_distances: compute distances in fp32 whatever the model's dtype (exact); False follows the
            published code, which computes them in the model's dtype.
        num_codes, code_offset: the codebook has `num_codes` centres, whose embeddings are rows
            `code_offset : code_offset + num_codes` of the input embeddings.
        use_latent_positions: add a learned embedding of the raster index to every embedded latent (not published).
        input_noise: upper end of the uniformly drawn strength of Gaussian noise on input latents in training, in
            units of the head's scaled latents (a guard against exposure bias; 0 = published).
        image_loss_weight: lambda of the training loss, text + lambda * image.
        lm_head_bias: the LM head has a bias (Phi and GPT-J bring one).
    """

    model_type = "orthus"
    sub_configs = {"text_config": AutoConfig, "autoencoder_config": AutoConfig, "head_config": DiffusionHeadConfig}

    text_config: Any = None  # a dict or a config at first, a config afterwards; so are the next two
    autoencoder_config: Any = None
    head_config: Any = None
    latent_embedding: Literal["softmax", "argmin", "linear"] = "softmax"
    soft_vq_temperature: float = 1.0
    soft_vq_fp32_distances: bool = True
    num_codes: int = 8192
    code_offset: int = 4
    use_latent_positions: bool = False
    input_noise: float = 0.0
    image_loss_weight: float = 100.0
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    boi_token_id: int = 8197
    eoi_token_id: int = 8196
    image_token_id: int = 8711
    separator_token_id: int = 8710
    vocabulary_map: dict | None = None
    initializer_range: float = 0.02
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        reject_unknown_keys(self, kwargs)
        require_choice("latent_embedding", self.latent_embedding, LATENT_EMBEDDINGS)
        if not self.soft_vq_temperature > 0:
            raise ValueError(f"soft_vq_temperature must be > 0, got {self.soft_vq_temperature}; use argmin for hard VQ")
        self.text_config = as_config("text_config", self.text_config, "llama")
        self.autoencoder_config = as_config("autoencoder_config", self.autoencoder_config, "orthus_patch_autoencoder")
        if self.head_config is None:
            self.head_config = {
                "latent_dim": self.autoencoder_config.latent_dim,
                "cond_dim": self.text_config.hidden_size,
            }
        if isinstance(self.head_config, dict):
            fields = {key: value for key, value in self.head_config.items() if key != "model_type"}
            self.head_config = DiffusionHeadConfig(**fields)
        for part in (self.text_config, self.autoencoder_config):
            part._name_or_path = ""  # where a part was loaded from is nobody's business later
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        self.check_parts()

    @classmethod
    def get_config_dict(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `transformers`; a published config is translated, with what it omits read off the weight files."""
        hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        subfolder = options.get("subfolder", "")
        fields, rest = super().get_config_dict(pretrained_model_name_or_path, **options)
        if is_published(fields):
            fields = config_from_published(fields, read_tensor_shapes(pretrained_model_name_or_path, subfolder, **hub))
        return fields, rest

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """From now on, what is saved holds our code too; see `remote_code.register`."""
        remote_code.register(cls, auto_class)

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """As in `transformers`, and next to `config.json` the code if it is registered; see `remote_code.follow`."""
        super().to_json_file(json_file_path, use_diff)
        remote_code.follow(json_file_path)

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end what a row writes: the separator, which closes a turn, and end-of-text."""
        return [self.separator_token_id, self.eos_token_id]

    @property
    def num_latents(self) -> int:
        """Latents per image (also the number of image placeholders in a prompt)."""
        return int(self.autoencoder_config.num_latents)

    def check_parts(self) -> None:
        """ValueError for parts that do not fit together."""
        text, autoencoder, head = self.text_config, self.autoencoder_config, self.head_config
        if head.latent_dim != autoencoder.latent_dim:
            raise ValueError(
                f"head_config.latent_dim={head.latent_dim} but the autoencoder makes latents of "
                f"{autoencoder.latent_dim} channels; set head_config.latent_dim={autoencoder.latent_dim}"
            )
        if head.cond_dim != text.hidden_size:
            raise ValueError(
                f"head_config.cond_dim={head.cond_dim} but the backbone's hidden size is {text.hidden_size}; "
                f"set head_config.cond_dim={text.hidden_size}"
            )
        if self.code_offset + self.num_codes > text.vocab_size:
            raise ValueError(
                f"code rows {self.code_offset}..{self.code_offset + self.num_codes - 1} lie outside the backbone's "
                f"vocabulary of {text.vocab_size}; enlarge text_config.vocab_size or lower num_codes"
            )


def as_config(name: str, value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    """A sub-config from a dict with `model_type` (or a config object, or None for the default type)."""
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    model_type = fields.pop("model_type", default_type)
    try:
        reject_typos(name, model_type, fields)
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        if "model identifier" not in str(error):
            raise
        raise ValueError(f"{name}.model_type={model_type!r} is no model type that transformers or orthus knows") from error


def reject_typos(name: str, model_type: str, fields: dict[str, Any]) -> None:
    """ValueError for a key that its model type does not have and that is nearly one it has; others are `transformers`' affair."""
    known = AutoConfig.for_model(model_type).to_dict()
    for key in fields:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            raise ValueError(f"unknown key {name}.{key}; did you mean {near[0]!r}?")


def require_patches(image_size: int, patch_size: int) -> None:
    """ValueError unless patches of this side tile a picture."""
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}; change one of them")


def require_noise(latent_noise: float) -> None:
    """ValueError for a negative strength of the training noise on latents."""
    if latent_noise < 0:
        raise ValueError(f"latent_noise={latent_noise} is negative; use 0 for none")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError with a suggestion unless `value` is one of `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}{hint}")


def reject_unknown_keys(config: PreTrainedConfig, extra: dict[str, Any]) -> None:
    """ValueError that suggests the nearest field for each key that neither the class nor `transformers` defines."""
    known = set(type(config).default_config_fields()) if hasattr(type(config), "default_config_fields") else set()
    known |= {field for cls in type(config).__mro__ for field in getattr(cls, "__annotations__", {})}
    passed_on = {"torch_dtype", "num_labels", "attn_implementation", "quantization_config", "auto_map", "use_cache"}
    for key in extra:
        if key.startswith("_") or key in known or key in passed_on or hasattr(type(config), key):
            continue
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown key {key!r} in {type(config).__name__}{hint}")
