// The kernels of one instruction set. CMake compiles this file once per set, with PK_ISA naming the table it defines.
#include "problems.h"

#define PK_JOIN(a, b) a##b
#define PK_TABLE(isa) PK_JOIN(cpu_kernels_, isa)
#define PK_TEXT(isa) #isa
#define PK_NAME(isa) PK_TEXT(isa)

namespace pk {
const CpuKernels& PK_TABLE(PK_ISA)() {
  static const CpuKernels table = {PK_NAME(PK_ISA),        scratch,
                                   sinkhorn_one<float>,    sinkhorn_one<double>,
                                   token_cost_one<float>,  token_cost_one<double>,
                                   attention_one<float>,   attention_one<double>};
  return table;
}
}  // namespace pk
