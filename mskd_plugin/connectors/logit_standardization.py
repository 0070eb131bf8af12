"""Logit standardisation, in front of any loss between logits."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.errors import SettingError

EPS = 1e-7


@MODELS.register_module()
class LogitStandardizationConnector(BaseModule):
    r"""Standardise the logits of each sample (Sun et al., CVPR 2024, arXiv 2403.01427).

    .. math:: z' = \frac{z - \operatorname{mean}(z)}{10^{-7} + \operatorname{std}(z)}

    over the classes of a sample, the standard deviation with C - 1. Put it on both networks'
    logits: in front of MMRazor's ``KLDivergence`` it makes KD with logit standardisation (LS-KD).
    It has no parameters, so that one connector serves both networks.

    Shapes:
        (N, C) to (N, C), in float32 or wider.

    Raises:
        SettingError: When called, if the input is no (N, C) with at least two classes.

    Source: sunshangquan/logit-standardization-KD, ``distillers/KD.py``.

    Example:
        >>> LogitStandardizationConnector()(torch.tensor([[1.0, 2.0, 3.0]])).round().tolist()
        [[-1.0, 0.0, 1.0]]
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return the standardised logits."""
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise SettingError(
                "logits",
                "a tensor (N, C) with at least two classes",
                f"shape {tuple(logits.shape)}",
            )
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            deviation = logits.std(dim=1, keepdim=True)
            return (logits - logits.mean(dim=1, keepdim=True)) / (EPS + deviation)
