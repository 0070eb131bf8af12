"""Backbones of the benchmarks, registered in mmpretrain's ``MODELS``."""

from mskd_plugin.backbones.cifar_mobilenet_v2 import CIFARMobileNetV2
from mskd_plugin.backbones.cifar_resnet import CIFARResNet
from mskd_plugin.backbones.cifar_shufflenet_v1 import CIFARShuffleNetV1
from mskd_plugin.backbones.cifar_shufflenet_v2 import CIFARShuffleNetV2
from mskd_plugin.backbones.cifar_vgg import CIFARVGG
from mskd_plugin.backbones.cifar_wide_resnet import CIFARWideResNet
from mskd_plugin.backbones.mobilenet_v1 import MobileNetV1

__all__ = [
    "CIFARMobileNetV2",
    "CIFARResNet",
    "CIFARShuffleNetV1",
    "CIFARShuffleNetV2",
    "CIFARVGG",
    "CIFARWideResNet",
    "MobileNetV1",
]
