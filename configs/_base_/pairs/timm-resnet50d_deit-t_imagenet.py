"""timm's ResNet-50-D to DeiT-T on ImageNet; timm's weights of the teacher are given by --teacher.

Any convolutional network of timm's can stand here. Needs timm (pip install timm).
"""

_base_ = "../imagenet_vit.py"

pair = dict(
    teacher="timm:resnet50d",
    student="deit_t",
    num_classes=1000,
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
