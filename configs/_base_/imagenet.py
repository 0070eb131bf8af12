"""Data, schedule and runtime of the ImageNet benchmark, and the methods' settings there."""

_base_ = ["datasets/imagenet.py", "schedules/imagenet_100e.py", "default_runtime.py"]

# Published settings for ImageNet, where they are not those for CIFAR-100.
pair = dict(
    num_classes=1000,
    settings=dict(
        kd=dict(temperature=1.0, loss_weight=0.5, ce_weight=0.5),
        dkd=dict(temperature=1.0, warmup=1),
        nkd=dict(temperature=1.0, gamma=1.5),
        dist=dict(temperature=1.0),
        mlkd=dict(temperatures=(1.0, 3.0, 5.0, 2.0, 6.0), loss_weight=0.5, ce_weight=1.0),
        ofd=dict(loss_weight=1e-4),
        reviewkd=dict(warmup=1, student_preact=True),
        wsld=dict(temperature=2.0, loss_weight=2.5),
    ),
)
