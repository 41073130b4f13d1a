// A GPU on one CPU thread, for the logic of CUDA kernels: every thread of a block is a fiber, which runs
// until it waits for others. Which goes on next, and when a copy arrives, is drawn at random, so a kernel
// that depends on luck fails; one that waits for what never comes is told so. It knows nothing of speed, of
// the order of memory between threads that do not synchronise, or of what ptxas makes of the code.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool holds, const char* what) {
    if (!holds) throw Failure(what);
}

// Where so many threads wait for one another, again and again.
struct Meeting {
    int arrived = 0, expected = 0;
    int64_t generation = 0;
};

constexpr int kWarp = 32, kGroup = 128, kNamedBarriers = 16;

struct Warp {
    Meeting meeting;
    uint64_t slot[kWarp];
};

// A matrix product that all threads of a warp group have, or will have, issued.
struct Product {
    uint64_t a, b;  // descriptors, of which a may be 0
    bool add;
    float (*read)(uint16_t);  // an operand's value
    float* d[kGroup] = {};
    const uint32_t* a_registers[kGroup] = {};
    int issued = 0;
};

struct Group {
    std::deque<Product> products;
    std::size_t done = 0;
};

struct Block;

struct Thread {
    ucontext_t context;
    Index index;
    Block* block = nullptr;
    std::function<bool()> ready;  // empty: can go on
    bool ended = false;
    bool fenced = false;                 // begin_products() since the last wait
    int registers = 0;                   // asked for
    int64_t arrived = -1;                // at the cluster's meeting of this number
    std::vector<uint64_t*> unpublished;  // barriers
    std::size_t issued = 0;
    std::vector<std::size_t> commits;

    int number() const { return int(index.x); }
};

struct Cluster;

struct Block {
    Index index;
    Cluster* cluster = nullptr;
    int rank = 0, size = 0, running = 0, votes = 0, registers = 0;
    char* shared = nullptr;
    std::size_t shared_bytes = 0;
    Meeting named[kNamedBarriers];
    std::vector<Warp> warps;
    std::vector<Group> groups;
};

struct Cluster {
    std::vector<Block> blocks;
    Meeting meeting;
    int running = 0;
};

struct Machine {
    static constexpr std::size_t kStack = 128 * 1024;

    std::mt19937 random{0};
    Thread* current = nullptr;
    ucontext_t scheduler;
    std::vector<std::function<void()>> copies;  // under way
    Index grid;
    std::function<void()> body;
    std::exception_ptr failure;
    std::vector<std::unique_ptr<char[]>> stacks;

    bool coin() { return random() & 1; }
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline Thread& self() { return *machine().current; }

inline void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    self().ready = std::move(ready);
    swapcontext(&self().context, &machine().scheduler);
}

inline void arrive(Meeting& meeting, int expected) {
    require(meeting.arrived == 0 || meeting.expected == expected, "threads expect different numbers of them");
    meeting.expected = expected;
    if (++meeting.arrived < expected) return;
    meeting.arrived = 0;
    ++meeting.generation;
}

inline void meet(Meeting& meeting, int expected) {
    const int64_t before = meeting.generation;
    arrive(meeting, expected);
    wait_until([&meeting, before] { return meeting.generation != before; });
}

inline Warp& own_warp() { return self().block->warps[self().number() / kWarp]; }
inline Group& own_group() { return self().block->groups[self().number() / kGroup]; }
inline void meet_warp() { meet(own_warp().meeting, kWarp); }
inline void meet_block() { meet(self().block->named[0], self().block->size); }

// Bytes of shared memory into which an address points.
inline std::size_t shared_offset(const void* at) {
    const Block& block = *self().block;
    const char* address = static_cast<const char*>(at);
    require(address >= block.shared && address < block.shared + block.shared_bytes, "not shared memory");
    return std::size_t(address - block.shared);
}

inline void enter() {
    try {
        machine().body();
    } catch (...) {
        if (!machine().failure) machine().failure = std::current_exception();
    }
    Thread& thread = self();
    thread.ended = true;
    thread.block->registers += thread.registers;
    --thread.block->cluster->running;
    if (--thread.block->running == 0) std::memset(thread.block->shared, 0xff, thread.block->shared_bytes);
    swapcontext(&thread.context, &machine().scheduler);
}

