"""Data of any source: read beside the product that runs, filled up, laid out over devices."""

import sys
import threading
import typing

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import MESH_KINDS, mesh_of

import hessjax as hj

SIZES = [4, 4, 2]


def loss_fn(params, batch):
    """A mean by weights, if the batch has any."""
    x, y, *weights = batch
    losses = jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2, axis=1)
    w = weights[0].astype(losses.dtype) if weights else jnp.ones_like(losses)
    return jnp.sum(w * losses) / jnp.sum(w)


def normal(seed, *shape):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


PARAMS = {"a": jnp.array(normal(0, 3, 5)), "b": jnp.array(normal(1, 5, 2))}
X, Y = normal(2, 16, 3), normal(3, 16, 2)


def cut(sizes=SIZES):
    ends = np.cumsum(sizes)
    return [(X[b - n : b], Y[b - n : b]) for n, b in zip(sizes, ends, strict=True)]


def over(data, **options):
    return hj.over_batches(lambda batch: hj.hessian(loss_fn, PARAMS, batch), data, **options)


def whole(sizes=SIZES):
    """The product over all examples at once."""
    n = sum(sizes)
    return hj.hessian(loss_fn, PARAMS, (X[:n], Y[:n]))(PARAMS)


def masked(batch, weights):
    return *batch, weights


# -- sources ---------------------------------------------------------------------------------------


class Tensor:
    """As torch's and TensorFlow's: NumPy can read it, jit cannot."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype}"

    def __array__(self, *_, **__):
        return self.array


class HalfTensor(Tensor):
    """As torch's in bfloat16: NumPy cannot read it, DLPack can."""

    def __array__(self, *_, **__):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **options):
        return jnp.asarray(self.array).__dlpack__(**options)

    def __dlpack_device__(self):
        return jnp.asarray(self.array).__dlpack_device__()


class Loader:
    """As torch's: starts afresh, has a length or none, batches are lists of tensors."""

    def __init__(self, kind=Tensor):
        self.kind = kind

    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")

    def __iter__(self):
        return ([self.kind(x) for x in batch] for batch in cut())


class Mapped:
    """As Grain's MapDataset: of a length, to be indexed, begins anew whenever it is iterated over."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        return cut()[index]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


class Dataset:
    """As tf.data's."""

    def as_numpy_iterator(self):
        return iter(cut())


def generated():
    yield from cut()


SOURCES = {
    "list": cut(),
    "loader of tensors": Loader(),
    "tensors of another kind": Loader(HalfTensor),
    "mapped": Mapped(),
    "iterator's method": Dataset().as_numpy_iterator,
    "generator function": generated,
    "batches": hj.batches(generated),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SOURCES)
