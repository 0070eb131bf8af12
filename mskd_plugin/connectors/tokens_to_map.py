"""From token sequences to the maps that losses between feature maps compare."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.errors import SettingError, check_count
from mskd_plugin.functional import tokens_to_map
from mskd_plugin.functional.decoupling import check_map_size


def recorded_tokens(feature: Tensor | Sequence) -> Tensor:
    """Return the tokens (N, L, C) of a record: a tensor, or the first item beside its grid's size.

    Raises:
        SettingError: If the record holds no token sequence.
    """
    tokens = feature[0] if isinstance(feature, (tuple, list)) and feature else feature
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens)
        raise SettingError("feature", "tokens (N, L, C), alone or first in a tuple", got)
    return tokens


def recorded_size(feature: Tensor | Sequence, tokens: int) -> tuple[int, int] | None:
    """Return the size (H, W) of the grid of so many tokens that a record states beside them, as
    those of Swin Transformer's stages do; None where it states none.
    """
    for item in () if isinstance(feature, Tensor) else feature:
        if isinstance(item, (tuple, list)) and [type(side) for side in item] == [int, int]:
            if item[0] * item[1] == tokens:
                return item[0], item[1]
    return None


@MODELS.register_module()
class TokensToMapConnector(BaseModule):
    """Lay the tokens of a transformer or an MLP out as a feature map.

    A method that compares maps crosses to token networks through it: alone, or as the first of a
    list of connectors, which MMRazor's distiller runs one after the other. It has no parameters.

    Args:
        class_tokens: Leading tokens that stand for no position and are left out.
        map_size: (H, W) of the patch grid. Default: what the record states, else a square.

    Shapes:
        (N, class_tokens + H W, C), row by row, to (N, C, H, W). The tokens may be the first item of
        a tuple, as Swin Transformer's stages return them beside the size of their grid.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if the record is no token
            sequence, or its tokens do not fill the grid.

    Example:
        >>> import torch
        >>> TokensToMapConnector(class_tokens=1)(torch.rand(2, 197, 192)).shape
        torch.Size([2, 192, 14, 14])
    """

    def __init__(self, class_tokens: int = 0, map_size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.class_tokens = check_count("class_tokens", class_tokens, least=0)
        self.map_size = check_map_size(map_size)

    def forward(self, feature: Tensor | Sequence) -> Tensor:
        """Return the map."""
        tokens = recorded_tokens(feature)
        size = self.map_size or recorded_size(feature, tokens.shape[1] - self.class_tokens)
        return tokens_to_map(tokens, self.class_tokens, size)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"class_tokens={self.class_tokens}, map_size={self.map_size}"
