"""What the pairs between the families share on ImageNet."""

_base_ = "heterogeneous.py"

pair = dict(
    num_classes=1000,
    # OFA-KD's script has neither method; these are the settings of two CNNs.
    settings=dict(
        nkd=dict(warmup=1),
        wsld=dict(temperature=2.0, loss_weight=2.5),
    ),
)
