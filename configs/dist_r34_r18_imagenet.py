"""DIST, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import dist, distill

model = distill(_base_, dist(_base_))
