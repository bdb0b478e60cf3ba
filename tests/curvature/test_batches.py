import collections

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj


def cut(data, sizes):
    ends = np.cumsum(sizes)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], data) for a, b in zip(ends - sizes, ends, strict=True)]


def over(params, batches, **options):
    return hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b, **options), batches)


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [[10, 10, 3], [1, 22], [23], [22, 1]])
@pytest.mark.parametrize("linearize", [False, True])
def test_the_mean_does_not_depend_on_how_the_data_is_cut(x64, sizes, linearize):
    params, data, vector = oracles.leaves(), oracles.batch(23), oracles.leaves(1)
    whole = hj.hessian(oracles.loss_fn, params, data)(vector)
    parts = over(params, cut(data, np.array(sizes)), linearize=linearize)(vector)
    oracles.close(parts, whole, rtol=1e-12, atol=1e-13)


def test_batches_of_any_shape_and_a_loader_that_opens_anew(x64):
    data = oracles.batch(9)
    opened = []

    class Loader:
        def __iter__(self):
            opened.append(1)
            for x, y in cut(data, np.array([4, 4, 1])):
                yield {"input": x, "deep": [{"target": np.asarray(y)}], "temperature": 1.0}

    def loss(params, batch):
        return oracles.loss_fn(params, (batch["input"], batch["deep"][0]["target"])) / batch["temperature"]

    params, vector = oracles.leaves(), oracles.leaves(1)
    matvec = hj.over_batches(lambda b: hj.hessian(loss, params, b), Loader())
    want = hj.hessian(oracles.loss_fn, params, data)(vector)
    for _ in range(2):
        oracles.close(matvec(vector), want, rtol=1e-12, atol=1e-13)
    assert len(opened) == 2


def test_examples_counted_otherwise(x64):
    """Sequences packed to one shape: what counts is the number of tokens that are not padding."""
    tokens = [jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[3.0, 0.0, 0.0]])]
    loss = lambda w, t: w**2 / 2 * jnp.sum(t) / jnp.sum(t > 0, dtype=t.dtype)
    count = lambda t: int(jnp.sum(t > 0))
    matvec = hj.over_batches(lambda t: hj.hessian(loss, jnp.array(1.0), t), tokens, weights=count)
    assert float(matvec(jnp.array(1.0))) == pytest.approx(2.0)


def test_bfloat16_params_are_summed_in_float32():
    params = jnp.ones((), jnp.bfloat16)
    batches = [jnp.ones(1)] + [jnp.full(1, 2.0**-9)] * 256  # in bfloat16, 1 + 2⁻⁹ is 1
    loss = lambda w, x: (jnp.mean(x) * w.astype(jnp.float32) ** 2 / 2).astype(jnp.float32)
    product = hj.over_batches(lambda b: hj.hessian(loss, params, b), batches)(params)
    assert product.dtype == jnp.bfloat16
    assert float(product) == pytest.approx(1.5 / 257, rel=1e-2)


def test_nested_batches_and_plain_matvecs(x64):
    params, data, vector = oracles.leaves(), oracles.batch(6), oracles.leaves(1)
    halves = cut(data, np.array([3, 3]))
    inner = lambda half: over(params, cut(half, np.array([2, 1])))
    product = hj.over_batches(inner, halves)(vector)
    want = hj.hessian(oracles.loss_fn, params, data)(vector)
    oracles.close(product, want, rtol=1e-12, atol=1e-13)


@pytest.mark.smoke
def test_new_params_batches_and_functions_compile_nothing(compilations):
    vector = oracles.leaves(9)
    over(oracles.leaves(0), cut(oracles.batch(7, 0), np.array([4, 3])))(vector)
    points = [oracles.leaves(1)], [cut(oracles.batch(7, 1), np.array([4, 3]))]
    del compilations[:]
    jax.block_until_ready(over(points[0][0], points[1][0])(vector))
    assert not compilations


def test_data_that_cannot_be_used():
    make = lambda b: hj.hessian(oracles.loss_fn, oracles.leaves(), b)
    with pytest.raises(TypeError, match="used only once: pass a list"):
        hj.over_batches(make, iter([oracles.batch()]))
    with pytest.raises(TypeError, match="used only once"):
        hj.over_batches(make, (b for b in [oracles.batch()]))
    with pytest.raises(TypeError, match="batches"):
        hj.over_batches(make, 3)
    with pytest.raises(TypeError, match="got dict; put one batch into a list"):
        hj.over_batches(make, {"x": oracles.batch()})
    nan = hj.over_batches(lambda b: lambda v: v, [jnp.ones(3)], weights=lambda b: float("nan"))
    with pytest.raises(
        ValueError, match="`weights` must give finite numbers of at least 0, got nan for batch 0"
    ):
        nan(jnp.ones(2))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        hj.over_batches(make, [])(oracles.leaves())
    with pytest.raises(ValueError, match="batch 1 has 0"):
        hj.over_batches(make, [oracles.batch(2), oracles.batch(0)])(oracles.leaves())
    x, y = oracles.batch(4)
    with pytest.raises(ValueError, match="one common leading axis, got x: 4, y: 3"):
        hj.over_batches(make, [{"x": x, "y": y[:3]}])(oracles.leaves())
    with pytest.raises(ValueError, match="no array with an axis"):
        hj.over_batches(make, [{"x": 1.0}])(oracles.leaves())
    loss_at = lambda b: oracles.loss_fn(oracles.leaves(), b)
    with pytest.raises(TypeError, match="`make_matvec` must return a matvec, .* got "):
        hj.over_batches(loss_at, [oracles.batch()])(oracles.leaves())


