// Three questions to the host, answered as if /sys knew the device and the process lived on a host of its own:
// NVSHMEM's only notion of a node is a hash of gethostname().
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

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
