"""The learnable scalars."""

import jax
import numpy as np
import pytest
from flax import nnx

from gramjax.models import LossParameters


def test_starts_at_the_temperature_asked_for():
    np.testing.assert_allclose(LossParameters(temperature=0.07).temperature, 0.07, rtol=1e-6)


def test_no_step_makes_the_temperature_negative():
    graphdef, params = nnx.split(LossParameters(temperature=0.07), nnx.Param)
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params).temperature)(params)
    params = jax.tree.map(lambda value, slope: value - 50.0 * slope, params, gradient)
    assert 0 < nnx.merge(graphdef, params).temperature < 0.07


def test_the_gradient_is_that_of_the_logarithm():
    graphdef, params = nnx.split(LossParameters(temperature=0.2), nnx.Param)
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params).temperature)(params)
    np.testing.assert_allclose(jax.tree.leaves(gradient), [0.2], rtol=1e-6)  # d exp(x) / dx = exp(x)


def test_a_constant_temperature_is_no_parameter():
    fixed = LossParameters(temperature=0.05, learn_temperature=False)
    assert fixed.temperature == 0.05
    assert not jax.tree.leaves(nnx.state(fixed, nnx.Param))


def test_bias_only_when_asked_for():
    assert LossParameters().bias is None
    assert float(LossParameters(bias=-10.0).bias[...]) == -10.0


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        LossParameters(temperature=temperature)
