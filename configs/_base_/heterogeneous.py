"""What all pairs between CNN, ViT and MLP families share."""

pair = dict(
    label_smoothing=0.1,
    # Those of OFA-KD's training script for both data sets.
    settings=dict(
        kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0),
        crd=dict(loss_weight=1.0),
        dist=dict(temperature=1.0, loss_weight=1.0),
        dkd=dict(temperature=1.0, beta=2.0, warmup=0),
    ),
)
