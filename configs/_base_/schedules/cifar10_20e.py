"""A short schedule for comparing settings: 20 epochs of one-cycle SGD, batch 128."""

epochs = 20

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = dict(
    type="OneCycleLR",
    eta_max=0.2,
    total_steps=epochs,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128, enable=False)
