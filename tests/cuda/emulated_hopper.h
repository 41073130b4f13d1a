// csrc/hopper.h on the CPU, from the PTX ISA: barriers count, boxes are swizzled as they are copied, matrices
// are found through their descriptors, and a product is computed as late as its issuer may leave it, or by
// luck as early as its issue: whoever reads, writes or frees what is under way gets wrong numbers or NaN.
#pragma once

#include "dtype.h"

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long, cudaDriverEntryPointQueryResult*) {
    if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    return cudaSuccess;
}

namespace moco_fast::hopper {

using emulated::require;
using emulated::self;

// As on a GPU shared memory begins after 1 KB of the system's, and the addresses of blocks in a cluster
// differ.
constexpr uint32_t kFirst = 0x400;
inline uint32_t shared_address(const void* at) {
    return kFirst + (uint32_t(self().block->rank) << 24) + uint32_t(emulated::shared_offset(at));
}
inline char* dynamic_shared() { return self().block->shared; }

// --- barriers ---

using Barrier = uint64_t;

struct BarrierState {
    uint8_t expected, pending, phase, used;
    int32_t bytes;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));
constexpr uint8_t kFresh = 0xb4, kUsed = 0xb5;  // before and after publish_barriers()

inline BarrierState& state_of(Barrier* barrier) {
    static_cast<void>(emulated::shared_offset(barrier));
    BarrierState& state = *reinterpret_cast<BarrierState*>(barrier);
    require(state.used == kUsed, "a barrier that nobody initialised and published");
    return state;
}

inline void init(Barrier* barrier, int arrivals) {
    require(emulated::shared_offset(barrier) % 8 == 0 && arrivals > 0, "an impossible barrier");
    const BarrierState fresh{uint8_t(arrivals), uint8_t(arrivals), 0, kFresh, 0};
    std::memcpy(barrier, &fresh, sizeof fresh);
    self().unpublished.push_back(barrier);
}

inline void publish_writes() {}
inline void publish_barriers() {
    for (Barrier* barrier : self().unpublished) reinterpret_cast<BarrierState*>(barrier)->used = kUsed;
    self().unpublished.clear();
}

inline void end_phase(BarrierState& state) {
    if (state.pending > 0 || state.bytes != 0) return;
    state.phase ^= 1;
    state.pending = state.expected;
}

inline void arrive_expecting(Barrier* barrier, int bytes) {
    BarrierState& state = state_of(barrier);
    require(state.pending > 0, "more arrivals than a barrier expects");
    require(bytes >= 0 && bytes < 1 << 20, "more bytes than a barrier counts");
    state.bytes += bytes;
    --state.pending;
    end_phase(state);
}

inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }

inline void wait(Barrier* barrier, int parity) {
    const BarrierState& state = state_of(barrier);
    emulated::wait_until([&state, parity] { return state.phase != parity; });
}

inline emulated::Meeting& named(int barrier, int threads) {
    require(barrier > 0 && barrier < emulated::kNamedBarriers && threads % 32 == 0, "an impossible barrier");
    return self().block->named[barrier];
}
inline void sync_warps(int barrier, int threads) { emulated::meet(named(barrier, threads), threads); }
inline void arrive_warps(int barrier, int threads) { emulated::arrive(named(barrier, threads), threads); }

// --- clusters ---

inline void arrive_cluster() {
    emulated::Cluster& cluster = *self().block->cluster;
    require(self().arrived < 0, "a thread arrives at the cluster's barrier twice");
    self().arrived = cluster.meeting.generation;
    emulated::arrive(cluster.meeting, cluster.running);
}
inline void wait_cluster() {
    const emulated::Meeting& meeting = self().block->cluster->meeting;
    const int64_t arrived = std::exchange(self().arrived, -1);
    require(arrived >= 0, "a thread waits at the cluster's barrier without having arrived");
    emulated::wait_until([&meeting, arrived] { return meeting.generation != arrived; });
}

template <class T>
const T* shared_of(int block, const T* own) {
    emulated::Cluster& cluster = *self().block->cluster;
    const std::size_t offset = emulated::shared_offset(own);
    return reinterpret_cast<const T*>(cluster.blocks.at(std::size_t(block)).shared + offset);
}

// --- the copy engine ---

