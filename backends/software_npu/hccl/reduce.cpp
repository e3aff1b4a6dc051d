// Reductions over ranks: see reduce.h.
#include "reduce.h"

#include <cstdint>
#include <cstring>

namespace software_npu {

namespace {

template <class T>
T combine(HcclReduceOp op, T a, T b) {
    switch (op) {
        case HCCL_REDUCE_SUM:
            return a + b;
        case HCCL_REDUCE_PROD:
            return a * b;
        case HCCL_REDUCE_MAX:
            return a > b ? a : b;
        default:
            return a < b ? a : b;
    }
}

template <class T>
T as_is(T value) {
    return value;
}

float from_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// To nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_fp16(_Float16 value) { return static_cast<float>(value); }
_Float16 to_fp16(float value) { return static_cast<_Float16>(value); }

// Accumulated as Wide, rounded once at the end.
template <class T, class Wide, class Widen, class Narrow>
void reduce_as(HcclReduceOp op, const std::vector<std::vector<char>> &parts, void *out, size_t count, Widen widen,
               Narrow narrow) {
    auto *result = static_cast<T *>(out);
    for (size_t i = 0; i < count; i++) {
        Wide total{};
        for (size_t rank = 0; rank < parts.size(); rank++) {
            T value;
            memcpy(&value, parts[rank].data() + i * sizeof(T), sizeof value);
            total = rank ? combine<Wide>(op, total, widen(value)) : widen(value);
        }
        result[i] = narrow(total);
    }
}

template <class T>
void reduce_plain(HcclReduceOp op, const std::vector<std::vector<char>> &parts, void *out, size_t count) {
    reduce_as<T, T>(op, parts, out, count, as_is<T>, as_is<T>);
}

}  // namespace

size_t element_bytes(HcclDataType dtype) {
    switch (dtype) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8:
        case HCCL_DATA_TYPE_HIF8:
        case HCCL_DATA_TYPE_FP8E4M3:
        case HCCL_DATA_TYPE_FP8E5M2:
        case HCCL_DATA_TYPE_FP8E8M0:
            return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16:
            return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32:
            return 4;
        case HCCL_DATA_TYPE_INT128:
            return 16;
        default:
            return 8;
    }
}

bool reduce(HcclDataType dtype, HcclReduceOp op, const std::vector<std::vector<char>> &parts, void *out, size_t count) {
    switch (dtype) {
        case HCCL_DATA_TYPE_FP32:
            reduce_plain<float>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_FP64:
            reduce_plain<double>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_INT8:
            reduce_plain<int8_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_UINT8:
            reduce_plain<uint8_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_INT16:
            reduce_plain<int16_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_INT32:
            reduce_plain<int32_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_INT64:
            reduce_plain<int64_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_UINT64:
            reduce_plain<uint64_t>(op, parts, out, count);
            return true;
        case HCCL_DATA_TYPE_FP16:
            reduce_as<_Float16, float>(op, parts, out, count, from_fp16, to_fp16);
            return true;
        case HCCL_DATA_TYPE_BFP16:
            reduce_as<uint16_t, float>(op, parts, out, count, from_bf16, to_bf16);
            return true;
        default:
            return false;
    }
}

}  // namespace software_npu
