"""MLKD, ResNet32x4 to ResNet8x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import distill, mlkd

model = distill(_base_, mlkd(_base_))
