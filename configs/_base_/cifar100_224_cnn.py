"""Data, schedule and runtime of heterogeneous pairs with a convolutional student on CIFAR-100."""

_base_ = [
    "datasets/cifar100_224.py",
    "schedules/cifar100_300e_sgd.py",
    "default_runtime.py",
    "heterogeneous.py",
]

pair = dict(num_classes=100)
