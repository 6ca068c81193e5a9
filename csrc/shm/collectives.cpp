// What each collective publishes in its rounds, and what it reads. Two forms: all ranks read the same part of a slot,
// or a slot has a lane for each rank. All but the small all_reduce go through in pieces that stay in the caches.
#include <algorithm>
#include <array>
#include <cstring>

#include "shm/reduce.hpp"
#include "shm/rounds.hpp"

namespace tpmp::shm {

namespace {

constexpr size_t kOneShotBytes = 64 << 10;  // below it one round that reads everything beats two rounds that share it

size_t one_shot_limit(int ranks) { return kOneShotBytes * 2 / size_t(ranks); }
uint64_t pieces(uint64_t bytes, uint64_t each) { return std::max<uint64_t>(1, (bytes + each - 1) / each); }
size_t down(size_t value, size_t to) { return value / to * to; }

struct Span {
  size_t begin, bytes;
};

// Piece k of `total` bytes.
Span piece_of(uint64_t total, uint64_t each, uint64_t k) {
  const uint64_t begin = std::min(total, each * k);
  return {begin, std::min(each, total - begin)};
}

// The bytes of a piece that `rank` reduces; boundaries on cache lines.
Span slice_of(size_t bytes, int ranks, int rank) {
  const size_t each = (bytes + size_t(ranks) * kLine - 1) / (size_t(ranks) * kLine) * kLine;
  return piece_of(bytes, each, uint64_t(rank));
}

struct Sources {
  std::array<const void*, kMaxWorld> of;
  void reduce(const Rounds& r, size_t bytes, void* out) const {
    reduce_tree(of.data(), r.size, bytes / r.element, r.call.dtype, r.call.op, out);
  }
};

const char* input(const Rounds& r) { return static_cast<const char*>(r.call.input); }
char* output(const Rounds& r) { return static_cast<char*>(r.call.output); }

void copy_unless_same(char* to, const char* from, size_t bytes) {
  if (to != from) std::memcpy(to, from, bytes);
}

// ---- all ranks read the same part

// Every rank publishes all of its data and reduces all of it. Copied even out of a heap: the result goes where the
// input is, while peers still read.
void one_shot(Rounds& r) {
  const size_t bytes = r.call.numel * r.element;
  r.run(
      1, false, [&](uint64_t, uint64_t round) { r.copy(round, input(r), bytes, 0); },
      [&](uint64_t, uint64_t round) {
        Sources sources;
        for (int i = 0; i < r.size; ++i) sources.of[i] = r.source(i, round);
        sources.reduce(r, bytes, output(r));
      });
}

// Reduce-scatter and all-gather in one stream: a round carries the inputs of one piece and the results of an earlier
// one. Each rank reduces its slice of a piece, where it stands: nobody else reads that slice of it as an input.
void two_shot(Rounds& r) {
  const size_t total = r.call.numel * r.element;
  const size_t inputs = down(r.capacity * size_t(r.size) / size_t(r.size + 1), kLine * size_t(r.size)) - kLine * size_t(r.size);
  const uint64_t count = pieces(total, inputs);
  const bool ahead = count > 2;
  const uint64_t lag = ahead ? 2 : 1;  // rounds between the inputs of a piece and its results
  char* const data = output(r);
  if (r.call.input != data) std::memcpy(data, r.call.input, total);

  const auto publish = [&](uint64_t k, uint64_t round) {
    const Span piece = piece_of(total, inputs, k);
    if (r.lends(data, total)) return r.lend(round, data);
    if (k < count) {
      const Span own = slice_of(piece.bytes, r.size, r.rank);
      const char* from = data + piece.begin;
      r.copy(round, from, own.begin, 0);
      r.copy(round, from + own.begin + own.bytes, piece.bytes - own.begin - own.bytes, own.begin + own.bytes);
    }
    if (k >= lag) {
      const Span past = piece_of(total, inputs, k - lag), own = slice_of(past.bytes, r.size, r.rank);
      r.copy(round, data + past.begin + own.begin, own.bytes, inputs);
    }
  };
  const auto read = [&](uint64_t k, uint64_t round) {
    if (k < count) {
      const Span piece = piece_of(total, inputs, k), own = slice_of(piece.bytes, r.size, r.rank);
      Sources sources;
      for (int i = 0; i < r.size; ++i)
        sources.of[i] = i == r.rank ? data + piece.begin + own.begin
                                    : r.source(i, round) + own.begin + (r.lent(i, round) ? piece.begin : 0);
      sources.reduce(r, own.bytes, data + piece.begin + own.begin);
    }
    if (k < lag) return;
    const Span past = piece_of(total, inputs, k - lag);
    for (int i = 0; i < r.size; ++i) {
      const Span theirs = slice_of(past.bytes, r.size, i);
      if (i == r.rank) continue;
      const size_t at = r.lent(i, round) ? past.begin + theirs.begin : inputs;
      std::memcpy(data + past.begin + theirs.begin, r.source(i, round) + at, theirs.bytes);
    }
  };
  r.run(count + lag, ahead, publish, read);
}

void all_reduce(Rounds& r) { r.call.numel * r.element <= one_shot_limit(r.size) ? one_shot(r) : two_shot(r); }

// Every rank publishes its input (the root alone in a broadcast), piece by piece; `read(round, piece)` takes it.
void common(Rounds& r, const std::function<void(uint64_t, Span)>& read) {
  const size_t total = r.call.numel * r.element, each = down(r.capacity, kLine);
  const uint64_t count = pieces(total, each);
  r.run(
      count, count > 1,
      [&](uint64_t k, uint64_t round) {
        const Span piece = piece_of(total, each, k);
        if (r.call.input != nullptr) r.lend_or_copy(round, input(r) + piece.begin, piece.bytes);
      },
      [&](uint64_t k, uint64_t round) { read(round, piece_of(total, each, k)); });
}

void reduce(Rounds& r) {
  common(r, [&](uint64_t round, Span piece) {
    if (r.rank != r.call.root) return;
    Sources sources;
    for (int i = 0; i < r.size; ++i)
      sources.of[i] = i == r.rank ? input(r) + piece.begin : r.source(i, round);
    sources.reduce(r, piece.bytes, output(r) + piece.begin);
  });
}

void broadcast(Rounds& r) {
  common(r, [&](uint64_t round, Span piece) {
    if (r.rank != r.call.root) std::memcpy(output(r) + piece.begin, r.source(r.call.root, round), piece.bytes);
  });
}

// all_gather, and gather on its root.
void gather(Rounds& r) {
  const size_t part = r.call.numel * r.element;
  common(r, [&](uint64_t round, Span piece) {
    if (r.call.output == nullptr) return;
    for (int i = 0; i < r.size; ++i) {
      const char* from = i == r.rank ? input(r) + piece.begin : r.source(i, round);
      copy_unless_same(output(r) + size_t(i) * part + piece.begin, from, piece.bytes);
    }
  });
}

// ---- a lane for each rank

// Where a lane's piece lies in the slot or in the heap, and the bytes of the whole part, to be compared.
struct Lane {
  uint64_t place, bytes, total;
};

struct Parts {
  std::vector<uint64_t> begin, bytes;  // by rank, of the input or the output

