"""ResNet20 to ResNet8 on scikit-learn's handwritten digits; the teacher's weights are given by
--teacher."""

_base_ = [
    "../datasets/digits.py",
    "../schedules/digits.py",
    "../default_runtime.py",
]

pair = dict(teacher="resnet20", student="resnet8", num_classes=10)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=2, max_keep_ckpts=1),
)
