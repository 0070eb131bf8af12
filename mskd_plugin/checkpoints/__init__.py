"""Reading weights of any accepted layout, strictly, and the normalisation that they state."""

from mskd_plugin.checkpoints.weights import fit_weights, load_weights, read_checkpoint

__all__ = ["fit_weights", "load_weights", "read_checkpoint"]
