"""WSLD, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, wsld

model = distill(_base_, wsld(_base_))
