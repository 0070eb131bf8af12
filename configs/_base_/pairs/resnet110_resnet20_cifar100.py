"""resnet110 to resnet20 on CIFAR-100; the teacher's weights are given by --teacher.

DKD's beta is that published for ResNet110 to ResNet32, ReviewKD's weight that for ResNet56 to
ResNet20: none is published for this pair.
"""

_base_ = "../cifar100.py"

pair = dict(
    teacher="resnet110",
    student="resnet20",
    settings=dict(
        dkd=dict(beta=2.0),
        ls_kd=dict(temperature=4.0, loss_weight=12.0),
        reviewkd=dict(loss_weight=0.6),
    ),
)
