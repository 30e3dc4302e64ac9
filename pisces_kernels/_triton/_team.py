"""Programs of one launch that work on one problem together and wait for each other."""

from __future__ import annotations

import triton
import triton.language as tl

# Only with this option of a launch do all of its programs run at the same time; else the launch fails.
TOGETHER = {"launch_cooperative_grid": True}


@triton.jit
def meet(arrived_ptr, meeting, TEAM: tl.constexpr):
    """Wait for the other programs of a team: what each stored before is there for all of them afterwards.

    Args:
        arrived_ptr: int32 of the team, 0 before the launch.
        meeting: 1 for the team's first meeting, then one more each time.
        TEAM: number of its programs.
    """
    tl.debug_barrier()  # all threads of this program have stored
    if TEAM > 1:
        arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") + 1
        while arrived < TEAM * meeting:
            arrived = tl.atomic_add(arrived_ptr, 0, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
