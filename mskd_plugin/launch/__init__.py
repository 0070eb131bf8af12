"""What the command line tools share: a checked config with their options, and its runner."""

from mskd_plugin.checkpoints.newest import newest_checkpoint
from mskd_plugin.launch.config import (
    CONFIG_SUFFIXES,
    TESTING,
    TRAINING,
    image_side,
    is_distillation,
    keep_student_only,
    load_config,
    read_config,
    set_teacher,
    use_method,
)
from mskd_plugin.launch.dry_run import dry_run
from mskd_plugin.launch.options import Count, add_common_options, add_overrides, add_switches
from mskd_plugin.launch.runner import build_datasets, build_runner
from mskd_plugin.launch.work_dir import check_work_dir, set_resume, work_dir_held

__all__ = [
    "CONFIG_SUFFIXES",
    "TESTING",
    "TRAINING",
    "Count",
    "add_common_options",
    "add_overrides",
    "add_switches",
    "build_datasets",
    "build_runner",
    "check_work_dir",
    "dry_run",
    "image_side",
    "is_distillation",
    "keep_student_only",
    "load_config",
    "newest_checkpoint",
    "read_config",
    "set_resume",
    "set_teacher",
    "use_method",
    "work_dir_held",
]
