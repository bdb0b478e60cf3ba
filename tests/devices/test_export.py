"""Everything public lowers for GPUs and TPUs, and calls there only what is known; no device is needed."""

import contextlib
import re

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from jax._src.interpreters import mlir
from meshes import BATCH, KEY, PARAMS, hessian, loss_fn, model_fn, normal, output_loss, ridge
from test_face import CALLED

import hessjax as hj

pytestmark = pytest.mark.promotes  # the network of `meshes`

PLATFORMS = ["cuda", "tpu"]

LIBRARIES = {
    "eigh": {"cuda": {"cusolver_syevd_ffi"}, "tpu": {"Eigh"}},
    "cholesky": {"cuda": {"cusolver_potrf_ffi"}, "tpu": set()},  # the TPU's compiler writes it itself
}
"""What a program may call from outside, by the operation that asks for it."""

CUSTOM_CALL = re.compile(r"custom_call @([\w.]+)")

DEVICE = {"on_device": True}
CATEGORICAL = {"likelihood": hj.likelihoods.categorical}
ATTENTION = {"attention": {name: {"kernel": normal(5, 4, 2, 3)} for name in ("query", "key", "value")}}
ATTENTION["attention"]["out"] = {"kernel": normal(6, 2, 3, 4)}
LEVELS = {"in/kernel": 0.4, "out/kernel": 0.6}


def run(estimator, p, b, op=hessian):
    return hj.run(estimator, op(p, b), KEY, p, max_matvecs=6, on_device=True)[0]


def grads(p, b):
    return hj.per_example_grads(loss_fn, p, b)


def inverse(p, b):
    blocks = lambda: (grads(p, b) for _ in range(2))
    made = [hj.inverse_fisher(blocks, 0.1, block_size=size) for size in (None, 8)]
    return [(F.apply(p), F.diagonal(), F.blocks(0), F.add(grads(p, b))) for F in made]


def selected(p, b):
    part = hj.select(p, "*/kernel")
    return hj.hvp(part.restrict(loss_fn), part.part, part.part, b)


def by_moments(make):
    return lambda p, b: once(make(hj.layers.moments(loss_fn, p, [b])), p, b)


def kronecker(p, b):
    moments = hj.layers.moments(model_fn, p, [b], likelihood=hj.likelihoods.gaussian)
    return hj.layers.kfac(moments), hj.layers.ekfac(moments, [b])


def applied(K, p):
    return K(p), K.inverse(0.1)(p), K.log_determinant(0.1), K.trace(), K.diagonal()


def distilled(p, b):
    return hj.distillation(model_fn, lambda batch: batch[1], output_loss)(p, b)


def pruned(saliency, p, b, **options):
    """`init`, and the update that takes a mask."""
    tx = hj.prune(optax.adam(1e-2), saliency, 0.5, every=1, start=1, **options)
    updates, state = tx.update(jax.grad(loss_fn)(p, b), tx.init(p), p, per_example_grads=grads(p, b))
    return updates, state, hj.mask_of(state)


def once(saliency, p, b, **options):
    return hj.prune_once(p, saliency, 0.5, grads_fn=lambda at: grads(at, b), **options).params


def by(saliency):
    return lambda p, b: (pruned(saliency, p, b), once(saliency, p, b))


def in_training(saliency):
    return lambda p, b: pruned(saliency, p, b)


def fitting(pattern):
    return lambda p, b: pruned(hj.saliencies.magnitude(), p, b, pattern=pattern)


def spread(allocation):
    return lambda p, b: pruned(hj.saliencies.magnitude(), p, b, allocation=allocation)


