"""SDD on KD, ResNet32x4 to ResNet8x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import distill, sdd_kd

model = distill(_base_, sdd_kd(_base_))
