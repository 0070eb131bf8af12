"""wrn_40_2 to wrn_16_2 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="wrn_40_2",
    student="wrn_16_2",
    settings=dict(
        dkd=dict(beta=6.0),
    ),
)
