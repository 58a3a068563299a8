"""Sparse-training methods, one a file: functions that return a Method."""

from fxsparse.ablation import srigl_fan_in
from fxsparse.method import from_dict
from fxsparse.methods.gmp import gmp
from fxsparse.methods.gse import gse
from fxsparse.methods.rigl import rigl
from fxsparse.methods.set_ import set_
from fxsparse.methods.sr_ste import sr_ste
from fxsparse.methods.srigl import srigl
from fxsparse.methods.static import static

METHODS = (static, set_, rigl, srigl, gse, gmp, sr_ste)  # what the contract tests run over

__all__ = ["METHODS", "from_dict", "gmp", "gse", "rigl", "set_", "sr_ste", "srigl", "srigl_fan_in", "static"]
