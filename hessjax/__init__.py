"""The curvature of a network's loss, and the weights it can do without, in JAX."""

import importlib as _importlib
from typing import Any as _Any

from hessjax import estimators as estimators
from hessjax import layers as layers
from hessjax._core._memory import MemoryLimitWarning as MemoryLimitWarning
from hessjax._core._results import Eigenpairs as Eigenpairs
from hessjax._core._results import Estimate as Estimate
from hessjax._core._types import relative as relative
from hessjax._fisher._build import inverse_fisher as inverse_fisher
from hessjax._fisher._inverse_fisher import InverseFisher as InverseFisher
from hessjax._report._problem import Problem as Problem
from hessjax._report._verb import Report as Report
from hessjax._report._verb import report as report
from hessjax._run._bar import progress_bar as progress_bar
from hessjax._run._callbacks import checkpoint as checkpoint
from hessjax._run._drivers import NonFiniteProductError as NonFiniteProductError
from hessjax._run._drivers import run as run
from hessjax._run._estimator import Progress as Progress
from hessjax._run._memory import MemoryEstimate as MemoryEstimate
from hessjax._run._memory import memory_estimate as memory_estimate
from hessjax.analysis import directions as directions
from hessjax.analysis import dynamics as dynamics
from hessjax.analysis._check import check as check
from hessjax.analysis._comparisons import Check as Check
from hessjax.analysis._influence import influence as influence
from hessjax.analysis._influence import self_influence as self_influence
from hessjax.analysis._landscape import Landscape as Landscape
from hessjax.analysis._landscape import landscape as landscape
from hessjax.analysis._scores import Influence as Influence
from hessjax.analysis._sensitivity import Sensitivity as Sensitivity
from hessjax.analysis._sensitivity import sensitivity as sensitivity
from hessjax.analysis._summary import summary as summary
from hessjax.compaction._compact import Compacted as Compacted
from hessjax.compaction._compact import compact as compact
from hessjax.compaction._obstacles import Obstacle as Obstacle
from hessjax.compaction._sparse import Saved as Saved
from hessjax.compaction._sparse import load_npz as load_npz
from hessjax.compaction._sparse import save_npz as save_npz
from hessjax.compaction._sparse import to_sparse as to_sparse
from hessjax.curvature import likelihoods as likelihoods
from hessjax.curvature._arithmetic import weighted_sum as weighted_sum
from hessjax.curvature._batches import over_batches as over_batches
from hessjax.curvature._data import Batches as Batches
from hessjax.curvature._data import batches as batches
from hessjax.curvature._ggn import fisher as fisher
from hessjax.curvature._ggn import ggn as ggn
from hessjax.curvature._gradients import empirical_fisher as empirical_fisher
from hessjax.curvature._gradients import per_example_grads as per_example_grads
from hessjax.curvature._hessian import hessian as hessian
from hessjax.curvature._hessian import hvp as hvp
from hessjax.curvature._preconditioner import adam_preconditioner as adam_preconditioner
from hessjax.curvature._preconditioner import preconditioned as preconditioned
from hessjax.curvature._roots import empirical_fisher_roots as empirical_fisher_roots
from hessjax.curvature._roots import ggn_roots as ggn_roots
from hessjax.curvature._roots import sampled_grads as sampled_grads
from hessjax.curvature._select import Selection as Selection
from hessjax.curvature._select import select as select
from hessjax.estimators import probes as probes
from hessjax.estimators._density import SpectralDensity as SpectralDensity
from hessjax.estimators._diagonal import diagonal as diagonal
from hessjax.estimators._diagonal import frobenius_norm as frobenius_norm
from hessjax.estimators._eigenpairs import eigenpairs as eigenpairs
from hessjax.estimators._slq import spectral_density as spectral_density
from hessjax.estimators._spectrum import Spectrum as Spectrum
from hessjax.estimators._spectrum import spectral_density_by_leaf as spectral_density_by_leaf
from hessjax.estimators._spectrum import spectrum as spectrum
from hessjax.estimators._trace import TraceByLeaf as TraceByLeaf
from hessjax.estimators._trace import trace as trace
from hessjax.estimators._trace import trace_by_leaf as trace_by_leaf
from hessjax.pruning import allocations as allocations
from hessjax.pruning import patterns as patterns
from hessjax.pruning import saliencies as saliencies
from hessjax.pruning._once import Pruned as Pruned
from hessjax.pruning._once import prune_once as prune_once
from hessjax.pruning.training._distillation import distillation as distillation
from hessjax.pruning.training._masks import mask_of as mask_of
from hessjax.pruning.training._prune import prune as prune
from hessjax.recipes._recipe import Recipe as Recipe
from hessjax.recipes._recipe import load_recipe as load_recipe
from hessjax.solvers._solve import solve as solve
from hessjax.solvers._system import Solution as Solution

__version__ = "0.1.0"

_ON_DEMAND = ("flax", "plot")  # `import hessjax` would wait for Flax and matplotlib


def __getattr__(name: str) -> _Any:
    if name in _ON_DEMAND:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What tab completion shows: verbs, result types and namespaces, not the packages that hold the code."""
    here = {name for name, value in globals().items() if name == "__version__" or _shown(name, value)}
    return sorted(here | {*_ON_DEMAND})


def _shown(name: str, value: object) -> bool:
    """A package is a namespace if it has functions of its own to show; those that hold the code have none."""
    if name.startswith("_") or not isinstance(value, type(probes)):
        return not name.startswith("_")
    inside = [x for key, x in vars(value).items() if not key.startswith("_")]
    return value.__name__.startswith(f"{__name__}.") and any(map(callable, inside))
