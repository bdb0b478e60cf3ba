import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rich.console

import hessjax as hj


def rows(result):
    return {row.name: row for row in result.rows}


def failed(result):
    return {row.name for row in result.rows if not row.passed}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_a_sound_loss_passes(x64, dtype):
    result = hj.check(oracles.loss_fn, oracles.leaves(dtype=dtype), oracles.batch())
    assert result.passed, str(result)
    names = ["finite params", "finite loss", "finite products", "same loss", "same loss retraced",
             "same products", "symmetric", "linear", "gradient", "Hessian", "examples", "halves", "precision",
             "unused leaves"]  # fmt: skip
    assert [row.name for row in result.rows] == names
    assert rows(result)["same products"].detail == "to the last bit"
    assert rows(result)["gradient"].measured <= rows(result)["gradient"].limit
    if dtype == jnp.float64:
        assert rows(result)["Hessian"].limit < 1e-6


@pytest.mark.parametrize("name", ["flax dataclass", "nnx State", "tuple"])
def test_any_container(name):
    params = oracles.CONTAINERS[name](oracles.leaves(dtype=jnp.float32))
    assert hj.check(oracles.loss_fn, params, oracles.batch()).passed


def test_a_network_with_kinks_and_an_unused_leaf_passes():
    x = jax.random.normal(jax.random.key(1), (64, 5))
    params = {"in": jax.random.normal(jax.random.key(2), (5, 16)), "out": jnp.ones(16), "spare": jnp.ones(2)}
    loss = lambda p, x: jnp.mean((jax.nn.relu(x @ p["in"]) @ p["out"] - 1) ** 2)
    result = hj.check(loss, params, x)
    assert result.passed, str(result)
    assert rows(result)["unused leaves"].detail == "gradient and product are exactly zero in: spare"


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@jax.custom_vjp
def lost(x):
    return x


lost.defvjp(lambda x: (x, None), lambda _, g: (0 * g,))


@pytest.mark.parametrize("wrong", [halved, lost])
def test_a_wrong_gradient_is_found_in_its_leaf(wrong):
    loss = lambda p, batch: oracles.loss_fn({**p, "d_kernel": wrong(p["d_kernel"])}, batch)
    result = hj.check(loss, oracles.leaves(dtype=jnp.float32), oracles.batch())
    assert rows(result)["gradient"].detail == "disagrees with finite differences in: d_kernel"
    if wrong is halved:
        assert "symmetric" in failed(result)


def test_many_leaves_are_compared_in_groups():
    params = {f"w{i:02}": jnp.full(2, 1.0 + i / 30) for i in range(20)}

    def loss(p, wrong):
        p = {**p, "w07": halved(p["w07"])} if wrong else p
        return sum(jnp.sum(jnp.sin(w)) for w in p.values())

    good, bad = (hj.check(functools.partial(loss, wrong=w), params) for w in (False, True))
    assert good.passed, str(good)
    assert "w07" in rows(bad)["gradient"].detail
    assert "w12" not in rows(bad)["gradient"].detail


def test_matvecs_that_are_not_symmetric_or_linear():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    loss = lambda p: sum(jnp.sum(x**2) for x in p.values())
    turn = lambda v: {"a": v["a"] + jnp.array([v["a"][1], -v["a"][0], 0.0]), "b": v["b"]}
    result = hj.check(loss, params, matvec=turn)
    assert failed(result) == {"symmetric"}
    assert rows(result)["symmetric"].detail == "rows differ from columns in: a"
    result = hj.check(loss, params, matvec=lambda v: {"a": v["a"], "b": v["b"] * jnp.abs(v["b"])})
    assert "linear" in failed(result)
    assert rows(result)["linear"].detail == "not linear in: b"


