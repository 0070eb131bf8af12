"""MSKD, ViT-S to ResNet-18, CIFAR-100."""

_base_ = "../_base_/pairs/vit-s_resnet18_cifar100.py"

from mskd_plugin.recipes import distill, mskd

model = distill(_base_, mskd(_base_))
