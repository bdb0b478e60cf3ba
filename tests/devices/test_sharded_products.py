"""Products of params over several devices: layouts, numbers, and nothing sent beyond the model's own."""

import functools

import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj

KEY = jax.random.key(2)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"in": {"kernel": normal(0, 24, 40) / 5, "bias": normal(1, 40)}, "out": normal(2, 40, 16) / 6}
BATCH = normal(3, 32, 24), jax.nn.softmax(normal(4, 32, 16))

# Of the params, of the batch, and of the hidden units.
LAYOUTS = {
    "data": (P(), P("data"), None),
    "FSDP": ({"in": {"kernel": P("data"), "bias": P("data")}, "out": P("data", None)}, P("data"), None),
    "tensor": ({"in": {"kernel": P(None, "model"), "bias": P("model")}, "out": P("model")}, P(), "model"),
    "mixed": (
        {"in": {"kernel": P("data", "model"), "bias": P("model")}, "out": P("model", "data")},
        P("data"),
        "model",
    ),
}


def laid(x, *spec):
    """Where axes are explicit a model says itself what is gathered."""
    return jax.sharding.reshard(x, explicitly(x, spec)) if explicitly(x, spec) else x


def times(x, kernel, *spec):
    return jnp.dot(x, kernel, out_sharding=explicitly(kernel, spec))


def explicitly(x, spec):
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, P(*spec)) if AxisType.Explicit in mesh.axis_types else None


def model_fn(params, batch, examples, units):
    kernel, bias = laid(params["in"]["kernel"], None, units), laid(params["in"]["bias"], units)
    hidden = jnp.tanh(times(batch[0], kernel, examples, units) + bias[None])
    return times(hidden, laid(params["out"], units, None), examples, None)


def output_loss(outputs, batch):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * batch[1], axis=-1))


class Problem:
    """The model on one layout."""

    def __init__(self, layout):
        _, batch, units = LAYOUTS[layout]
        self.examples, self.units = (*batch, None)[0], units

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __hash__(self):
        return hash((self.examples, self.units))

    def model(self, params, batch):
        return model_fn(params, batch, self.examples, self.units)

    def loss(self, params, batch):
        return output_loss(self.model(params, batch), batch)

    def alone(self, params, batch):
        """Of examples one by one, which no axis divides."""
        return output_loss(model_fn(params, batch, None, self.units), batch)

    def hessian(self, params, batch, **options):
        return hj.hessian(self.loss, params, batch, **options)

    def ggn(self, params, batch, **options):
        return hj.ggn(self.model, output_loss, params, batch, **options)


def over_batches(problem, params, batch):
    return hj.over_batches(lambda part: problem.hessian(params, part), [batch, batch])


def weighted_sum(problem, params, batch):
    parts = [problem.hessian(params, batch), problem.ggn(params, batch)]
    return hj.weighted_sum(parts, [1.0, -1.0], shift=0.5)


def preconditioned(problem, params, batch):
    return hj.preconditioned(problem.ggn(params, batch), jax.tree.map(lambda x: 1 + x**2, params))


def fisher(problem, params, batch, **options):
    return hj.fisher(problem.model, params, batch, likelihood=hj.likelihoods.categorical, **options)


PRODUCTS = {
    "hessian": Problem.hessian,
    "hessian, reverse": lambda *at: Problem.hessian(*at, mode="reverse-over-reverse"),
    "hessian, forward": lambda *at: Problem.hessian(*at, mode="reverse-over-forward"),
    "hessian, linearized": lambda *at: Problem.hessian(*at, linearize=True),
    "hessian, in parts": lambda problem, p, b: hj.hessian(problem.alone, p, b, microbatch=16),
    "ggn": Problem.ggn,
    "ggn, linearized": lambda *at: Problem.ggn(*at, linearize=True),
    "fisher": fisher,
    "fisher, sampled": lambda *at: fisher(*at, key=KEY),
    "empirical_fisher": lambda problem, p, b: hj.empirical_fisher(problem.alone, p, b),
    "empirical_fisher, in parts": lambda problem, p, b: hj.empirical_fisher(
        problem.alone, p, b, microbatch=16
    ),
    "over_batches": over_batches,
    "weighted_sum": weighted_sum,
    "preconditioned": preconditioned,
}


VECTOR = jax.tree.map(jnp.cos, PARAMS)


def bare(mode, problem, params, batch, vector, shardings):
    """The same product in one line of jax, the result where the params are."""
    gradient = jax.grad(lambda params: problem.loss(params, batch))
    if mode == "forward-over-reverse":
        product = jax.jvp(gradient, (params,), (vector,))[1]
    elif mode == "reverse-over-reverse":
        product = jax.vjp(gradient, params)[1](vector)[0]
    else:
        slope = lambda params: jax.jvp(lambda p: problem.loss(p, batch), (params,), (vector,))[1]
        product = jax.grad(slope)(params)
    is_auto = AxisType.Auto in jax.tree.leaves(shardings)[0].mesh.axis_types
    return jax.tree.map(
        jax.lax.with_sharding_constraint if is_auto else jax.sharding.reshard, product, shardings
    )


def sent(text):
    return sum(collective.bytes for collective in programs.collectives(text))


@functools.cache
def on_one_device(name):
    # With axes of one device nothing is divided: any layout says the same.
    return PRODUCTS[name](Problem("data"), PARAMS, BATCH)(VECTOR)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_products_lie_where_the_params_do_and_send_what_the_model_sends(kind, layout):
    mesh, problem, (specs, of_batch, _) = programs.mesh_of(kind), Problem(layout), LAYOUTS[layout]
    params, vector = (programs.placed(tree, mesh, specs) for tree in (PARAMS, VECTOR))
    batch = programs.placed(BATCH, mesh, of_batch)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    modes = "forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"
    with programs.recorded() as bares:
        for mode in modes:
            jax.jit(functools.partial(bare, mode, problem, shardings=shardings))(params, batch, vector)
    with programs.recorded() as texts:
        products = {name: make(problem, params, batch)(vector) for name, make in PRODUCTS.items()}
    most = max(map(sent, bares))
    for text in texts:
        name = text.split(",", 1)[0]
        is_product = any(part in name for part in ("multiply", "linearize", "_part"))
        # A microbatch is cut out of a batch that is divided along the same axis: it is gathered before.
        cut = programs.nbytes(BATCH) if "_part" in name else 0
        # The others may send a number of each leaf.
        assert sent(text) <= (most + cut if is_product else 64), name
    for name, product in products.items():
        assert programs.apart(product, params) == [], name
        assert programs.difference(product, on_one_device(name)) < 1e-6, name


@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_a_product_of_a_part_lies_where_the_part_does(kind):
    mesh, problem = programs.mesh_of(kind), Problem("tensor")
    params, batch = programs.placed(PARAMS, mesh, LAYOUTS["tensor"][0]), programs.placed(BATCH, mesh, P())
    part = hj.select(params, "in/*")
    product = hj.hessian(part.restrict(problem.loss), part.part, batch)(part.part)
    whole = hj.select(PARAMS, "in/*")
    want = hj.hessian(whole.restrict(problem.loss), whole.part, BATCH)(whole.part)
    assert programs.apart(product, part.part) == []
    assert programs.difference(product, want) < 1e-6
