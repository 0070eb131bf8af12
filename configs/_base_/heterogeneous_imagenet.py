"""What the pairs between the families share on ImageNet."""

_base_ = "heterogeneous.py"

pair = dict(
    num_classes=1000,
    # OFA-KD's script has none of these methods; they have the settings of two CNNs.
    settings=dict(
        ls_kd=dict(ce_weight=1.0),
        mlkd=dict(temperatures=(1.0, 3.0, 5.0, 2.0, 6.0), loss_weight=0.5, ce_weight=1.0),
        nkd=dict(temperature=1.0, gamma=1.5),
        wsld=dict(temperature=2.0, loss_weight=2.5),
    ),
)
