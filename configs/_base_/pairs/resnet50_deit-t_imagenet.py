"""ResNet-50 (torchvision's weights) to DeiT-T on ImageNet."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="resnet50",
    student="deit_t",
    num_classes=1000,
    teacher_ckpt="torchvision://resnet50",
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
