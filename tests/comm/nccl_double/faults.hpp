// What the double is told to do wrong, and which calls it has met: see the head of nccl.cpp.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Fault {
  std::string rank, function, hit, action;
  int value = 0;
};

std::mutex plan_mutex;
std::condition_variable released;
std::vector<Fault> faults;
std::map<std::pair<std::string, int>, int> hits;
std::vector<std::string> called;
int release = 0;

std::vector<Fault> parsed(const std::string& text) {
  std::vector<Fault> found;
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ';');) {
    std::istringstream in(entry);
    Fault fault;
    std::getline(in, fault.rank, ':');
    std::getline(in, fault.function, ':');
    std::getline(in, fault.hit, ':');
    std::getline(in, fault.action, '=');
    in >> fault.value;
    found.push_back(fault);
  }
  return found;
}

// Notes the call, and returns what is planned for it; hangs where that is planned.
Fault met(const std::string& function, int rank, const std::string& what = "") {
  std::unique_lock<std::mutex> lock(plan_mutex);
  called.push_back(function + "(" + std::to_string(rank) + what + ")");
  const int count = ++hits[{function, rank}];
  for (const Fault fault : faults) {  // a copy: the plan may change while this hangs
    if (fault.function != function || (fault.rank != "*" && fault.rank != std::to_string(rank))) continue;
    if (fault.hit != "*" && fault.hit != std::to_string(count)) continue;
    if (fault.action == "hang") released.wait(lock, [before = release] { return release != before; });
    return fault;
  }
  return {};
}

}  // namespace
