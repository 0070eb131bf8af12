"""The teacher ResNet50, CIFAR-100."""

_base_ = "../_base_/pairs/resnet50_vgg8_cifar100.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
