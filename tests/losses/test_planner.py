"""Plans: the arithmetic of the reference shape by hand, and every plan fits its budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incr_ds.losses.planner import (
    LEAN_CUDA_BUDGET_BYTES,
    SLAB_ROWS,
    LossShape,
    Speeds,
    cached_rows,
    default_budget,
    plan_loss,
    plan_recompute,
)

REFERENCE = LossShape(tokens=8192, vocabulary=128256, student_width=4096, teacher_width=2048)
H200 = Speeds(tflops=790, gigabytes_per_second=4300)


def test_a_budget_of_2_5_gigabytes_makes_one_chunk_of_the_reference_shape():
    plan = plan_loss(REFERENCE, 2_500_000_000)
    assert (plan.chunks, plan.chunk_rows, plan.slab_rows) == (1, 8192, 1024)
    # 128320 columns of 2 bytes: 8192 rows of the student's and 1024 of the teacher's.
    assert plan.buffer_bytes == (8192 + 1024) * 128320 * 2
    products = 2 * 8192 * 128256 * (3 * 4096 + 2048)
    passes = 8192 * 128256 * 5 * 2
    assert plan.milliseconds(H200) == pytest.approx(products / 790e12 * 1e3 + passes / 4300e9 * 1e3)
    assert plan.describe(H200) == (
        "1 chunks of 8192 tokens, slabs of 1024: 2.37 GB of logits, 40.6 ms predicted at 790 TFLOP/s and 4300 GB/s"
    )


def test_each_further_chunk_costs_the_heads_gradient_once_more():
    one, four = plan_loss(REFERENCE, 2_500_000_000), plan_loss(REFERENCE, 800_000_000)
    assert (four.chunks, four.chunk_rows) == (4, 2048)
    assert four.moved_bytes - one.moved_bytes == 3 * 8 * 128256 * 4096


@given(
    tokens=st.integers(1, 40_000),
    vocabulary=st.integers(1, 200_000),
    teacher_width=st.sampled_from([0, 64]),
    temporaries=st.integers(0, 5),
    budget=st.integers(1, 10**10),
)
def test_every_plan_fits_its_budget_or_is_the_smallest(tokens, vocabulary, teacher_width, temporaries, budget):
    shape = LossShape(tokens, vocabulary, 128, teacher_width, temporaries=temporaries)
    plan = plan_loss(shape, budget)
    assert plan.buffer_bytes <= budget or (plan.chunk_rows, plan.slab_rows) == (1, 1)
    assert 1 <= plan.slab_rows <= min(plan.chunk_rows, SLAB_ROWS) and plan.chunk_rows <= tokens
    assert plan.chunk_rows * plan.chunks >= tokens > plan.chunk_rows * (plan.chunks - 1)
    assert plan.milliseconds(H200) >= plan_loss(shape, 2 * budget).milliseconds(H200)


def test_the_reference_shape_without_stored_logits_needs_less_than_0_4_gigabytes():
    plan = plan_recompute(REFERENCE, LEAN_CUDA_BUDGET_BYTES, accumulates=True)
    assert (plan.blocks, plan.columns, plan.walks) == (18, 7168, 2)
    # The fp32 gradient of the hidden states, and a block of both models' logits, 64 columns wider than it is.
    assert plan.buffer_bytes == 8192 * 4096 * 4 + 8192 * (7168 + 64) * 2 * 2 < 400_000_000
    products = 2 * 8192 * 128256 * (4 * 4096 + 2 * 2048)
    traffic = 8192 * 128256 * 5 * 2 + 17 * 8 * 8192 * 4096
    assert plan.milliseconds(H200) == pytest.approx(products / 790e12 * 1e3 + traffic / 4300e9 * 1e3)
    assert plan.describe(H200) == (
        "18 blocks of 7168 columns, 2 walks: 0.37 GB, 58.0 ms predicted at 790 TFLOP/s and 4300 GB/s"
    )
    jsd = plan_recompute(REFERENCE, LEAN_CUDA_BUDGET_BYTES, accumulates=True, walks=3)
    assert jsd.flops - plan.flops == 2 * 8192 * 128256 * (4096 + 2048)


@given(
    tokens=st.integers(0, 40_000),
    vocabulary=st.integers(0, 200_000),
    teacher_width=st.sampled_from([0, 64]),
    temporaries=st.integers(0, 5),
    accumulates=st.booleans(),
    budget=st.integers(1, 10**10),
)
def test_every_lean_plan_fits_its_budget_or_has_the_narrowest_blocks(
    tokens, vocabulary, teacher_width, temporaries, accumulates, budget
):
    shape = LossShape(tokens, vocabulary, 128, teacher_width, temporaries=temporaries)
    plan = plan_recompute(shape, budget, accumulates=accumulates)
    assert plan.buffer_bytes <= budget or plan.columns == min(64, max(vocabulary, 1))
    assert 1 <= plan.columns <= max(vocabulary, 1) and plan.columns * plan.blocks >= vocabulary


@pytest.mark.parametrize("cuda", [True, False])
def test_lean_has_the_smaller_budget(cuda):
    assert default_budget(cuda, recompute=True) < default_budget(cuda, recompute=False) / 2


def test_a_slab_on_a_cpu_fits_its_cache_but_has_enough_rows_for_a_product():
    shapes = {vocabulary: LossShape(4096, vocabulary, 64, 32) for vocabulary in (0, 1024, 4096, 128_256)}
    rows = {vocabulary: cached_rows(shape) for vocabulary, shape in shapes.items()}
    assert rows == {0: 524_288, 1024: 512, 4096: 128, 128_256: 64}
    assert cached_rows(LossShape(4096, 4096, 64)) == SLAB_ROWS  # nothing is stored for them
    plan = plan_loss(LossShape(4096, 4096, 64, 32, logits_bytes=4), 2**40, rows[4096])
    assert (plan.chunks, plan.slab_rows) == (1, 128)
