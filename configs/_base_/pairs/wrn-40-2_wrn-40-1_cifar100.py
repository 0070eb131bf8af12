"""wrn_40_2 to wrn_40_1 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="wrn_40_2",
    student="wrn_40_1",
    settings=dict(
        dkd=dict(beta=6.0),
    ),
)
