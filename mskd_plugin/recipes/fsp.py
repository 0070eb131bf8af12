"""The flow of the solution procedure (Yim et al., CVPR 2017)."""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import Network, Tap, network
from mskd_plugin.recipes.method import method


@method
def fsp(base: dict, *, loss_weight: float = 1.0, init_epochs: int = 30) -> dict[str, Any]:
    """Match how maps change from stage to stage, then train the student on the task.

    One :class:`mskd_plugin.losses.FSPLoss` for each two consecutive maps, the stem's included.
    Phase 1 trains the student's backbone by their sum alone; phase 2 trains the student by its own
    loss alone. Needs :func:`mskd_plugin.recipes.two_phases`.

    Args:
        base: Config with the ``pair``.
        loss_weight: Weight of the method in phase 1. Default 1: the CRD benchmark's command line
            gives 50, but its code applies no weight in phase 1 and leaves the term out in phase 2.
        init_epochs: Epochs of phase 1. The CRD benchmark takes 30.

    Raises:
        SettingError: If the networks' maps differ in number or channels, or are tokens, or a
            network's stem is not known.
    """
    pair = base["pair"]
    nets = {role: network(pair[role]) for role in ("teacher", "student")}
    if any(net.tokens for net in nets.values()):
        kinds = {role: "tokens" if net.tokens else "maps" for role, net in nets.items()}
        raise SettingError(
            "pair",
            "of networks whose stem and stages are maps (N, C, H, W), for FSP",
            " and ".join(f"{kind} of {pair[role]}" for role, kind in kinds.items()),
        )
    student, teacher = (_taps(base, role, nets[role]) for role in ("student", "teacher"))
    channels = [[width for _, width in taps.values()] for taps in (student, teacher)]
    if channels[0] != channels[1]:
        raise SettingError(
            "pair",
            "of networks with equal channels at the stem and every stage, for FSP",
            f"{channels[0]} in {pair['student']} and {channels[1]} in {pair['teacher']}",
        )
    parts: dict[str, Any] = {
        "student_recorders": _recorders(student),
        "teacher_recorders": _recorders(teacher),
        "distill_losses": {},
        "loss_forward_mappings": {},
    }
    names = list(student)
    for bottom, top in zip(names, names[1:]):
        loss = f"loss_fsp_{top}"
        parts["distill_losses"][loss] = {"type": "FSPLoss", "loss_weight": loss_weight}
        parts["loss_forward_mappings"][loss] = {
            f"{role}_{place}": {"recorder": name, "from_student": role == "student"}
            for role in ("student", "teacher")
            for place, name in (("bottom", bottom), ("top", top))
        }
    parts["phases"] = {
        "init_losses": list(parts["distill_losses"]),
        "init_modules": ["architecture.backbone"],
        "init_epochs": init_epochs,
    }
    return parts


def _taps(base: dict, role: str, net: Network) -> dict[str, Tap]:
    pair = base["pair"]
    if net.stem is None:
        raise SettingError(
            f"pair.{role}",
            "a network whose map before the first stage is known, for FSP",
            f"{pair[role]!r} in {pair['teacher']} to {pair['student']}",
        )
    stages = {f"stage{index}": tap for index, tap in enumerate(net.stages, start=1)}
    return {"stem": net.stem, **stages}


def _recorders(taps: dict[str, Tap]) -> dict[str, Any]:
    return {name: {"type": "ModuleOutputs", "source": source} for name, (source, _) in taps.items()}
