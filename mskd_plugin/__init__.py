"""Multi-scale feature decoupling with contrastive learning for MMRazor.

Importing the package makes MMRazor usable on current torch (:mod:`mskd_plugin.host`) and registers
connectors, losses, algorithms, backbones, data sets and hooks. Where none of the host packages is
installed, only :mod:`mskd_plugin.functional` is available, which needs torch alone.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if any(find_spec(name) for name in ("mmengine", "mmcv", "mmpretrain", "mmrazor")):
    from mskd_plugin.host import prepare_host

    prepare_host()
    from mskd_plugin import (  # noqa: F401  (imported to register what they define)
        algorithms,
        backbones,
        connectors,
        data_preprocessor,
        datasets,
        hooks,
        losses,
        networks,
        optim,
        recorders,
        schedule,
    )
