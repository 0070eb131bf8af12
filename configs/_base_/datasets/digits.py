"""Scikit-learn's handwritten digits as 32 x 32 images, in memory."""

# In units of 0..255: mean and deviation of the training images.
data_preprocessor = dict(
    type="ClsDataPreprocessor",
    num_classes=10,
    mean=[78.1, 78.1, 78.1],
    std=[82.4, 82.4, 82.4],
    to_rgb=False,
)

num_train_images = 1198
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="Digits",
        split="train",
        pipeline=[
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="Digits", split="test", pipeline=[dict(type="PackInputs")]),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
