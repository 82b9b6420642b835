"""The LM head: hidden states to logits, with what some families of backbones do to them afterwards."""

from typing import Any

from torch import Tensor, nn


class TextHead(nn.Linear):
    """Logits `(..., V)` of hidden states `(..., D)`: `cap * tanh(factor * W h / cap)`.

    The factor (Granite, Cohere) and the soft cap (Gemma) are those that the backbone's config names; most name neither. A
    backbone that does something else to its logits is refused where a model is built from it (`backbones.check_same_text`).
    """

    def __init__(self, text_config: Any, bias: bool = False) -> None:
        super().__init__(text_config.hidden_size, text_config.vocab_size, bias=bias)
        divisor = getattr(text_config, "logits_scaling", None) or 1.0
        self.factor = (getattr(text_config, "logit_scale", None) or 1.0) / divisor
        self.cap = getattr(text_config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = super().forward(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap
