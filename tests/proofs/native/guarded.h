// Memory of the native drivers: an access beyond its end ends the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

// `bytes` that end where the page without access begins; filled with NaN of every type.
inline char* guarded(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
  char* base = static_cast<char*>(
      mmap(nullptr, size_t(whole + 2 * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(base, size_t(page), PROT_NONE);
  mprotect(base + page + whole, size_t(page), PROT_NONE);
  char* data = base + page + whole - bytes;
  memset(data, 0xff, size_t(bytes));
  return data;
}
