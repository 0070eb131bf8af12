"""Runner, hooks and logs of every config."""

custom_imports = dict(imports=["mskd_plugin"], allow_failed_imports=False)
default_scope = "mmpretrain"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    # Has the switches channels_last and compile, off; fast.py sets all that there are.
    networks=dict(type="FastNetworksHook"),
)
custom_hooks = [
    dict(type="PreflightHook"),
    dict(type="EpochSeedHook"),
    dict(type="TeacherIdentityHook"),
    dict(type="TeacherEvaluationHook"),
    dict(type="MissedValidationHook"),
    dict(type="LossWarmupHook"),
    dict(type="PhaseHook"),
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(
    type="UniversalVisualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=0)
