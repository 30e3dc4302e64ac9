// Matrix fragments of a warp, as the PTX manual lays them out over the lanes.
#include "emulator.h"

namespace pk {
namespace device {
namespace {

struct Fragments {
  uint32_t a[4], b[2];
};
float of_bits(uint32_t bits) { return __uint_as_float(bits); }
// Half `part` of a register of two bf16.
float of_pair(uint32_t pair, int part) { return of_bits(part ? pair & 0xffff0000u : pair << 16); }

// d += a b with a 16 x K, b K x 8; element(all, is_b, row or column, k) finds an entry among the lanes' registers.
template <class Element> void multiply(float (&d)[4], int depth, Element&& element) {
  const int lane = emulator::current->lane;
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + (r / 2) * 8, col = lane % 4 * 2 + r % 2;
    float sum = d[r];
    for (int k = 0; k < depth; ++k) sum += element(false, row, k) * element(true, col, k);
    d[r] = sum;
  }
}

}  // namespace

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[32];
  emulator::warp_gather(0xffffffffu, &mine, sizeof mine, all, false, {file, line});
  multiply(d, 8, [&](bool right, int index, int k) {
    if (right) return of_bits(all[index * 4 + k % 4].b[k / 4]);
    return of_bits(all[index % 8 * 4 + k % 4].a[index / 8 + k / 4 * 2]);
  });
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[32];
  emulator::warp_gather(0xffffffffu, &mine, sizeof mine, all, false, {file, line});
  multiply(d, 16, [&](bool right, int index, int k) {
    const int quad = k % 8 / 2;
    if (right) return of_pair(all[index * 4 + quad].b[k / 8], k % 2);
    return of_pair(all[index % 8 * 4 + quad].a[index / 8 + k / 8 * 2], k % 2);
  });
}
void load_matrices(uint32_t (&d)[4], const void* shared_row, const char* file, int line) {
  const void* rows[32];
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) emulator::fail({file, line}, "a matrix row is not aligned to 16 bytes");
  emulator::warp_gather(0xffffffffu, &shared_row, sizeof shared_row, rows, false, {file, line});
  const int lane = emulator::current->lane;
  for (int matrix = 0; matrix < 4; ++matrix)
    memcpy(&d[matrix], static_cast<const char*>(rows[matrix * 8 + lane / 4]) + lane % 4 * 4, 4);
  char mine = 0, all[32];  // a lane may overwrite its row only when all have read it
  emulator::warp_gather(0xffffffffu, &mine, 1, all, false, {file, line});
}

}  // namespace device
}  // namespace pk
