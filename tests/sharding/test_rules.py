"""Where arrays live: names, rules, splitting by size, and what follows a parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.sharding import Rule, place
from jaxtrain.sharding.rules import spec_text

NAMES = {"up/kernel$": ("embed", "mlp"), "up/bias$": ("mlp",), "down/kernel$": ("mlp", "embed")}


def shapes(**arrays):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in arrays.items()}


def state(params, extra=None, tx=None):
    made = jax.eval_shape((tx or optax.identity()).init, params)
    return State(jax.ShapeDtypeStruct((), jnp.int32), params, extra or {}, made)


PAIR = {
    "up": shapes(kernel=(64, 256), bias=(256,)),
    "down": shapes(kernel=(256, 64)),
}


def mesh(text):
    return sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))


def texts(params, on, **settings):
    placed = place(state(params), mesh(on), **settings)
    return {path: spec_text(leaf) for path, leaf in leaf_paths(placed.shardings.params).items()}


def test_model_splits_by_name_and_fsdp_by_size():
    assert texts(PAIR, "data=2,fsdp=2,model=2", names=NAMES) == {
        "down/kernel": "model fsdp",
        "up/bias": "model",
        "up/kernel": "fsdp model",
    }


def test_names_have_no_effect_without_a_model_axis():
    assert texts(PAIR, "data=8", names=NAMES) == {"down/kernel": "", "up/bias": "", "up/kernel": ""}
    assert texts(PAIR, "fsdp=8", names=NAMES) == texts(PAIR, "fsdp=8")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), "- fsdp"),  # the largest
        ((128, 64), "fsdp"),
        ((64, 64), "fsdp"),  # the first of equals
        ((3, 3, 12, 64), "- - - fsdp"),
        ((4097 * 3, 16), "- fsdp"),  # the largest does not divide
        ((4097, 3), ""),  # none does
        ((4096,), "fsdp"),
        ((8, 511), ""),  # small arrays are not split
        ((8, 512), "- fsdp"),
        ((), ""),
    ],
)
def test_fsdp_splits_the_largest_dimension_it_divides(shape, spec):
    assert texts({"w": shapes(kernel=shape)}, "fsdp=8")["w/kernel"] == spec


def test_large_arrays_that_fsdp_cannot_divide_are_listed():
    params = shapes(odd=(4097, 3), small=(7, 7), even=(64, 128))
    assert place(state(params), mesh("fsdp=8")).unsplit == ("params/odd",)
    assert place(state(params), mesh("data=8")).unsplit == ()


def test_fsdp_joins_model_on_a_dimension_where_no_other_divides():
    names = {"kernel$": (None, "mlp")}
    assert texts(shapes(kernel=(15, 512)), "fsdp=4,model=2", names=names) == {"kernel": "- model+fsdp"}


def test_moments_averages_and_statistics_follow_their_parameter():
    params = PAIR
    stats = {"norm": shapes(mean=(256,), var=(256,))}
    extra = {
        "batch_stats": stats,
        "ema": {"params": params, "batch_stats": stats},
        "loss_scale": shapes(scale=()),
    }
    made = state(params, extra, optax.adamw(1e-3, mask=None))
    names = {**NAMES, "norm/": ("channels",)}
    placed = leaf_paths(place(made, mesh("data=2,fsdp=2,model=2"), names).shardings)
    got = {path: spec_text(leaf) for path, leaf in placed.items()}
    assert got["opt_state/0/mu/up/kernel"] == got["opt_state/0/nu/up/kernel"] == "fsdp model"
    assert got["extra/ema/params/down/kernel"] == "model fsdp"
    assert got["extra/batch_stats/norm/mean"] == got["extra/ema/batch_stats/norm/var"] == "model"
    assert got["opt_state/0/count"] == got["step"] == got["extra/loss_scale/scale"] == ""


def test_optimizer_state_with_another_shape_is_split_by_size():
    """Adafactor keeps a row and a column for a matrix."""
    params = {"big": shapes(kernel=(8192, 4096))}
    placed = leaf_paths(place(state(params, tx=optax.adafactor(1e-3)), mesh("fsdp=8")).shardings)
    got = {path: spec_text(leaf) for path, leaf in placed.items() if "v_row" in path or "v_col" in path}
    assert got and set(got.values()) == {"fsdp"}


def test_rules_of_the_experiment_take_precedence():
    rules = (Rule("mlp", None), Rule("down/kernel$", (("fsdp", "model"), None)))
    assert texts(PAIR, "data=2,fsdp=2,model=2", names=NAMES, rules=rules) == {
        "down/kernel": "fsdp+model",
        "up/bias": "",
        "up/kernel": "- fsdp",
    }


def test_the_first_matching_rule_wins():
    mlp = (Rule("mlp", None), Rule("mlp", "model"))
    rules = (Rule("kernel$", ("fsdp", None)), Rule("up/kernel$", (None, "fsdp")), *mlp)
    got = texts(PAIR, "fsdp=8", names=NAMES, rules=rules)
    assert got["up/kernel"] == got["down/kernel"] == "fsdp"
    rules = (Rule("kernel$", (None, "model")), *mlp)
    assert texts(PAIR, "data=4,model=2", names=NAMES, rules=rules)["up/bias"] == ""


def test_a_rule_can_match_optimizer_state_alone():
    made = state(PAIR, tx=optax.trace(0.9))
    rules = (Rule("^opt_state/.*kernel$", ("data", None)),)
    placed = leaf_paths(place(made, mesh("data=8"), rules=rules).shardings)
    assert spec_text(placed["opt_state/trace/up/kernel"]) == "data"
    assert spec_text(placed["params/up/kernel"]) == ""


@pytest.mark.parametrize(
    ("on", "names", "rules", "message"),
    [
        ("data=4,model=2", {}, (), "no parameter of this model is split over model"),
        ("data=4,model=2", {"up/": ("embed", "mlp"), **NAMES}, (), r"names 2 axes .* params/up/bias \[256\]"),
        (
            "data=4,model=2",
            {"up/kernel$": ("embed", "mlp"), "up/bias$": ("mlp",)},
            (),
            r"no rule says how params/down/kernel \[256, 64\] is split .*Rule\('down/kernel\$'",
        ),
        ("data=4,model=2", {**NAMES, "up/bias$": ("hidden",)}, (), "no rule for the logical axis 'hidden'"),
        ("data=8", NAMES, (Rule("mpl", None),), "no logical axis 'mpl': did you mean mlp"),
        ("data=8", NAMES, (Rule("xyz", "model"),), "'xyz': there are embed, mlp"),
        ("data=8", NAMES, (Rule("mlp", "tensor"),), "no mesh axis is called 'tensor': there are data, fsdp"),
        ("data=8", {}, (Rule("up/kernel", (None, "tensor")),), "no mesh axis is called 'tensor'"),
        ("data=8", {}, (Rule("head/kernel", (None, "fsdp")),), "'head/kernel' matches no array of the state"),
        ("data=8", {}, (Rule("up/kernel", ("fsdp",)),), r"1 entries and params/up/kernel \[64, 256\] has 2"),
        ("data=8", {}, (Rule("up/(kernel", ("fsdp",)),), "rules: .* is not a regular expression"),
        ("data=8", {"up/(kernel": ("embed",)}, (), "logical_axes: .* is not a regular expression"),
        ("data=8", {}, (Rule("mlp", "model"),), "the model has no logical axis 'mlp': there are none"),
        (
            "fsdp=2,model=4",
            {},
            (Rule("up/kernel", ("model", "model")),),
            "rules split two dimensions over one mesh axis",
        ),
    ],
)  # fmt: skip
def test_bad_rules_and_names_are_refused(on, names, rules, message):
    with pytest.raises(InputError, match=message):
        place(state(PAIR), mesh(on), names, rules)


def test_a_misspelt_parameter_name_is_reported():
    names = {"up/kernel$": ("embed", "mlp"), "up/bias$": ("mlp",), "donw/kernel$": ("mlp", "embed")}
    with pytest.raises(InputError, match=r"down/kernel .*\(in which 'donw/kernel\$' matches nothing\)"):
        place(state(PAIR), mesh("data=4,model=2"), names)


def test_a_size_that_does_not_divide_is_refused_with_a_fix():
    params = {"up": shapes(kernel=(64, 6), bias=(6,)), "down": shapes(kernel=(6, 64))}
    with pytest.raises(
        InputError,
        match=r"params/down/kernel \[6, 64\]: mlp of 6 does not divide over model = 4: use a mesh with "
        r"model = 2, change the model's size, or replicate it with sharding.Rule\('mlp', None\)",
    ):
        place(state(params), mesh("data=2,model=4"), NAMES)
    with pytest.raises(InputError, match=r"dimension 1 of 6 .* fsdp×model = 8.*change its rule"):
        place(state(params), mesh("fsdp=2,model=4"), {}, (Rule("up/kernel", (None, ("fsdp", "model"))),))


def test_shardings_place_real_arrays():
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state(PAIR, tx=optax.adam(1e-3)))
    placed = jax.device_put(made, place(made, mesh("fsdp=8")).shardings)
    shard = placed.opt_state[0].mu["up"]["kernel"].addressable_shards[3]
    assert shard.data.shape == (64, 32)
    np.testing.assert_array_equal(shard.index[1], slice(96, 128, None))


def test_logical_axes_as_text_are_refused():
    with pytest.raises(InputError, match=r"has the text 'mlp' for params/up/bias: write \('mlp',\)"):
        place(state({"up": shapes(bias=(64,))}), mesh("model=8"), {"up/bias$": "mlp"})


def test_misspelt_names_and_axes_get_a_suggestion():
    params = {"up": shapes(kernel=(64, 64))}
    with pytest.raises(InputError, match=r"no rule for the logical axis 'mpl' .*did you mean mlp"):
        place(state(params), mesh("model=8"), {"up": ("embed", "mpl")})
    with pytest.raises(InputError, match="no mesh axis is called 'modle': did you mean model"):
        place(state(params), mesh("model=8"), {"up": ("embed", "mlp")}, (Rule("mlp", "modle"),))
