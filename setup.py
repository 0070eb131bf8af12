"""Installation: ``pip install -e .`` into an environment of one's own, or ``make .venv`` for a
complete one.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "mskd_plugin" / "__init__.py").read_text(encoding="utf-8")
README = ROOT / "README.md"

# mmcv is missing here on purpose: `mmcv` and `mmcv-lite` own the same folder, so asking for either
# would overwrite the other. mskd_plugin.requirements says at import which command brings it where
# it is missing.
REQUIREMENTS = [
    "torch>=2.1",
    "torchvision>=0.16",
    "mmengine>=0.10.4,<1",
    "mmpretrain>=1.2.0,<2",
    "mmrazor>=1.0.0,<1.1",
    "joblib",  # imported by mmrazor, which does not declare it
    "numpy",
    "packaging",
    "setuptools<81",  # mmengine imports pkg_resources
    "tensorboard",  # every training of configs/ logs to it
]
EXTRAS = {
    "mmcv-lite": ["mmcv-lite==2.1.0"],
    "demo": ["scikit-learn", "matplotlib"],
    "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "safetensors"],
}

setup(
    name="mskd-plugin",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1),
    description="Contrastive distillation by multi-scale feature decoupling, for MMRazor",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mskd_plugin*"]),
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
