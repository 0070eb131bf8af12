"""The teacher ResNet20, CIFAR-10 image files, all 50,000 of them."""

_base_ = "../_base_/pairs/resnet20_resnet8_cifar10.py"

from mskd_plugin.recipes import alone

model = alone(_base_, "teacher")
train_dataloader = dict(dataset=dict(indices=None))
