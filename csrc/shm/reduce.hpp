// The reduction of one element over ranks, in one fixed binary tree: ((0+1)+(2+3))+..., an odd one out moves up. It is
// the same for every element, whatever the size, the chunking and the rank that computes it, so that bits are equal.
#pragma once

#include <cstddef>

#include "../transport.hpp"

namespace tpmp::shm {

// out[i] = tree over r of sources[r][i], i in [0, count). bf16 and fp16 accumulate in fp32 and round once at the end.
// max and min propagate NaN; avg divides the sum by `ranks`. out may be one of the sources, but not overlap otherwise.
void reduce_tree(const void* const* sources, int ranks, size_t count, DType dtype, ReduceOp op, void* out);

}  // namespace tpmp::shm
