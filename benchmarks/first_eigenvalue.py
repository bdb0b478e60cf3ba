"""When does a fresh interpreter have a small network's first eigenvalue? Prints the time, in seconds."""

import time

import jax
import models

import hessjax as hj

problem = models.small_conv_net()
A = hj.hessian(problem.loss_fn, problem.params, *problem.args)
pairs = hj.eigenpairs(A, jax.random.key(0), problem.params, k=1, which="largest")
assert pairs.converged[0], pairs.residuals
print(time.time())  # of the clock, for `startup.py`, which knows when it began
