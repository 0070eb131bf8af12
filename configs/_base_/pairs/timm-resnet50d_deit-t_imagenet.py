"""timm's ResNet-50-D to DeiT-T on ImageNet; timm's weights of the teacher are given by --teacher.

Most of timm's convolutional and token networks can stand here, as teacher or student; one that
cannot is refused. Needs timm (pip install timm). A network that timm normalises otherwise needs the
data_preprocessor to say so.
"""

_base_ = "../imagenet_vit.py"

pair = dict(teacher="timm:resnet50d", student="deit_t")
