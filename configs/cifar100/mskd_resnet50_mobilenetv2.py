"""MSKD, ResNet50 to MobileNetV2, CIFAR-100."""

_base_ = "../_base_/pairs/resnet50_mobilenetv2_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
