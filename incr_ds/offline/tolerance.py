"""How far the logits of two models may be apart; torch is not needed to know it."""

EXACT = 1e-4  # of the largest logit: the effect of fp32 arithmetic in another order
# Like this measure, a growth multiplies and rounds each weight once. Its largest effect on a logit was up to 1.5 times as
# large (docs/exactness.md).
ROUNDING_FACTOR = 3.0
