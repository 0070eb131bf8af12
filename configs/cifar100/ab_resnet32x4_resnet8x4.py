"""AB, ResNet32x4 to ResNet8x4, CIFAR-100."""

_base_ = "../_base_/pairs/resnet32x4_resnet8x4_cifar100.py"

from mskd_plugin.recipes import ab, distill, two_phases

model = distill(_base_, ab(_base_))
globals().update(two_phases(_base_, ab(_base_)))
