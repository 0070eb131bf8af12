"""CIFAR-100 at the side 224, augmented and mixed as vision transformers are trained.

Both networks see the same mixed images. Of the published recipe's settings, colour jitter has no
effect beside RandAugment.
"""

_base_ = "cifar100_224.py"

data_preprocessor = dict(
    batch_augments=dict(
        augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)],
    ),
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(
                type="RandomResizedCrop",
                scale=224,
                backend="pillow",
                interpolation="bilinear",
            ),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(
                type="RandAugment",
                policies="timm_increasing",
                num_policies=2,
                total_level=10,
                magnitude_level=9,
                magnitude_std=0.5,
                hparams=dict(pad_val=[129, 124, 112], interpolation="bilinear"),
            ),
            dict(
                type="RandomErasing",
                erase_prob=0.25,
                mode="rand",
                min_area_ratio=0.02,
                max_area_ratio=1 / 3,
                fill_color=[129.3105, 124.1085, 112.404],
                fill_std=[68.2125, 65.4075, 70.4055],
            ),
            dict(type="PackInputs"),
        ],
    ),
)
