"""Orthus: one autoregressive transformer over text tokens and continuous image latents (arXiv 2412.00127)."""

from orthus.configuration import DiffusionHeadConfig, OrthusConfig
from orthus.generation import OrthusGenerateOutput
from orthus.modeling import OrthusForConditionalGeneration, OrthusOutput
from orthus.processing import OrthusProcessor

__version__ = "0.1.0"
__all__ = [
    "DiffusionHeadConfig",
    "OrthusConfig",
    "OrthusForConditionalGeneration",
    "OrthusGenerateOutput",
    "OrthusOutput",
    "OrthusProcessor",
    "__version__",
]
