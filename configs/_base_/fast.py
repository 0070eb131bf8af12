"""The switches of the fast loop, merged over a config by ``--fast``, or as its second base:

_base_ = ["mskd_r34_r18_imagenet.py", "_base_/fast.py"]

Each is a setting of its own and stands alone, too. ``--cfg-options`` are read after these, so
``--fast --cfg-options default_hooks.networks.compile=False`` leaves one out. Data loaders stay as
they are: their memory is pinned where the data need it, and workers that persisted would not resume
exactly.
"""

# Bases may not share a key, hence one of its own; mskd_plugin.switches.use_fast takes it apart.
fast = dict(
    optim_wrapper=dict(
        # On a GPU without bfloat16 --amp's other wrapper, in float16.
        type="BFloat16OptimWrapper",
        # Where torch has the kernels for optimizer and device.
        optimizer=dict(fused=True),
    ),
    # Of a distillation with a frozen teacher.
    model=dict(teacher_inference_mode=True),
    # Labels as one tensor and copies that nobody waits for, where labels are classes.
    train_dataloader=dict(collate_fn=dict(type="collate_batch")),
    data_preprocessor=dict(type="mmpretrain.BatchDataPreprocessor"),
    default_hooks=dict(
        networks=dict(
            type="FastNetworksHook",
            channels_last=True,
            compile=dict(dynamic=False),
            compile_losses=dict(dynamic=False),
        ),
        runtime_info=dict(type="DeferredRuntimeInfoHook"),
    ),
)
