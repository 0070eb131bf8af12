"""MSKD and KD, ResNet-34 to ResNet-18, ImageNet."""

_base_ = "_base_/pairs/resnet34_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, kd, mskd

model = distill(_base_, mskd(_base_), kd(_base_))
