// What the two libraries of the double share: a stream of libcuda, as libnccl enqueues on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

struct FakeStream;
using Step = std::function<void()>;

void fake_cuda_push(FakeStream* stream, Step step);
