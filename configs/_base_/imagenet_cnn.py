"""Data, schedule and runtime of heterogeneous pairs with a convolutional student on ImageNet."""

_base_ = [
    "datasets/imagenet.py",
    "schedules/imagenet_100e_warmup.py",
    "default_runtime.py",
    "heterogeneous_imagenet.py",
    "imagenet_teachers.py",
]

train_dataloader = dict(batch_size=64)
