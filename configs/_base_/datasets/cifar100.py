"""CIFAR-100 by the benchmark's protocol: batch 64 on one GPU, crop and flip."""

# In units of 0..255, the images are RGB already.
data_preprocessor = dict(
    type="ClsDataPreprocessor",
    num_classes=100,
    mean=[129.3105, 124.1085, 112.404],
    std=[68.2125, 65.4075, 70.4055],
    to_rgb=False,
)

num_train_images = 50_000
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=False,
    pin_memory=True,
    worker_init_fn=dict(type="keep_worker_seed"),
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CIFAR100",
        data_root="data/cifar100",
        download=True,
        split="train",
        pipeline=[
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CIFAR100",
        data_root="data/cifar100",
        download=True,
        split="test",
        pipeline=[dict(type="PackInputs")],
    ),
)
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
