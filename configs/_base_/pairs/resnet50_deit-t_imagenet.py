"""ResNet-50 (torchvision's weights) to DeiT-T on ImageNet."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="resnet50",
    student="deit_t",
    teacher_ckpt=_base_.teacher_weights.resnet50,
)
