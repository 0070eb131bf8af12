"""ResNet-34 (torchvision's weights) to ResNet-18 on ImageNet."""

_base_ = "../imagenet.py"

pair = dict(
    teacher="resnet34",
    student="resnet18",
    num_classes=1000,
    teacher_ckpt="torchvision://resnet34",
    # Published settings for ImageNet, where they are not those for CIFAR-100.
    settings=dict(
        kd=dict(temperature=1.0, loss_weight=0.5, ce_weight=0.5),
        dkd=dict(temperature=1.0, beta=0.5, warmup=1),
        nkd=dict(warmup=1),
        dist=dict(temperature=1.0),
        reviewkd=dict(loss_weight=1.0, warmup=1, student_preact=True),
        sdd_kd=dict(scales=(1, 2)),
        sdd_dkd=dict(scales=(1, 2)),
        sdd_nkd=dict(scales=(1, 2)),
        wsld=dict(temperature=2.0, loss_weight=2.5),
    ),
)
