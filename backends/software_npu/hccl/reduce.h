// Sums and their kin of what the ranks of a communicator sent, in the order of ranks, so that every rank gets the same bits.
#pragma once

#include <hccl/hccl.h>

#include <cstddef>
#include <vector>

namespace software_npu {

// Bytes of one element.
size_t element_bytes(HcclDataType dtype);

// out[i] = parts[0][i] op parts[1][i] op ...; false for a dtype that HCCL does not reduce (FP8).
bool reduce(HcclDataType dtype, HcclReduceOp op, const std::vector<std::vector<char>> &parts, void *out, size_t count);

}  // namespace software_npu
