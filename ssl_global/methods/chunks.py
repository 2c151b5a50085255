"""Walking over a matrix that no cache holds, such as logits over 65 536 prototypes: some rows at a time."""

from torch import Tensor

# Numbers at a time (ours): 1 MB on a CPU, whose cache then holds a few such; on a GPU what keeps it busy.
AT_ONCE = {"cpu": 2**18}
ELSEWHERE = 2**26


def chunks(matrix: Tensor) -> list[slice]:
    """Slices of its rows, in order, each of at least one."""
    rows = max(1, AT_ONCE.get(matrix.device.type, ELSEWHERE) // matrix.shape[1])
    return [slice(first, first + rows) for first in range(0, len(matrix), rows)]
