"""Orthus: one autoregressive transformer over text tokens and continuous image latents (arXiv 2412.00127)."""

from orthus.autoencoder_loading import load_autoencoder
from orthus.configuration import DiffusionHeadConfig, OrthusConfig
from orthus.generation import OrthusGenerateOutput
from orthus.image_processing import OrthusImageProcessor
from orthus.modeling import OrthusForConditionalGeneration, OrthusOutput
from orthus.processing import OrthusProcessor

__version__ = "0.1.0"
__all__ = [
    "DiffusionHeadConfig",
    "OrthusConfig",
    "OrthusForConditionalGeneration",
    "OrthusGenerateOutput",
    "OrthusImageProcessor",
    "OrthusOutput",
    "OrthusProcessor",
    "__version__",
    "load_autoencoder",
]
