"""Factor transfer (Kim et al., arXiv 1802.04977)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import behind_layout, stage_pairs, tapped


@method
def ft(
    base: dict,
    *,
    loss_weight: float = 200.0,
    factor_ratio: float = 0.5,
    factor_power: int = 2,
    error_power: float = 1.0,
    init_epochs: int = 30,
    init_lr: float = 0.01,
) -> dict[str, Any]:
    """Compress the teacher's last map to a factor, then let the student follow the factor.

    Phase 1 trains the paraphraser on the teacher's map, by
    :class:`mskd_plugin.losses.ParaphraserLoss`. Phase 2 trains the student and its translator, by
    the student's own loss and :class:`mskd_plugin.losses.FactorTransferLoss` against the frozen
    paraphraser. Both encoders are MMRazor's ``Translator``, three 3x3 convolutions with
    LeakyReLU(0.1), with batch normalisation on the student's side alone. Needs
    :func:`mskd_plugin.recipes.two_phases`.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the term in phase 2. The CRD benchmark takes 200.
        factor_ratio: Channels of the factor over those of the teacher's map. The CRD benchmark
            takes 0.5.
        factor_power: Power of the factors before the mean over channels. As published 2.
        error_power: Power of their difference. As published 1.
        init_epochs: Epochs of phase 1. The CRD benchmark takes 30.
        init_lr: Learning rate of phase 1, at most the base's. The CRD benchmark takes 0.01, but
            0.05, its base's, for VGG students.

    Raises:
        SettingError: If a factor would have no channels.
    """
    (pair,) = stage_pairs(base, (-1,))
    factor_channels = int(pair.teacher_channels * factor_ratio)
    if factor_channels < 1:
        raise SettingError(
            "factor_ratio",
            f"large enough for one of the {pair.teacher_channels} channels of "
            f"{base['pair']['teacher']}",
            factor_ratio,
        )
    encoder, init_loss = "ft_paraphraser", "loss_ft_paraphraser"
    translator = {"type": "Translator", "out_channel": factor_channels}
    feature, connectors = tapped(pair.name, "teacher", pair.teacher_layout)
    teacher_factor = {**feature, "connector": encoder}
    return {
        "student_recorders": {
            pair.name: {"type": "ModuleOutputs", "source": pair.student_source},
        },
        "teacher_recorders": {
            pair.name: {"type": "ModuleOutputs", "source": pair.teacher_source},
        },
        "connectors": {
            **connectors,
            "ft_translator": behind_layout(
                pair.student_layout,
                {**translator, "in_channel": pair.student_channels, "use_bn": True},
            ),
            encoder: behind_layout(
                pair.teacher_layout,
                {**translator, "in_channel": pair.teacher_channels, "use_bn": False},
            ),
        },
        "distill_losses": {
            init_loss: {
                "type": "ParaphraserLoss",
                "in_channels": pair.teacher_channels,
                "factor_channels": factor_channels,
            },
            "loss_ft": {
                "type": "FactorTransferLoss",
                "loss_weight": loss_weight,
                "factor_power": factor_power,
                "error_power": error_power,
            },
        },
        "loss_forward_mappings": {
            init_loss: {"teacher_factor": teacher_factor, "teacher_feature": feature},
            "loss_ft": {
                "student_feature": {
                    "recorder": pair.name,
                    "from_student": True,
                    "connector": "ft_translator",
                },
                "teacher_feature": teacher_factor,
            },
        },
        "phases": {
            "init_losses": [init_loss],
            "init_modules": [
                f"distiller.connectors.{encoder}",
                f"distiller.distill_losses.{init_loss}",
            ],
            "init_epochs": init_epochs,
        },
        "init_lr": init_lr,
    }
