"""What a network tells of itself: its config, and where its maps can be recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Name of a module inside a classifier, and the channels of its output.
Tap = tuple[str, int]


@dataclass(frozen=True)
class Network:
    """One network, and where in its classifier its maps can be recorded.

    All names are of modules inside the classifier, and ``(name, channels)`` pairs stand in the
    order of the forward. MMRazor's ``ModuleOutputs`` records ``stem``, ``stages`` and ``final``,
    :class:`mskd_plugin.recorders.PreActivationRecorder` (type ``PreActivation``) records
    ``preact_stages``.

    Attributes:
        backbone: Config of the backbone, for mmpretrain's ``MODELS``.
        width: Channels of the pooled feature, which feeds the classifier.
        stages: Each stage's map, as the CRD benchmark takes it: after the ReLU where one follows
            it. Of wide residual networks it is the raw sum of the last block, of MobileNetV2 the
            output of a linear layer, both with negative values.
        stem: The map before the first stage, after the ReLU but for wide residual networks. None
            where it is not known.
        final: The map whose average over positions is the pooled feature: the last of ``stages``,
            or of other channels where layers stand between the last stage and the pooling.
        num_classes: Classes of the data set that the network is made for: 100 for CIFAR-100, 1000
            for ImageNet.
        preact_stages: The maps of ``stages`` before the ReLU. Of wide residual networks they are
            the sums normalised by the layer that follows; of MobileNetV2, where no ReLU follows,
            they are ``stages``. Default: none are known.
        preact_norms: The normalisation layer that each map of ``preact_stages`` comes from, the
            last in the residual branch where a shortcut is added to it. Default: none, as where
            half of the channels have another origin, in ShuffleNetV2.
        head_init: How the classifier's ``init_weights`` initialises the linear layer. Default:
            None, torch's own initialisation or ``init_cfg``.
        init_cfg: How ``init_weights`` initialises the whole classifier, where the backbone's own
            way is not the published one. Default: None.
        neck: Config of what pools the backbone's output. Default: the average over the map's
            positions; None where the backbone pools.
        tokens: Whether ``stages`` and ``final`` are token sequences (N, L, C), alone or in a tuple
            with the size of their grid. Default: False, maps (N, C, H, W).
        class_tokens: Leading tokens of the sequences that stand for no position. Default: 0.
        final_is_pooled: Whether the average of ``final`` over its positions is what the classifier
            reads. False of vision transformers, which classify their class token, and of ConvNeXt,
            which normalises the average. Default: True.
    """

    backbone: dict[str, Any]
    width: int
    stages: tuple[Tap, ...]
    stem: Tap | None
    final: Tap
    num_classes: int
    preact_stages: tuple[Tap, ...] = ()
    preact_norms: tuple[str, ...] = ()
    head_init: dict[str, Any] | None = None
    init_cfg: list[dict[str, Any]] | None = None
    neck: dict[str, Any] | None = field(default_factory=lambda: {"type": "GlobalAveragePooling"})
    tokens: bool = False
    class_tokens: int = 0
    final_is_pooled: bool = True
