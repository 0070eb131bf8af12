"""KD, ResNet20 to ResNet8, CIFAR-10 image files."""

_base_ = "../_base_/pairs/resnet20_resnet8_cifar10.py"

from mskd_plugin.recipes import distill, kd

model = distill(_base_, kd(_base_))
