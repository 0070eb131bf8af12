"""mmpretrain's vision transformers and MLPs, whose stages are tokens.

Settings are those of mmpretrain's published configs, but for the dropout of MLP-Mixer, 0.1 there:
the students of OFA-KD's recipe have none. Each takes images of the side 224.
"""

from __future__ import annotations

from mskd_plugin.networks.description import Network, Tap

_TRANSFORMER = [
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02, "bias": 0.0},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
]


def swin(arch: str, width: int) -> Network:
    """Describe a Swin transformer of four stages, whose classifier reads the average of its tokens.

    Args:
        arch: mmpretrain's name of the architecture.
        width: Channels of the first stage.

    Source: Liu et al., "Swin Transformer" (arXiv 2103.14030).
    """
    widths = tuple(factor * width for factor in (1, 2, 4, 8))
    return Network(
        backbone={"type": "SwinTransformer", "arch": arch, "drop_path_rate": 0.2},
        width=widths[-1],
        stages=tuple((f"backbone.stages.{i}", width) for i, width in enumerate(widths)),
        stem=("backbone.drop_after_pos", width),
        final=("backbone.norm3", widths[-1]),
        num_classes=1000,
        init_cfg=_TRANSFORMER,
        tokens=True,
    )


def vision_transformer(arch: str, width: int) -> Network:
    """Describe a vision transformer of 12 layers and patches of 16, which classifies a class token.

    Args:
        arch: mmpretrain's name of the architecture.
        width: Channels of the tokens.

    Source: Touvron et al., "Training data-efficient image transformers" (arXiv 2012.12877).
    """
    return Network(
        backbone={"type": "VisionTransformer", "arch": arch, "img_size": 224, "patch_size": 16},
        width=width,
        stages=_quarters(width, 12),
        stem=("backbone.drop_after_pos", width),
        final=("backbone.ln1", width),
        num_classes=1000,
        init_cfg=_TRANSFORMER,
        neck=None,
        tokens=True,
        class_tokens=1,
        final_is_pooled=False,
    )


def mixer(arch: str, width: int, depth: int) -> Network:
    """Describe an MLP-Mixer with patches of 16, whose classifier reads the average of its tokens.

    Args:
        arch: mmpretrain's name of the architecture.
        width: Channels of the tokens.
        depth: Its layers, a multiple of 4.

    Source: Tolstikhin et al., "MLP-Mixer" (arXiv 2105.01601).
    """
    convolution = {"type": "Kaiming", "layer": "Conv2d", "mode": "fan_in", "nonlinearity": "linear"}
    return Network(
        backbone={
            "type": "MlpMixer",
            "arch": arch,
            "img_size": 224,
            "patch_size": 16,
            "init_cfg": [convolution],
        },
        width=width,
        stages=_quarters(width, depth),
        stem=("backbone.patch_embed", width),
        final=("backbone.ln1", width),
        num_classes=1000,
        head_init={"type": "Normal", "layer": "Linear", "std": 0.01},
        # The backbone gives (N, C, L).
        neck={"type": "GlobalAveragePooling", "dim": 1},
        tokens=True,
    )


def _quarters(width: int, depth: int) -> tuple[Tap, ...]:
    """Return taps behind each quarter of the layers, all of one width."""
    return tuple((f"backbone.layers.{depth * k // 4 - 1}", width) for k in range(1, 5))
