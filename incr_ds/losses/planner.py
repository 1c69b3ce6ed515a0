"""Plans how many tokens' logits are in memory at once, from a byte budget. The plan can be printed before anything runs.

Every chunk of tokens reads and writes the head's fp32 gradient once, so few large chunks are fast. The teacher's logits
are only needed while a row is processed, so they are computed in smaller slabs inside the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SLAB_ROWS = 1024
# On a CPU, a slab of the teacher's logits should still be in the cache when the row kernels read it.
CPU_SLAB_ROWS, CPU_SLAB_BYTES = 64, 2 * 2**20
ROW_QUANTUM = 128
COLUMN_QUANTUM = 64

CPU_BUDGET_BYTES = 256 * 2**20
CUDA_BUDGET_BYTES = 2560 * 2**20
LEAN_CPU_BUDGET_BYTES = 64 * 2**20
LEAN_CUDA_BUDGET_BYTES = 360 * 2**20


def default_budget(cuda: bool, *, recompute: bool) -> int:
    """Bytes for logits if the caller states none."""
    if recompute:
        return LEAN_CUDA_BUDGET_BYTES if cuda else LEAN_CPU_BUDGET_BYTES
    return CUDA_BUDGET_BYTES if cuda else CPU_BUDGET_BYTES


@dataclass(frozen=True)
class Speeds:
    """Speeds that a prediction assumes: matrix products in TFLOP/s, memory in GB/s (10^9 bytes)."""

    tflops: float
    gigabytes_per_second: float

    def milliseconds(self, flops: int, moved_bytes: int) -> float:
        """Time of products and memory traffic, one after the other."""
        return flops / self.tflops / 1e9 + moved_bytes / self.gigabytes_per_second / 1e6

    def __str__(self) -> str:
        return f"{self.tflops:g} TFLOP/s and {self.gigabytes_per_second:g} GB/s"


@dataclass(frozen=True)
class LossShape:
    """Sizes of one call on one rank: tokens N, real columns V, widths Hs and Ht (0 without a dense teacher).

    ``logits_bytes`` and ``accumulation_bytes`` are bytes per element. ``copy_bytes`` are those of a copy of the logits'
    gradient that the products need (0 if they need no copy). ``temporaries`` counts the row kernels' [rows, V] buffers in
    the accumulation dtype.
    """

    tokens: int
    vocabulary: int
    student_width: int
    teacher_width: int = 0
    logits_bytes: int = 2
    accumulation_bytes: int = 4
    copy_bytes: int = 0
    temporaries: int = 0

    @property
    def stride(self) -> int:
        """Elements from one row of logits to the next: aligned, and at least one column wider than V."""
        return _round_up(self.vocabulary + 1, COLUMN_QUANTUM)

    @property
    def student_row_bytes(self) -> int:
        """Memory per token while its chunk is processed."""
        return self.stride * self.logits_bytes + self.vocabulary * self.copy_bytes

    @property
    def slab_row_bytes(self) -> int:
        """Additional memory per token while its slab is processed."""
        teacher = self.stride * self.logits_bytes if self.teacher_width else 0
        return teacher + self.temporaries * self.vocabulary * self.accumulation_bytes


@dataclass(frozen=True)
class LossPlan:
    """Student logits of ``chunk_rows`` tokens at a time, and within them teacher logits of ``slab_rows`` tokens."""

    shape: LossShape
    chunk_rows: int
    slab_rows: int

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.shape.tokens // self.chunk_rows)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the logits and the row kernels' temporaries."""
        return self.chunk_rows * self.shape.student_row_bytes + self.slab_rows * self.shape.slab_row_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of the four matrix products, forward and backward."""
        shape = self.shape
        return 2 * shape.tokens * shape.vocabulary * (3 * shape.student_width + shape.teacher_width)

    @property
    def moved_bytes(self) -> int:
        """Memory traffic besides the products: two row passes, and the head's gradient once per further chunk."""
        shape = self.shape
        passes = (3 + (2 if shape.teacher_width else 0)) * shape.logits_bytes
        again = 2 * shape.accumulation_bytes * shape.vocabulary * shape.student_width
        return shape.tokens * shape.vocabulary * passes + (self.chunks - 1) * again

    def milliseconds(self, machine: Speeds) -> float:
        """Predicted time of forward and backward together."""
        return machine.milliseconds(self.flops, self.moved_bytes)

    def describe(self, machine: Speeds) -> str:
        """The plan in one readable line."""
        return (
            f"{self.chunks} chunks of {self.chunk_rows} tokens, slabs of {self.slab_rows}: "
            f"{self.buffer_bytes / 1e9:.2f} GB of logits, {self.milliseconds(machine):.1f} ms predicted at {machine}"
        )


