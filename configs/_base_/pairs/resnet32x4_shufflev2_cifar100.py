"""resnet32x4 to ShuffleV2 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet32x4",
    student="ShuffleV2",
    teacher_lr=0.05,
    settings=dict(
        reviewkd=dict(loss_weight=8.0),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
