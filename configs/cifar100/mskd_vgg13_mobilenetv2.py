"""MSKD, vgg13 to MobileNetV2, CIFAR-100."""

_base_ = "../_base_/pairs/vgg13_mobilenetv2_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
