"""The method in plain functions of tensors, which compute with torch alone.

To import them is to import the package, with its hosts.
"""

from mskd_plugin.functional.categorization import consistent_regions
from mskd_plugin.functional.contrastive import (
    ContrastiveTerms,
    multi_scale_contrastive_terms,
)
from mskd_plugin.functional.decoupling import decouple, tokens_to_map, window_bounds
from mskd_plugin.functional.distributed import gather_batch

__all__ = [
    "ContrastiveTerms",
    "consistent_regions",
    "decouple",
    "gather_batch",
    "multi_scale_contrastive_terms",
    "tokens_to_map",
    "window_bounds",
]
