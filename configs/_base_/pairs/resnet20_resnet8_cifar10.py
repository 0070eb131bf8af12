"""ResNet20 to ResNet8 on CIFAR-10: small enough for a CPU, real enough to compare settings."""

_base_ = [
    "../datasets/cifar10_folder.py",
    "../schedules/cifar10_20e.py",
    "../default_runtime.py",
]

pair = dict(teacher="resnet20", student="resnet8", num_classes=10)
