"""ResNet-50 (torchvision's weights) to MobileNetV1 on ImageNet.

Tables of papers call this student MobileNet or MobileNetV2.
"""

_base_ = "../imagenet.py"

pair = dict(
    teacher="resnet50",
    student="mobilenet_v1",
    teacher_ckpt="torchvision://resnet50",
    settings=dict(
        dkd=dict(beta=2.0),
        ls_kd=dict(ce_weight=0.5),
        reviewkd=dict(loss_weight=8.0, max_mid_channels=256),
    ),
)
