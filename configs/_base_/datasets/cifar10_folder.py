"""CIFAR-10 as image files, data/cifar10/{train,test}/<class>/*: every fifth training image, and a
validation set.

The validation images are training images that the student does not see; the test images are for the
end.
"""

data_preprocessor = dict(
    type="ClsDataPreprocessor",
    num_classes=10,
    mean=[125.3, 123.0, 113.9],
    std=[63.0, 62.1, 66.7],
    to_rgb=True,
)

num_train_images = 10_000
train_dataloader = dict(
    batch_size=128,
    num_workers=1,
    persistent_workers=False,
    worker_init_fn=dict(type="keep_worker_seed"),
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CustomDataset",
        data_root="data/cifar10",
        data_prefix="train",
        indices=range(0, 50_000, 5),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=1,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CustomDataset",
        data_root="data/cifar10",
        data_prefix="train",
        indices=range(1, 50_000, 10),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        type="CustomDataset",
        data_root="data/cifar10",
        data_prefix="test",
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
)
test_evaluator = val_evaluator
