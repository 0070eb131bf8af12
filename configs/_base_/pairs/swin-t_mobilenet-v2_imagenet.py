"""Swin-T (mmpretrain's weights) to MobileNetV2 on ImageNet."""

_base_ = "../imagenet_cnn.py"

pair = dict(
    teacher="swin_t",
    student="mobilenet_v2",
    teacher_ckpt=_base_.teacher_weights.swin_t,
)
