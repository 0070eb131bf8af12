"""Connectors between a recorder and a loss, registered in MMRazor's ``MODELS``."""

from mskd_plugin.connectors.activation_boundary import ActivationBoundaryConnector
from mskd_plugin.connectors.fitnet import FitNetRegressor
from mskd_plugin.connectors.full_precision import FullPrecisionConnector
from mskd_plugin.connectors.logit_standardization import LogitStandardizationConnector
from mskd_plugin.connectors.multi_scale_decoupling import MultiScaleDecouplingConnector
from mskd_plugin.connectors.ofa import OFABranch, OFATokenBranch
from mskd_plugin.connectors.sample_index import SampleIndex
from mskd_plugin.connectors.tokens_to_map import TokensToMapConnector
from mskd_plugin.connectors.vid import VIDRegressor

__all__ = [
    "ActivationBoundaryConnector",
    "FitNetRegressor",
    "FullPrecisionConnector",
    "LogitStandardizationConnector",
    "MultiScaleDecouplingConnector",
    "OFABranch",
    "OFATokenBranch",
    "SampleIndex",
    "TokensToMapConnector",
    "VIDRegressor",
]
