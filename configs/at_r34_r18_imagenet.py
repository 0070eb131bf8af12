"""AT, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import at, distill

model = distill(_base_, at(_base_))
