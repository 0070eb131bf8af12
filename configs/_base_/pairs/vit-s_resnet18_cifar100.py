"""ViT-S to ResNet-18 on CIFAR-100 at 224x224; the teacher's weights are given by --teacher."""

_base_ = "../cifar100_224_cnn.py"

pair = dict(teacher="vit_s", student="resnet18")
