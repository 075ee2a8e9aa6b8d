"""Constraints that a technique lays upon weights while a model trains, with tensors of their own, on every backend.

On TensorFlow and PyTorch they are `variable.constraint`, which an optimizer applies inside its compiled step. JAX would
compile their tensors into the step as constants; there one compiled function runs the step and then the constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np


class WeightConstraint(keras.constraints.Constraint):
    """Applies another constraint, if there is one, and then `project`, after each update of the optimizer.

    Subclasses write `project`. The tensors that it reads or assigns are variables of `HeldWeights.new_state`.

    Args:
        inner: the constraint that the weights had before, or `None`.
    """

    def __init__(self, inner: Any = None):
        self.inner = inner

    def __call__(self, w: Any) -> Any:
        if self.inner is not None:
            w = self.inner(w)
        return w if _deferred() else self.project(keras.ops.convert_to_tensor(w))

    def project(self, w: Any) -> Any:
        """Return the weights to go on with; `w` is the tensor that the optimizer and the inner constraint left."""
        raise NotImplementedError

    def chain(self) -> Iterator[WeightConstraint]:
        """Yield the constraints of this kind in the order in which they are applied; this one is the last."""
        if isinstance(self.inner, WeightConstraint):
            yield from self.inner.chain()
        yield self


class HeldWeights:
    """The weights of a model that one technique constrains while it trains, and the technique's tensors.

    Nothing of it gets into checkpoints: state belongs neither to the model nor to its optimizer. Several techniques
    may hold one weight; who installs later is applied later. Call `install` in `on_train_begin` or later.

    Args:
        model: the model that is trained: the one whose `fit` runs.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self._constraints: list[tuple[keras.Variable, WeightConstraint]] = []
        self._states: list[keras.Variable] = []

    def new_state(self, reference: keras.Variable, value: Any, name: str, dtype: str | None = None) -> keras.Variable:
        """Return a variable that lives where `reference` does, also on several devices.

        Inside `project`, read it as `state.value` and write it with `state.assign`; outside of training steps, read it
        with `keras.ops.convert_to_numpy` and write it with `assign`.

        Args:
            reference: the weight that it belongs to.
            value: what it holds at first, of any shape.
            name: its name in error messages.
            dtype: its type; that of `reference` by default.
        """
        strategy = getattr(self.model, "distribute_strategy", None)  # TensorFlow
        with nullcontext() if strategy is None else strategy.scope():
            state = keras.Variable(
                np.asarray(value),
                dtype=dtype or reference.dtype,
                trainable=False,
                name=name,
                aggregation="only_first_replica",  # each replica computes the same
            )
        self._states.append(state)
        return state

    def install(self, variable: keras.Variable, make: Callable[[Any], WeightConstraint]) -> None:
        """Constrain `variable` by `make(constraint that it has now, or None)`, and compile the training step anew."""
        constraint = make(variable.constraint)
        variable.constraint = constraint
        self._constraints.append((variable, constraint))
        self._renew_step()

    def sync(self) -> None:
        """Bring the variables up to date; on JAX they are not while an epoch runs. Call before reading or writing any.

        Call it in `on_train_batch_begin`: overriding `on_train_batch_end` nearly doubles the cost of a step on JAX.
        """
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()

    def remove(self) -> None:
        """Give the weights back the constraints that they had, and forget the compiled training step."""
        installed, self._constraints = self._constraints, []
        for variable, constraint in installed:
            _unlink(variable, constraint)
        self._states = []
        if installed:
            self._renew_step()

    def step_states(self) -> list[keras.Variable]:
        """Return the state that a training step carries."""
        return list(self._states)

    def is_installed(self) -> bool:
        """Return whether any weight is constrained."""
        return any(constraint in _chain_of(variable) for variable, constraint in self._constraints)

    def _renew_step(self) -> None:
        """Have the training step compiled anew: a compiled one keeps the constraints of that time."""
        if not self.model.compiled:
            return
        holders = [each for each in _holders(self.model) if each is not self and each.is_installed()]
        if self._constraints:
            holders.append(self)
        self.model.make_train_function(force=True)
        if holders and _deferred():
            self.model.train_function = _ConstrainedStep(self.model, holders)


