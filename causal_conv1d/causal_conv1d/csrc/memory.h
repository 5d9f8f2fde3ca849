// Working memory that a thread keeps from call to call. Blocks of this size come from the system with every malloc and go
// back with every free, and then each of their pages costs a fault: more than the work done in it.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace memory {

constexpr size_t MOST_KEPT = size_t(4) << 20;  // bytes of one block

struct Block {
    void *data = nullptr;
    size_t bytes = 0;
    bool taken = false;

    ~Block() { std::free(data); }
};

// Those of this thread; as many as a kernel has at a time.
struct Blocks {
    static constexpr int COUNT = 16;
    Block all[COUNT];

    static Blocks &own() {
        static thread_local Blocks blocks;
        return blocks;
    }
    // The smallest free block that is large enough, else the largest that is not; null if all are taken.
    Block *find(size_t bytes) {
        Block *best = nullptr;
        for (Block &each : all) {
            if (each.taken) continue;
            const bool fits = each.bytes >= bytes, best_fits = best && best->bytes >= bytes;
            if (!best || (fits && (!best_fits || each.bytes < best->bytes)) ||
                (!fits && !best_fits && each.bytes > best->bytes))
                best = &each;
        }
        return best;
    }
};

// `bytes` of memory, of any content, for as long as this lives; it must end on the thread it began on.
class Buffer {
  public:
    explicit Buffer(size_t bytes) : block_(bytes <= MOST_KEPT ? Blocks::own().find(bytes) : nullptr) {
        if (!block_) {
            data_ = std::malloc(bytes);
            return;
        }
        if (block_->bytes < bytes) {
            std::free(block_->data);
            block_->data = std::malloc(bytes);
            block_->bytes = block_->data ? bytes : 0;
        }
        data_ = block_->data;
        block_->taken = data_ != nullptr;
    }
    ~Buffer() {
        if (block_) block_->taken = false;
        else std::free(data_);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    // Null where there was none.
    void *data() const { return data_; }

  private:
    Block *block_;
    void *data_;
};

}  // namespace memory
