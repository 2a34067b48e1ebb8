"""Find reductions that a compiled program computes in half precision."""

from __future__ import annotations

import dataclasses
import re

from jaxtrain.plan.hlo import ARRAY, called, op_name, operands, read_hlo

HALF = ("bf16", "f16")


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A ``reduce`` instruction of a compiled program.

    Attributes:
      dtype: of the result and of the accumulator: ``bf16`` or ``f16``.
      operand, result: their shapes.
      dimensions: which of the operand's are reduced.
      reducer: the operation on two elements: ``add``, ``maximum``. Only a sum is inexact.
      op_name: the operation of the user's program, such as ``jit(step)/transpose(jvp(GPT))/head/reduce_sum``.
    """

    dtype: str
    operand: tuple[int, ...]
    result: tuple[int, ...]
    dimensions: tuple[int, ...]
    reducer: str
    op_name: str

    @property
    def size(self) -> int:
        """The number of elements that are reduced to one."""
        size = 1
        for dimension in self.dimensions:
            size *= self.operand[dimension]
        return size


def half_precision_reductions(hlo: str) -> list[Reduction]:
    """Return the reductions in bfloat16 or float16, those inside of fusions too.

    A sum of n numbers in bfloat16 loses the terms that are smaller than 1/256 of the sum. XLA reduces a large
    array in two stages, each of which is listed. Products (``dot``) accumulate in float32 and are not listed.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      InputError: the text is not a compiled program.

    >>> text = '''
    ... %sum (a: bf16[], b: bf16[]) -> bf16[] {
    ...   ROOT %c = bf16[] add(%a, %b)
    ... }
    ... ENTRY %main (p: bf16[64,8]) -> bf16[8] {
    ...   %p = bf16[64,8]{1,0} parameter(0)
    ...   ROOT %r = bf16[8]{0} reduce(%p, %zero), dimensions={0}, to_apply=%sum
    ... }'''
    >>> [(one.dtype, one.operand, one.size, one.reducer) for one in half_precision_reductions(text)]
    [('bf16', (64, 8), 64, 'add')]
    """
    program = read_hlo(hlo)
    found = []
    for ops in program.computations.values():
        shapes = {op.name: op.shape for op in ops}
        for op in ops:
            dtypes = [dtype for dtype, _ in ARRAY.findall(op.shape)]
            half = [dtype for dtype in dtypes if dtype in HALF]
            if op.opcode != "reduce" or not half:
                continue
            reduced = re.search(r"dimensions=\{([\d,]*)\}", op.rest)
            [region] = called(op)
            inner = program.computations.get(region, [])
            found.append(
                Reduction(
                    dtype=half[0],
                    operand=_dimensions(shapes.get(operands(op)[0], "")),
                    result=_dimensions(op.shape),
                    dimensions=_numbers(reduced[1]) if reduced else (),
                    reducer=inner[-1].opcode if inner else "",
                    op_name=op_name(op),
                )
            )
    return found


def _dimensions(shape: str) -> tuple[int, ...]:
    found = ARRAY.search(shape)
    return _numbers(found[2].replace("<=", "")) if found else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
