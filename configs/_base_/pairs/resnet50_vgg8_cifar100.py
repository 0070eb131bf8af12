"""ResNet50 to vgg8 on CIFAR-100; the teacher's weights are given by --teacher.

DKD and ReviewKD take their defaults: no settings are published for this pair.
"""

_base_ = "../cifar100.py"

pair = dict(
    teacher="ResNet50",
    student="vgg8",
    settings=dict(
        ft=dict(init_lr=0.05),
        # Of SDD's published runs of this pair NKD's alone take no scale of 4.
        sdd_nkd=dict(scales=(1, 2)),
    ),
)
