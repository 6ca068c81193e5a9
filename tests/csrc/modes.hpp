// What the native test program can do; each prints lines "group=... name=number ..." and returns 0 where it ran.
#pragma once

#include <cstdint>

namespace tpmp::test {

int threads(uint64_t seed, int batches);        // random calls, ranks as threads
int deaths(uint64_t seed, int kills);           // ranks as processes that die at failpoints; at most so many kills
int faults();                                   // stops, exits, exceptions, pauses, two deaths at once
int pass_by();                                  // one failpoint, armed from the environment
int jobs(uint64_t seed, int count);             // whole jobs killed at random times

}  // namespace tpmp::test
