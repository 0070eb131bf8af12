"""The tolerances of every numerical test, by the precision that the arithmetic runs in."""

from __future__ import annotations

import torch
from torch import Tensor

#: dtype -> (rtol, atol). bfloat16 holds 8 bits, and a temperature of 0.1 makes ten of each error.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (4e-2, 4e-2),
}


def assert_close(
    actual: Tensor | float | list,
    expected: Tensor | float | list,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Assert equal shapes, and values equal within the tolerance of ``dtype``."""
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64).detach(),
        torch.as_tensor(expected, dtype=torch.float64).detach(),
        rtol=rtol,
        atol=atol,
    )
