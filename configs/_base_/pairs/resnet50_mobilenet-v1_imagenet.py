"""ResNet-50 (torchvision's weights) to MobileNetV1 on ImageNet.

Tables of papers call this student MobileNet or MobileNetV2.
"""

_base_ = "../imagenet.py"

pair = dict(
    teacher="resnet50",
    student="mobilenet_v1",
    num_classes=1000,
    teacher_ckpt="torchvision://resnet50",
    # Published settings for ImageNet, where they are not those for CIFAR-100.
    settings=dict(
        kd=dict(temperature=1.0, loss_weight=0.5, ce_weight=0.5),
        dkd=dict(temperature=1.0, beta=2.0, warmup=1),
        nkd=dict(warmup=1),
        dist=dict(temperature=1.0),
        ofd=dict(loss_weight=1e-4),
        reviewkd=dict(loss_weight=8.0, warmup=1, student_preact=True, max_mid_channels=256),
        wsld=dict(temperature=2.0, loss_weight=2.5),
    ),
)
