"""KD, ConvNeXt-T to DeiT-T, ImageNet."""

_base_ = "../_base_/pairs/convnext-t_deit-t_imagenet.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
