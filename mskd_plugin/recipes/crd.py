"""Contrastive representation distillation (Tian et al., arXiv 1910.10699)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.recipes.logits import LABELS, LABELS_MAPPING
from mskd_plugin.recipes.method import method
from mskd_plugin.recipes.taps import POOLED, linear_connectors


@method
def crd(
    base: dict,
    *,
    num_images: int | None = None,
    loss_weight: float = 0.8,
    embedding_channels: int = 128,
    num_negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> dict[str, Any]:
    """Contrast each image's embedding with a memory of all training images' embeddings.

    Args:
        base: Config with the ``pair``, and ``num_train_images``.
        num_images: Number of training images. Default: the base's ``num_train_images``.
        loss_weight: Weight of the term. The CRD benchmark takes 0.8.
        embedding_channels: Width of the embeddings. The CRD benchmark takes 128.
        num_negatives: Negatives of each image. The CRD benchmark takes 16384.
        temperature: Temperature of the similarities. The CRD benchmark takes 0.07.
        momentum: Share of a memory's row that stays at each update. The CRD benchmark takes 0.5.

    Raises:
        SettingError: If the number of training images is not known.
    """
    num_images = base.get("num_train_images") if num_images is None else num_images
    if num_images is None:
        raise SettingError(
            "num_train_images",
            "stated by the config beside its data set, since CRD keeps a row for each image",
            None,
            "Or give `num_images` to `crd(...)`.",
        )
    mappings: dict[str, Any] = {
        f"{role}_embedding": {
            "recorder": "pooled",
            "from_student": role == "student",
            "data_idx": 0,
            "connector": f"crd_{role}",
        }
        for role in ("student", "teacher")
    }
    mappings["labels"] = dict(LABELS_MAPPING)
    mappings["sample_idx"] = {
        "recorder": "data_samples",
        "from_student": True,
        "data_idx": 1,
        "connector": "sample_idx",
    }
    return {
        "student_recorders": {
            **POOLED,
            **LABELS,
            # The empty name is the student itself, whose second input the data samples are.
            "data_samples": {"type": "ModuleInputs", "source": ""},
        },
        "teacher_recorders": dict(POOLED),
        "connectors": {
            **linear_connectors(base, "crd", embedding_channels),
            "sample_idx": {"type": "SampleIndex"},
        },
        "distill_losses": {
            "loss_crd": {
                "type": "MemoryCRDLoss",
                "num_images": num_images,
                "loss_weight": loss_weight,
                "embedding_channels": embedding_channels,
                "num_negatives": num_negatives,
                "temperature": temperature,
                "momentum": momentum,
            }
        },
        "loss_forward_mappings": {"loss_crd": mappings},
    }
