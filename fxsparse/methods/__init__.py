"""Methods of sparse training and of one-shot pruning, one a file: functions that return a Method."""

from fxsparse.ablation import srigl_fan_in
from fxsparse.method import from_dict
from fxsparse.methods.gmp import gmp
from fxsparse.methods.gse import gse
from fxsparse.methods.rigl import rigl
from fxsparse.methods.set_ import set_
from fxsparse.methods.sparsegpt import sparsegpt
from fxsparse.methods.spartan import dual_averaging, imp, spartan
from fxsparse.methods.sr_ste import sr_ste
from fxsparse.methods.srigl import srigl
from fxsparse.methods.static import static
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
)  # what the contract tests run over

__all__ = [
    "METHODS",
    "dual_averaging",
    "from_dict",
    "gmp",
    "gse",
    "imp",
    "rigl",
    "set_",
    "sparsegpt",
    "spartan",
    "sr_ste",
    "srigl",
    "srigl_fan_in",
    "static",
    "wanda",
]
