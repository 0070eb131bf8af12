"""Swin-T (mmpretrain's weights) to ResNet-18 on ImageNet."""

_base_ = "../imagenet_cnn.py"

pair = dict(
    teacher="swin_t",
    student="resnet18",
    teacher_ckpt=_base_.teacher_weights.swin_t,
)
