"""The teacher ResNet20, digits."""

_base_ = "../_base_/pairs/resnet20_resnet8_digits.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