def test_any_source_gives_the_product_of_all_examples_every_time(name):
    matvec = over(SOURCES[name])
    for _ in range(2):
        oracles.close(matvec(PARAMS), whole(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_sources_wherever_batches_are_taken(name):
    there = [jnp.array([0.0, 1.0])]
    drawn = hj.landscape(loss_fn, PARAMS, batches=SOURCES[name], directions=PARAMS, distances=there)
    want = hj.landscape(loss_fn, PARAMS, batches=[(X[:10], Y[:10])], directions=PARAMS, distances=there)
    oracles.close(drawn.losses, want.losses, rtol=1e-5)
    assert drawn.num_batches == len(SIZES)


def test_check_and_inverse_fisher_take_functions_too():
    result = hj.check(loss_fn, PARAMS, batches=generated)
    assert result.passed, str(result)
    grads = lambda: (hj.per_example_grads(loss_fn, PARAMS, batch) for batch in cut())
    want = hj.inverse_fisher(grads(), 0.1).apply(PARAMS)
    oracles.close(hj.inverse_fisher(grads, 0.1).apply(PARAMS), want)


def test_grain():
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source([{"x": X[i], "y": Y[i]} for i in range(10)]).batch(4)
    loss = lambda params, batch: loss_fn(params, (batch["x"], batch["y"]))
    for source in (data, data.to_iter_dataset(), lambda: iter(data)):
        matvec = hj.over_batches(lambda batch: hj.hessian(loss, PARAMS, batch), source)
        for _ in range(2):
            oracles.close(matvec(PARAMS), whole(), rtol=1e-5, atol=1e-6)
    for wrong, words in [(iter(data), "only once"), (data.repeat(), "`batches` must end")]:
        with pytest.raises((TypeError, ValueError), match=words):
            over(wrong)


def test_torch():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X[:10]), torch.tensor(Y[:10]))
    matvec = over(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    for _ in range(2):
        oracles.close(matvec(PARAMS), whole(), rtol=1e-5, atol=1e-6)
    half = torch.utils.data.DataLoader(torch.ones(4, 3, dtype=torch.bfloat16), batch_size=2)
    assert [x.dtype for x in hj.batches(half)] == [jnp.bfloat16] * 2
    with pytest.raises(TypeError, match=r"batch 0 of `source` must hold arrays that NumPy can read"):
        list(hj.batches([(torch.ones(3, requires_grad=True),)]))


class Pair(typing.NamedTuple):
    x: object
    y: object


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (X, r"got one array, float32\[16, 3\], which would be taken apart into its rows"),
        (jnp.ones(3), r"got one array, float32\[3\]"),
        ((X, np.arange(16)), r"the parts of one batch, float32\[16, 3\], int64\[16\]: put it into a list"),
        (Pair(X, Y), "the parts of one batch"),
        ({"x": X}, "got dict; put one batch into a list"),
        (range(sys.maxsize), "`batches` must end, got a range that repeats"),
        (iter(cut()), "can be used only once"),
        (lambda epoch: cut(), r"`batches` must be a function `\(\) -> iterable of batches`"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(source, words):
    with pytest.raises((TypeError, ValueError), match=words):
        over(source)


def test_what_shows_only_when_it_is_opened():
    with pytest.raises(
        TypeError, match=r"`batches\(\)` must give an iterable of batches, got float32\[16, 3\]"
    ):
        over(lambda: X)(PARAMS)
    with pytest.raises(TypeError, match="`source` must be an iterable of batches, got one array"):
        hj.batches(Tensor(X))
    used = iter(cut())
    matvec = over(lambda: used)
    matvec(PARAMS)
    with pytest.raises(ValueError, match="got none: an iterator that is used up"):
        matvec(PARAMS)
    with pytest.raises(TypeError, match="call it once"):
        hj.batches(hj.batches(cut()))


# -- read ahead ------------------------------------------------------------------------------------


def test_the_next_batch_is_read_while_a_product_runs_and_no_more_than_that():
    products, at_read = [], []

    @jax.jit
    def slow(batch, vector):
        return jax.lax.fori_loop(0, 1_000, lambda _, x: jnp.sin(x + batch[0]), vector)

    def make(batch):
        def product(vector):
            products.append(slow(batch, vector))
            return products[-1]

        return product

    def source():
        for index in range(4):
            at_read.append([product.is_ready() for product in products])
            yield np.full((1,), index, np.float32)

    vector = jnp.ones(20_000)
    for _ in range(2):
        products.clear(), at_read.clear()
        jax.block_until_ready(hj.over_batches(make, source)(vector))
    # Batch b is read when product b - 1 is under way, not finished, and b - 2 is.
    assert at_read == [[], [False], [True, False], [True, True, False]]


def test_a_loader_may_fill_the_same_arrays_again():
    def reused():
        x, y = np.empty((4, 3), np.float32), np.empty((4, 2), np.float32)
        for i in range(3):
            x[:], y[:] = X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]
            yield x, y
            x[:], y[:] = np.nan, np.nan

    oracles.close(over(reused)(PARAMS), whole([12]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [KeyError("broken record"), KeyboardInterrupt()])
def test_what_a_source_raises_arrives_where_it_is_asked_for(error):
    threads, fails = threading.active_count(), [True]
    closed = []

    def source():
        try:
            yield cut()[0]
            if fails:
                raise error
            yield from cut()[1:]
        finally:
            closed.append(1)

    matvec = over(source)
    with pytest.raises(type(error)) as caught:
        matvec(PARAMS)
    assert caught.value is error
    assert closed == [1]
    assert threading.active_count() == threads
    fails.clear()
    oracles.close(matvec(PARAMS), whole(), rtol=1e-5, atol=1e-6)


def test_numbers_text_and_keys_stay_what_they_are():
    batch = {"x": X, "scale": 2.0, "name": np.array(["a"]), "key": jax.random.key(0), "other": None}
    got = next(iter(hj.batches([batch])))
    assert isinstance(got["x"], jax.Array)
    assert all(got[name] is batch[name] for name in ("scale", "name", "key", "other"))


# -- filled up -------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [[4, 4, 2], [4, 1, 3], [4]])
@pytest.mark.parametrize("weights", [None, lambda batch: batch[2], lambda batch: batch[2].sum()])
def test_padding_changes_nothing(x64, sizes, weights):
    data = hj.batches(cut(sizes), with_weights=masked)
    got = over(data, weights=weights)(PARAMS)
    oracles.close(got, whole(sizes), rtol=1e-5, atol=1e-6)
    assert {x.shape for x, *_ in data} == {(4, 3)}
    assert sum(w.sum() for *_, w in data) == sum(sizes)


def test_padding_compiles_nothing_anew(compilations):
    over(hj.batches(cut([4, 4, 2]), with_weights=masked))(PARAMS)
    del compilations[:]
    jax.block_until_ready(over(hj.batches(cut([4, 1, 3]), with_weights=masked))(PARAMS))
    assert not compilations
    over(cut([4, 1, 3]))(PARAMS)
    assert compilations


def test_a_mask_of_positions_that_is_there_already():
    lengths = np.array([3, 1, 2, 3, 2])
    rows = {"y": Y[:5, :1] + np.arange(3, dtype=np.float32), "mask": np.arange(3) < lengths[:, None]}
    data = [jax.tree.map(lambda x: x[:3], rows), jax.tree.map(lambda x: x[3:], rows)]

    def loss(w, batch):
        mask = batch["mask"].astype(w.dtype)
        return jnp.sum(mask * (w * batch["y"]) ** 2) / jnp.sum(mask)

    at = jnp.array(1.5)
    put = lambda batch, w: {**batch, "mask": batch["mask"] * w[:, None]}
    make = lambda batch: hj.hessian(loss, at, batch)
    filled = hj.batches(data, with_weights=put, size=4)
    got = hj.over_batches(make, filled, weights=lambda batch: batch["mask"])(at)
    oracles.close(got, make(rows)(at), rtol=1e-6)


def test_examples_with_keys_are_filled_up():
    keys = jax.random.split(jax.random.key(1), 6)
    data = [(X[:4], keys[:4]), (X[4:6], keys[4:])]
    *_, (_, filled, w) = hj.batches(data, with_weights=masked)
    assert jnp.array_equal(filled[:2], keys[4:])
    assert jnp.array_equal(filled[2:], keys[jnp.array([5, 5])])
    assert w.tolist() == [1, 1, 0, 0]


def test_padding_that_would_count_is_refused():
    data = hj.batches(cut(), with_weights=masked)
    with pytest.raises(
        ValueError, match="`weights` must be 0 for the examples that batch 2 is filled up with"
    ):
        over(data, weights=lambda batch: np.ones(len(batch[0])))(PARAMS)
    for size, words in [
        (None, "filled up to 2, but batch 1 has 4"),
        (3, "filled up to 3, but batch 1 has 4"),
    ]:
        with pytest.raises(ValueError, match=words):
            over(hj.batches(cut([2, 4]), with_weights=masked, size=size))(PARAMS)
    with pytest.raises(ValueError, match="filled up to 4, but batch 0 has 0"):
        over(hj.batches(cut([0, 4]), with_weights=masked, size=4))(PARAMS)
    with pytest.raises(ValueError, match="`size` must come with `with_weights`"):
        hj.batches(cut(), size=4)


def test_check_sees_a_loss_that_counts_padding():
    data = hj.batches(cut(), with_weights=masked)
    wrong = lambda params, batch: loss_fn(params, batch[:2])
    for loss, passes in [(loss_fn, True), (wrong, False)]:
        row = {row.name: row for row in hj.check(loss, PARAMS, batches=data).rows}["padding"]
        assert row.passed == passes, row
    assert "padding" not in [row.name for row in hj.check(loss_fn, PARAMS, batches=cut()).rows]


def test_they_say_what_they_are():
    assert repr(hj.batches(cut())) == "Batches of list"
    assert len(hj.batches(Mapped())) == 3
    with pytest.raises(TypeError, match="a source of type Loader has no length"):
        len(hj.batches(Loader()))


# -- laid out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_batches_over_devices(kind):
    mesh = mesh_of(kind)
    rows = NamedSharding(mesh, P("data"))
    data = hj.batches(generated, with_weights=masked, sharding=rows)
    for batch in data:
        assert {x.sharding for x in batch} == {rows}
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        matvec = hj.over_batches(lambda batch: hj.hessian(loss_fn, params, batch), data)
        oracles.close(matvec(params), whole(), rtol=1e-5, atol=1e-6)
    tree = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P(None, "model"))
    x, y = next(iter(hj.batches(cut(), sharding=tree)))
    assert (x.sharding, y.sharding) == tree


def test_shards_that_do_not_fit():
    rows = NamedSharding(mesh_of("Auto"), P("data"))
    for source in (cut(), jax.tree.map(jnp.asarray, cut())):
        with pytest.raises(
            ValueError, match=r"`sharding` must fit .* `0` of a batch is float32\[2, 3\]: fill"
        ):
            over(hj.batches(source, sharding=rows))(PARAMS)
