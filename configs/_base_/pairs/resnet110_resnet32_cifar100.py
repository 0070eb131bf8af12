"""resnet110 to resnet32 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet110",
    student="resnet32",
    settings=dict(
        dkd=dict(beta=2.0),
        reviewkd=dict(loss_weight=1.0),
    ),
)
