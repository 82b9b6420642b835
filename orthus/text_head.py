"""The LM head: hidden states to logits, with what some families of backbones do to them afterwards."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_BYTES = 256 * 2**20  # of logits in fp32 that a loss holds at a time


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
        logits = super().forward(hidden.to(self.weight.dtype))
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of `targets` `(N,)` given `hidden` `(N, D)`. Beyond `MAX_LOGIT_BYTES` the positions are taken in
        parts, whose logits the backward computes again, so that they never exist together."""
        size = max(1, MAX_LOGIT_BYTES // (4 * self.out_features))
        if len(targets) <= size:
            return self._part(hidden, targets)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        sums = [checkpoint(self._part, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
        return sum(sums[1:], sums[0])

    def _part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(hidden).float(), targets, reduction="sum")
