"""Reading weights of any accepted layout, strictly, and the normalisation that they state."""
