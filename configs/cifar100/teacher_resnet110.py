"""The teacher resnet110, CIFAR-100."""

_base_ = "../_base_/pairs/resnet110_resnet32_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
