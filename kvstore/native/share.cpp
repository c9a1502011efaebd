// Work shared among threads that sleep until there is some.
#include "share.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace kvstore {
namespace {

class Work {
   public:
    Work(std::int64_t pieces, const std::function<void(std::int64_t)>& piece)
        : pieces_(pieces), piece_(piece) {}

    // Do pieces that nobody else does, until there are no more.
    void help() {
        for (std::int64_t i; (i = next_++) < pieces_;) {
            try {
                piece_(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    // Those who have begun a piece are at its end about when this thread is at the end of its own.
    void wait() {
        while (done_.load(std::memory_order_acquire) < pieces_) std::this_thread::yield();
        if (error_) std::rethrow_exception(error_);
    }

   private:
    const std::int64_t pieces_;
    // Not called any more once all pieces are done, when whoever owns it may go on.
    const std::function<void(std::int64_t)>& piece_;
    std::atomic<std::int64_t> next_{0}, done_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

class Helpers {
   public:
    // Let up to `count` threads help.
    void call(const std::shared_ptr<Work>& work, std::int64_t count) {
        if (getpid() != pid_) return;  // threads do not survive a fork, and locks may be held
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; threads_ < count; threads_++) std::thread(&Helpers::run, this).detach();
            work_ = work;
            wanted_ = count;
        }
        for (std::int64_t i = 0; i < count; i++) wake_.notify_one();
    }

   private:
    void run() {
        for (;;) {
            std::shared_ptr<Work> work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [this] { return wanted_ > 0; });
                wanted_--;
                work = work_;
            }
            work->help();
        }
    }

    const pid_t pid_ = getpid();
    std::mutex mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Work> work_;
    std::int64_t wanted_ = 0, threads_ = 0;
};

}  // namespace

void share(std::int64_t pieces, std::int64_t threads,
           const std::function<void(std::int64_t)>& piece) {
    // Never destroyed: its threads sleep until the process ends.
    static Helpers* const helpers = new Helpers;
    const auto work = std::make_shared<Work>(pieces, piece);
    if (std::min(pieces, threads) > 1) helpers->call(work, std::min(pieces, threads) - 1);
    work->help();
    work->wait();
}

}  // namespace kvstore
