from fxsparse.globs import matches, unmatched


def test_a_glob_names_full_names_and_modules_above_them():
    assert matches("layer4.*", "layer4.0.conv1.weight")
    assert matches("head", "head.weight")
    assert matches("*.conv1", "layer4.0.conv1.weight")
    assert matches("in_proj_weight", "in_proj_weight")


def test_a_module_prefix_does_not_name_a_longer_module():
    assert not matches("layer1", "layer10.weight")
    assert not matches("head", "backbone.head.weight")


def test_unmatched_keeps_the_order_of_the_globs():
    assert unmatched(["b", "head", "a"], iter(["head.weight"])) == ["b", "a"]
