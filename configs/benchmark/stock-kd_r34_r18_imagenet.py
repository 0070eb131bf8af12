"""KD, ResNet-34 to ResNet-18, ImageNet, as MMRazor ships it, to compare with."""

_base_ = "mmrazor::distill/mmcls/kd/kd_logits_resnet34_resnet18_8xb32_in1k.py"
