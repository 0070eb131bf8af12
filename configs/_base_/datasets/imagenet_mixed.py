"""ImageNet (ILSVRC 2012), augmented and mixed as vision transformers are trained, 128 images a
process.

Both networks see the same mixed images.
"""

_base_ = "imagenet.py"

from mskd_plugin.recipes.augmentation import mixed_batches, strong_augmentation

data_preprocessor = dict(batch_augments=mixed_batches())
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            # Images are read in the order blue, green, red.
            *strong_augmentation(
                mean=_base_.data_preprocessor.mean[::-1],
                std=_base_.data_preprocessor.std[::-1],
                interpolation="bicubic",
            ),
        ],
    ),
)
