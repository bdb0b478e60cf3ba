"""Right calls of everything public, and what people write in place of each argument by mistake."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import hessjax as hj


class Tensor:
    """As torch's: NumPy can read it, jit cannot."""

    shape = (2, 3)
    dtype = "torch.float32"

    def __array__(self, *_, **__):
        return np.ones((2, 3), np.float32)


class Thing:
    """No function, no number, no tree."""

    def __repr__(self):
        return "<a thing>"


W, X, KEY = jnp.ones(3), jnp.ones((2, 3)), jax.random.key(0)
PARAMS = {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4), "bias": jnp.ones(4)}
WIDE, MAGNITUDE, ADAM = jnp.ones((2, 4)), hj.saliencies.magnitude(), optax.adam(0.1)
GRADS = {"kernel": jnp.arange(1.0, 33.0).reshape(2, 4, 4), "bias": jnp.ones((2, 4))}
UNFILTERED = {"kernel": jnp.ones((4, 4)), "act": jax.nn.relu, "size": 7}
A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 4.0))
A2 = jax.tree_util.Partial(jax.tree.map, A)
VARIABLES = linen.Dense(2).init(KEY, X)
FOLDER = pathlib.Path(tempfile.gettempdir()) / "hessjax-calls"


def loss(w, x, *_):
    return jnp.mean((x @ w) ** 2)


def model(w, x, *_):
    return x @ w[:, None]


