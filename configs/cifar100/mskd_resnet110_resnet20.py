"""MSKD, resnet110 to resnet20, CIFAR-100."""

_base_ = "../_base_/pairs/resnet110_resnet20_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
