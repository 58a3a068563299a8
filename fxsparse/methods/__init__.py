"""Methods of sparse training and of one-shot pruning, one a file: functions that return a Method."""

from fxsparse.ablation import srigl_fan_in
from fxsparse.method import from_dict
from fxsparse.methods.acdc import acdc
from fxsparse.methods.chase import chase
from fxsparse.methods.cht import cht
from fxsparse.methods.dsr import dsr
from fxsparse.methods.dtp import dtp
from fxsparse.methods.feather import feather
from fxsparse.methods.gmp import gmp
from fxsparse.methods.granet import granet
from fxsparse.methods.gse import gse
from fxsparse.methods.hypersparse import hypersparse
from fxsparse.methods.mest import mest
from fxsparse.methods.movement import movement
from fxsparse.methods.mst import mst
from fxsparse.methods.rigl import rigl
from fxsparse.methods.s_ste import s_ste
from fxsparse.methods.set_ import set_
from fxsparse.methods.snfs import snfs
from fxsparse.methods.soft_movement import soft_movement
from fxsparse.methods.sparsegpt import sparsegpt
from fxsparse.methods.spartan import dual_averaging, imp, spartan
from fxsparse.methods.sr_ste import sr_ste
from fxsparse.methods.srigl import srigl
from fxsparse.methods.static import static
from fxsparse.methods.str_ import str_
from fxsparse.methods.supermask import supermask
from fxsparse.methods.top_kast import top_kast
from fxsparse.methods.wanda import wanda

METHODS = (
    static,
    set_,
    rigl,
    srigl,
    gse,
    spartan,
    dual_averaging,
    imp,
    gmp,
    sr_ste,
    wanda,
    sparsegpt,
    acdc,
    granet,
    feather,
    top_kast,
    str_,
    movement,
    mest,
    snfs,
    dsr,
    s_ste,
    hypersparse,
    cht,
    chase,
    soft_movement,
    dtp,
    supermask,
    mst,
)  # what the contract tests run over

__all__ = [
    "METHODS",
    "acdc",
    "chase",
    "cht",
    "dsr",
    "dtp",
    "dual_averaging",
    "feather",
    "from_dict",
    "gmp",
    "granet",
    "gse",
    "hypersparse",
    "imp",
    "mest",
    "movement",
    "mst",
    "rigl",
    "s_ste",
    "set_",
    "snfs",
    "soft_movement",
    "sparsegpt",
    "spartan",
    "sr_ste",
    "srigl",
    "srigl_fan_in",
    "static",
    "str_",
    "supermask",
    "top_kast",
    "wanda",
]
