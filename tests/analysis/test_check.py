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
    names = ["finite params", "finite loss", "same loss", "same loss retraced", "same products", "symmetric",
             "linear", "gradient", "Hessian", "precision", "unused leaves"]  # fmt: skip
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
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        hj.check(mean_loss, jnp.ones(3), batches=[])


def test_a_generator_cannot_be_compared_with_itself():
    with pytest.raises(TypeError, match="can be used only once"):
        hj.check(lambda w, x: jnp.sum(w) * jnp.sum(x), jnp.ones(2), batches=(x for x in [jnp.ones(2)]))
