"""Published weights of teachers on ImageNet: torchvision's and mmpretrain's, with its top-1.

All but Mixer-B/16 were trained on images normalised as in datasets/imagenet.py.
"""

OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0"

teacher_weights = dict(
    resnet50="torchvision://resnet50",
    # 82.14
    convnext_t=f"{OPENMMLAB}/convnext/convnext-tiny_32xb128_in1k_20221207-998cf3e9.pth",
    # 76.68
    mixer_b16=f"{OPENMMLAB}/mlp-mixer/mixer-base-p16_3rdparty_64xb64_in1k_20211124-1377e3e0.pth",
    # 81.18
    swin_t=f"{OPENMMLAB}/swin-transformer/"
    "swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth",
    # 80.69, called DeiT-S there
    vit_s=f"{OPENMMLAB}/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth",
)

del OPENMMLAB  # no setting of a run