@dataclass(frozen=True)
class LeanPlan:
    """Logits of all tokens for ``columns`` of the vocabulary at a time, in ``walks`` passes over the vocabulary.

    With ``accumulates`` the hidden states' gradient is summed in a separate buffer of higher precision.
    """

    shape: LossShape
    columns: int
    walks: int
    accumulates: bool

    @property
    def blocks(self) -> int:
        """Number of blocks of the vocabulary."""
        return -(-self.shape.vocabulary // self.columns)

    @property
    def buffer_bytes(self) -> int:
        """Memory of a block's logits, the row kernels' temporaries and the hidden states' gradient."""
        block = replace(self.shape, vocabulary=self.columns)
        return self.shape.tokens * (block.student_row_bytes + block.slab_row_bytes) + self.fixed_bytes

    @property
    def fixed_bytes(self) -> int:
        """Memory that does not depend on the size of a block."""
        shape = self.shape
        return shape.tokens * shape.student_width * shape.accumulation_bytes if self.accumulates else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the products. Every pass computes the logits of both models again."""
        shape = self.shape
        widths = self.walks * (shape.student_width + shape.teacher_width) + 2 * shape.student_width
        return 2 * shape.tokens * shape.vocabulary * widths

    @property
    def moved_bytes(self) -> int:
        """Memory traffic besides the products: the row passes, and the hidden states' gradient once per further block."""
        shape = self.shape
        passes = (self.walks * (2 if shape.teacher_width else 1) + 1) * shape.logits_bytes
        again = 2 * shape.accumulation_bytes * shape.tokens * shape.student_width
        return shape.tokens * shape.vocabulary * passes + (self.blocks - 1) * again

    def milliseconds(self, machine: Speeds) -> float:
        """Predicted time of forward and backward together."""
        return machine.milliseconds(self.flops, self.moved_bytes)

    def describe(self, machine: Speeds) -> str:
        """The plan in one readable line."""
        return (
            f"{self.blocks} blocks of {self.columns} columns, {self.walks} walks: {self.buffer_bytes / 1e9:.2f} GB, "
            f"{self.milliseconds(machine):.1f} ms predicted at {machine}"
        )


def plan_recompute(shape: LossShape, budget_bytes: int, *, accumulates: bool, walks: int = 2) -> LeanPlan:
    """The widest blocks, of nearly equal size, whose buffers fit ``budget_bytes``; COLUMN_QUANTUM columns if none do."""
    quantum = COLUMN_QUANTUM
    plan = LeanPlan(shape, quantum, walks, accumulates)
    spare = (budget_bytes - plan.buffer_bytes) // max(
        1, replace(plan, columns=2 * quantum).buffer_bytes - plan.buffer_bytes
    )
    most = min(quantum * (1 + max(0, spare)), max(shape.vocabulary, 1))
    even = _round_up(-(-shape.vocabulary // -(-shape.vocabulary // most)), quantum) if shape.vocabulary else most
    return replace(plan, columns=min(most, even))


def cached_rows(shape: LossShape) -> int:
    """Tokens of a slab on a CPU. If something is stored for them, they fit CPU_SLAB_BYTES, but are enough for a fast product."""
    if not shape.slab_row_bytes:
        return SLAB_ROWS
    return max(CPU_SLAB_ROWS, CPU_SLAB_BYTES // (max(shape.vocabulary, 1) * shape.accumulation_bytes))


def plan_loss(shape: LossShape, budget_bytes: int, slab_rows: int = SLAB_ROWS) -> LossPlan:
    """The fastest plan whose buffers fit ``budget_bytes``, or one token at a time if none fit.

    It takes the largest chunk that leaves room for a slab of ``slab_rows`` tokens, and then makes chunks of nearly equal
    size. If the budget is too small for that, slabs are whole chunks.
    """
    slab = min(shape.tokens, slab_rows)
    rows = (budget_bytes - slab * shape.slab_row_bytes) // shape.student_row_bytes
    if rows < slab:
        rows = slab = max(1, budget_bytes // (shape.student_row_bytes + shape.slab_row_bytes))
    rows = max(1, min(rows, shape.tokens))
    even = _round_up(-(-max(shape.tokens, 1) // -(-max(shape.tokens, 1) // rows)), ROW_QUANTUM)
    rows = min(rows, even)
    return LossPlan(shape, rows, max(1, min(slab, rows)))


def _round_up(number: int, quantum: int) -> int:
    return -(-number // quantum) * quantum
