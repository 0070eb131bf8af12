"""Methods as parts of a config, one a file, and how they join."""

from mskd_plugin.recipes.ab import ab
from mskd_plugin.recipes.assemble import alone, distill
from mskd_plugin.recipes.at import at
from mskd_plugin.recipes.cc import cc
from mskd_plugin.recipes.crd import crd
from mskd_plugin.recipes.dist import dist
from mskd_plugin.recipes.dkd import dkd
from mskd_plugin.recipes.fitnet import fitnet
from mskd_plugin.recipes.fsp import fsp
from mskd_plugin.recipes.ft import ft
from mskd_plugin.recipes.kd import kd
from mskd_plugin.recipes.ls_kd import ls_kd
from mskd_plugin.recipes.method import METHODS
from mskd_plugin.recipes.mlkd import mlkd
from mskd_plugin.recipes.mskd import mskd
from mskd_plugin.recipes.nkd import nkd
from mskd_plugin.recipes.nst import nst
from mskd_plugin.recipes.ofa import ofa
from mskd_plugin.recipes.ofd import ofd
from mskd_plugin.recipes.phases import two_phases
from mskd_plugin.recipes.pkt import pkt
from mskd_plugin.recipes.reviewkd import reviewkd
from mskd_plugin.recipes.rkd import rkd
from mskd_plugin.recipes.sdd import sdd_dkd, sdd_kd, sdd_nkd
from mskd_plugin.recipes.sp import sp
from mskd_plugin.recipes.vid import vid
from mskd_plugin.recipes.wsld import wsld

__all__ = [
    "METHODS",
    "ab",
    "alone",
    "at",
    "cc",
    "crd",
    "dist",
    "distill",
    "dkd",
    "fitnet",
    "fsp",
    "ft",
    "kd",
    "ls_kd",
    "mlkd",
    "mskd",
    "nkd",
    "nst",
    "ofa",
    "ofd",
    "pkt",
    "reviewkd",
    "rkd",
    "sdd_dkd",
    "sdd_kd",
    "sdd_nkd",
    "sp",
    "two_phases",
    "vid",
    "wsld",
]
