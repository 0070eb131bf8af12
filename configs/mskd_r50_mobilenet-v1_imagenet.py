"""MSKD, ResNet-50 to MobileNetV1, ImageNet."""

_base_ = "_base_/pairs/resnet50_mobilenet-v1_imagenet.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
