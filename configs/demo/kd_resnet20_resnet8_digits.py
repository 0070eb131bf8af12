"""KD, ResNet20 to ResNet8, digits."""

_base_ = "../_base_/pairs/resnet20_resnet8_digits.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
