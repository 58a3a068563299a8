// Large memory that results and scratch gave back, kept for those that come next.  The system zeroes new pages at their first
// write, which took longer than the products of a large batch, and glibc takes all that is larger than 32 MiB from it anew.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace fxsparse {

constexpr size_t kHugePage = size_t(1) << 21;
constexpr size_t kLarge = 2 * kHugePage;          // bytes from which memory is kept
constexpr size_t kMostKept = size_t(512) << 20;  // of what nobody uses; beyond, the oldest goes back to the system

class KeptMemory {
 public:
  // Never destroyed, since tensors may live until the process ends.
  static KeptMemory& all() {
    static auto* all = new KeptMemory;
    return *all;
  }

  // At least `bytes`, aligned to a huge page and on such pages: of what is kept the smallest that is not a quarter too large.
  void* take(size_t bytes) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->size >= size && block->size <= size + size / 4 && (best == kept_.end() || block->size <= best->size))
        best = block;
    if (best == kept_.end()) return used_.insert({allocate(size), size}).first->first;
    void* data = best->data;
    used_[data] = best->size;
    bytes_ -= best->size;
    kept_.erase(best);
    return data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(data);
    kept_.push_back({data, found->second});
    bytes_ += found->second;
    used_.erase(found);
    drop(kMostKept);
  }

  // All that is kept goes back to the system; its bytes.
  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = bytes_;
    drop(0);
    return bytes;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  void* allocate(size_t size) {
    void* data = ::operator new(size, std::align_val_t(kHugePage), std::nothrow);
    if (!data) {
      drop(0);
      data = ::operator new(size, std::align_val_t(kHugePage));
    }
#if defined(__linux__)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    return data;
  }

  // The oldest, until at most so many bytes are kept.
  void drop(size_t most) {
    for (; bytes_ > most; kept_.pop_front()) {
      bytes_ -= kept_.front().size;
      ::operator delete(kept_.front().data, std::align_val_t(kHugePage));
    }
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // the one that was given back last comes last
  std::unordered_map<void*, size_t> used_;
  size_t bytes_ = 0;
};

}  // namespace fxsparse
