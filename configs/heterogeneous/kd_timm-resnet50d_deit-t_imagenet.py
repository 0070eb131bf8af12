"""KD, timm's ResNet-50-D to DeiT-T, ImageNet."""

_base_ = "../_base_/pairs/timm-resnet50d_deit-t_imagenet.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
