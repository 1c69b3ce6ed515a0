"""hidden @ head.T and the two products of its gradient, with operands and sums in separate dtypes.

Shapes: N tokens, C of a chunk, H width, V real rows of the head.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from incr_ds.kernels.rows import accumulation_dtype


class Projection:
    """``hidden`` [N, H] and ``head`` [V, H].

    On CUDA the products take low-precision operands and sum in fp32. Elsewhere the operands are converted first, because
    only CUDA's ``mm`` returns fp32 for low-precision operands. With ``softcap`` c the logits are c tanh(z / c) of the
    product z (Gemma 2, arXiv 2408.00118, section 2).
    """

    def __init__(self, hidden: Tensor, head: Tensor, softcap: float | None = None) -> None:
        operand = operand_dtype(hidden, head)
        self.operand_dtype = operand
        self.dtype = accumulation_dtype(operand)
        self._mixed = hidden.is_cuda and operand != self.dtype
        self._product_dtype = operand if self._mixed else self.dtype
        self._hidden = hidden.detach().to(operand)
        self._head = self._operand(head.detach().to(operand))
        self._softcap = softcap

    def of_columns(self, columns: slice) -> Projection:
        """The same tokens with only the rows ``columns`` of the head."""
        part = copy.copy(self)
        part._head = self._head[columns]
        return part

    def logits(self, rows: slice, out: Tensor) -> None:
        """Compute the logits of the tokens ``rows`` into ``out`` [C, V]."""
        self._product(self._operand(self._hidden[rows]), self._head.t(), out)
        if self._softcap is not None:
            out.div_(self._softcap).tanh_().mul_(self._softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """The factor from the gradient of capped ``logits`` [C, V] to that of the product: 1 - (logits / c)^2.

        None without a cap.
        """
        if self._softcap is None:
            return None
        return logits.to(self.dtype, copy=True).div_(self._softcap).square_().neg_().add_(1.0)

    def through_head(self, gradient: Tensor, out: Tensor, *, add: bool) -> None:
        """Compute the hidden states' gradient into ``out`` [C, H], or add it, from the logits' [C, V]."""
        self._sum(self._operand(gradient), self._head, out, add)

    def through_hidden(self, gradient: Tensor, rows: slice, out: Tensor, *, add: bool) -> None:
        """Compute the head's gradient into ``out`` [V, H], or add it, from the logits' [C, V] of ``rows``."""
        self._sum(self._operand(gradient).t(), self._operand(self._hidden[rows]), out, add)

    def _sum(self, left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        if not add:
            self._product(left, right, out)
        elif out.dtype == self._product_dtype:
            torch.addmm(out, left, right, out=out)
        elif self._mixed and out.dtype == self.dtype:
            torch.ops.aten.addmm.dtype_out(out, left, right, self.dtype, out=out)
        else:
            out.add_(left @ right)

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._product_dtype)

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if out.dtype == self._product_dtype:
            torch.mm(left, right, out=out)
        elif self._mixed:
            torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
        else:
            out.copy_(left @ right)


def operand_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The dtype that F.linear would use: autocast's if it is on, otherwise the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, head.dtype)