// Where a byte of a swizzled matrix lies: bits 4 to 6 of its address, exclusive or bits 7 to 9.
inline std::size_t swizzled(std::size_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy_box(void* to, const CUtensorMap* matrix, int row, int column, Barrier* barrier) {
    emulated::Block& block = *self().block;
    const std::size_t at = emulated::shared_offset(to), pitch = 2 * matrix->box_columns;
    const std::size_t bytes = matrix->box_rows * pitch;
    require(at % 1024 == 0 && pitch == 128 && at + bytes <= block.shared_bytes,
            "a box in an impossible place");
    BarrierState& state = state_of(barrier);
    std::memset(to, 0xff, bytes);
    emulated::machine().copies.push_back([=, &state, &block, map = *matrix] {
        for (std::size_t r = 0; r < map.box_rows; ++r) {
            for (std::size_t c = 0; c < map.box_columns; ++c) {
                const uint64_t from_row = uint64_t(row) + r, from_column = uint64_t(column) + c;
                uint16_t value = 0;
                if (from_row < map.count && from_column < map.columns)
                    std::memcpy(&value, map.rows + from_row * map.pitch + 2 * from_column, 2);
                std::memcpy(block.shared + swizzled(at + r * pitch + 2 * c), &value, 2);
            }
        }
        state.bytes -= int32_t(bytes);
        end_phase(state);
    });
}

inline void prefetch(const CUtensorMap*) {}

// --- registers ---

inline void ask_for_registers(int registers) {
    emulated::Thread& thread = self();
    require(registers % 8 == 0 && registers >= 24 && registers <= 256 && thread.registers == 0,
            "an impossible number of registers");
    thread.registers = registers;
}
template <int Registers>
void give_registers() {
    ask_for_registers(Registers);
}
template <int Registers>
void take_registers() {
    ask_for_registers(Registers);
}

// --- products ---

template <class T>
struct Operand {
    static float read(uint16_t bits) { return to_float(T{bits}); }
    static uint32_t pair(float low, float high) {
        T l, h;
        from_float(low, l);
        from_float(high, h);
        return uint32_t(h.bits) << 16 | l.bits;
    }
};
using F16 = Operand<f16_t>;
using Bf16 = Operand<bf16_t>;

// A matrix in shared memory, of rows of 128 bytes: element (row, column).
struct Matrix {
    std::size_t start, blocks, eight_rows;
    const char* shared;

    Matrix(uint64_t descriptor, const char* memory)
        : start(((descriptor & 0x3fff) << 4) - kFirst),
          blocks((descriptor >> 16 & 0x3fff) << 4),
          eight_rows((descriptor >> 32 & 0x3fff) << 4),
          shared(memory) {
        require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "not a 128-byte swizzle");
    }
    uint16_t at(int row, int column) const {
        const std::size_t address = start + std::size_t(column / 64) * blocks +
                                    std::size_t(row / 8) * eight_rows + std::size_t(row % 8) * 128 +
                                    std::size_t(column % 64) * 2;
        uint16_t bits;
        std::memcpy(&bits, shared + swizzled(address), 2);
        return bits;
    }
};

// The place of element (row, column) of a fragment: thread of the group, and which of its values.
struct Place {
    int thread, value;
};
inline Place place(int row, int column) {
    return {row / 16 * 32 + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row / 8 % 2 * 2 + column % 2};
}

constexpr int kM = 64, kN = 128, kK = 16;

inline void compute(const emulated::Product& product, const char* shared) {
    static float a[kM][kK], b[kN][kK];
    if (product.a) {
        const Matrix rows(product.a, shared);
        for (int m = 0; m < kM; ++m)
            for (int k = 0; k < kK; ++k) a[m][k] = product.read(rows.at(m, k));
    } else {
        for (int m = 0; m < kM; ++m)
            for (int k = 0; k < kK; ++k) {
                const Place from = place(m, k);
                const uint32_t pair = product.a_registers[from.thread][from.value / 2];
                a[m][k] = product.read(uint16_t(from.value % 2 ? pair >> 16 : pair));
            }
    }
    const Matrix other(product.b, shared);
    for (int n = 0; n < kN; ++n)
        for (int k = 0; k < kK; ++k) b[n][k] = product.read(product.a ? other.at(n, k) : other.at(k, n));
    for (int m = 0; m < kM; ++m)
        for (int n = 0; n < kN; ++n) {
            const Place to = place(m, n);
            float& d = product.d[to.thread][to.value];
            double sum = product.add ? double(d) : 0.0;
            for (int k = 0; k < kK; ++k) sum += double(a[m][k]) * double(b[n][k]);
            d = float(sum);
        }
}

// Computes those of a group's products that all its threads have issued, up to one.
inline void advance(emulated::Group& group, std::size_t to, const char* shared) {
    while (group.done < to && group.done < group.products.size() &&
           group.products[group.done].issued == emulated::kGroup)
        compute(group.products[group.done++], shared);
}

inline void issue(const emulated::Product& product, float* d, const uint32_t* a) {
    emulated::Thread& thread = self();
    require(thread.fenced, "a product after registers changed, without begin_products()");
    emulated::Group& group = emulated::own_group();
    if (thread.issued == group.products.size()) group.products.push_back(product);
    emulated::Product& shared = group.products[thread.issued++];
    require(shared.a == product.a && shared.b == product.b && shared.add == product.add,
            "threads of a group issue different products");
    const int lane = thread.number() % emulated::kGroup;
    shared.d[lane] = d;
    shared.a_registers[lane] = a;
    ++shared.issued;
}

template <class Type>
void rows_by_rows(Type, float (&d)[64], uint64_t a, uint64_t b, bool add) {
    emulated::Product product{};
    product.a = a, product.b = b, product.add = add, product.read = Type::read;
    issue(product, d, nullptr);
}

template <class Type>
void registers_by_columns(Type, float (&d)[64], const uint32_t* a, uint64_t b) {
    emulated::Product product{};
    product.b = b, product.add = true, product.read = Type::read;
    issue(product, d, a);
}

inline void begin_products() { self().fenced = true; }

inline void commit_products() {
    self().commits.push_back(self().issued);
    if (emulated::machine().coin()) advance(emulated::own_group(), self().issued, self().block->shared);
}

template <int Groups>
void wait_products() {
    emulated::Thread& thread = self();
    thread.fenced = false;
    if (thread.commits.size() <= Groups) return;
    const std::size_t to = thread.commits[thread.commits.size() - 1 - Groups];
    emulated::Group& group = emulated::own_group();
    const char* shared = thread.block->shared;
    emulated::wait_until([&group, to, shared] {
        advance(group, to, shared);
        return group.done >= to;
    });
}

inline void written_by_products(float (&)[64]) {}

inline float root_fast(float x) { return std::sqrt(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace moco_fast::hopper
