"""KD, ConvNeXt-T to DeiT-T, CIFAR-100."""

_base_ = "../_base_/pairs/convnext-t_deit-t_cifar100.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
