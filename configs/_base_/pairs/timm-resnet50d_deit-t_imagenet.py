"""timm's ResNet-50-D to DeiT-T on ImageNet; timm's weights of the teacher are given by --teacher.

Any convolutional network of timm's can stand here. Needs timm (pip install timm).
"""

_base_ = "../imagenet_vit.py"

pair = dict(teacher="timm:resnet50d", student="deit_t")
