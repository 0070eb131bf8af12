"""MSKD, resnet32x4 to ShuffleV1, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_shufflev1_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