def test_randomness_is_found_wherever_it_enters():
    rng = np.random.default_rng(0)
    frozen = lambda w: jnp.sum(w**2) * rng.normal()
    assert "same loss retraced" in failed(hj.check(frozen, jnp.ones(3)))

    def noise(x):
        return np.float32(rng.normal())

    drawn = lambda w: jnp.sum(w**2) + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), 0.0)
    assert "same loss" in failed(hj.check(drawn, jnp.ones(3)))
    keys = iter(jax.random.split(jax.random.key(0), 99))
    noisy = lambda v: {"a": v["a"] * jax.random.normal(next(keys)), "b": v["b"]}
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    result = hj.check(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2), params, matvec=noisy)
    assert "changes in: a;" in rows(result)["same products"].detail


def mean_loss(w, batch):
    return jnp.mean((batch["x"] @ w) ** 2)


def test_data_that_change_are_named():
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(4, 3)).astype(np.float32), "key": jax.random.key(0)} for _ in range(3)]

    class Shuffled:
        def __iter__(self):
            yield data[0]
            for batch in data[1:]:
                yield {**batch, "x": rng.permutation(batch["x"])}

    result = hj.check(mean_loss, jnp.ones(3), batches=Shuffled())
    assert failed(result) == {"same data"}
    detail = "2 of 3 batches change in a second pass; batch 1 is the first to change: its leaves x differ"
    assert rows(result)["same data"].detail == detail
    good = hj.check(mean_loss, jnp.ones(3), batches=data)
    assert good.passed
    assert rows(good)["same data"].detail == "3 batches, twice the same"


def test_data_that_end_are_named():
    seen = []

    class Shrinking:
        def __iter__(self):
            seen.append(1)
            return iter([{"x": np.ones((1, 3), np.float32)}] * (2 if len(seen) == 1 else 1))

    row = rows(hj.check(mean_loss, jnp.ones(3), batches=Shrinking()))["same data"]
    assert "batch 1 is the first to change: the second pass has ended before it" in row.detail


def test_numbers_that_are_not_finite_are_named_and_end_the_check():
    params = {"a": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.ones(2)}
    result = hj.check(lambda p: jnp.sum(p["a"]), params)
    assert [row.name for row in result.rows] == ["finite params"]
    assert result.rows[0].detail == "NaN or infinite in: a"
    assert result.rows[0].measured == 2
    result = hj.check(lambda w: jnp.sum(jnp.log(w - 1)), jnp.ones(3))
    assert failed(result) == {"finite loss"}
    assert result.rows[-1].detail == "the loss is -inf"


def norm_at_zero(p):
    return jnp.linalg.norm(p["v"]) + jnp.sum(p["w"] ** 2)


def test_products_that_are_not_finite_are_named_before_what_depends_on_them():
    params = {"v": jnp.zeros(3), "w": jnp.ones(2)}
    result = hj.check(norm_at_zero, params)
    names = [row.name for row in result.rows]
    assert names[2] == "finite products"
    detail = rows(result)["finite products"].detail
    assert detail.startswith(
        "gradient NaN or infinite in: v; product NaN or infinite in: v: an untaken branch"
    )
    for name in names[5:]:
        if name != "precision":
            assert not rows(result)[name].passed
            assert rows(result)[name].detail == "not tested: not finite in v"
    assert len(failed(result)) == 9
    assert "untested" in str(result)


def test_a_product_alone_that_is_not_finite():
    """The gradient of |x|^1.5 is finite at 0, its derivative is not."""
    loss = lambda p: jnp.sum(jnp.abs(p["v"]) ** 1.5) + jnp.sum(p["w"] ** 2)
    result = hj.check(loss, {"v": jnp.zeros(3), "w": jnp.ones(2)})
    assert rows(result)["finite products"].detail.startswith("product NaN or infinite in: v: ")
    assert rows(result)["gradient"].passed
    assert rows(result)["Hessian"].detail == "not tested: not finite in v"
    mine = hj.check(lambda w: jnp.sum(w**2), jnp.ones(3), matvec=lambda v: v / 0)
    assert rows(mine)["finite products"].detail.endswith("not so the gradient, so look at `matvec`")
    assert rows(mine)["Hessian"].passed


