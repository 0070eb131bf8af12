"""Mixer-B/16 to ResNet-18 on CIFAR-100 at 224x224; the teacher's weights are given by --teacher."""

_base_ = "../cifar100_224_cnn.py"

pair = dict(teacher="mixer_b16", student="resnet18")
