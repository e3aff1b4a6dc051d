// Addresses of NPU tensors, and CPU tensors over them: see place.h.
#include "place.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace software_npu {

Place::Place(const at::Tensor &npu)
    : memory_(npu.storage().mutable_data()),
      bytes_(npu.storage().nbytes()),
      offset_(npu.storage_offset()),
      sizes_(npu.sizes().vec()),
      strides_(npu.strides().vec()),
      dtype_(npu.scalar_type()),
      conj_(npu.is_conj()),
      neg_(npu.is_neg()) {}

at::Tensor Place::view(Storages &storages) const {
    auto view = at::empty({0}, at::TensorOptions().dtype(dtype_));
    if (!memory_) return view.resize_(sizes_);
    auto found = storages.find(memory_);
    if (found == storages.end()) {
        auto bytes = at::from_blob(memory_, {static_cast<int64_t>(bytes_)}, at::TensorOptions().dtype(at::kByte));
        found = storages.emplace(memory_, bytes.storage()).first;
    }
    view.set_(found->second, offset_, sizes_, strides_);
    if (conj_) view._set_conj(true);
    if (neg_) view._set_neg(true);
    return view;
}

}  // namespace software_npu
