"""What all pairs between CNN, ViT and MLP families share."""

pair = dict(
    label_smoothing=0.1,
    # Both terms have the weight 1 in the published runs.
    settings=dict(kd=dict(temperature=1.0, loss_weight=1.0, ce_weight=1.0)),
)
