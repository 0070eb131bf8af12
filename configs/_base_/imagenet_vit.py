"""Data, schedule and runtime of heterogeneous pairs with a transformer or MLP student on ImageNet.

Evaluated and saved is the average of the weights, of decay 0.99996.
"""

_base_ = [
    "datasets/imagenet_mixed.py",
    "schedules/imagenet_300e_adamw.py",
    "default_runtime.py",
    "heterogeneous_imagenet.py",
    "imagenet_teachers.py",
]

custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL"),
]
