"""The multi-scale decoupling connector: a recorded stage in, the regions of every scale out."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.connectors.tokens_to_map import recorded_size
from mskd_plugin.errors import SettingError, check_count
from mskd_plugin.functional import tokens_to_map
from mskd_plugin.functional.decoupling import (
    DEFAULT_SCALES,
    check_map_size,
    check_overlap,
    check_scales,
    pool_windows,
)

PROJECTORS = ("none", "linear", "mlp")


@MODELS.register_module()
class MultiScaleDecouplingConnector(BaseModule):
    """Decouple a stage's feature map into the region vectors of several scales.

    The map is pooled first and the region vectors are projected after: for a linear projector the
    same values as projecting the map, for R vectors an image in place of H W positions.

    Args:
        scales: Scale k cuts the map into windows of relative side 1/k; 1 is the global feature.
        overlap: Overlap of neighbouring windows, in [0, 1). 0 is the k x k grid of adaptive average
            pooling, the only setting that gives maps of different sizes the same regions.
        projector: ``"none"``; ``"linear"``, one linear map with bias to the other network's
            channels; or ``"mlp"``, linear, LayerNorm, ReLU, linear. LayerNorm, since BatchNorm
            would tie the regions of a batch together and make the loss depend on how images are
            spread over processes.
        in_channels: Channels of the stage. Needed by a projector.
        out_channels: Channels after the projector. Needed by a projector.
        hidden_channels: Width inside the mlp. Default: ``out_channels``.
        class_tokens: For token sequences (N, L, C): leading tokens that stand for no position and
            are left out.
        map_size: For token sequences: (H, W) of the patch grid. Default: what the record states,
            as those of Swin Transformer's stages do, else a square.
        init_cfg: MMEngine's initialisation config.

    Shapes:
        In: a feature map (N, C, H, W), a token sequence (N, L, C) or pooled vectors (N, C); or a
        tuple that holds one such tensor, as necks and some transformer stages return.
        Out: a tuple with one (N, R_k, D) per scale; D is ``out_channels``, or C without a
            projector.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if a scale is larger than
            the map, the channels are not ``in_channels``, or a tuple holds several tensors.

    Source: arXiv 2502.05835, reconstructed; see :mod:`mskd_plugin.functional.decoupling`.

    Example:
        >>> import torch
        >>> connector = MultiScaleDecouplingConnector(
        ...     scales=(1, 2), projector="linear", in_channels=64, out_channels=256)
        >>> [tuple(regions.shape) for regions in connector(torch.rand(8, 64, 7, 7))]
        [(8, 1, 256), (8, 4, 256)]
    """

    def __init__(
        self,
        scales: Sequence[int] = DEFAULT_SCALES,
        overlap: float = 0.0,
        projector: str = "none",
        in_channels: int | None = None,
        out_channels: int | None = None,
        hidden_channels: int | None = None,
        class_tokens: int = 0,
        map_size: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.scales = check_scales(scales)
        self.overlap = check_overlap(overlap)
        self.class_tokens = check_count("class_tokens", class_tokens, least=0)
        self.map_size = check_map_size(map_size)
        self.in_channels = in_channels
        self.projector = self._build_projector(
            projector, in_channels, out_channels, hidden_channels
        )

    @staticmethod
    def _build_projector(
        projector: str,
        in_channels: int | None,
        out_channels: int | None,
        hidden_channels: int | None,
    ) -> nn.Module:
        if projector not in PROJECTORS:
            raise SettingError("projector", f"one of {PROJECTORS}", repr(projector))
        for name, channels in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("hidden_channels", hidden_channels),
        ):
            if channels is not None:
                check_count(name, channels)
        if hidden_channels is not None and projector != "mlp":
            raise SettingError(
                "hidden_channels", "None unless `projector` is 'mlp'", repr(hidden_channels)
            )
        if projector == "none":
            if out_channels not in (None, in_channels):
                raise SettingError(
                    "projector",
                    f"'linear' or 'mlp' to map {in_channels} channels to {out_channels}",
                    "'none'",
                )
            return nn.Identity()
        if not in_channels or not out_channels:
            raise SettingError(
                "in_channels and out_channels",
                f"both given for the projector {projector!r}",
                f"{in_channels} and {out_channels}",
            )
        if projector == "linear":
            return nn.Linear(in_channels, out_channels)
        hidden = hidden_channels or out_channels
        return nn.Sequential(
            nn.Linear(in_channels, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_channels),
        )

    def forward(self, feature: Tensor | Sequence) -> tuple[Tensor, ...]:
        """Return the regions of each scale, (N, R_k, D)."""
        record = feature
        if not isinstance(feature, Tensor):
            feature = self._only_tensor(feature)
        if feature.dim() == 3:
            size = self.map_size or recorded_size(record, feature.shape[1] - self.class_tokens)
            feature = tokens_to_map(feature, self.class_tokens, size)
        regions, counts = pool_windows(feature, self.scales, self.overlap)
        if self.in_channels is not None and regions.shape[-1] != self.in_channels:
            raise SettingError(
                "in_channels",
                f"the {regions.shape[-1]} channels of the recorded stage",
                self.in_channels,
            )
        return self.projector(regions).split(counts, dim=1)

    @staticmethod
    def _only_tensor(feature: Sequence) -> Tensor:
        if not isinstance(feature, (tuple, list)):
            raise SettingError(
                "feature", "a tensor or a tuple that holds one", type(feature).__name__
            )
        tensors = [item for item in feature if isinstance(item, Tensor)]
        if len(tensors) != 1:
            raise SettingError(
                "data_idx",
                "the index of one tensor in the recorded tuple",
                f"a record with {len(tensors)} tensors",
            )
        return tensors[0]

    def extra_repr(self) -> str:
        """Show the settings that are no submodules."""
        return f"scales={self.scales}, overlap={self.overlap}"
