"""vgg13 to vgg8 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="vgg13",
    student="vgg8",
    settings=dict(
        dkd=dict(beta=6.0),
        ls_kd=dict(temperature=3.0),
        ft=dict(init_lr=0.05),
        sdd_kd=dict(scales=(1, 2)),
        sdd_dkd=dict(scales=(1, 2)),
        sdd_nkd=dict(scales=(1, 2)),
    ),
)
