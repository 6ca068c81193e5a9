// Libraries found at run time: nothing here is linked against NCCL or the CUDA driver, so that the extension loads on
// any machine.
#pragma once

#include <string>
#include <vector>

namespace tpmp {

// One library, opened once and never closed: closing NCCL or the driver under a running thread ends the process.
class Library {
 public:
  // Tries, in this order: the file `override` alone where it is given (a bad path is an error, never a fallback), a
  // copy of `soname` that the process has loaded, each of `files`, then `soname` on the system's own path. Throws
  // transport_error naming all that was tried and the reason of each failure.
  static Library open(const std::string& name, const std::string& soname, const std::string& override,
                      const std::vector<std::string>& files);

  // Null where it is absent.
  void* find(const char* symbol) const;
  // Throws transport_error where it is absent.
  void* need(const char* symbol) const;
  const std::string& path() const { return path_; }  // as the loader resolved it

 private:
  Library(std::string name, void* handle);
  std::string name_, path_;
  void* handle_;
};

}  // namespace tpmp
