"""MSKD, ResNet20 to ResNet8, CIFAR-10 image files."""

_base_ = "../_base_/pairs/resnet20_resnet8_cifar10.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
