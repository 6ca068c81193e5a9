#include "dynlib.hpp"

#include <dlfcn.h>
#include <link.h>

#include "transport.hpp"

namespace tpmp {

namespace {

std::string resolved(void* handle) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr ? map->l_name : "";
}

std::string reason() {
  const char* text = dlerror();
  return text != nullptr ? text : "unknown reason";
}

}  // namespace

Library::Library(std::string name, void* handle) : name_(std::move(name)), path_(resolved(handle)), handle_(handle) {}

Library Library::open(const std::string& name, const std::string& soname, const std::string& override,
                      const std::vector<std::string>& files) {
  // Never RTLD_GLOBAL: two versions in one process would take each other's symbols.
  if (!override.empty()) {
    void* handle = dlopen(override.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return {name, handle};
    throw transport_error(ErrorCode::system, -1, name + ": the library asked for cannot be loaded: " + reason());
  }
  void* loaded = dlopen(soname.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (loaded != nullptr) return {name, loaded};
  std::string tried;
  std::vector<std::string> candidates = files;
  candidates.push_back(soname);
  for (const std::string& candidate : candidates) {
    void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return {name, handle};
    tried += (tried.empty() ? "" : "; ") + reason();
  }
  throw transport_error(ErrorCode::system, -1, name + " is not on this machine (" + tried + ")");
}

void* Library::find(const char* symbol) const { return dlsym(handle_, symbol); }

void* Library::need(const char* symbol) const {
  void* address = find(symbol);
  if (address == nullptr)
    throw transport_error(ErrorCode::system, -1,
                          name_ + " at " + path_ + " has no " + symbol + "; install a newer one");
  return address;
}

}  // namespace tpmp
