"""The experts' activations and their slopes, in float32.

Formulas as in `omnigene_fast.reference`, but through a sigmoid whose exponent is bounded: nothing overflows, however
large the gate.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) through exp2, with the exponent bounded so that nothing overflows."""
    return 1.0 / (1.0 + tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0)))


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """Activation in float32. gelu_tanh: 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    tl.static_assert(ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu" or ACTIVATION == "silu")
    if ACTIVATION == "gelu_tanh":
        return gate * sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        return gate * sigmoid(gate)


@triton.jit
def activate_with_slope(gate, ACTIVATION: tl.constexpr):
    """Activation and derivative in float32. With act(x) = x * s(u(x)) and s the sigmoid, act' = s + x * s (1 - s) u'.

    1 - s = e * s with e = exp(-u), which keeps its digits where s is close to 1. Beyond 96 either way the derivative is
    1 or 0 to float32; it is evaluated no further out, where x^3 would overflow. A NaN stays one.
    """
    tl.static_assert(ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu" or ACTIVATION == "silu")
    x = tl.where(gate > 96.0, 96.0, tl.where(gate < -96.0, -96.0, gate))
    if ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = s + x * tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
    else:
        if ACTIVATION == "gelu_tanh":
            u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            u_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            u = x
            u_slope = 1.0
        e = tl.exp2(tl.minimum(u * -1.4426950408889634, 126.0))
        s = 1.0 / (1.0 + e)
        slope = s + x * u_slope * (e * s * s)
    return gate * s, slope
