"""MSKD, Swin-T to ResNet-18, CIFAR-100."""

_base_ = "../_base_/pairs/swin-t_resnet18_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
