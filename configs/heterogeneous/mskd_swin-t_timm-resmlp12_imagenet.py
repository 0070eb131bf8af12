"""MSKD, Swin-T to timm's ResMLP-S12, ImageNet."""

_base_ = "../_base_/pairs/swin-t_timm-resmlp12_imagenet.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
