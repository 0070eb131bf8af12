"""The teacher wrn_40_2, CIFAR-100."""

_base_ = "../_base_/pairs/wrn-40-2_wrn-16-2_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
