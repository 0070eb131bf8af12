"""Data, schedule and runtime of the CIFAR-100 benchmark."""

_base_ = ["datasets/cifar100.py", "schedules/cifar100_240e.py", "default_runtime.py"]

pair = dict(num_classes=100)