inline void run_cluster(Cluster& cluster, std::vector<Thread>& threads) {
    Machine& m = machine();
    std::vector<Thread*> order;
    for (Thread& thread : threads) order.push_back(&thread);
    while (cluster.running > 0) {
        std::shuffle(order.begin(), order.end(), m.random);
        bool progress = false;
        for (Thread* thread : order) {
            if (thread->ended || (thread->ready && !thread->ready())) continue;
            thread->ready = nullptr;
            progress = true;
            m.current = thread;
            swapcontext(&m.scheduler, &thread->context);
            if (m.failure) return;
        }
        if (!m.copies.empty() && (!progress || m.coin())) {
            const std::size_t which = m.random() % m.copies.size();
            const auto arrives = std::move(m.copies[which]);
            m.copies.erase(m.copies.begin() + std::ptrdiff_t(which));
            arrives();
            progress = true;
        }
        if (!progress) {
            m.failure = std::make_exception_ptr(Failure("deadlock: " + std::to_string(cluster.running) +
                                                        " threads wait for what does not come"));
            return;
        }
    }
}

// Runs `body` in every thread of a grid, cluster by cluster, in an order drawn at random.
inline void run(Index grid, int block_size, Index cluster_size, std::size_t shared_bytes,
                std::function<void()> body) {
    Machine& m = machine();
    m.grid = grid;
    m.body = std::move(body);
    m.failure = nullptr;
    m.copies.clear();
    require(
        grid.x % cluster_size.x == 0 && grid.y % cluster_size.y == 0 && grid.z == 1 && cluster_size.z == 1,
        "the grid is not made of whole clusters");
    const int blocks = int(cluster_size.x * cluster_size.y);
    std::vector<char> memory(std::size_t(blocks) * (shared_bytes + 1024) + 1024);
    while (m.stacks.size() < std::size_t(blocks * block_size))
        m.stacks.push_back(std::unique_ptr<char[]>(new char[Machine::kStack]));
    std::vector<Index> places;
    for (unsigned y = 0; y < grid.y; y += cluster_size.y)
        for (unsigned x = 0; x < grid.x; x += cluster_size.x) places.push_back({x, y, 0});
    std::shuffle(places.begin(), places.end(), m.random);
    for (const Index& place : places) {
        Cluster cluster;
        cluster.blocks.resize(std::size_t(blocks));
        cluster.running = blocks * block_size;
        std::vector<Thread> threads(std::size_t(blocks * block_size));
        char* next = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
        for (int rank = 0; rank < blocks; ++rank) {
            Block& block = cluster.blocks[std::size_t(rank)];
            block.index = {place.x + unsigned(rank) % cluster_size.x,
                           place.y + unsigned(rank) / cluster_size.x, 0};
            block.cluster = &cluster;
            block.rank = rank;
            block.size = block.running = block_size;
            block.shared = next;
            block.shared_bytes = shared_bytes;
            next += (shared_bytes + 1023) / 1024 * 1024;
            std::memset(block.shared, 0xff, shared_bytes);
            block.warps.resize(std::size_t((block_size + kWarp - 1) / kWarp));
            block.groups.resize(std::size_t((block_size + kGroup - 1) / kGroup));
            for (int i = 0; i < block_size; ++i) {
                Thread& thread = threads[std::size_t(rank * block_size + i)];
                thread.index.x = unsigned(i);
                thread.block = &block;
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = m.stacks[std::size_t(rank * block_size + i)].get();
                thread.context.uc_stack.ss_size = Machine::kStack;
                thread.context.uc_link = nullptr;
                makecontext(&thread.context, enter, 0);
            }
        }
        run_cluster(cluster, threads);
        if (m.failure) std::rethrow_exception(m.failure);
        const int most = 65536 / block_size / 8 * 8 * block_size;  // what a launch of such blocks is given
        for (const Block& block : cluster.blocks)
            require(block.registers <= most, "more registers than there are");
    }
}

}  // namespace emulated
