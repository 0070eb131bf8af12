"""Mixer-B/16 (mmpretrain's weights) to DeiT-T on ImageNet."""

_base_ = "../imagenet_vit.py"

# As the published teacher was trained. What the augmentation erases is still filled with ImageNet's
# mean and std.
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)

pair = dict(
    teacher="mixer_b16",
    student="deit_t",
    teacher_ckpt=_base_.teacher_weights.mixer_b16,
)
