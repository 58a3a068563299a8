import pytest

from fxsparse.method import Method
from fxsparse.methods import (
    METHODS,
    acdc,
    chase,
    cht,
    dsr,
    dtp,
    dual_averaging,
    feather,
    gmp,
    granet,
    gse,
    hypersparse,
    imp,
    mest,
    movement,
    mst,
    rigl,
    s_ste,
    set_,
    snfs,
    soft_movement,
    sparsegpt,
    spartan,
    sr_ste,
    srigl,
    static,
    str_,
    supermask,
    top_kast,
    wanda,
)
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Strided, Unstructured
from fxsparse.testing import check_method

FAST = {
    "static": static(),
    "set": set_(every=1),
    "rigl": rigl(every=1, stop=1000),
    "srigl": srigl(every=1, stop=1000),
    "srigl without ablation": srigl(every=1, stop=1000, ablate=False),
    "srigl, authors' code": srigl(every=1, stop=1000, preset="srigl_repo"),
    "gse": gse(every=1, stop=1000),
    "gse, grabo": gse(every=1, stop=1000, sampling="grabo"),
    "gse, graest, all layers": gse(every=1, stop=1000, sampling="graest", scope="global"),
    "gmp": gmp(start=0, stop=999, every=1),
    "sr_ste": sr_ste(),
    "spartan": spartan(steps=1250),
    "dual averaging": dual_averaging(steps=1250),
    "imp": imp(steps=1250),
    "wanda": wanda(),
    "sparsegpt": sparsegpt(),
    "acdc": acdc(
        steps=2000,
        compress=tuple(k / 1000 for k in range(1, 1000, 2)),
        decompress=tuple(k / 1000 for k in range(2, 1000, 2)),
    ),
    "granet": granet(every=1, start=0, ramp=500, stop=1100),
    "feather": feather(steps=1100),
    "top_kast": top_kast(every=1),
    "str": str_(initial=-1.0),
    "movement": movement(steps=1100, warmup=50, cooldown=100),
    "mest": mest(steps=1100, every=1),
    "snfs": snfs(every=1, stop=1100),
    "dsr": dsr(every=1),
    "s_ste": s_ste(),
    "hypersparse": hypersparse(cut=5, start=1),
    "cht": cht(every=1, steps=1100),
    "chase": chase(every=1, stop=1100, channel_every=2, channel_stop=1000),
    "soft_movement": soft_movement(steps=1100, warmup=50, cooldown=100),
    "dtp": dtp(),
    "supermask": supermask(),
    "mst": mst((0.5, 0.95), (100, 400), restore=800, stop=1100, every=1),
}
PATTERNS = [Unstructured(), ConstantFanIn(), NM(2, 4), Block(2, 4), Strided(4)]


def pairs(methods):
    """Every method with every pattern that it trains."""
    return [
        pytest.param(method, pattern, id=f"{name}, {pattern}")
        for name, method in methods.items()
        for pattern in PATTERNS
        if method.pattern is None or type(pattern) is type(method.pattern)
    ]


@pytest.mark.parametrize(("method", "pattern"), pairs(FAST))
def test_nnz_is_exact_after_a_thousand_updates(method: Method, pattern: Pattern) -> None:
    check_method(method, pattern, shape=(6, 8), nnz=19, updates=1000)


@pytest.mark.parametrize(("method", "pattern"), pairs({build().name: build() for build in METHODS}))
def test_defaults_keep_the_contract_on_a_convolution(method: Method, pattern: Pattern) -> None:
    check_method(method, pattern, shape=(4, 8, 2, 2), nnz=50, updates=20)


def test_every_exported_method_runs_a_thousand_updates_here() -> None:
    assert {build().name for build in METHODS} == {method.name for method in FAST.values()}
