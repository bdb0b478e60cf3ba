"""The spectral density of every layer: one Lanczos program, turned on each leaf's diagonal block."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._typing import Key, Matvec, Params
from hessjax.estimator import run
from hessjax.spectral.density import SpectralDensity
from hessjax.spectral.probes import Probe, gaussian
from hessjax.spectral.slq import slq


def spectral_density_by_leaf(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 1,
    num_matvecs: int = 80,
    *,
    probe: Probe = gaussian,
    reorthogonalise: bool = False,
    at_once: int = 1,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> dict[str, SpectralDensity]:
    """The distribution of the eigenvalues of every leaf's diagonal block A_ll.

    The block is the whole matvec between two masks, v ↦ P_l A P_l v. Which leaf is let through is data, so
    that all leaves share what is compiled for one. A leaf smaller than `num_matvecs` has all its eigenvalues
    found before the end; the nodes that are too many have weight zero.

    Args:
        matvec: the symmetric linear map.
        key: random key; leaf i uses `fold_in(key, i)`.
        like: pytree like the vectors; usually the params.
        num_probes: number of random start vectors for each leaf. Small leaves need more of them.
        num_matvecs: Lanczos steps for each: the resolution.
        probe: see `slq`.
        reorthogonalise: see `slq`. Off by default: a basis of vectors of full length is a lot of memory for
            one leaf's numbers.
        at_once: see `slq`.
        callbacks: see `run`; they hear of one run for each leaf, so `checkpoint` is refused.
        on_device: see `run`.

    Returns:
        For the path of each leaf that is not empty, a `SpectralDensity` with `dimension` the leaf's size.

    Raises:
        ValueError: as `slq`; two leaves with one path.
        NonFiniteProductError: see `run`.

    Cost:
        `num_probes · num_matvecs` products of the whole matvec for every leaf; memory as `slq`: 2·d, or
        (num_matvecs + 1)·d with reorthogonalisation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> like = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> densities = hj.spectral_density_by_leaf(A, jax.random.key(0), like, num_matvecs=2)
        >>> {path: round(float(density.moment()), 5) for path, density in densities.items()}
        {'bias': 2.0, 'kernel': 3.0}
    """
    paths, leaves = _tree.unique_paths(like, "like"), jax.tree.leaves(like)
    if any(hasattr(callback, "restore") for callback in callbacks):
        raise ValueError(
            "`callbacks` must not hold a `checkpoint`, which is of one run: this makes one for every leaf. "
            "For checkpoints take the densities of `hessjax.select(params, path)` one by one."
        )
    estimator = slq(num_probes, num_matvecs, probe=probe, reorthogonalise=reorthogonalise, at_once=at_once)

    def density_of(index: int) -> SpectralDensity:
        init = Partial(estimator.init, leaf=jnp.int32(index))
        density, _ = run(
            estimator._replace(init=init),
            matvec,
            jax.random.fold_in(key, index),
            like,
            max_matvecs=num_probes * num_matvecs,
            callbacks=callbacks,
            on_device=on_device,
        )
        return density

    return {path: density_of(i) for i, path in enumerate(paths) if jnp.size(leaves[i])}
