"""Small images in memory, cropped and flipped by the batch; ``--in-memory``, or as a second base:

_base_ = ["mskd_resnet32x4_resnet8x4.py", "../_base_/in_memory.py"]
"""

# Bases may not share a key, hence one of its own; mskd_plugin.switches.use_in_memory changes the
# data loaders.
in_memory = True
