"""The teacher ResNet32x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
