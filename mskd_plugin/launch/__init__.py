"""What the command line tools share: a checked config with their options, and its runner."""

from mskd_plugin.launch.config import (
    CONFIG_SUFFIXES,
    is_distillation,
    keep_student_only,
    load_config,
    set_teacher,
    use_method,
)
from mskd_plugin.launch.options import add_common_options, add_overrides, add_switches
from mskd_plugin.launch.resume import check_work_dir, newest_checkpoint, set_resume
from mskd_plugin.launch.runner import build_datasets, build_runner

__all__ = [
    "CONFIG_SUFFIXES",
    "add_common_options",
    "add_overrides",
    "add_switches",
    "build_datasets",
    "build_runner",
    "check_work_dir",
    "is_distillation",
    "keep_student_only",
    "load_config",
    "newest_checkpoint",
    "set_resume",
    "set_teacher",
    "use_method",
]
