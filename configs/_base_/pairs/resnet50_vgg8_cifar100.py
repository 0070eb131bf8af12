"""ResNet50 to vgg8 on CIFAR-100; the teacher's weights are given by --teacher.

ReviewKD takes its default: no weight is published for this pair. DKD's, 8, is that of SDD's runs of
it.
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
