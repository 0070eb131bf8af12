"""MSKD, Swin-T to MobileNetV2, CIFAR-100."""

_base_ = "../_base_/pairs/swin-t_mobilenet-v2_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
