"""Data, schedule and runtime of the ImageNet benchmark."""

_base_ = ["datasets/imagenet.py", "schedules/imagenet_100e.py", "default_runtime.py"]
