"""MSKD, wrn_40_2 to wrn_40_1, CIFAR-100."""

_base_ = "../_base_/pairs/wrn-40-2_wrn-40-1_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
