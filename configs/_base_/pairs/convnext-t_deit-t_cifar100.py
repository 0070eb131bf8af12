"""ConvNeXt-T to DeiT-T on CIFAR-100 at 224x224; the teacher's weights are given by --teacher."""

_base_ = "../cifar100_224_vit.py"

pair = dict(teacher="convnext_t", student="deit_t")