def out_loss(outputs, *_):
    return jnp.mean(outputs**2)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def size_of(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


# -- what is wrong for an argument, by its kind ------------------------------------------------------

NUMBERS = [None, "0.5", [0.5], {}, jnp.ones(2), 1j, len, Thing(), True]
COUNTS = [*NUMBERS, 2.5, float("nan"), -1, jnp.float32(2)]
TREES = [{"w": "x"}, UNFILTERED, Tensor(), {"w": Tensor()}, loss, "w", jnp.full(3, 1j)]
RULES = [None, 1, X, {}, Thing(), dict]

SOURCES = [
    1, "x", {}, {"x": X}, len, Thing(), X, np.ones((2, 3)), Tensor(), (X, jnp.arange(2)), [X, jnp.ones(2)],
    range(10**15), lambda: X,
]  # fmt: skip

WRONG = {
    "number": [*NUMBERS, float("nan")],
    "schedule": [x for x in [*NUMBERS, float("nan")] if x is not len],
    "count": COUNTS,
    "integer": [x for x in COUNTS if not (isinstance(x, int) and x == -1)],
    "function": [None, 1, 0.5, "f", [loss], {}, X, Thing()],
    "key": [None, 0, "0", 0.5, jax.random.split(KEY), X, {}, len],
    "typed key": [None, 0, "0", 0.5, jax.random.split(KEY), X, {}, len, jax.random.PRNGKey(0)],
    "params": [*TREES, None, {}, (), 3, jnp.arange(3), [None], jnp.ones((0,)), {"w": True}],
    "vector": [*TREES, None, {}, 3, {"w": jnp.ones(3)}, jnp.ones(7), jnp.arange(3)],
    "tree": [x for x in [*TREES, None, {}, [None]] if not isinstance(x, jax.Array)],
    "flag": ["yes", "no", None, 2, 0.5, [], X, len],
    "choice": [None, "typo", 1, ["both"], X, len, {}],
    "axis": [9, "typo", 0.5, ["output"], X, len, {}],
    "path": [None, 1, 0.5, [], {}, X, len],
    "text": [None, 1, 0.5, [], {}, X, len],
    "tol": ["1e-3", -1.0, float("nan"), [1e-3], {}, jnp.ones(2), 1j, hj.relative, Thing(), True, None],
    "where": [None, 1, 0.5, [], "nothing*", [1], X, Thing()],
    "saliency": [*RULES, "magnitude", loss, hj.saliencies.magnitude, hj.patterns.rows()],
    "pattern": [
        *RULES, "2:4", hj.patterns.n_of_m, hj.patterns.heads, hj.patterns.filters, hj.saliencies.magnitude(),
        {"*": "2:4"}, {"*": hj.patterns.rows}, {"*": None}, {"nothing": hj.patterns.rows()}, lambda *_: None,
    ],
    "allocation": [
        *RULES, "uniform", hj.allocations.uniform, hj.allocations.explicit, hj.saliencies.magnitude(),
        hj.patterns.rows(), hj.allocations.threshold(1.0),
    ],
    "likelihood": [*RULES, "categorical", hj.likelihoods, loss, hj.likelihoods.Likelihood],
    "estimator": [*RULES, "xtrace", hj.estimators.lanczos, hj.estimators.xtrace, hj.probes.rademacher],
    "estimator maker": [1, "xtrace", hj.estimators.xtrace(10), {}, X, Thing(), lambda n: None],
    "method": [None, 1, "minres", hj.estimators.minres(W), {}, X, Thing(), lambda *_, **__: None],
    "probe": [None, 1, "rademacher", {}, X, Thing(), lambda *_: None, lambda key, like: 3.0],
    "callbacks": [
        None, 1, "bar", hj.progress_bar, len, [1], [None], ["bar"], [hj.progress_bar], {}, X, Thing(),
        hj.progress_bar(),
    ],
    "optimizer": [*RULES, "adam", optax.adam, len, (len, len)],
    "precision": ["typo", 1, [], X, len, True],
    "batches": [*SOURCES, []],
    "batches again": [*SOURCES, [], iter([X]), (X for _ in range(2))],
    "source": SOURCES,
    "args": ["mean", Tensor(), len, Thing(), {"x": "y"}, [X, "mean"], np.array(["a"]), np.array([None, 1])],
    "one array": [*TREES, None, {}, 3, jnp.arange(3), {"w": W}],
    "weights": ["0.5", [None, 1], Thing(), len, ["a", "b"], jnp.ones(3), [-1.0, 1.0], {"w": 1}],
    "numbers": [None, "0.5", {}, Thing(), len, ["a"], [None]],
    "norms": [*TREES, None, {}, 3, jnp.arange(3), {"w": True}, jnp.ones(()), jnp.ones((2, 2))],
    "counts": [None, "ab", 3, {}, Thing(), ["a"], [2.5], [0], [None]],
    "functions": [None, A, "A", [], [1], {}, X, Thing()],
    "mapping": [None, 1, "a", [1], X, loss, Thing()],
    "result": [None, 1, "a", {}, X, loss, Thing()],
    "module": [None, 1, "Dense", linen.Dense, X, {}, Thing()],
    "inputs": [7, "nothing", X, Thing()],
}  # fmt: skip


# -- arguments, which have one meaning wherever they are ---------------------------------------------

KINDS = {
    "number": """damping temperature alpha b2 eps eps_root shift factor decay start_open floor least
        least_sparsity confidence batch_size max_ratio? dense_accuracy? minutes? sparsity learning_rate
        bandwidth small_size large_size""",
    "schedule": "penalty fraction level",
    "count": """num_probes num_matvecs max_matvecs k block_size basis_size? at_once every num_samples?
        recomputes microbatch? num_grads? chunk_size points_at_once steps_per_epoch? n m num_heads?
        max_width max_evaluations num_points top seed budget? keep_bytes?""",
    "integer": "axis?",
    "function": """loss_fn model_fn output_loss matvec make_matvec metric grads_fn? teacher_fn information
        score loss weights? fn approximation
        preconditioner? query_fn? inverse?""",
    "key": "key",
    "params": "params like rhs grads scores",
    "vector": "vector start? diagonal directions other state?",
    "flag": """linearize on_device reorthogonalise drop_constants progress transient regrow straight_through
        linear log by_leaf per_layer landscape layers resume force anyway""",
    "choice": "mode which update positions basis_dtype? within empty",
    "axis": "filter_axis?",
    "path": "path out?",
    "text": "description unit",
    "tol": "tol",
    "where": "where",
    "saliency": "saliency choose by",
    "pattern": "pattern",
    "allocation": "allocation",
    "likelihood": "likelihood",
    "estimator": "estimator",
    "method": "method",
    "probe": "probe",
    "callbacks": "callbacks",
    "optimizer": "inner optimizer",
    "precision": "precision",
    "batches": "batches train query",
    "args": "x",
    "numbers": "levels distances? steps values accuracy residuals?",
    "norms": "small large",
    "counts": "shape",
    "functions": "matvecs",
    "mapping": "groups? curvature sparsities curves densities",
    "result": "opt_state density traces result eigenpairs? ax? axes? labels moments pairs? problem",
    "module": "module model",
    "inputs": "inputs",
}
KIND_OF = {name.rstrip("?"): (kind, "?" in name) for kind, names in KINDS.items() for name in names.split()}

RIGHT = {
    "loss_fn": loss, "model_fn": model, "output_loss": out_loss, "matvec": A, "params": W, "like": W,
    "rhs": W, "key": KEY, "x": X, "vector": W, "num_probes": 2, "num_matvecs": 3, "callbacks": (),
    "max_matvecs": 6, "k": 1, "damping": 1.0,
    "likelihood": hj.likelihoods.gaussian, "batches": [X], "loss": out_loss, "where": "*",
    "saliency": MAGNITUDE, "sparsity": 0.5, "grads_fn": lambda p: GRADS, "grads": GRADS,
    "directions": W, "distances": [0.0, 1.0], "factor": 0.1, "path": FOLDER, "inner": optax.sgd(0.1),
    "choose": MAGNITUDE, "by": hj.saliencies.obs(), "penalty": 0.1, "fraction": 0.3,
    "stop": 3,
    "n": 2, "m": 4, "shape": (2, 2), "curvature": {"kernel": 0.5, "bias": 0.5}, "sparsities": {"kernel": 0.5},
    "level": 0.5, "module": linen.Dense(2), "model": nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "levels": [0.0, 0.5],
    "fn": model, "approximation": A, "preconditioner": A,
    "make_matvec": lambda batch: hj.hessian(loss, W, batch), "matvecs": [A, A], "diagonal": W, "other": W,
    "teacher_fn": dense, "metric": size_of, "information": loss, "scores": PARAMS, "steps": [0, 1],
    "train": [X], "query": [X], "inverse": A,
    "small": 2 * W, "large": W, "small_size": 2, "large_size": 3,
    "values": [1.0, 2.0], "accuracy": [0.5, 1.0], "curves": {"a": ([0.1, 1.0], [0.5, 1.0])},
}  # fmt: skip

PRUNED = {"params": (PARAMS, "params")}
INSTEAD = {
    "hj.solve": {"damping": (0.0, "number")},
    "hj.inverse_fisher": {"damping": (1.0, "tol"), "weights": (None, "weights?")},
    "hj.saliencies.obs": {"damping": (1.0, "tol")},
    "hj.saliencies.wood_taylor": {"damping": (1.0, "tol")},
    "hj.trace": {"estimator": (None, "estimator maker?")},
    "hj.run": {"estimator": (hj.estimators.hutchinson(), "estimator")},
    "hj.check": {"batches": (None, "batches again?"), "matvec": (None, "function?"), "key": (None, "key?")},
    "hj.over_batches": {"batches": ([X], "batches again")},
    "hj.batches": {
        "source": ([X], "source"), "with_weights": (lambda batch, w: batch, "function?"),
        "size": (2, "count?"), "sharding": (None, "result?"),
    },
    "hj.weighted_sum": {"weights": (None, "numbers?")},
    "hj.landscape": {"batches": (None, "batches?")},
    "hj.sampled_grads": {"num_samples": (1, "count")},
    "hj.fisher": {"num_samples": (1, "count?")},
    "hj.adam_preconditioner": {"opt_state": (ADAM.update(W, ADAM.init(W))[1], "result")},
    "hj.mask_of": {"opt_state": (hj.prune(ADAM, MAGNITUDE, 0.5).init(PARAMS), "result")},
    "hj.prune": {"sparsity": (0.5, "schedule"), "start": (0, "count"), "stop": (None, "count?")},
    "hj.prune_once": {**PRUNED, "loss_fn": (size_of, "function?"), "max_ratio": (None, None)},
    "hj.memory_estimate": {"what": (jax.nn.relu, "function")},
    "hj.select": PRUNED,
    "hj.sensitivity": {
        **PRUNED, "diagonal": (None, "vector?"), "path": (None, "path?"), "metric": (size_of, "function?"),
    },
    "hj.compact": {"params": (PARAMS, "tree"), "model_fn": (dense, "function"), "x": (WIDE, "args")},
    "hj.report": {"density": (True, "flag"), "problem": (hj.Problem(loss, W, [X]), "result")},
    "hj.summary": {**PRUNED, "model_fn": (dense, "function"), "x": (WIDE, "args")},
    "hj.to_sparse": PRUNED,
    "hj.save_npz": {"params": (PARAMS, "tree")},
    "hj.load_npz": {"like": (PARAMS, "vector?")},
    "hj.load_recipe": {"path": ("tests/recipes/recipe.yaml", "path"), "steps_per_epoch": (10, "count?")},
    "hj.directions.random": PRUNED,
    "hj.dynamics.directional_sharpness": {"update": (W, "vector")},
    "hj.dynamics.critical_sharpness": {"update": (W, "vector")},
    "hj.influence": {"x": (jnp.ones(()), "args")},
    "hj.self_influence": {"x": (jnp.ones(()), "args")},
    "hj.dynamics.noise_scale": {"grads": (jnp.eye(3), "params"), "weights": (None, "numbers?")},
    "hj.dynamics.critical_batch_size": {"grads": (jnp.eye(3), "params"), "weights": (None, "numbers?")},
    "hj.likelihoods.Likelihood": {"score": (loss, "function")},
    "hj.saliencies.movement": {"start": (jnp.zeros_like, "function")},
    "hj.saliencies.rigl": {"score": (hj.saliencies.magnitude(), "saliency")},
    "hj.saliencies.sparse_evolution": {"score": (MAGNITUDE, "saliency"), "key": (KEY, "typed key")},
    "hj.saliencies.from_magnitudes": {"weights": (W, "one array")},
    "hj.saliencies.random": {"key": (KEY, "typed key")},
    "hj.saliencies.hard_concrete": {"stop": (3, "count"), "key": (KEY, "typed key")},
    "hj.saliencies.static": {"scores": (PARAMS, "mapping")},
    "hj.estimators.hutchinson_by_leaf": {"groups": ((), None)},
    "hj.layers.moments": {"num_samples": (1, "count?")},
    "hj.patterns.heads": {"num_heads": (2, "count?")},
    "hj.flax.linen_recalibrate": {
        "module": (linen.BatchNorm(use_running_average=False), "module"),
        "variables": (linen.BatchNorm().init(KEY, X, use_running_average=True), "mapping"),
    },
    "hj.flax.nnx_recalibrate": {"model": (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), "module")},
    "hj.plot.pruning_run": {"sparsity": ([0.0, 0.5], "numbers")},
    "hj.plot.sensitivity": {"metric": (None, "choice?")},
    "hj.plot.kept": {"params": (PARAMS, "tree")},
    "hj.plot.layers": {"params": (W, "tree")},
}  # fmt: skip


