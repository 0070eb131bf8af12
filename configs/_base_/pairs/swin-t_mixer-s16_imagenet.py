"""Swin-T (mmpretrain's weights) to Mixer-S/16 on ImageNet."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="swin_t",
    student="mixer_s16",
    teacher_ckpt=_base_.teacher_weights.swin_t,
)
