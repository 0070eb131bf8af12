"""What is checked before a training: each failure is one clear error, none costs training time.

A file for each subject. Checks take the config, or the runner and its model; what may be meant is a
warning. :func:`mskd_plugin.launch.build_runner` and :class:`mskd_plugin.hooks.PreflightHook` call
them, tools some before. That of a warm-up is beside its hook, which it looks for.
"""
