// Blocks of elements go through the tree together: plain loops over short arrays, which the compiler vectorises.
#include "shm/reduce.hpp"

#include <algorithm>
#include <type_traits>

#include "shm/numbers.hpp"

namespace tpmp::shm {

namespace {

constexpr size_t kBlock = 512;  // elements; the accumulators of all levels stay in the L1 cache
constexpr int kLevels = 7;      // of a tree over 64 ranks, and one more

struct Add { template <class T> static T of(T a, T b) { return T(a + b); } };
struct Multiply { template <class T> static T of(T a, T b) { return T(a * b); } };
// The second test is true for a NaN in `a`; a NaN in `b` fails both and is returned.
struct Max { template <class T> static T of(T a, T b) { return (a > b) | (a != a) ? a : b; } };
struct Min { template <class T> static T of(T a, T b) { return (a < b) | (a != a) ? a : b; } };

template <class T>
constexpr bool is_half = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;
template <class T>
using Accumulator = std::conditional_t<is_half<T>, float, T>;

template <class T>
Accumulator<T> load(const T& value) {
  if constexpr (is_half<T>) return widen(value);
  else return value;
}

template <class T>
T store(Accumulator<T> value) {
  if constexpr (is_half<T>) return narrow<T>(value);
  else return value;
}

template <class Op, class A>
[[gnu::always_inline]] inline void combine(A* into, const A* other, size_t count) {
  for (size_t i = 0; i < count; ++i) into[i] = Op::of(into[i], other[i]);
}

// The tree over ranks [0, n): the largest power of two below n on the left. Pairs are leaves; as in a binary counter,
// a subtree is complete when its right sibling is, and those left at the end are joined from the right.
template <class T, class Op>
[[gnu::always_inline]] inline void block(const T* const* sources, int ranks, size_t at, size_t count,
                                         Accumulator<T> (*levels)[kBlock]) {
  int depth = 0;
  for (int r = 0; r < ranks; r += 2) {
    auto* out = levels[depth++];
    const T* a = sources[r] + at;
    if (r + 1 == ranks) {
      for (size_t i = 0; i < count; ++i) out[i] = load(a[i]);
      break;
    }
    const T* b = sources[r + 1] + at;
    for (size_t i = 0; i < count; ++i) out[i] = Op::of(load(a[i]), load(b[i]));
    for (int pairs = r / 2; pairs & 1; pairs >>= 1, --depth) combine<Op>(levels[depth - 2], levels[depth - 1], count);
  }
  for (; depth > 1; --depth) combine<Op>(levels[depth - 2], levels[depth - 1], count);
}

template <class T, class Op>
[[gnu::always_inline]] inline void blocks(const void* const* sources, int ranks, size_t count, bool average,
                                          void* out) {
  alignas(64) Accumulator<T> levels[kLevels][kBlock];
  auto* inputs = reinterpret_cast<const T* const*>(sources);
  for (size_t at = 0; at < count; at += kBlock) {
    const size_t n = std::min(kBlock, count - at);
    block<T, Op>(inputs, ranks, at, n, levels);
    if (average)
      for (size_t i = 0; i < n; ++i) levels[0][i] /= Accumulator<T>(ranks);
    T* target = static_cast<T*>(out) + at;
    for (size_t i = 0; i < n; ++i) target[i] = store<T>(levels[0][i]);
  }
}

#if defined(__x86_64__) && !defined(TPMP_NO_AVX2)
template <class T, class Op>
[[gnu::target("avx2")]] void blocks_avx2(const void* const* sources, int ranks, size_t count, bool average, void* out) {
  blocks<T, Op>(sources, ranks, count, average, out);
}
#endif

// The same operations on wider vectors where the machine has them: the same bits, and a tenth of a large all_reduce.
template <class T, class Op>
void reduce(const void* const* sources, int ranks, size_t count, bool average, void* out) {
#if defined(__x86_64__) && !defined(TPMP_NO_AVX2)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return blocks_avx2<T, Op>(sources, ranks, count, average, out);
#endif
  blocks<T, Op>(sources, ranks, count, average, out);
}

template <class T>
void reduce_typed(const void* const* sources, int ranks, size_t count, ReduceOp op, void* out) {
  switch (op) {
    case ReduceOp::sum: return reduce<T, Add>(sources, ranks, count, false, out);
    case ReduceOp::avg: return reduce<T, Add>(sources, ranks, count, true, out);
    case ReduceOp::max: return reduce<T, Max>(sources, ranks, count, false, out);
    case ReduceOp::min: return reduce<T, Min>(sources, ranks, count, false, out);
    case ReduceOp::prod: return reduce<T, Multiply>(sources, ranks, count, false, out);
    case ReduceOp::none: return;
  }
}

}  // namespace

void reduce_tree(const void* const* sources, int ranks, size_t count, DType dtype, ReduceOp op, void* out) {
  switch (dtype) {
    case DType::f64: return reduce_typed<double>(sources, ranks, count, op, out);
    case DType::f32: return reduce_typed<float>(sources, ranks, count, op, out);
    case DType::bf16: return reduce_typed<bf16>(sources, ranks, count, op, out);
    case DType::f16: return reduce_typed<fp16>(sources, ranks, count, op, out);
    // Unsigned, because a sum that wraps is defined for it; the bits are those of the signed sum. Order is not.
    case DType::i64:
      if (op == ReduceOp::max || op == ReduceOp::min) return reduce_typed<int64_t>(sources, ranks, count, op, out);
      return reduce_typed<uint64_t>(sources, ranks, count, op, out);
    case DType::i32:
      if (op == ReduceOp::max || op == ReduceOp::min) return reduce_typed<int32_t>(sources, ranks, count, op, out);
      return reduce_typed<uint32_t>(sources, ranks, count, op, out);
    case DType::i16:
      if (op == ReduceOp::max || op == ReduceOp::min) return reduce_typed<int16_t>(sources, ranks, count, op, out);
      return reduce_typed<uint16_t>(sources, ranks, count, op, out);
    case DType::i8:
      if (op == ReduceOp::max || op == ReduceOp::min) return reduce_typed<int8_t>(sources, ranks, count, op, out);
      return reduce_typed<uint8_t>(sources, ranks, count, op, out);
    case DType::u8: return reduce_typed<uint8_t>(sources, ranks, count, op, out);
    default: return;
  }
}

}  // namespace tpmp::shm
