"""How many seconds pass from the first import to a small network's first eigenvalue? Prints the number."""

import time

start = time.perf_counter()

import jax  # noqa: E402
import models  # noqa: E402

import hessjax as hj  # noqa: E402

problem = models.small_conv_net()
A = hj.hessian(problem.loss_fn, problem.params, *problem.args)
pairs = hj.eigenpairs(A, jax.random.key(0), problem.params, k=1, which="largest")
assert pairs.converged[0], pairs.residuals
print(time.perf_counter() - start)
