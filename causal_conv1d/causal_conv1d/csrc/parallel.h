// Threads for kernels: those torch already has. Work is split by index, never by who is free, so that a fixed number of
// threads always adds in the same order.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace parallel {

// GOMP_parallel of whichever OpenMP runtime the process has loaded. Linking one of our own would bring a second pool of
// spinning threads.
struct Runtime {
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    using Query = int (*)();
    Parallel parallel;
    Query thread_num, num_threads;

    static const Runtime &get() {
        static const Runtime runtime = {
            reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
            reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
            reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads")),
        };
        return runtime;
    }
    bool complete() const { return parallel && thread_num && num_threads; }
};

// body(share) for every share in [0, shares), each exactly once. body must not throw.
template <class Body> void run(int shares, Body body) {
    if (shares <= 1) {
        if (shares == 1) body(0);
        return;
    }
    const Runtime &runtime = Runtime::get();
    if (!runtime.complete()) {
        std::vector<std::thread> helpers;
        for (int share = 1; share < shares; ++share) helpers.emplace_back(body, share);
        body(0);
        for (std::thread &helper : helpers) helper.join();
        return;
    }
    struct Job {
        Body &body;
        int shares;
        const Runtime &runtime;
    } job{body, shares, runtime};
    // The runtime may give fewer threads than asked for (inside another parallel region, say): they take turns.
    runtime.parallel(
        [](void *data) {
            Job &job = *static_cast<Job *>(data);
            for (int share = job.runtime.thread_num(); share < job.shares; share += job.runtime.num_threads())
                job.body(share);
        },
        &job, static_cast<unsigned>(shares), 0);
}

// How many threads `work` (in arithmetic steps) is worth, at most `threads` and at most `tasks`.
inline int shares_for(int64_t threads, int64_t tasks, int64_t work) {
    constexpr int64_t STEPS_WORTH_A_THREAD = 1 << 15;
    int64_t shares = work / STEPS_WORTH_A_THREAD + 1;
    shares = shares < threads ? shares : threads;
    shares = shares < tasks ? shares : tasks;
    return static_cast<int>(shares > 1 ? shares : 1);
}

struct Range {
    int64_t begin, end;
};

// The tasks of one share: contiguous, and all shares as equal as can be.
inline Range share_of(int64_t tasks, int shares, int share) {
    return {tasks * share / shares, tasks * (share + 1) / shares};
}

}  // namespace parallel
