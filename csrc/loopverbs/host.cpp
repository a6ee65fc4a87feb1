// Questions to the host, answered as if /sys knew the device and the process lived on a host of its own:
// NVSHMEM's only notion of a node is a hash of gethostname(), and ranks of one that share a GPU meet in shared
// memory.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED char* realpath(const char* path, char* resolved) {
  if (path != nullptr && strncmp(path, "/sys/class/infiniband/loop0", 27) == 0) {
    const char* where = "/sys/devices/pci0000:00/0000:00:00.0";
    return resolved != nullptr ? strcpy(resolved, where) : strdup(where);
  }
  using Function = char* (*)(const char*, char*);
  static const auto real = reinterpret_cast<Function>(dlvsym(RTLD_NEXT, "realpath", "GLIBC_2.3"));
  return real(path, resolved);
}

EXPORTED int access(const char* path, int mode) {
  if (strcmp(path, "/sys/module/nvidia_peermem/version") == 0) return 0;
  return static_cast<int>(syscall(SYS_faccessat, AT_FDCWD, path, mode));
}

EXPORTED int gethostname(char* name, size_t length) {
  using Function = int (*)(char*, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "gethostname"));
  const char* host = getenv("LOOPVERBS_HOSTNAME");
  if (host == nullptr) return real(name, length);
  snprintf(name, length, "%s", host);
  return 0;
}

namespace {

/// The name of shared memory with this host's before it; what a keeper removes with the session's own.
std::string on_this_host(const char* name) {
  const char *session = getenv("LOOPVERBS_SESSION"), *host = getenv("LOOPVERBS_HOSTNAME");
  if (session == nullptr || host == nullptr) return name;
  return std::string("/loopverbs.") + session + "." + host + "." + (name[0] == '/' ? name + 1 : name);
}

}  // namespace

EXPORTED int shm_open(const char* name, int flags, mode_t mode) {
  using Function = int (*)(const char*, int, mode_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "shm_open"));
  return real(on_this_host(name).c_str(), flags, mode);
}

EXPORTED int shm_unlink(const char* name) {
  using Function = int (*)(const char*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "shm_unlink"));
  return real(on_this_host(name).c_str());
}