E, S, P, A = hj.estimators, hj.saliencies, hj.patterns, hj.allocations
TRACED = {
    "hj.hessian": lambda p, b: [hj.hessian(loss_fn, p, b, linearize=x)(p) for x in (False, True)],
    "hj.hvp": lambda p, b: hj.hvp(loss_fn, p, p, b),
    "hj.ggn": lambda p, b: hj.ggn(model_fn, output_loss, p, b)(p),
    "hj.fisher": lambda p, b: [hj.fisher(model_fn, p, b, **CATEGORICAL, key=key)(p) for key in (None, KEY)],
    "hj.empirical_fisher": lambda p, b: hj.empirical_fisher(loss_fn, p, b)(p),
    "hj.per_example_grads": grads,
    "hj.empirical_fisher_roots": lambda p, b: hj.empirical_fisher_roots(loss_fn, p, b),
    "hj.ggn_roots": lambda p, b: hj.ggn_roots(model_fn, p, b, **CATEGORICAL),
    "hj.sampled_grads": lambda p, b: hj.sampled_grads(model_fn, p, b, **CATEGORICAL, key=KEY),
    "hj.select": selected,
    "hj.weighted_sum": lambda p, b: ridge(p, b)(p),
    "hj.preconditioned": lambda p, b: hj.preconditioned(hessian(p, b), jax.tree.map(jnp.abs, p))(p),
    "hj.adam_preconditioner": lambda p, b: hj.adam_preconditioner(optax.adam(0.1).init(p)),
    "hj.eigenpairs": lambda p, b: hj.eigenpairs(hessian(p, b), KEY, p, 2, **DEVICE),
    "hj.trace": lambda p, b: hj.trace(hessian(p, b), KEY, p, 3, **DEVICE),
    "hj.trace_by_leaf": lambda p, b: hj.trace_by_leaf(hessian(p, b), KEY, p, 3, **DEVICE),
    "hj.diagonal": lambda p, b: hj.diagonal(hessian(p, b), KEY, p, 3, **DEVICE),
    "hj.frobenius_norm": lambda p, b: hj.frobenius_norm(hessian(p, b), KEY, p, 3, **DEVICE),
    "hj.spectral_density": lambda p, b: hj.spectral_density(hessian(p, b), KEY, p, 1, 4, **DEVICE),
    "hj.spectral_density_by_leaf": lambda p, b: hj.spectral_density_by_leaf(
        hessian(p, b), KEY, p, 1, 4, **DEVICE
    ),
    "hj.spectrum": lambda p, b: hj.spectrum(hessian(p, b), KEY, p, 1, 4, **DEVICE),
    "hj.solve": lambda p, b: hj.solve(ridge(p, b), p, **DEVICE),
    "hj.inverse_fisher": inverse,
    "hj.prune": lambda p, b: pruned(S.magnitude(), p, b),
    "hj.prune_once": lambda p, b: once(S.obs(), p, b),
    "hj.distillation": distilled,
    "hj.run": lambda p, b: run(E.hutchinson(), p, b),
    "hj.estimators.lanczos": lambda p, b: run(E.lanczos(2), p, b),
    "hj.estimators.power_iteration": lambda p, b: run(E.power_iteration(2), p, b),
    "hj.estimators.hutchinson": lambda p, b: run(E.hutchinson(hj.probes.gaussian), p, b),
    "hj.estimators.hutchinson_by_leaf": lambda p, b: run(E.hutchinson_by_leaf(), p, b),
    "hj.estimators.hutchpp": lambda p, b: run(E.hutchpp(6), p, b),
    "hj.estimators.xtrace": lambda p, b: run(E.xtrace(6), p, b),
    "hj.estimators.hutchinson_diagonal": lambda p, b: run(E.hutchinson_diagonal(), p, b),
    "hj.estimators.hutchinson_frobenius": lambda p, b: run(E.hutchinson_frobenius(), p, b),
    "hj.estimators.slq": lambda p, b: run(E.slq(3), p, b),
    "hj.estimators.conjugate_gradient": lambda p, b: run(
        E.conjugate_gradient(p, preconditioner=ridge(p, b)), p, b, ridge
    ),
    "hj.estimators.minres": lambda p, b: run(E.minres(p), p, b, ridge),
    "hj.probes.rademacher": lambda p, b: hj.probes.rademacher(KEY, p),
    "hj.probes.gaussian": lambda p, b: hj.probes.gaussian(KEY, p),
    "hj.directions.random": lambda p, b: hj.directions.random(KEY, p),
    "hj.directions.line": lambda p, b: hj.directions.line(p, p),
    "hj.dynamics.noise_scale": lambda p, b: hj.dynamics.noise_scale(grads(p, b)),
    "hj.dynamics.noise_scale_from_norms": lambda p, b: hj.dynamics.noise_scale_from_norms(
        2 * p["in"]["bias"], p["in"]["bias"], 1, 2
    ),
    "hj.dynamics.critical_batch_size": lambda p, b: hj.dynamics.critical_batch_size(grads(p, b), ridge(p, b)),
    "hj.dynamics.directional_sharpness": lambda p, b: hj.dynamics.directional_sharpness(
        loss_fn, p, b, update=p
    ),
    "hj.dynamics.critical_sharpness": lambda p, b: hj.dynamics.critical_sharpness(loss_fn, p, b, update=p),
    "hj.dynamics.heterogeneity": lambda p, b: hj.dynamics.heterogeneity(
        hj.spectral_density_by_leaf(hessian(p, b), KEY, p, 1, 4, **DEVICE)
    ),
    "hj.layers.capture": lambda p, b: hj.layers.capture(loss_fn, p, b),
    "hj.layers.moments": lambda p, b: (
        hj.layers.moments(model_fn, p, [b], likelihood=hj.likelihoods.gaussian).leaves
    ),
    "hj.layers.kfac": lambda p, b: applied(kronecker(p, b)[0], p),
    "hj.layers.ekfac": lambda p, b: applied(kronecker(p, b)[1], p),
    "hj.saliencies.magnitude": by(S.magnitude()),
    "hj.saliencies.random": by(S.random(KEY)),
    "hj.saliencies.gradient": by(S.gradient()),
    "hj.saliencies.movement": in_training(S.movement()),
    "hj.saliencies.soft_movement": in_training(S.soft_movement(0.1)),
    "hj.saliencies.hard_concrete": in_training(S.hard_concrete(penalty=0.1, stop=3, key=KEY)),
    "hj.saliencies.obd": by(S.obd()),
    "hj.saliencies.obs": lambda p, b: [by(S.obs(block_size=size))(p, b) for size in (None, 8)],
    "hj.saliencies.wood_taylor": by(S.wood_taylor()),
    "hj.saliencies.wanda": by_moments(S.wanda),
    "hj.saliencies.obc": by_moments(S.obc),
    "hj.saliencies.sparsegpt": by_moments(S.sparsegpt),
    "hj.saliencies.static": by(S.static(PARAMS)),
    "hj.saliencies.sparse_evolution": in_training(S.sparse_evolution(0.3, KEY)),
    "hj.saliencies.rigl": in_training(S.rigl(0.3)),
    "hj.saliencies.compensated": by(S.compensated(S.magnitude(), S.obs())),
    "hj.saliencies.from_magnitudes": lambda p, b: S.from_magnitudes(p["in"]["kernel"]),
    "hj.patterns.unstructured": fitting(P.unstructured()),
    "hj.patterns.n_of_m": fitting(P.n_of_m(2, 4)),
    "hj.patterns.blocks": fitting(P.blocks((2, 2))),
    "hj.patterns.channels": fitting(P.channels()),
    "hj.patterns.filters": fitting(P.filters()),
    "hj.patterns.rows": fitting(P.rows()),
    "hj.patterns.heads": lambda p, b: hj.prune_once(
        jax.tree.map(lambda x: x * p["in"]["bias"][0], ATTENTION), S.magnitude(), 0.5, pattern=P.heads()
    ),
    "hj.allocations.global_threshold": spread(A.global_threshold()),
    "hj.allocations.uniform": spread(A.uniform()),
    "hj.allocations.erdos_renyi": spread(A.erdos_renyi()),
    "hj.allocations.by_curvature": spread(A.by_curvature(LEVELS)),
    "hj.allocations.explicit": lambda p, b: (
        hj.prune_once(p, S.magnitude(), 0.5, allocation=A.explicit(LEVELS)).params
    ),
}

