"""CIFAR-100 at the side 224, augmented and mixed as vision transformers are trained.

Both networks see the same mixed images.
"""

_base_ = "cifar100_224.py"

from mskd_plugin.recipes.augmentation import mixed_batches, strong_augmentation

data_preprocessor = dict(batch_augments=mixed_batches())
train_dataloader = dict(
    dataset=dict(
        pipeline=strong_augmentation(
            mean=_base_.data_preprocessor.mean,
            std=_base_.data_preprocessor.std,
            interpolation="bilinear",
        ),
    ),
)
