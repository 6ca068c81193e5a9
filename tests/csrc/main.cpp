// The native test program of the transport, run by tests/comm/test_native.py: MODE [SEED COUNT].
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "modes.hpp"

int main(int argc, char** argv) {
  using namespace tpmp::test;
  const char* mode = argc > 1 ? argv[1] : "";
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const int count = argc > 3 ? std::atoi(argv[3]) : 0;
  if (std::strcmp(mode, "threads") == 0) return threads(seed, count);
  if (std::strcmp(mode, "jobs") == 0) return jobs(seed, count);
#ifdef TPMP_FAILPOINTS
  if (std::strcmp(mode, "deaths") == 0) return deaths(seed, count);
  if (std::strcmp(mode, "faults") == 0) return faults();
  if (std::strcmp(mode, "pass_by") == 0) return pass_by();
#endif
  std::fprintf(stderr, "expected threads, jobs, or with failpoints deaths, faults, pass_by; got '%s'\n", mode);
  return 2;
}