def remove_constraints(model: keras.Model, kind: type[WeightConstraint]) -> None:
    """Take constraints of `kind` off `model`: those that a `fit` which raised has left."""
    left = [(v, each) for v in model.variables for each in _chain_of(v) if isinstance(each, kind)]
    for variable, constraint in left:
        _unlink(variable, constraint)
    if left:
        HeldWeights(model)._renew_step()


def find_constraint(variable: keras.Variable, kind: type[WeightConstraint]) -> WeightConstraint | None:
    """Return the constraint of `kind` that holds `variable`, or `None`."""
    return next((each for each in _chain_of(variable) if isinstance(each, kind)), None)


def _deferred() -> bool:
    return keras.backend.backend() == "jax"


def _chain_of(variable: keras.Variable) -> list[WeightConstraint]:
    constraint = variable.constraint
    return list(constraint.chain()) if isinstance(constraint, WeightConstraint) else []


def _unlink(variable: keras.Variable, constraint: WeightConstraint) -> None:
    """Take `constraint` out of the chain; those around it stay."""
    if variable.constraint is constraint:
        variable.constraint = constraint.inner
    for outer in _chain_of(variable):
        if outer.inner is constraint:
            outer.inner = constraint.inner


def _holders(model: keras.Model) -> list[HeldWeights]:
    step = getattr(model, "train_function", None)
    return step.holders if isinstance(step, _ConstrainedStep) else []


class _ConstrainedStep:
    """Keras' own JAX training step, followed by the constraints; it stands in for `model.train_function`.

    The constraints' state goes in and out as arguments, so that a change of it compiles nothing anew.
    """

    def __init__(self, model: keras.Model, holders: Iterable[HeldWeights]):
        self.holders = list(holders)
        self._model = model
        self._states = [state for holder in self.holders for state in holder.step_states()]
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, state: Any, iterator: Iterator[Any]) -> tuple[Any, Any]:
        """Run `steps_per_execution` steps; return the logs of the last and the new training state."""
        logs, state = self._one(state, next(iterator))
        for _ in range(self._model.steps_per_execution - 1):
            try:
                data = next(iterator)
            except StopIteration:
                break
            logs, state = self._one(state, data)
        return logs, state

    def _one(self, state: Any, data: Any) -> tuple[Any, Any]:
        if self._compiled is None:
            self._compiled = self._compile(state)
        logs, state, changed = self._compiled(state, [held.value for held in self._states], data)
        for held, value in zip(self._states, changed, strict=True):
            if value is not None:
                held.assign(value)
        return logs, state

    def _compile(self, state: Any) -> Callable[..., Any]:
        if self._model.run_eagerly or not self._model.jit_compile:
            return self._step
        import jax

        shardings = None
        if keras.distribution.distribution() is not None:
            shardings = (None, jax.tree.map(lambda value: value.sharding, state), None)
        return jax.jit(self._step, donate_argnums=0, out_shardings=shardings)

    def _step(self, state: Any, held: list[Any], data: Any) -> tuple[Any, Any, list[Any]]:
        logs, (trainable, *others) = self._model.train_step(state, data)
        with keras.StatelessScope(list(zip(self._states, held, strict=True))) as scope:
            variables = self._model.trainable_variables
            trainable = [_projected(v, value) for v, value in zip(variables, trainable, strict=True)]
        after = [scope.get_current_value(each) for each in self._states]
        changed = [None if new is old else new for new, old in zip(after, held, strict=True)]
        return logs, (trainable, *others), changed


def _projected(variable: keras.Variable, value: Any) -> Any:
    for constraint in _chain_of(variable):
        value = constraint.project(value)
    return value
