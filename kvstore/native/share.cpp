// Work shared among the threads that torch has: they are awake while a model runs, where threads of
// one's own would have to be woken, and on a core that those keep busy with waiting.
#include "share.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <mutex>

namespace kvstore {
namespace {

// How GCC's code starts a parallel region: part of the interface of libgomp, and of the libraries
// that can stand for it. `function` runs on so many threads, and all are waited for.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// That of the OpenMP library that torch uses, whatever its name: looked for in what torch is linked
// with. Null if it has none of GCC's interface.
Parallel parallel() {
    static const Parallel found = [] {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return torch ? reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
    }();
    return found;
}

// A process that was forked since has none of the threads, and libgomp would wait for them.
const pid_t loaded_by = getpid();

class Work {
   public:
    Work(std::int64_t pieces, const std::function<void(std::int64_t)>& piece)
        : pieces_(pieces), piece_(piece) {}

    // Do pieces that nobody else does, until there are no more.
    static void help(void* work) {
        auto& self = *static_cast<Work*>(work);
        for (std::int64_t i; (i = self.next_++) < self.pieces_;) {
            try {
                self.piece_(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(self.mutex_);
                if (!self.error_) self.error_ = std::current_exception();
            }
        }
    }

    void raise() const {
        if (error_) std::rethrow_exception(error_);
    }

   private:
    const std::int64_t pieces_;
    const std::function<void(std::int64_t)>& piece_;
    std::atomic<std::int64_t> next_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

}  // namespace

bool can_share() { return parallel() != nullptr; }

void share(std::int64_t pieces, std::int64_t threads,
           const std::function<void(std::int64_t)>& piece) {
    Work work(pieces, piece);
    if (pieces > 1 && threads > 1 && getpid() == loaded_by && parallel()) {
        // All of torch's threads, needed or not: for another number libgomp ends and starts some.
        parallel()(Work::help, &work, static_cast<unsigned>(threads), 0);
    } else {
        Work::help(&work);
    }
    work.raise();
}

}  // namespace kvstore
