"""KD, ResNet-50 to DeiT-T, ImageNet."""

_base_ = "../_base_/pairs/resnet50_deit-t_imagenet.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
