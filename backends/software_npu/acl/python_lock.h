// Work of a stream may be Python's (reference_ops/), and Python has one lock: a thread that holds it must let it go while
// it waits for a stream. Some of torch's calls wait with it held.
#pragma once

#include <dlfcn.h>

namespace software_npu {

class WithoutPythonsLock {
   public:
    WithoutPythonsLock() {
        // Found in the process; without Python there is nothing to let go.
        static auto held = find<int (*)()>("PyGILState_Check");
        static auto ending = find<int (*)()>("_Py_IsFinalizing", "Py_IsFinalizing");
        static auto let_go = find<void *(*)()>("PyEval_SaveThread");
        if (held && let_go && held() && !(ending && ending())) state_ = let_go();
    }
    ~WithoutPythonsLock() {
        static auto take = find<void (*)(void *)>("PyEval_RestoreThread");
        if (state_) take(state_);
    }
    WithoutPythonsLock(const WithoutPythonsLock &) = delete;

   private:
    template <class Function>
    static Function find(const char *name, const char *otherwise = "") {
        void *found = dlsym(RTLD_DEFAULT, name);
        return reinterpret_cast<Function>(found ? found : dlsym(RTLD_DEFAULT, otherwise));
    }

    void *state_ = nullptr;
};

}  // namespace software_npu
