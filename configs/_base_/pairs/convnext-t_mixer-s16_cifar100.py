"""ConvNeXt-T to Mixer-S/16 on CIFAR-100 at 224x224.

The teacher's weights are given by --teacher.
"""

_base_ = "../cifar100_224_vit.py"

pair = dict(teacher="convnext_t", student="mixer_s16")
