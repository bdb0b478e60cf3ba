"""Rows as data, and the table."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import nnx

import hessjax as hj


def test_numbers_are_those_of_numpy():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 5)).astype(np.float32), "b": rng.normal(2, 3, 7).astype(np.float32)}
    params["a"][0] = 0
    result = hj.summary(params)
    bag = np.concatenate([params["a"].ravel(), params["b"]]).astype(np.float64)
    a, total = result.rows[0], result.total
    assert (a.path, a.shape, a.number, a.nonzeros, a.sparsity) == ("a", (4, 5), 20, 15, 0.25)
    assert (total.path, total.number, total.nonzeros) == ("total", 27, 22)
    np.testing.assert_allclose(
        total[-4:], [5 / 27, bag.std(), bag.mean(), np.abs(bag).mean()], rtol=1e-6, atol=1e-7
    )


def test_linen_nnx_and_bfloat16():
    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    assert [r.shape for r in hj.summary(linen).rows] == [(3,), (2, 3)]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert [r.shape for r in hj.summary(state).rows] == [(3,), (2, 3)]
    many = jnp.ones((1000,), jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    assert hj.summary(many).total.mean == 1.0
    assert hj.summary(many).rows[0].path == "."


def test_table_is_aligned_and_plain():
    result = hj.summary({"layer": {"kernel": jnp.zeros((3, 3, 16, 32)), "scale": jnp.ones(())}})
    lines = result.to_text(120).splitlines()
    assert str(result) == repr(result)
    assert lines[0].split()[:2] == ["Name", "Shape"]
    assert "3×3×16×32" in lines[1]
    assert "4,608" in lines[1]
    assert lines[-1].startswith("total")
    assert len({len(line) for line in lines}) == 1
    assert "\x1b" not in str(result)


def test_rich_prints_it_with_style():
    out = io.StringIO()
    rich.console.Console(file=out, force_terminal=True, width=100).print(hj.summary(jnp.ones((2, 2))))
    assert "\x1b[1m" in out.getvalue()


def test_names_are_shown_as_they_are():
    text = str(hj.summary({"w[a]": jnp.ones(2), "x[/a]": jnp.ones(2)}))
    assert "w[a]" in text
    assert "x[/a]" in text


def test_empty_leaves():
    result = hj.summary({"a": jnp.ones((2,)), "e": jnp.ones((0, 3))})
    assert result.rows[1].sparsity == 0.0
    assert np.isnan(result.rows[1].mean)
    assert result.total.mean == 1.0


def test_bad_trees():
    with pytest.raises(TypeError, match="step: int32"):
        hj.summary({"step": jnp.zeros((), jnp.int32), "w": jnp.ones(2)})
    with pytest.raises(ValueError, match="at least one number"):
        hj.summary({})


def count_zero_parts(kernel):
    """By the definition, one by one: columns, rows, channels, kernels, filters."""
    if kernel.ndim == 2:
        return [np.mean([not c.any() for c in kernel.T]), np.mean([not r.any() for r in kernel]), 0, 0, 0]
    ins, outs = kernel.shape[-2:]
    channels = np.mean([not kernel[..., i, :].any() for i in range(ins)])
    filters = np.mean([not kernel[..., o].any() for o in range(outs)])
    return [0, 0, channels, np.mean(
        [not kernel[..., i, o].any() for i in range(ins) for o in range(outs)]
    ), filters]  # fmt: skip


def test_structures_are_counted_as_defined():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in
              {"conv": (3, 4, 5), "dense": (6, 5), "plane": (3, 3, 4, 6),
               "scale": (7,)}.items()}  # fmt: skip
    params["dense"][[0, 2]] = 0
    params["dense"][:, 1] = 0
    params["conv"][..., 1, :] = 0
    params["plane"][..., 2] = 0
    params["plane"][..., :2, 3] = 0
    params["plane"][..., 0, 4] = 0
    params["plane"][1, 1, 0, 0] = 0
    result = hj.summary(params)
    for row in result.rows[:3]:
        np.testing.assert_allclose(row[6:11], count_zero_parts(params[row.path]))
    assert result.rows[3][6:11] == (0,) * 5
    np.testing.assert_allclose(result.total[6:11], [1 / 5, 2 / 6, 1 / 8, (4 + 2 + 1 + 5) / 44, 1 / 11])
    titles = str(result).splitlines()[0]
    assert "".join(titles.split()).startswith("NameShapeWeightsNonzeroCols%Rows%Ch%2D%3D%Zeros%")
    assert "%" not in str(hj.summary(jnp.ones((2, 2)))).splitlines()[0].replace("Zeros %", "")


@pytest.mark.parametrize("counts", [(3,), (2, 2)])
def test_scanned_layers_have_structures_of_their_own(counts):
    kernel = np.random.default_rng(0).normal(size=(*counts, 4, 6)).astype(np.float32)
    kernel[..., 1, :] = 0  # an input of every layer
    kernel.reshape(-1, 4, 6)[0, :, 2] = 0  # an output of the first
    params = {"norm": {"scale": jnp.ones((*counts, 4))}, "dense": {"kernel": jnp.asarray(kernel)}}
    number, model = int(np.prod(counts)), lambda p, x: x @ p["dense"]["kernel"].reshape(-1, 4, 6)[0]
    whole = hj.summary(params).rows[0]
    np.testing.assert_allclose(whole[6:11], [1 / (6 * number), 1 / 4, 0, 0, 0])
    rows = hj.summary(params, model, jnp.ones((1, 4)), by_layer=True).rows
    assert [row.path for row in rows[:2]] == (["dense/kernel[0]", "dense/kernel[1]"] if number == 3 else
                                              ["dense/kernel[0,0]", "dense/kernel[0,1]"])  # fmt: skip
    layers = kernel.reshape(-1, 4, 6)
    for row, layer in zip(rows[:number], layers, strict=True):
        alone = hj.summary({"dense": {"kernel": jnp.asarray(layer)}}).rows[0]
        assert row._replace(path=alone.path, multiply_adds=None, multiply_adds_left=None) == alone
    assert len(rows) == 2 * number


def test_structures_in_other_layouts():
    kernel = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    kernel[2] = 0
    plain = hj.summary({"kernel": jnp.asarray(kernel)}).rows[0]
    for tree, axes in (({"weight": kernel.T}, None), ({"kernel": kernel.T}, {"kernel": "out in"})):
        row = hj.summary(jax.tree.map(jnp.asarray, tree), axes=axes).rows[0]
        np.testing.assert_allclose(row[6:11], plain[6:11])
    query = hj.summary({"query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.zeros((2, 3))}}).rows
    assert query[0][6:11] == (0,) * 5
    assert query[1][6:11] == (0,) * 5


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 1.0, 2.0**40, 2.0**100])
def test_moments_scale_with_the_weights(scale):
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    one, row = (hj.summary(jnp.asarray(x * np.float32(s))).rows[0] for s in (1.0, scale))
    for name in ("std", "mean", "abs_mean"):
        assert getattr(row, name) == pytest.approx(scale * getattr(one, name), rel=1e-6)
    assert one.std == pytest.approx(x.std(), rel=1e-5)
