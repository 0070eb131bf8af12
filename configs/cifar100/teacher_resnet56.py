"""The teacher resnet56, CIFAR-100."""

_base_ = "../_base_/pairs/resnet56_resnet20_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
