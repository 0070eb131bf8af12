"""Distillation losses, registered in MMRazor's ``MODELS``."""

from mskd_plugin.losses.attention_transfer import AttentionTransferLoss
from mskd_plugin.losses.correlation_congruence import CorrelationCongruenceLoss
from mskd_plugin.losses.crd import MemoryCRDLoss
from mskd_plugin.losses.dkd import DecoupledKDLoss
from mskd_plugin.losses.factor_transfer import FactorTransferLoss, ParaphraserLoss
from mskd_plugin.losses.fsp import FSPLoss
from mskd_plugin.losses.mlkd import MultiLevelKDLoss
from mskd_plugin.losses.multi_scale_contrastive import MultiScaleContrastiveLoss
from mskd_plugin.losses.neuron_selectivity import NeuronSelectivityLoss
from mskd_plugin.losses.nkd import NormalizedKDLoss
from mskd_plugin.losses.ofa import OFALoss
from mskd_plugin.losses.overhaul import OverhaulLoss
from mskd_plugin.losses.probabilistic_transfer import ProbabilisticTransferLoss
from mskd_plugin.losses.relational import RelationalLoss
from mskd_plugin.losses.review import ReviewKDLoss
from mskd_plugin.losses.sdd import ScaleDecoupledKDLoss
from mskd_plugin.losses.similarity_preserving import SimilarityPreservingLoss
from mskd_plugin.losses.variational_information import VariationalInformationLoss

__all__ = [
    "AttentionTransferLoss",
    "CorrelationCongruenceLoss",
    "DecoupledKDLoss",
    "FSPLoss",
    "FactorTransferLoss",
    "MemoryCRDLoss",
    "MultiLevelKDLoss",
    "MultiScaleContrastiveLoss",
    "NeuronSelectivityLoss",
    "NormalizedKDLoss",
    "OFALoss",
    "OverhaulLoss",
    "ParaphraserLoss",
    "ProbabilisticTransferLoss",
    "RelationalLoss",
    "ReviewKDLoss",
    "ScaleDecoupledKDLoss",
    "SimilarityPreservingLoss",
    "VariationalInformationLoss",
]