ON_THE_HOST = {
    "hj.over_batches": lambda p, b: hj.over_batches(lambda part: hessian(p, part), [b, b])(p),
    "hj.batches": lambda p, b: list(hj.batches([b])),
    "hj.trace": lambda p, b: hj.trace(hessian(p, b), KEY, p, 3),
    "hj.influence": lambda p, b: hj.influence(loss_fn, p, [b], [b], inverse=None),
    "hj.self_influence": lambda p, b: hj.self_influence(loss_fn, p, [b], inverse=None),
    "hj.landscape": lambda p, b: hj.landscape(loss_fn, p, b, directions=p, distances=[0.0, 1.0]),
    "hj.sensitivity": lambda p, b: hj.sensitivity(lambda at: loss_fn(at, b), p, [0.5]),
    "hj.summary": lambda p, b: hj.summary(p),
    "hj.layers.quality": lambda p, b: hj.layers.quality(hessian(p, b), hessian(p, b), KEY, p, num_probes=1),
    "hj.check": lambda p, b: hj.check(loss_fn, p, b),
}
"""What reads numbers between its programs."""

NOTHING_COMPUTED = """
    relative progress_bar checkpoint mask_of load_recipe save_npz load_npz to_sparse compact memory_estimate
    report layers.coverage layers.reconstruct estimators.Estimator
    likelihoods.Likelihood likelihoods.categorical likelihoods.gaussian
    saliencies.Saliency patterns.Pattern allocations.Allocation allocations.threshold
"""
"""Settings that others take, and what only moves numbers on the host, or reads its masks there."""