def results():
    """What the figures show: made when it is asked for, as it takes a second to compile."""
    curve = hj.landscape(size_of, W, directions=W, distances=[0.0, 1.0])
    plane = hj.landscape(size_of, W, directions=jnp.eye(2, 3), distances=[0.0, 1.0])
    density = hj.spectral_density(A, KEY, W, 1, 3)
    moments = hj.layers.moments(model, W, [X], likelihood=hj.likelihoods.gaussian)
    of_all = hj.layers.moments(dense, PARAMS, [WIDE], likelihood=hj.likelihoods.gaussian)
    return {
        "hj.dynamics.heterogeneity": {
            "densities": (hj.spectral_density_by_leaf(A2, KEY, [W, W], 1, 3), "mapping"),
        },
        "hj.layers.kfac": {"moments": (moments, "result")},
        **{f"hj.saliencies.{name}": {"moments": (of_all, "result"), "damping": (1.0, "tol")}
           for name in ("obc", "sparsegpt")},
        "hj.saliencies.wanda": {"moments": (of_all, "result")},
        "hj.layers.reconstruct": {
            "params": (W, "tree"), "mask": (W != 1, "tree"), "moments": (moments, "result"),
            "batches": (None, "batches?"), "damping": (1.0, "tol"), "empty": ("allow", "choice")},
        "hj.layers.ekfac": {"moments": (moments, "result")},
        "hj.plot.density": {"density": (density, "result")},
        "hj.plot.cumulative": {"density": (density, "result")},
        "hj.plot.layers": {"traces": (hj.trace_by_leaf(A, KEY, W, 2), "result")},
        "hj.plot.landscape": {"result": (curve, "result")},
        "hj.plot.landscape_surface": {"result": (plane, "result")},
        "hj.plot.sensitivity": {"result": (hj.sensitivity(size_of, PARAMS, [0.5]), "result")},
    }  # fmt: skip


