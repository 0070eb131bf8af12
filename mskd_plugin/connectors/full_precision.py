"""Logits in full precision, in front of losses that compute in the precision they are given."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class FullPrecisionConnector(BaseModule):
    """Bring float16 and bfloat16 to float32; leave wider numbers as they are.

    MMRazor's losses between logits compute in the precision of the logits. Under autocast that is
    bfloat16 or float16, on a GPU in the division by the temperature alone, on a CPU in the softmax
    too, where the gradient of ``WSLD`` for one is tens of percent off. It has no parameters, so
    that one connector serves both networks.

    Shapes:
        Any; the same in float32 or wider.

    Example:
        >>> FullPrecisionConnector()(torch.ones(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits in float32 or wider."""
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
