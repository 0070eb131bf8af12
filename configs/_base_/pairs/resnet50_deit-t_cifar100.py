"""ResNet-50 to DeiT-T on CIFAR-100 at 224x224; the teacher's weights are given by --teacher."""

_base_ = "../cifar100_224_vit.py"

pair = dict(
    teacher="resnet50",
    student="deit_t",
    num_classes=100,
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
