"""Swin-T to ResNet-18 on CIFAR-100 at 224x224; the teacher's weights are given by --teacher."""

_base_ = "../cifar100_224_cnn.py"

pair = dict(
    teacher="swin_t",
    student="resnet18",
    num_classes=100,
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
