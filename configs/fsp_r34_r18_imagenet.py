"""FSP, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, fsp, two_phases

model = distill(_base_, fsp(_base_))
globals().update(two_phases(_base_, fsp(_base_)))
