"""MSKD, ResNet20 to ResNet8, digits."""

_base_ = "../_base_/pairs/resnet20_resnet8_digits.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
