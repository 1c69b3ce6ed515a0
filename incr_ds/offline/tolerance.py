"""How far the logits of two models may be apart; torch is not needed to know it."""

EXACT = 1e-4  # of the largest logit: what fp32 arithmetic in another order leaves
# A growth multiplies and rounds each weight once, as the measure does; its largest effect on a logit was up to 1.5 times as
# large (docs/exactness.md).
ROUNDING_FACTOR = 3.0
