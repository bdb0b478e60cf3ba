"""Iterative methods that ask for matrix-vector products, and what they estimate."""

from hessjax._run._estimator import Estimator as Estimator
from hessjax.estimators._diagonal import hutchinson_diagonal as hutchinson_diagonal
from hessjax.estimators._diagonal import hutchinson_frobenius as hutchinson_frobenius
from hessjax.estimators._hutchinson import hutchinson as hutchinson
from hessjax.estimators._hutchinson import hutchinson_by_leaf as hutchinson_by_leaf
from hessjax.estimators._hutchpp import hutchpp as hutchpp
from hessjax.estimators._lanczos import lanczos as lanczos
from hessjax.estimators._power import power_iteration as power_iteration
from hessjax.estimators._slq import slq as slq
from hessjax.estimators._xtrace import xtrace as xtrace
from hessjax.solvers._conjugate_gradient import conjugate_gradient as conjugate_gradient
from hessjax.solvers._minres import minres as minres
