"""Swin-T (mmpretrain's weights) to timm's ResMLP-S12 on ImageNet. Needs timm (pip install timm)."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="swin_t",
    student="timm:resmlp_12_224",
    teacher_ckpt=_base_.teacher_weights.swin_t,
)
