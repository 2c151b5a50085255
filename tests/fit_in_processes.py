"""A job with unlike room: `torchrun --nproc_per_node 2 tests/fit_in_processes.py [--sharded] ARGUMENTS`.

Trials take their steps as ever; what they are said to have taken is 1000 bytes an image on the first process, 2000 on
the second, of 5000 that are free. So two images at once fit, as the second has it. --sharded: with FSDP2 over gloo.
"""

import os
import sys

from fsdp_on_cpu import start_sharded

from ssl_global import pretrain
from ssl_global.training import fit, processes


def counted(trial: fit.Trial, images: int) -> int:
    COUNTED(trial, images)
    return 1000 * (1 + int(os.environ["RANK"])) * images


COUNTED = fit.Trial.bytes_counted

if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--sharded":
        words = words[1:]
        processes.start = lambda **how: start_sharded(shards=None, **how)  # type: ignore[assignment]
    fit.Trial.bytes_counted = counted  # type: ignore[method-assign]
    fit.free_bytes = lambda device, processes_here: round(5000 / fit.USABLE) + 1
    pretrain.main(words)