# Their sums, in the vector's dtype, would be cut to whole numbers.
@pytest.mark.parametrize("combine", [
    lambda A: hj.over_batches(lambda _: A, [jnp.ones(2)]),
    lambda A: hj.weighted_sum([A], [0.5]),
    lambda A: hj.preconditioned(A, jnp.ones(2)),
])  # fmt: skip
def test_vectors_and_products_of_integers_are_refused(combine):
    half = jax.tree_util.Partial(lambda v: 0.5 * v)
    for wrong in (jnp.array([1, 0]), "v", np.array([1.0, "a"], object)):
        with pytest.raises(TypeError, match="`vector` must "):
            combine(half)(wrong)


def test_products_of_integers_are_refused():
    whole = jax.tree_util.Partial(lambda v: v.astype(int))
    for call in (hj.weighted_sum([whole]), hj.preconditioned(whole, jnp.ones(2))):
        with pytest.raises(TypeError, match=r"`matvec\(vector\)` must be floating point, got int32\[2\]"):
            call(jnp.ones(2))
    for on_device in (False, True):
        with pytest.raises(TypeError, match=r"`matvec\(vector\)` must be floating point, got int32\[2\]"):
            hj.trace(whole, jax.random.key(0), jnp.ones(2), 2, on_device=on_device)


def test_it_says_that_it_cannot_be_traced():
    matvec = over(oracles.leaves(), [oracles.batch()])
    with pytest.raises(TypeError, match="reads its data on the host"):
        jax.jit(matvec)(oracles.leaves())
    with pytest.raises(TypeError, match="reads its data on the host"):
        hj.trace(matvec, jax.random.key(0), oracles.leaves(), 2, on_device=True)


def test_counts_beyond_32_bits(x64):
    params = oracles.leaves()
    one = hj.over_batches(
        lambda b: hj.hessian(oracles.loss_fn, params, b),
        [oracles.batch()] * 2,
        weights=lambda b: 3 * 10**9,
    )
    oracles.close(one(params), hj.hessian(oracles.loss_fn, params, oracles.batch())(params))


def test_named_tuples_are_batches_too(x64):
    batch_type = collections.namedtuple("batch_type", "x y")
    data = batch_type(*oracles.batch(5))
    params = oracles.leaves()
    got = over(params, cut(data, np.array([3, 2])))(params)
    want = hj.hessian(oracles.loss_fn, params, data)(params)
    oracles.close(got, want, rtol=1e-12, atol=1e-13)


def counted(params, made, **options):
    """A mean over three batches of a linearized Hessian that notes each batch it is made of."""

    def make(batch):
        made.append(len(batch[0]))
        return hj.hessian(oracles.loss_fn, params, batch, linearize=True)

    return hj.over_batches(make, cut(oracles.batch(9), np.array([4, 3, 2])), **options)


def test_kept_matvecs_give_the_same_products_and_are_made_once(x64):
    params, made = oracles.leaves(), []
    A = counted(params, made, keep_bytes=2**30)
    for seed in (1, 2):
        vector = oracles.leaves(seed)
        want = hj.hessian(oracles.loss_fn, params, oracles.batch(9))(vector)
        oracles.close(A(vector), want, rtol=1e-12, atol=1e-13)
    product, forms = A.by_batch(vector)
    oracles.close(product, want, rtol=1e-12, atol=1e-13)
    assert forms.weights.tolist() == [4, 3, 2]
    assert made == [4, 3, 2]


def test_as_many_matvecs_are_kept_as_fit_and_what_they_share_counts_once(x64):
    params, made = oracles.leaves(), []
    vector = oracles.leaves(1)
    A = counted(params, made, keep_bytes=2**30)
    plain = A(vector)
    held = [x for _, matvec in A.kept.matvecs for x in jax.tree.leaves(matvec)]
    enough = sum({id(x): x.nbytes for x in held}.values())
    assert enough < sum(x.nbytes for x in held)
    for keep_bytes, remade in ((enough, []), (enough - 1, [2]), (1, [4, 3, 2])):
        made.clear()
        A = counted(params, made, keep_bytes=keep_bytes)
        oracles.close(A(vector), plain, rtol=1e-12, atol=1e-13)
        made.clear()
        oracles.close(A(vector), plain, rtol=1e-12, atol=1e-13)
        assert made == remade


def test_matvecs_are_kept_of_batches_that_come_in_one_order(x64):
    params, vector = oracles.leaves(), oracles.leaves(1)
    order = [*cut(oracles.batch(8), np.array([4, 4]))]
    make = lambda b: hj.hessian(oracles.loss_fn, params, b)
    held = {id(x): x.nbytes for x in jax.tree.leaves(make(order[0])) if hasattr(x, "nbytes")}
    some = hj.over_batches(make, lambda: iter(order), keep_bytes=sum(held.values()))
    first = some(vector)
    assert len(some.kept.matvecs) == 1
    oracles.close(some(vector), first, rtol=1e-12, atol=1e-13)
    order.reverse()
    with pytest.raises(
        ValueError, match="same order at every pass with `keep_bytes`, but batch 0 is another"
    ):
        some(vector)
    every = hj.over_batches(make, lambda: iter(order), keep_bytes=2**20)
    every(vector)
    order.clear()
    oracles.close(every(vector), first, rtol=1e-12, atol=1e-13)


def test_what_cannot_be_kept():
    with pytest.raises(ValueError, match="`keep_bytes` must be at least 1, got 0"):
        counted(oracles.leaves(), [], keep_bytes=0)
    plain = hj.over_batches(lambda b: lambda v: v, [jnp.ones(3)], keep_bytes=9)
    with pytest.raises(TypeError, match="must return matvecs that are pytrees with `keep_bytes`"):
        plain(jnp.ones(2))
