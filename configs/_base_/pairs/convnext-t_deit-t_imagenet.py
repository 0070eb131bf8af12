"""ConvNeXt-T (mmpretrain's weights) to DeiT-T on ImageNet."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="convnext_t",
    student="deit_t",
    teacher_ckpt=_base_.teacher_weights.convnext_t,
)
