"""MSKD and DKD, ResNet32x4 to ResNet8x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import distill, dkd, mskd

model = distill(_base_, mskd(_base_), dkd(_base_))
