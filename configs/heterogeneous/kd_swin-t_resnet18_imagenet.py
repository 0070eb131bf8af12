"""KD, Swin-T to ResNet-18, ImageNet."""

_base_ = "../_base_/pairs/swin-t_resnet18_imagenet.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
