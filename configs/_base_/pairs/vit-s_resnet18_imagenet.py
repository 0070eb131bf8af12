"""ViT-S (mmpretrain's DeiT-S) to ResNet-18 on ImageNet."""

_base_ = "../imagenet_cnn.py"

pair = dict(
    teacher="vit_s",
    student="resnet18",
    teacher_ckpt=_base_.teacher_weights.vit_s,
)
