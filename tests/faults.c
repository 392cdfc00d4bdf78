// Preloaded into a process under test (LD_PRELOAD): one chosen call of the C library on files below a folder fails with
// an errno, or delivers a signal to the process.
//
// Calls are counted over all threads. What is read through a memory map or written by the C library itself (stdio) is
// not seen.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READS = 1, WRITES = 2 };

static char folder[PATH_MAX];
static size_t folder_length;
static int counted_kinds, armed_error, armed_signal;
static long first_call, last_call;
static atomic_long calls;

// From here on, calls `first` to `first + repeats - 1` of the kinds in the mask fail with `error`, or go on normally
// after `signal` was sent if that is not 0. first = 0 only counts. repeats = LONG_MAX is for good.
void faults_arm(const char* below, int kinds, long first, long repeats, int error, int signal) {
  snprintf(folder, sizeof folder, "%s/", below);
  folder_length = strlen(folder);
  counted_kinds = kinds;
  first_call = first ? first : LONG_MAX;
  last_call = repeats > LONG_MAX - first_call ? LONG_MAX : first_call + repeats - 1;
  armed_error = error;
  armed_signal = signal;
  atomic_store(&calls, 0);
}

long faults_calls(void) { return atomic_load(&calls); }

// 0, or -1 with errno set if this call on `path` in `directory`, a descriptor, is to fail. An empty path is the
// descriptor's own file.
static int strike(int directory, const char* path, int kind) {
  char full[2 * PATH_MAX];
  if (!folder_length || !(counted_kinds & kind)) return 0;
  if (path[0] != '/' && directory != AT_FDCWD) {
    char link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, full, PATH_MAX - 1);
    errno = before;
    if (length < 0) return 0;
    snprintf(full + length, PATH_MAX, "/%s", path);
    path = full;
  }
  if (strncmp(path, folder, folder_length)) return 0;
  long call = atomic_fetch_add(&calls, 1) + 1;
  if (call < first_call || call > last_call) return 0;
  if (armed_signal) {
    kill(getpid(), armed_signal);
    return 0;
  }
  errno = armed_error;
  return -1;
}

static int kind_of(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT) ? WRITES : READS; }

// The function that this one stands before. `mode` is passed on even where it was not given and is not read.
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name, directory, parameters, arguments)                            \
  int name parameters {                                                         \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    mode_t mode = va_arg(more, mode_t);                                         \
    va_end(more);                                                               \
    return strike(directory, path, kind_of(flags)) ? -1 : REAL(name) arguments; \
  }
OPEN(open, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))
OPEN(openat, directory, (int directory, const char* path, int flags, ...), (directory, path, flags, mode))
OPEN(openat64, directory, (int directory, const char* path, int flags, ...), (directory, path, flags, mode))

#define ON_DESCRIPTOR(result, name, kind, parameters, arguments) \
  result name parameters { return strike(descriptor, "", kind) ? -1 : REAL(name) arguments; }
ON_DESCRIPTOR(ssize_t, read, READS, (int descriptor, void* to, size_t count), (descriptor, to, count))
ON_DESCRIPTOR(ssize_t, pread, READS, (int descriptor, void* to, size_t count, off_t at), (descriptor, to, count, at))
ON_DESCRIPTOR(
    ssize_t, pread64, READS, (int descriptor, void* to, size_t count, off64_t at), (descriptor, to, count, at))
ON_DESCRIPTOR(ssize_t, write, WRITES, (int descriptor, const void* from, size_t count), (descriptor, from, count))
ON_DESCRIPTOR(int, fsync, WRITES, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fdatasync, WRITES, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, ftruncate, WRITES, (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(int, ftruncate64, WRITES, (int descriptor, off64_t size), (descriptor, size))

#define ON_PATH(name, parameters, arguments) \
  int name parameters { return strike(AT_FDCWD, path, WRITES) ? -1 : REAL(name) arguments; }
ON_PATH(rename, (const char* path, const char* target), (path, target))
ON_PATH(link, (const char* path, const char* target), (path, target))
ON_PATH(mkdir, (const char* path, mode_t mode), (path, mode))
ON_PATH(rmdir, (const char* path), (path))
ON_PATH(unlink, (const char* path), (path))
ON_PATH(chmod, (const char* path, mode_t mode), (path, mode))

int unlinkat(int directory, const char* path, int flags) {
  return strike(directory, path, WRITES) ? -1 : REAL(unlinkat)(directory, path, flags);
}
