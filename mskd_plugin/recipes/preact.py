"""Where recipes tap the maps before the ReLU.

Recorders are ``stage<k>_preact``, the stage counted from 1 in the student, and for the parameters
of the teacher's last normalisation before it ``stage<k>_norm_weight`` and ``stage<k>_norm_bias``.
"""

from __future__ import annotations

from typing import Any

from mskd_plugin.errors import SettingError
from mskd_plugin.networks import network
from mskd_plugin.recipes.taps import StagePair


def preact_pairs(base: dict, method: str) -> list[StagePair]:
    """Pair the pre-activation maps of both networks' stages, counted from the last one.

    Args:
        base: Config with the ``pair``.
        method: Name of the method, for the error.

    Raises:
        SettingError: If a network has no such maps.
    """
    taps = []
    for role in ("student", "teacher"):
        taps.append(network(base["pair"][role]).preact_stages)
        if not taps[-1]:
            raise SettingError(
                f"pair.{role}",
                f"a network whose maps before the ReLU are known, for {method}",
                f"{base['pair'][role]!r} in {base['pair']['teacher']} to {base['pair']['student']}",
            )
    student, teacher = taps
    depth = min(len(student), len(teacher))
    return [
        StagePair(f"stage{len(student) + index + 1}", index, *student[index], *teacher[index])
        for index in range(-depth, 0)
    ]


def preact_recorders(pairs: list[StagePair]) -> dict[str, Any]:
    """Return the recorders of both networks' maps before the ReLU, as parts of a method."""
    return {
        f"{role}_recorders": {
            f"{pair.name}_preact": {
                "type": "PreActivation",
                "source": getattr(pair, f"{role}_source"),
            }
            for pair in pairs
        }
        for role in ("student", "teacher")
    }


def preact(pair: StagePair, from_student: bool) -> dict[str, Any]:
    """Return the mapping of a stage's map before the ReLU."""
    return {"recorder": f"{pair.name}_preact", "from_student": from_student}
