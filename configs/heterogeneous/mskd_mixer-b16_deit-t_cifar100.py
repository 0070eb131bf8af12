"""MSKD, Mixer-B/16 to DeiT-T, CIFAR-100."""

_base_ = "../_base_/pairs/mixer-b16_deit-t_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
