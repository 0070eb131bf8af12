"""resnet56 to resnet20 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet56",
    student="resnet20",
    settings=dict(
        dkd=dict(beta=2.0),
        reviewkd=dict(loss_weight=0.6),
    ),
)
