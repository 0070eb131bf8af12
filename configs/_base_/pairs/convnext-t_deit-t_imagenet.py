"""ConvNeXt-T to DeiT-T on ImageNet; the teacher's weights are given by --teacher."""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="convnext_t",
    student="deit_t",
    num_classes=1000,
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
