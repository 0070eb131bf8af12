"""Networks by name, as mmpretrain classifiers, and where their maps can be recorded."""

from mskd_plugin.networks.by_name import NETWORKS, classifier, network
from mskd_plugin.networks.description import Network, Tap
from mskd_plugin.networks.necks import TokenPooling

__all__ = ["NETWORKS", "Network", "Tap", "TokenPooling", "classifier", "network"]
