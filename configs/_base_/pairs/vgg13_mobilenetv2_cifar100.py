"""vgg13 to MobileNetV2 on CIFAR-100; the teacher's weights are given by --teacher.

The student's last map has 2 x 2 positions, so MSKD takes no scale of 4.
"""

_base_ = "../cifar100.py"

pair = dict(
    teacher="vgg13",
    student="MobileNetV2",
    teacher_lr=0.05,
    settings=dict(
        dkd=dict(beta=6.0),
        ls_kd=dict(temperature=3.0),
        mskd=dict(scales=(1, 2)),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
