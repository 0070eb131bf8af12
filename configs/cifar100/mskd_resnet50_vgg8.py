"""MSKD, ResNet50 to vgg8, CIFAR-100."""

_base_ = "../_base_/pairs/resnet50_vgg8_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
