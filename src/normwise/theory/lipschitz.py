"""How 1-Lipschitz layers shrink a signal at the start (arXiv 2503.00240, "[LI]")."""

from __future__ import annotations

import itertools
import math

from normwise.theory._checks import check

__all__ = ["aol_variance", "signal_variance"]


def aol_variance(outputs: int, inputs: int) -> float:
    r"""The variance of an entry of an AOL weight whose parameters are normal with mean 0.

    .. math::
        \mathrm{Var}[\bar w] \approx \Big(d + (n - 1)\, \frac{2}{\sqrt\pi}\,
        \frac{\Gamma((d+1)/2)}{\Gamma(d/2)}\Big)^{-1} \le \frac1d

    for n columns of d entries: with E|⟨wᵢ, wⱼ⟩| = s²·(2/√π)·Γ((d+1)/2)/Γ(d/2) off the diagonal
    of WᵀW. The variance of the parameters, s², cancels, as the scale of the weight does.

    Args:
        outputs: d, the rows of the weight, 1 or more.
        inputs: n, its columns, 1 or more.

    Returns:
        The variance.

    Raises:
        ValueError: for a number below 1.

    Source: arXiv 2503.00240, and the ``w_variance`` of its code.
    """
    if outputs < 1 or inputs < 1:
        raise ValueError(f"Invalid shape: {outputs}×{inputs}; both must be 1 or more")
    off = 2 / math.sqrt(math.pi)
    off *= math.exp(math.lgamma((outputs + 1) / 2) - math.lgamma(outputs / 2))
    return 1 / (outputs + (inputs - 1) * off)


def signal_variance(
    widths: tuple[int, ...] | list[int], variance: float = 1.0, bias_variance: float = 0.0
) -> list[float]:
    r"""The variance of pre-activations behind each layer of a deep AOL network with ReLU.

    The first layer multiplies the variance of its input by n·Var[w̄], each later one by
    n/2·Var[w̄], since half of a symmetric pre-activation's square passes a ReLU. That is below 1, so
    the signal decays with depth whatever the parameters' variance; a bias's is what remains:

    .. math::
        q_{l+1} = \tfrac{n}{2}\,\mathrm{Var}[\bar w]\, q_l + \sigma_b^2.

    Args:
        widths: the sizes of the input and of each layer's output.
        variance: the mean square of the input's entries (default: 1).
        bias_variance: σ_b² (default: 0).

    Returns:
        One number for each layer.

    Raises:
        ValueError: for fewer than two widths, or a negative variance.

    Source: arXiv 2503.00240.
    """
    if len(widths) < 2:
        raise ValueError(f"Invalid widths: {list(widths)}; give the input's and a layer's or more")
    check(variance=variance, bias_variance=bias_variance)
    found = []
    passed = 1.0
    for inputs, outputs in itertools.pairwise(widths):
        variance = passed * inputs * aol_variance(outputs, inputs) * variance + bias_variance
        found.append(variance)
        passed = 0.5
    return found
