"""The heterogeneous pairs' schedule of transformer and MLP students on ImageNet: that on CIFAR-100,
with a cosine to 1e-6."""

_base_ = "cifar100_300e_adamw.py"

param_scheduler = [
    _base_.param_scheduler[0],
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=20, end=300),
]
