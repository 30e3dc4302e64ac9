"""Known bugs of CUDA kernels, to be put into the sources one at a time."""

from __future__ import annotations

from dataclasses import dataclass

TINY = ("tiny", "tiny_80")


@dataclass(frozen=True)
class Mutation:
    """One bug: a text that occurs once in a file of csrc/cuda, and what takes its place."""

    name: str
    file: str
    old: str
    new: str
    found_by: tuple[str, ...]  # ways of running that are tried: plain, address, thread
    program: str = "test_sinkhorn"
    devices: tuple[str, ...] = TINY


MUTATIONS = (
    Mutation(
        "no barrier between partial sums and their total",
        "scaling.cuh",
        "    cast(seen.votes(), problem.votes(true));\n    __syncthreads();\n    float* const sums",
        "    cast(seen.votes(), problem.votes(true));\n    float* const sums",
        ("plain", "thread"),
    ),
    Mutation(
        "no barrier between the two passes",
        "scaling.cuh",
        "    }\n    __syncthreads();\n  }\n  const int lane",
        "    }\n  }\n  const int lane",
        ("thread",),
    ),
    Mutation(
        "no barrier before the rows' votes are counted",
        "scaling.cuh",
        "  cast(seen.votes(), problem.votes(false));\n  __syncthreads();\n",
        "  cast(seen.votes(), problem.votes(false));\n",
        ("plain", "thread"),
    ),
    Mutation(
        "a cluster that meets block by block",
        "peers.cuh",
        "      cluster_sync();\n      return;",
        "      __syncthreads();\n      return;",
        ("plain", "thread"),
    ),
    Mutation(
        "a grid that does not wait for the others",
        "peers.cuh",
        "while (int(load_acquire(counter) - target) < 0) relax();",
        "load_acquire(counter);",
        ("plain", "thread"),
    ),
    Mutation(
        "exchange buffers that do not take turns",
        "peers.cuh",
        "{ turn ^= 1; }",
        "{ turn ^= 0; }",
        ("plain", "thread"),
    ),
    Mutation(
        "a block that leaves the cluster while others read its memory",
        "sinkhorn.cu",
        "  if (place.meeting == Meeting::cluster) cluster_sync();",
        "  if (place.meeting == Meeting::cluster && solver.peers.rank > 99) cluster_sync();",
        ("plain", "address", "thread"),
    ),
    Mutation(
        "off by one in shared memory",
        "placement.h",
        "const size_t slots = 2 * sizeof(float) *",
        "const size_t slots = sizeof(float) *",
        ("plain", "address"),
    ),
    Mutation(
        "off by one in global memory",
        "sinkhorn.cu",
        "for (int j = threadIdx.x; j < problem.m; j += blockDim.x) {\n      const bool there",
        "for (int j = threadIdx.x; j <= problem.m; j += blockDim.x) {\n      const bool there",
        ("address",),
    ),
    Mutation(
        "a mask that leaves out half of the warp",
        "numerics.cuh",
        "__shfl_xor_sync(ALL_LANES, give, 16)",
        "__shfl_xor_sync(0x0000ffffu, give, 16)",
        ("plain",),
    ),
    Mutation(
        "an accumulator that is not set to zero",
        "scaling.cuh",
        "  for (int i = 0; i < ROWS; ++i) sums[i] = 0;",
        "  for (int i = 0; i < ROWS; ++i) sums[i] = problem.partial[i];",
        ("plain", "thread"),
    ),
    Mutation(
        "a masked column that ends a row",
        "log_domain.cuh",
        "(!exists(problem.cols.weight(j))) continue;\n      const float entry = cost.column(problem.first + j)",
        "(!exists(problem.cols.weight(j))) break;\n      const float entry = cost.column(problem.first + j)",
        ("plain",),
    ),
    Mutation(
        "a masked row that counts",
        "log_domain.cuh",
        "const bool both = there && exists(problem.rows.weight(i));",
        "const bool both = there;",
        ("plain", "address"),
    ),
    Mutation(
        "tiles that are used before their copies have arrived",
        "points_tile.cuh",
        "      copy_async_wait<0>();\n      __syncthreads();",
        "      __syncthreads();",
        ("plain",),
        "test_points",
    ),
    Mutation(
        "a stage that is overwritten while others read it",
        "points_tile.cuh",
        "      copy_async_wait<0>();\n      __syncthreads();",
        "      copy_async_wait<0>();\n      __syncwarp();",
        ("thread",),
        "test_points",
        ("tiny",),
    ),
    Mutation(
        "parts of log-sums that are added up before all are there",
        "points.cu",
        "== unsigned(own.splits) - 1;",
        "== 0;",
        ("plain", "thread"),
        "test_points",
        ("sm_90",),
    ),
    Mutation(
        "a log-sum that has moved far and is not repeated",
        "points.cu",
        "if (!safe && !(fabsf(away) <= FAR)) {",
        "if (!safe && away != away) {",
        ("plain",),
        "test_points",
    ),
    Mutation(
        "a repetition that averages the rows again that have been",
        "points.cu",
        " || (repeated && own.last[at] == own.last[at])) return;",
        ") return;",
        ("plain",),
        "test_points",
    ),
    Mutation(
        "sums of a head that are read before all of its blocks have written theirs",
        "token_cost_gradient.cu",
        "    peers.sync();\n    sums = *",
        "    sums = *",
        ("plain", "thread"),
        "test_attention",
        ("sm_90",),
    ),
    Mutation(
        "features that are overwritten while others multiply them",
        "matrix_tile.cuh",
        "squared);\n      }\n      __syncthreads();",
        "squared);\n      }",
        ("plain", "thread"),
        "test_attention",
    ),
    Mutation(
        "rows that are not selected and not kept",
        "attention.cu",
        "if (mask == nullptr || mask[i]) continue;",
        "if (mask == nullptr || !mask[i]) continue;",
        ("plain",),
        "test_attention",
    ),
    Mutation(
        "sums of a row that start with what a register held",
        "attention.cu",
        "e_sum[QUAD] = {}, product[QUAD] = {};",
        "e_sum[QUAD] = {}, product[QUAD] = {NAN};",
        ("plain",),
        "test_attention",
    ),
    Mutation(
        "means of the attention that not all blocks have brought",
        "token_cost.cuh",
        "make_float4(t, y, x, total);\n    }\n    peers.sync();",
        "make_float4(t, y, x, total);\n    }\n    __syncthreads();",
        ("plain", "thread"),
        "test_attention",
    ),
    Mutation(
        "a row beyond the problem",
        "plan.cu",
        "if (threadIdx.x < ROWS && i < problem.rows) {",
        "if (threadIdx.x < ROWS && i <= problem.rows) {",
        ("plain", "address"),
        "test_plan",
    ),
    Mutation(
        "a pivot that changes while others read it",
        "implicit.cu",
        ": 0.0;\n      __syncthreads();\n      if (threadIdx.x == 0) A[k * n + k] = inverse;",
        ": 0.0;\n      if (threadIdx.x == 0) A[k * n + k] = inverse;",
        ("plain", "thread"),
        "test_implicit",
    ),
)
