"""Learning from a dense teacher while pruning: a loss that mixes its softened outputs with the task."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_function, checked_number
from hessjax._core._types import ModelFn, settings


@settings()
class Distillation:
    """The loss of a student that learns from a teacher's outputs and from the task.

    With logits z of the student, t of the teacher, and the softmax σ over the last axis,

        α · T² · KL(σ(t / T) ‖ σ(z / T)) + (1 − α) · output_loss(z, *args),

    the divergence being a mean over all leading axes. T² keeps its gradient of the size of the task's,
    whatever the temperature. No gradient flows into the teacher.

    It is a loss like any other, `loss_fn(params, *args) -> scalar`, in nats where `output_loss` is; those of
    equal parts are equal and share compiled code.

    Args:
        model_fn: `(params, *args) -> logits`, an array whose last axis is the classes, or a pytree of such,
            whose divergences are added up: the start and the end of an answer, say.
        teacher_fn: `(*args) -> logits` like the student's: `functools.partial(model_fn, dense_params)` or
            `lambda batch: batch["teacher_logits"]`, when they were computed once and put into the batch.
        output_loss: `(logits, *args) -> scalar`, the mean over the examples, as for `ggn`.
        temperature: T, positive.
        alpha: α in [0, 1], the weight of the teacher. 0 is the task alone, 1 the teacher alone; what has no
            weight is not computed.

    Raises:
        ValueError: a temperature that is not positive and finite, `alpha` outside [0, 1]; by the loss, if the
            teacher's outputs are not shaped like the student's.

    Cost:
        That of the model and of the teacher, forward.

    References:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network (2015), arXiv 1503.02531.
        Sanh, Wolf and Rush, Movement pruning (2020), arXiv 2005.07683: while pruning, with T = 2, α = 0.5.

    Example:
        >>> import functools, jax, jax.numpy as jnp, optax, hessjax as hj
        >>> def model_fn(params, batch):
        ...     return batch["x"] @ params
        >>> def task(logits, batch):
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        >>> dense = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> loss_fn = hj.distillation(model_fn, functools.partial(model_fn, dense), task)
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([0, 1])}
        >>> sparse = dense.at[0, 0].set(0.0)
        >>> bool(loss_fn(sparse, batch) > loss_fn(dense, batch) == task(model_fn(dense, batch), batch) / 2)
        True
    """

    model_fn: ModelFn
    teacher_fn: Callable[..., Any]
    output_loss: Callable[..., Any]
    temperature: float | int = 2.0
    alpha: float | int = 0.5

    def __post_init__(self) -> None:
        for name, form in {
            "model_fn": "(params, *args) -> logits",
            "teacher_fn": "(*args) -> logits",
            "output_loss": "(logits, *args) -> scalar",
        }.items():
            checked_function(name, getattr(self, name), form)
        if not 0 < checked_number("temperature", self.temperature) < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, got {self.temperature}.")
        if not 0 <= checked_number("alpha", self.alpha) <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], the weight of the teacher, got {self.alpha}.")

    def __call__(self, params: Any, *args: Any) -> Float[Array, ""]:
        """The loss."""
        student = self.model_fn(params, *args)
        taught = jnp.zeros(())
        # What has no weight is not computed, nor its NaN multiplied by 0.
        if self.alpha > 0:
            teacher = jax.lax.stop_gradient(self.teacher_fn(*args))
            taught = softened_divergence(student, teacher, self.temperature)
        task = self.output_loss(student, *args) if self.alpha < 1 else jnp.zeros(())
        taught, task = _numbers.promoted(taught, task)
        return self.alpha * taught + (1 - self.alpha) * task


def softened_divergence(student: Any, teacher: Any, temperature: float | int) -> Float[Array, ""]:
    """T² · KL(σ(teacher / T) ‖ σ(student / T)), a mean over leading axes, added up over leaves."""
    _tree.check_like(teacher, student, "teacher_fn(*args)", "model_fn(params, *args)")
    pairs = zip(jax.tree.leaves(_tree.wide(student)), jax.tree.leaves(_tree.wide(teacher)), strict=True)
    divergences = [
        optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(z / temperature), jax.nn.log_softmax(t / temperature)
        )
        for z, t in pairs
    ]
    # The gradient of the divergence shrinks by T²: this makes up for it.
    means = _numbers.promoted(*map(jnp.mean, divergences))
    return temperature**2 * sum(means[1:], means[0])


distillation = Distillation
