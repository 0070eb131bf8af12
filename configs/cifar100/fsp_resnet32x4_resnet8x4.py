"""FSP, ResNet32x4 to ResNet8x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import distill, fsp, two_phases

model = distill(_base_, fsp(_base_))
globals().update(two_phases(_base_, fsp(_base_)))
