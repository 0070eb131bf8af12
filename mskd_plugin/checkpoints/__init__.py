"""Reading weights of any accepted layout, strictly, and what a checkpoint states beside them."""