  Parts(const Rounds& r, const std::vector<uint64_t>& splits) {
    uint64_t at = 0;
    for (int i = 0; i < r.size; ++i) {
      begin.push_back(at);
      bytes.push_back((splits.empty() ? r.call.numel : splits[i]) * r.element);
      at += bytes.back();
    }
  }
  uint64_t largest() const { return *std::max_element(bytes.begin(), bytes.end()); }
};

size_t lane_bytes(const Rounds& r) {
  return down((r.capacity - sizeof(Lane) * size_t(r.size)) / size_t(r.size) - kLine, kLine);
}

void publish_lanes(Rounds& r, const Parts& in, uint64_t k, uint64_t round) {
  const size_t each = lane_bytes(r), table = (sizeof(Lane) * size_t(r.size) + kLine - 1) / kLine * kLine;
  Lane* lanes = reinterpret_cast<Lane*>(r.slot(r.rank, round).payload());
  const bool lends = r.lends(input(r), in.begin.back() + in.bytes.back());
  if (lends) r.lend(round, input(r));
  for (int i = 0; i < r.size; ++i) {
    const Span piece = piece_of(in.bytes[i], each, k);
    lanes[i] = {lends ? in.begin[i] + piece.begin : table + size_t(i) * each, piece.bytes, in.bytes[i]};
    if (!lends && i != r.rank) r.copy(round, input(r) + in.begin[i] + piece.begin, piece.bytes, lanes[i].place);
  }
}

// The piece that `rank` has for this one. `expected`: bytes of the whole part.
const char* lane(Rounds& r, int rank, uint64_t round, uint64_t expected) {
  const Lane& mine = reinterpret_cast<const Lane*>(r.slot(rank, round).payload())[r.rank];
  if (mine.total != expected)
    r.fail(-1, "rank " + std::to_string(rank) + " has " + std::to_string(mine.total / r.element) +
                   " elements for rank " + std::to_string(r.rank) + ", which expects " +
                   std::to_string(expected / r.element) + "; they differ in count");
  return (r.lent(rank, round) ? r.source(rank, round) : r.slot(rank, round).payload()) + mine.place;
}

void reduce_scatter(Rounds& r) {
  const Parts in(r, {});
  const size_t each = lane_bytes(r), total = in.bytes[0];
  const uint64_t count = pieces(total, each);
  r.run(
      count, count > 1, [&](uint64_t k, uint64_t round) { publish_lanes(r, in, k, round); },
      [&](uint64_t k, uint64_t round) {
        const Span piece = piece_of(total, each, k);
        Sources sources;
        for (int i = 0; i < r.size; ++i)
          sources.of[i] = i == r.rank ? input(r) + in.begin[i] + piece.begin : lane(r, i, round, total);
        sources.reduce(r, piece.bytes, output(r) + piece.begin);
      });
}

void scatter(Rounds& r) {
  const Parts in(r, {});
  const size_t each = lane_bytes(r), total = in.bytes[0];
  const uint64_t count = pieces(total, each);
  const bool root = r.rank == r.call.root;
  r.run(
      count, count > 1,
      [&](uint64_t k, uint64_t round) {
        if (root) publish_lanes(r, in, k, round);
      },
      [&](uint64_t k, uint64_t round) {
        const Span piece = piece_of(total, each, k);
        const char* from = root ? input(r) + in.begin[r.rank] + piece.begin : lane(r, r.call.root, round, total);
        copy_unless_same(output(r) + piece.begin, from, piece.bytes);
      });
}

// With uneven parts only all ranks together know how many rounds there are: a first round tells.
uint64_t agreed_rounds(Rounds& r, uint64_t own) {
  uint64_t most = own;
  r.run(
      1, false, [&](uint64_t, uint64_t round) { r.slot(r.rank, round).rounds = own; },
      [&](uint64_t, uint64_t round) {
        for (int i = 0; i < r.size; ++i) most = std::max(most, r.slot(i, round).rounds);
      });
  return most;
}

void all_to_all(Rounds& r) {
  const Parts in(r, r.call.input_splits), out(r, r.call.output_splits);
  const size_t each = lane_bytes(r);
  uint64_t count = pieces(in.largest(), each);
  if (!r.call.input_splits.empty()) count = agreed_rounds(r, count);
  r.run(
      count, count > 1, [&](uint64_t k, uint64_t round) { publish_lanes(r, in, k, round); },
      [&](uint64_t k, uint64_t round) {
        for (int i = 0; i < r.size; ++i) {
          const char* from = lane(r, i, round, out.bytes[i]);
          const Span piece = piece_of(out.bytes[i], each, k);
          if (i == r.rank) from = input(r) + in.begin[i] + piece.begin;
          std::memcpy(output(r) + out.begin[i] + piece.begin, from, piece.bytes);
        }
      });
}

void barrier(Rounds& r) {
  const auto nothing = [](uint64_t, uint64_t) {};
  r.run(1, false, nothing, nothing);
}

}  // namespace

void carry_out(Rounds& r) {
  switch (r.call.kind) {
    case Kind::barrier: barrier(r); break;
    case Kind::all_reduce: all_reduce(r); break;
    case Kind::reduce: reduce(r); break;
    case Kind::reduce_scatter: reduce_scatter(r); break;
    case Kind::all_gather: case Kind::gather: gather(r); break;
    case Kind::broadcast: broadcast(r); break;
    case Kind::all_to_all: all_to_all(r); break;
    case Kind::scatter: scatter(r); break;
    case Kind::send: case Kind::recv: break;  // transfers are not collectives
  }
  r.finish();
}

}  // namespace tpmp::shm
