"""The branches of one-for-all distillation (OFA-KD): from a stage of the student to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import PatchMerging
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.connectors.tokens_to_map import recorded_tokens
from mskd_plugin.errors import SettingError, check_count
from mskd_plugin.functional.decoupling import check_map_size

#: Side of the grid that patches are merged down to, and heads of each transformer block.
FINAL_SIDE, HEADS = 7, 4
TOKEN_POOLS = ("average", "class_token")


class HalvingConv(nn.Sequential):
    """Two depthwise-separable 3x3 convolutions, the first with stride 2, each with BN and ReLU.

    Args:
        in_channels: Channels of the input and between the two.
        out_channels: Channels of the output.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for stride, channels in ((2, in_channels), (1, out_channels)):
            layers += [
                nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
                nn.Conv2d(in_channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        super().__init__(*layers)


@MODELS.register_module()
class OFABranch(BaseModule):
    """Map a convolutional stage of the student to logits.

    As many :class:`HalvingConv` as stages follow, which double the channels but for the last, which
    gives ``hidden_channels``; behind the last stage a 1x1 convolution with bias in their place.
    Then the average over positions and a linear classifier. The branch trains with the student and
    is not part of it afterwards. Convolutions start from Kaiming's initialisation with fan-out, the
    linear layer from a truncated normal with deviation 0.02 and no bias.

    Args:
        in_channels: Channels of the stage.
        hidden_channels: Width before the classifier: the larger of both networks' pooled widths.
        num_classes: Number of classes.
        halvings: Stages between this one and the last.

    Shapes:
        (N, in_channels, H, W) to (N, num_classes).

    Raises:
        SettingError: When built, if a size is no positive integer; when called, if the input is no
            map of ``in_channels`` channels.

    Source: Hao840/OFAKD, ``distillers/ofa.py``, arXiv 2310.19444.

    Example:
        >>> import torch
        >>> OFABranch(16, 64, 10, halvings=2)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        halvings: int,
    ) -> None:
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        check_count("hidden_channels", hidden_channels)
        check_count("num_classes", num_classes)
        check_count("halvings", halvings, least=0)
        layers: list[nn.Module] = []
        for left in reversed(range(halvings)):
            out_channels = 2 * in_channels if left else hidden_channels
            layers.append(HalvingConv(in_channels, out_channels))
            in_channels = out_channels
        if not layers:
            layers = [nn.Conv2d(in_channels, hidden_channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(hidden_channels, num_classes)
        self.apply(_initialize)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the branch's logits."""
        if feature.dim() != 4 or feature.shape[1] != self.in_channels:
            raise SettingError(
                "feature",
                f"a map (N, {self.in_channels}, H, W)",
                f"shape {tuple(feature.shape)}",
            )
        return self.fc(self.pool(self.layers(feature)).flatten(1))


def count_mergings(map_size: Sequence[int]) -> int:
    """Return how often a patch grid (H, W) is halved: as often as it stays at least 7 wide.

    Example:
        >>> [count_mergings((side, side)) for side in (4, 7, 13, 14, 28, 56)]
        [0, 0, 0, 1, 2, 3]
    """
    side = math.isqrt(map_size[0] * map_size[1])
    return max((side // FINAL_SIDE).bit_length() - 1, 0)


@MODELS.register_module()
class OFATokenBranch(BaseModule):
    r"""Map a stage of a transformer or an MLP student to logits.

    1. :func:`count_mergings` patch mergings, mmpretrain's ``PatchMerging``: the 2 x 2 neighbours'
       channels joined, LayerNorm, a linear map without bias. The first one gives
       ``hidden_channels``, the others keep them; GELU follows each but the last of several.
       A grid of 14 x 14 has one merging, with GELU, to 7 x 7; 28 x 28 two, 56 x 56 three, and one
       below 14 none. A row or a column too many is padded with zeros.
    2. ``num_blocks`` pre-norm transformer blocks, mmpretrain's ``TransformerEncoderLayer``: 4
       heads, no bias of queries, keys and values, a GELU layer of 4 ``hidden_channels``, no
       dropout, no position embedding.
    3. The average of the tokens, with no normalisation before it, and a linear classifier.

    The branch trains with the student and is not part of it afterwards. Linear layers start from a
    truncated normal with deviation 0.02 and no bias.

    Args:
        in_channels: Width of the stage's tokens.
        hidden_channels: Width of mergings and blocks, a multiple of 4: the student's pooled width.
        num_classes: Number of classes.
        map_size: (H, W) of the patch grid.
        num_blocks: Transformer blocks: as many as stages follow, at least 1.
        class_tokens: Leading tokens that stand for no position.
        pool: ``"average"``: class tokens are left out before anything else. ``"class_token"``: the
            one class token goes past the mergings, takes part in the blocks and is what the
            classifier reads.

    Shapes:
        (N, class_tokens + H W, in_channels), patches row by row, to (N, num_classes). The tokens
        may be the first item of a tuple, as mmpretrain's Swin stages give them; other layouts,
        (N, H, W, C) for one, are refused.

    Raises:
        SettingError: When built, if a setting is malformed, the widths differ where no merging
            changes them, or there is not one class token to read; when called, if the input is no
            sequence of that length and width.

    Source: Hao840/OFAKD, ``distillers/ofa.py`` and ``distillers/utils.py``, arXiv 2310.19444. That
    code averages the tokens of Swin, Mixer and ResMLP students, and of students with a class token
    (DeiT) reads the class token: ``pool="class_token"``. mmpretrain's merging orders the joined
    channels by channel, the published one by neighbour: the same layer under a permutation of its
    weights.

    Example:
        >>> branch = OFATokenBranch(16, 32, 10, map_size=(14, 14), num_blocks=2, class_tokens=1)
        >>> branch(torch.rand(2, 1 + 14 * 14, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        map_size: Sequence[int],
        num_blocks: int = 1,
        class_tokens: int = 0,
        pool: str = "average",
    ) -> None:
        check_count("in_channels", in_channels)
        check_count("hidden_channels", hidden_channels)
        check_count("num_classes", num_classes)
        check_count("num_blocks", num_blocks)
        if hidden_channels % HEADS:
            raise SettingError("hidden_channels", f"a multiple of {HEADS} heads", hidden_channels)
        size = check_map_size(map_size)
        if size is None:
            raise SettingError("map_size", "two positive integers (H, W)", None)
        if pool not in TOKEN_POOLS:
            raise SettingError("pool", f"one of {TOKEN_POOLS}", repr(pool))
        check_count("class_tokens", class_tokens, least=0)
        if pool == "class_token" and class_tokens != 1:
            raise SettingError("class_tokens", "1 for the pool 'class_token'", class_tokens)
        count = count_mergings(size)
        if in_channels != hidden_channels and (not count or pool == "class_token"):
            raise SettingError(
                "hidden_channels",
                f"the stage's {in_channels}, as no merging changes "
                + (f"a grid of {size[0]} x {size[1]}" if not count else "the class token"),
                hidden_channels,
            )
        super().__init__()
        self.in_channels, self.class_tokens, self.pool = in_channels, class_tokens, pool
        self.map_size = size
        self.mergings = nn.ModuleList(
            PatchMerging(hidden_channels if index else in_channels, hidden_channels)
            for index in range(count)
        )
        self.blocks = nn.Sequential(
            *(
                TransformerEncoderLayer(hidden_channels, HEADS, 4 * hidden_channels, qkv_bias=False)
                for _ in range(num_blocks)
            )
        )
        self.act = nn.GELU()
        self.fc = nn.Linear(hidden_channels, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Start from the published initialisation, which is not that of mmpretrain's modules."""
        self.apply(_initialize)

    def forward(self, feature: Tensor | Sequence) -> Tensor:
        """Return the branch's logits."""
        tokens = recorded_tokens(feature)
        length = self.class_tokens + self.map_size[0] * self.map_size[1]
        if tokens.shape[1:] != (length, self.in_channels):
            raise SettingError(
                "feature",
                f"tokens (N, {length}, {self.in_channels})",
                f"shape {tuple(tokens.shape)}",
            )
        class_token, patches = tokens.tensor_split([self.class_tokens], dim=1)
        size = self.map_size
        for index, merging in enumerate(self.mergings):
            patches, size = merging(patches, size)
            if index == 0 or index < len(self.mergings) - 1:
                patches = self.act(patches)
        if self.pool == "average":
            return self.fc(self.blocks(patches).mean(1))
        return self.fc(self.blocks(torch.cat([class_token, patches], dim=1))[:, 0])


def _initialize(module: nn.Module) -> None:
    # Here, not by an init_cfg: MMRazor's distiller does not run its connectors' `init_weights`.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
