"""MSKD, ViT-S to ResNet-18, ImageNet."""

_base_ = "../_base_/pairs/vit-s_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
