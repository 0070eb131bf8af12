"""ResNet32x4 to ResNet8x4 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet32x4",
    student="resnet8x4",
    settings=dict(
        sdd_kd=dict(scales=(1, 2)),
        sdd_dkd=dict(scales=(1, 2)),
        sdd_nkd=dict(scales=(1, 2)),
    ),
)