def once(**setting):
    given = {"saliency": MAGNITUDE, "sparsity": 0.5, "grads_fn": lambda p: GRADS, **setting}
    return hj.prune_once(PARAMS, **given)


_ONCE = {"saliency": MAGNITUDE, "sparsity": 0.5, "grads_fn": lambda p: GRADS}


def trained(tx):
    state = tx.init(PARAMS)
    return tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)


MATVECS = ["hessian", "ggn", "fisher", "empirical_fisher", "over_batches", "weighted_sum", "preconditioned"]
MATVECS += ["kfac", "ekfac"]
FAMILIES = {"saliencies": "saliency", "patterns": "pattern", "allocations": "allocation"}


def use(name, made):
    """What shows that it works: a product of a matvec, pruning by a rule."""
    last = name.split(".")[-1]
    if name.startswith("hj.estimators."):
        return hj.run(made, A, KEY, W, max_matvecs=6)
    if last == "batches":
        return list(made)
    if last in MATVECS:
        return made(W)
    if last == "select":
        return hj.hvp(made.restrict(size_of), made.part, made.part)
    if last == "prune":
        return trained(made)
    if last in ("threshold", "hard_concrete"):
        rule = MAGNITUDE if last == "threshold" else made
        return hj.prune(optax.sgd(0.1), rule, made if last == "threshold" else 0.5, start=1).init(PARAMS)
    if (family := FAMILIES.get(name.split(".")[1])) and last not in ("heads", "from_magnitudes"):
        return once(**{family: made})
    if last in ("linen_loss", "linen_model"):
        return made(VARIABLES["params"], X)
    return made[0](made.params, X, made.state) if last in ("nnx_loss", "nnx_model") else made
