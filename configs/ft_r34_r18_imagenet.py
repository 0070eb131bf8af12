"""FT, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, ft, two_phases

model = distill(_base_, ft(_base_))
globals().update(two_phases(_base_, ft(_base_)))
