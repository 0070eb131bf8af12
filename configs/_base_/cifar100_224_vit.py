"""Data, schedule and runtime of heterogeneous pairs with a transformer or MLP student on
CIFAR-100."""

_base_ = [
    "datasets/cifar100_224_mixed.py",
    "schedules/cifar100_300e_adamw.py",
    "default_runtime.py",
    "heterogeneous.py",
]

pair = dict(num_classes=100)
