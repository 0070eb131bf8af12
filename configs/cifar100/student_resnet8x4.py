"""ResNet8x4 alone, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "student")
