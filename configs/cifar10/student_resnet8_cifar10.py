"""ResNet8 alone, CIFAR-10 image files."""

_base_ = "../_base_/pairs/resnet20_resnet8_cifar10.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "student")
