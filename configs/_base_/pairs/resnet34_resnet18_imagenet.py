"""ResNet-34 (torchvision's weights) to ResNet-18 on ImageNet."""

_base_ = "../imagenet.py"

pair = dict(
    teacher="resnet34",
    student="resnet18",
    teacher_ckpt="torchvision://resnet34",
    settings=dict(
        dkd=dict(beta=0.5),
        ls_kd=dict(ce_weight=1.0),
        reviewkd=dict(loss_weight=1.0),
        sdd_kd=dict(scales=(1, 2)),
        sdd_dkd=dict(scales=(1, 2)),
        sdd_nkd=dict(scales=(1, 2)),
    ),
)
