"""MSKD, vgg13 to vgg8, CIFAR-100."""

_base_ = "../_base_/pairs/vgg13_vgg8_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
