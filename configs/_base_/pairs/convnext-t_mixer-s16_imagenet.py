"""ConvNeXt-T (mmpretrain's weights) to Mixer-S/16 on ImageNet."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="convnext_t",
    student="mixer_s16",
    teacher_ckpt=_base_.teacher_weights.convnext_t,
)
