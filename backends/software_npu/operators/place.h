// Where the values of an NPU tensor are. A device knows addresses, not tensors: work that is still to come keeps no
// memory alive, so that memory which torch_npu gives away too early is overwritten here, too.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

namespace software_npu {

// Storages that CPU views were made of, by address: arguments that overlap still do.
using Storages = std::map<void *, c10::Storage>;

class Place {
   public:
    explicit Place(const at::Tensor &npu);

    // A CPU tensor over that memory, for as long as the memory is there.
    at::Tensor view(Storages &storages) const;
    c10::IntArrayRef sizes() const { return sizes_; }

   private:
    void *memory_;
    size_t bytes_;
    int64_t offset_;
    std::vector<int64_t> sizes_, strides_;
    at::ScalarType dtype_;
    bool conj_, neg_;
};

}  // namespace software_npu
