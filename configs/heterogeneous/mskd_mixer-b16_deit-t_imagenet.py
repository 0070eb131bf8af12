"""MSKD, Mixer-B/16 to DeiT-T, ImageNet."""

_base_ = "../_base_/pairs/mixer-b16_deit-t_imagenet.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
