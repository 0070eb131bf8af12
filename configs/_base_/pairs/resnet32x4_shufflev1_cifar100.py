"""resnet32x4 to ShuffleV1 on CIFAR-100; the teacher's weights are given by --teacher."""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet32x4",
    student="ShuffleV1",
    teacher_lr=0.05,
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
