"""How many gradients does a Hessian-vector product cost?"""

import jax
import models
import table
import timing

import hessjax as hj

PROBLEMS = {
    "MLP": (models.mlp, 30),
    "transformer": (models.transformer, 12),
    "ResNet-20": (models.resnet, 10),
}
BARS = {
    "plain product": 2.8,
    "linearized product": 2.0,
    "Gauss-Newton product": None,
    "linearized Gauss-Newton product": None,
    "jax.jvp of jax.grad": None,
}


def measure(quick: bool) -> table.Measured:
    figures, raw = [], {}
    for name, (make, rounds) in PROBLEMS.items():
        problem = make(quick)
        calls = products(problem)
        compilation = timing.first_calls(calls)
        times = timing.interleave(calls, 3 if quick else rounds)
        raw[name] = {"num_params": problem.num_params, "first_call": compilation, "times": times}
        figures += figures_of(name, times, compilation)
    return figures, raw


def products(problem: models.Problem) -> dict[str, timing.Call]:
    """The gradient, hessjax's products, and the two lines that anyone would write, at one point."""
    loss_fn, params, args, model_fn = problem
    vector = jax.tree.map(lambda x: models.normal(2, x.shape), params)
    gradient = jax.jit(jax.grad(loss_fn))
    naive = jax.jit(lambda p, v, args: jax.jvp(lambda q: jax.grad(loss_fn)(q, *args), (p,), (v,))[1])
    plain = hj.hessian(loss_fn, params, *args)
    linearized = hj.hessian(loss_fn, params, *args, linearize=True)
    ggn = hj.ggn(model_fn, models.cross_entropy, params, *args)
    kept_ggn = hj.ggn(model_fn, models.cross_entropy, params, *args, linearize=True)
    return {
        "gradient": lambda: gradient(params, *args),
        "plain product": lambda: plain(vector),
        "linearized product": lambda: linearized(vector),
        "Gauss-Newton product": lambda: ggn(vector),
        "linearized Gauss-Newton product": lambda: kept_ggn(vector),
        "jax.jvp of jax.grad": lambda: naive(params, vector, args),
    }


def figures_of(name: str, times: timing.Times, compilation: dict[str, float]) -> list[table.Figure]:
    gradient = timing.milliseconds(times["gradient"])
    figures = []
    for call, bar in BARS.items():
        ratio, cost = timing.ratio(times, call, "gradient"), timing.milliseconds(times[call])
        note = f"{cost:.1f} ms (gradient {gradient:.1f} ms), first call {compilation[call]:.1f} s"
        figure = table.Figure(f"{call}, {name}", ratio.median, "gradients", bar, ratio[1:], note)
        figures.append(figure)
    return figures


if __name__ == "__main__":
    table.main(__doc__, measure)
