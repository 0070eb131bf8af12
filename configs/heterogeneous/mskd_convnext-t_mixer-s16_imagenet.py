"""MSKD, ConvNeXt-T to Mixer-S/16, ImageNet."""

_base_ = "../_base_/pairs/convnext-t_mixer-s16_imagenet.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