def test_the_range_of_float16_is_named():
    params = {"v": jnp.full(2, 200.0, jnp.float16)}
    result = hj.check(lambda p: 1 / jnp.sum(p["v"] ** 3), params)  # 1/∞
    assert "float16 ends at 65504" in rows(result)["finite products"].detail


# -- examples --------------------------------------------------------------------------------------


def normalized(params, batch):
    """BatchNorm in train mode."""
    h = batch["x"] @ params["w"]
    h = (h - h.mean(axis=0, keepdims=True)) / jnp.sqrt(h.var(axis=0, keepdims=True) + 1e-3)
    return jnp.mean((jnp.tanh(h) @ params["out"] - batch["y"]) ** 2)


def masked(params, batch):
    out = jnp.tanh(batch["x"] @ params["w"]) @ params["out"]
    losses = (out - batch["y"]) ** 2 * batch["mask"]
    return jnp.sum(losses) / jnp.sum(batch["mask"])


def scaled(params, batch):
    return batch["scale"] * masked(params, batch)


def network(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "out": jnp.asarray(rng.normal(size=4), dtype),
    }


def examples(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    lengths = np.arange(shape[0]) % shape[-1] + 1
    mask = (np.arange(shape[-1]) < lengths[:, None]) if len(shape) > 1 else lengths > 1
    x, y = rng.normal(size=(*shape, 3)), rng.normal(size=shape)
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype), "mask": jnp.asarray(mask, dtype)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_examples_and_halves_at_every_scale(dtype, scale):
    batch = examples(8, 5, dtype=dtype) | {"scale": jnp.asarray(scale, dtype)}
    result = hj.check(scaled, network(dtype), batch, weights=lambda b: b["mask"])
    assert rows(result)["examples"].passed, str(result)
    assert rows(result)["halves"].passed, str(result)
    result = hj.check(scaled, network(dtype), batch)
    assert {"examples", "halves"} >= failed(result), str(result)
    assert "examples" in failed(result), str(result)


def test_what_couples_examples_is_named_with_the_ways_out():
    batch = examples(8)
    for loss in (normalized, masked):
        result = hj.check(loss, network(), batch)
        assert failed(result) == {"examples", "halves"}
        detail = rows(result)["examples"].detail
        for word in ("BatchNorm in train mode", "eval mode", "`weights=`", "data outside `args[0]`"):
            assert word in detail
    assert rows(result)["halves"].detail == "differs in out, w, as examples"
    good = hj.check(masked, network(), batch, weights=lambda b: b["mask"])
    assert good.passed, str(good)
    number = hj.check(masked, network(), batch, weights=lambda b: int(b["mask"].sum()))
    assert number.passed
    assert rows(number)["examples"].detail == "skipped: `weights` gives one number for the whole batch"
    wrong = hj.check(normalized, network(), batch, weights=lambda b: b["mask"])
    assert "`weights` are not those of the loss's own mean" in rows(wrong)["examples"].detail
    total = hj.check(lambda p, b: jnp.sum(jnp.sin(b["x"] @ p["w"])), network(), batch)
    assert "a sum over its examples: take the mean" in rows(total)["examples"].detail


def test_padding_that_is_not_finite_counts_for_nothing():
    batch = examples(6, 4) | {"mask": jnp.zeros((6, 4)).at[0].set(1.0).at[1, :2].set(1.0)}
    result = hj.check(masked, network(), batch, weights=lambda b: b["mask"])
    assert result.passed, str(result)  # of the second half nothing counts
    assert {"examples", "halves"} == failed(hj.check(masked, network(), batch))


