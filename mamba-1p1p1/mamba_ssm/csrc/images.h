// How threads divide the images of a batch where one image after the other goes through several steps.
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace images {

// How many images go through at a time, given the arithmetic steps of all: as many as there are threads, or one.
inline int shares_for(int64_t batch, int64_t threads, int64_t work) {
    return batch < threads ? 1 : parallel::shares_for(threads, batch, work);
}

// body(first image, end, threads, share) -> not zero where there was no memory: every thread takes as many whole images as
// the others, as one of `shares`; the threads divide those that are left, in share 0.
template <class Body> int each(int64_t batch, int64_t threads, int shares, Body body) {
    const int64_t whole = shares > 1 ? batch / shares : 0;
    std::atomic<int> failures{0};
    if (whole)
        parallel::run(shares, [&](int share) { failures += body(share * whole, (share + 1) * whole, int64_t(1), share); });
    if (shares * whole < batch) failures += body(shares * whole, batch, threads, 0);
    return failures ? 1 : 0;
}

}  // namespace images
