"""The connector of activation boundaries (AB)."""

from __future__ import annotations

from mmrazor.registry import MODELS
from torch import Tensor

from mskd_plugin.connectors.fitnet import FitNetRegressor


@MODELS.register_module()
class ActivationBoundaryConnector(FitNetRegressor):
    """Bring a student's pre-activation map to the channels and the size of the teacher's:
    convolution with bias and batch normalisation.

    Arguments, shapes and errors are those of :class:`FitNetRegressor`, whose ReLU it leaves out.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by
    Hidden Neurons", AAAI 2019, arXiv 1811.03233, with the layers of the CRD benchmark
    (``Connector`` of RepDistiller).
    """

    def forward(self, feature: Tensor) -> Tensor:
        """Return the connected map."""
        connected: Tensor = self.bn(self.conv(feature))
        return connected
