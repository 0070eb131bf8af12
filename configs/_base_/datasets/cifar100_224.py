"""CIFAR-100 at the side 224 of ImageNet's networks, 128 images a process."""

_base_ = "cifar100.py"

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    dataset=dict(
        pipeline=[
            dict(
                type="RandomResizedCrop",
                scale=224,
                backend="pillow",
                interpolation="bilinear",
            ),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        pipeline=[
            dict(type="Resize", scale=224, backend="pillow", interpolation="bilinear"),
            dict(type="PackInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
