"""Powers of two: what the device's exponentials and logarithms are of."""

import math

import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
LOG2_E = tl.constexpr(1.0 / math.log(2.0))
