"""What stands between a backbone that gives tokens and a linear classifier."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor

from mskd_plugin.errors import SettingError, check_count


@MODELS.register_module()
class TokenPooling(BaseModule):
    """Make one vector an image from tokens (N, L, C), where mmpretrain's own necks read maps.

    Args:
        class_tokens: Leading tokens that stand for no position.
        average: Whether the vector is the average over the positions, class tokens left out; else
            it is the first class token. Default: True.

    Shapes:
        A tuple that ends with (N, L, C), L above ``class_tokens``, to a tuple of one (N, C).

    Raises:
        SettingError: If ``class_tokens`` is no count, or no token is left to take.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[9.0], [1.0], [3.0]]])
        >>> TokenPooling(class_tokens=1)((tokens,))[0].tolist()
        [[2.0]]
        >>> TokenPooling(class_tokens=1, average=False)((tokens,))[0].tolist()
        [[9.0]]
    """

    def __init__(self, class_tokens: int = 0, average: bool = True) -> None:
        super().__init__()
        check_count("class_tokens", class_tokens, least=0)
        if not average and not class_tokens:
            raise SettingError("class_tokens", "at least 1, where one is taken", class_tokens)
        self.class_tokens, self.average = class_tokens, average

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Pool the last entry."""
        tokens = inputs[-1]
        if tokens.dim() != 3 or tokens.shape[1] <= self.class_tokens:
            raise SettingError(
                "inputs",
                f"tokens (N, L, C) with more than {self.class_tokens} tokens",
                f"shape {tuple(tokens.shape)}",
            )
        if self.average:
            return (tokens[:, self.class_tokens :].mean(dim=1),)
        return (tokens[:, 0],)
