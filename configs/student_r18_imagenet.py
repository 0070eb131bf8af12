"""ResNet-18 alone, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "student")