CALLS_OUT = {
    "eigh": """ggn_roots eigenpairs spectral_density spectral_density_by_leaf spectrum
        estimators.lanczos estimators.power_iteration estimators.slq dynamics.heterogeneity
        layers.moments layers.kfac layers.ekfac""",
    "cholesky": """inverse_fisher prune_once saliencies.obs saliencies.wood_taylor saliencies.compensated
        saliencies.obc saliencies.sparsegpt""",
}
"""Who calls libraries at all."""


def called(name, platform):
    operations = [x for x, names in CALLS_OUT.items() if name.removeprefix("hj.") in names.split()]
    return set().union(*(LIBRARIES[operation][platform] for operation in operations))


def exported(call, platform):
    """The text of one program for another platform. What jax does not vouch for it refuses, if not known."""
    known = set().union(*(names[platform] for names in LIBRARIES.values()))
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in known]
    make = jax.export.export(jax.jit(call), platforms=[platform], disabled_checks=checks)
    return make(PARAMS, BATCH).mlir_module()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", TRACED)
def test_it_is_one_program_for_any_platform(name, platform):
    found = set(CUSTOM_CALL.findall(exported(TRACED[name], platform)))
    assert found == called(name, platform), f"{name} calls {found or 'nothing'} on {platform}"


@contextlib.contextmanager
def lowered_elsewhere(found):
    """Inside, all that is compiled is lowered for other platforms too; what it calls goes to `found`."""
    original = mlir.lower_jaxpr_to_module

    def lower(*args, **kwargs):
        for platform in PLATFORMS:
            module = original(*args, **{**kwargs, "platforms": (platform,)}).module
            found[platform].update(CUSTOM_CALL.findall(str(module)))
        return original(*args, **kwargs)

    jax.clear_caches()  # what was lowered before would not be lowered again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "lower_jaxpr_to_module", lower)
        yield


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_all_its_programs_are_for_any_platform(name):
    found = {platform: set() for platform in PLATFORMS}
    with lowered_elsewhere(found):
        ON_THE_HOST[name](PARAMS, BATCH)
    for platform in PLATFORMS:
        assert found[platform] == called(name, platform), f"{name} calls {found} on {platform}"


def test_nothing_public_is_left_out():
    public = {name for name in CALLED if name.split(".")[1] not in ("flax", "plot")}
    known = {*TRACED, *ON_THE_HOST, *(f"hj.{name}" for name in NOTHING_COMPUTED.split())}
    assert public - known == set()
    assert {name for name in TRACED if name not in public} == set()