NO_BATCH = {
    "spread": (
        lambda w, x, y: jnp.mean((x @ w - y) ** 2),
        (jnp.arange(12.0).reshape(4, 3), jnp.array([900.0, -500.0, 0.0, 20.0])),
    ),
    "no arguments": (lambda w: jnp.sum(w**2), ()),
    "a number": (lambda w, t: t * jnp.sum(w**2), (2.0,)),
    "a matrix": (lambda w, A: w @ A @ w, (jnp.arange(9.0).reshape(3, 3),)),
    "targets": (lambda w, t: jnp.sum((w - t) ** 2), (jnp.arange(3.0),)),
    "a key": (lambda w, key: jnp.sum(w**2 * jax.random.normal(key, (3,))), (jax.random.key(0),)),
    "an old key": (lambda w, key: jnp.sum(w**2 * jax.random.normal(key, (3,))), (jax.random.PRNGKey(0),)),
    "one example": (lambda w, x: jnp.mean((x @ w) ** 2), (jnp.ones((1, 3)),)),
    "unlike arrays": (lambda w, b: jnp.sum(w**2) * b[0].sum() * b[1].sum(), ([jnp.ones(2), jnp.ones(3)],)),
    "a fixed size": (lambda w, x: jnp.mean((x.reshape(4, 3) @ w) ** 2), (jnp.ones((4, 3)),)),
    "dropout": (
        lambda w, x, key: jnp.mean((jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0) @ w) ** 2),
        (jnp.arange(24.0).reshape(8, 3), jax.random.key(1)),
    ),
}


@pytest.mark.parametrize("name", NO_BATCH)
def test_what_is_no_batch_is_said_to_be_none(name):
    loss, args = NO_BATCH[name]
    result = hj.check(loss, jnp.arange(1.0, 4.0), *args)
    assert result.passed, str(result)
    for row in ("examples", "halves"):
        detail = rows(result)[row].detail
        assert detail.startswith("skipped: ")
        assert ("wants it as the first, `(x, y)`" in detail) == (name == "spread")


def test_the_table_is_80_columns_wide():
    path = "a_module_of_a_very_long_name/another_module_of_a_long_name/kernel_of_that_module"
    result = hj.check(
        lambda p: jnp.sum(lost(p[path])) + jnp.sum(p["b"] ** 2), {path: jnp.ones(2), "b": jnp.ones(2)}
    )
    assert max(map(len, str(result).splitlines())) <= 80
    joined = "".join("".join(line[47:].split()) for line in str(result).splitlines())
    assert path in joined


def test_the_table_shows_every_row():
    params = {"a[x]": jnp.array([1.0, jnp.nan])}
    result = hj.check(lambda p: jnp.sum(p["a[x]"]), params)
    assert str(result) == repr(result)
    header, line = str(result).splitlines()
    assert header.split() == ["Check", "Result", "Measured", "Limit", "Detail"]
    assert line.split() == ["finite", "params", "FAILED", "1", "0", "NaN", "or", "infinite", "in:", "a[x]"]
    out = io.StringIO()
    rich.console.Console(file=out, force_terminal=True, width=80).print(result)
    assert "\x1b[1;31m" in out.getvalue()


def test_bad_input():
    with pytest.raises(TypeError, match="`params` must have real"):
        hj.check(jnp.sum, jnp.arange(3))
    with pytest.raises(TypeError, match="`loss_fn` must return one real number"):
        hj.check(lambda w: w, jnp.ones(3))
    with pytest.raises(TypeError, match="`loss_fn` must not look at values"):
        hj.check(lambda w: jnp.sum(w) if w[0] > 0 else 0.0, jnp.ones(3))
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        hj.check(mean_loss, jnp.ones(3), batches=[])


def test_a_generator_cannot_be_compared_with_itself():
    with pytest.raises(TypeError, match="can be used only once"):
        hj.check(lambda w, x: jnp.sum(w) * jnp.sum(x), jnp.ones(2), batches=(x for x in [jnp.ones(2)]))
