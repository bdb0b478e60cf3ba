"""How much memory does a spectral density take beyond a gradient's, without a basis?"""

from typing import Any

import jax
import models
import optax
import table

import hessjax as hj

BATCH = 128


class LiveBytes:
    """A matvec that notes how much is alive when it is called: the estimator's state and its vector."""

    def __init__(self, matvec: Any) -> None:
        self.matvec = matvec
        self.seen: list[int] = []

    def __call__(self, vector: Any) -> Any:
        """The product, after the count."""
        self.seen.append(live_bytes())
        return self.matvec(vector)


def measure(quick: bool) -> table.Measured:
    problem = models.mlp(quick, BATCH)
    copy = 4 * problem.num_params
    matvec = hj.hessian(problem.loss_fn, problem.params, *problem.args)
    gradient = peak(jax.grad(problem.loss_fn), problem.params, *problem.args)
    product = peak(matvec, problem.params) - nbytes(problem.params)  # its vector is counted by the run
    figures, raw = [], {"copy": copy, "gradient": gradient, "product": product}
    for name, options in (("two vectors", {"reorthogonalise": False}), ("a basis of 80", {})):
        phases = run_phases(hj.estimators.slq(2, 80, **options), matvec, problem, product)
        raw[name] = phases
        bar = 4.0 if options else None
        note = ", ".join(f"{phase} {bytes_ / copy:.1f}" for phase, bytes_ in phases.items())
        note = f"peaks: gradient {gradient / copy:.1f}, {note}"
        beyond = (max(phases.values()) - gradient) / copy
        figures.append(
            table.Figure(f"peak beyond a gradient's, {name}", beyond, "× the params", bar, note=note)
        )
    at_scale = estimated(1000 if quick else 10_000)
    raw["estimated"] = at_scale
    beyond = (at_scale["density"] - at_scale["gradient"]) / at_scale["copy"]
    note = f"of {at_scale['copy'] // 4:,} weights, asked of the compiled programs"
    figures.append(
        table.Figure("peak beyond a gradient's, large leaves", beyond, "× the params", 4.0, note=note)
    )
    return figures, raw


def estimated(width: int) -> dict[str, int]:
    """Peaks of an MLP of this width (10⁸ weights at 10,000), of which nothing is allocated."""
    network = models.MLP((width, width))
    x, y = jax.ShapeDtypeStruct((BATCH, 784), "float32"), jax.ShapeDtypeStruct((BATCH,), "int32")
    params = jax.eval_shape(network.init, jax.random.key(0), x)["params"]

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits = network.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    density = hj.estimators.slq(2, 80, reorthogonalise=False)
    return {
        "copy": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
        "gradient": hj.memory_estimate(jax.grad(loss_fn), params, x, y).total,
        "density": hj.memory_estimate(density, hj.hessian(loss_fn, params, x, y), params).total,
    }


def run_phases(estimator: Any, matvec: Any, problem: models.Problem, product: int) -> dict[str, int]:
    """Peak bytes while it multiplies, and while it takes a product in; params and data included."""
    key, before, watch = jax.random.key(0), live_bytes(), LiveBytes(matvec)
    hj.run(estimator, watch, key, problem.params, max_matvecs=3)
    resident = nbytes((problem.params, problem.args))
    held = max(watch.seen) - before  # state and vector
    state = jax.eval_shape(estimator.init, key, problem.params)
    update = jax.jit(estimator.update, donate_argnums=0).lower(state, _block_like(problem.params)).compile()
    analysis = update.memory_analysis()
    absorb = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return {
        "multiplying": held + product,
        "absorbing": resident + absorb - analysis.alias_size_in_bytes,
    }


def peak(function: Any, *args: Any) -> int:
    """What the compiled function needs at once: arguments, what it carries, results and temporaries."""
    analysis = jax.jit(lambda function, args: function(*args)).lower(jax.tree_util.Partial(function), args)
    sizes = analysis.compile().memory_analysis()
    return int(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def live_bytes() -> int:
    """All arrays that exist."""
    return sum(array.nbytes for array in jax.live_arrays())


def nbytes(tree: Any) -> int:
    """Of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _block_like(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)


if __name__ == "__main__":
    table.main(__doc__, measure)
