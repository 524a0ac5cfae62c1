"""Faults for real: C libraries that stand before the system's calls, by LD_PRELOAD.

A process that is started with one meets the fault wherever the call is made: in Python, or in a
library that it uses.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# flock() as on Lustre mounted without it.
NO_FLOCK = """
#include <errno.h>
int flock(int fd, int operation) { errno = ENOLCK; return -1; }
"""

# Fails calls on files whose path contains FAULT_PATH: those named in FAULT_CALLS, with FAULT_ERRNO,
# after the first FAULT_AFTER bytes or so were written (0: at once).
FILES = r"""
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
static long written = 0;
static int fails(int fd, const char *call, size_t count) {
  const char *path = getenv("FAULT_PATH"), *calls = getenv("FAULT_CALLS");
  char link[64], name[4096];
  if (!path || !calls || !strstr(calls, call)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, name, sizeof name - 1);
  if (length < 0) return 0;
  name[length] = 0;
  if (!strstr(name, path)) return 0;
  const char *after = getenv("FAULT_AFTER");
  long start = written;
  written += count;
  if (after && start < atol(after)) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}
#define WRAP(result, call, name, arguments, ...) \
  result name arguments { \
    static result (*real) arguments = 0; \
    if (!real) real = dlsym(RTLD_NEXT, #name); \
    return fails(fd, call, count) ? -1 : real(__VA_ARGS__); \
  }
WRAP(ssize_t, "write", write, (int fd, const void *b, size_t count), fd, b, count)
WRAP(ssize_t, "write", pwrite, (int fd, const void *b, size_t count, off_t o), fd, b, count, o)
WRAP(ssize_t, "write", pwrite64, (int fd, const void *b, size_t count, off64_t o), fd, b, count, o)
WRAP(ssize_t, "read", read, (int fd, void *b, size_t count), fd, b, count)
WRAP(ssize_t, "read", pread, (int fd, void *b, size_t count, off_t o), fd, b, count, o)
WRAP(ssize_t, "read", pread64, (int fd, void *b, size_t count, off64_t o), fd, b, count, o)
#define count 0
WRAP(int, "fsync", fsync, (int fd), fd)
WRAP(int, "fsync", fdatasync, (int fd), fd)
"""

# The time of day jumps. CLOCK_JUMPS is "PATH=SECONDS;PATH=SECONDS": from the first look after PATH
# exists on, the clock is so many seconds off. Waits whose end is a time of day end early or late
# with it, as the system's do when its clock is set; clocks that only count go on.
CLOCK = r"""
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static char *next_jump = 0;
static volatile time_t off = 0;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
__attribute__((constructor)) static void begin(void) {
  const char *jumps = getenv("CLOCK_JUMPS");
  next_jump = strdup(jumps ? jumps : "");
}
static void look(void) {
  if (!next_jump || !*next_jump || pthread_mutex_trylock(&mutex)) return;
  char *equal = strchr(next_jump, '='), *end = equal ? strchr(equal, ';') : 0;
  if (equal) {
    *equal = 0;
    if (access(next_jump, F_OK) == 0) {
      off = atol(equal + 1);
      next_jump = end ? end + 1 : "";
    } else *equal = '=';
  }
  pthread_mutex_unlock(&mutex);
}
static long (*real_syscall)(long, ...) = 0;
static long raw(long number, long a, long b, long c, long d, long e, long f) {
  if (!real_syscall) real_syscall = dlsym(RTLD_NEXT, "syscall");
  return real_syscall(number, a, b, c, d, e, f);
}
int clock_gettime(clockid_t id, struct timespec *t) {
  int result = raw(SYS_clock_gettime, id, (long)t, 0, 0, 0, 0);
  if (id != CLOCK_REALTIME && id != CLOCK_REALTIME_COARSE) return result;
  int saved = errno;
  look();
  errno = saved;
  if (!result) t->tv_sec += off;
  return result;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
/* A twentieth of a second from now by the true clock, or `end` by the shifted one if that is
   earlier; returns whether it is `end`. */
static int slice(const struct timespec *end, struct timespec *until) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  *until = (struct timespec){now.tv_sec, now.tv_nsec + 50000000};
  if (until->tv_nsec >= 1000000000) { until->tv_sec++; until->tv_nsec -= 1000000000; }
  int last = end->tv_sec < until->tv_sec ||
             (end->tv_sec == until->tv_sec && end->tv_nsec <= until->tv_nsec);
  if (last) *until = *end;
  until->tv_sec -= until->tv_sec < off ? until->tv_sec : off;  /* an end long past is no mistake */
  return last;
}
/* Ends of waits on counting clocks are seconds since the machine's start. */
static int is_time_of_day(const struct timespec *t) { return t->tv_sec > 1000000000; }
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *end) {
  static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) = 0;
  if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  if (!is_time_of_day(end)) return real(c, m, end);
  struct timespec until;
  int last = slice(end, &until), result = real(c, m, &until);
  return result == ETIMEDOUT && !last ? 0 : result;  /* woken for nothing, which callers expect */
}
int sem_timedwait(sem_t *s, const struct timespec *end) {
  static int (*real)(sem_t *, const struct timespec *) = 0;
  if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
  struct timespec until;
  for (;;) {
    int last = slice(end, &until), result = real(s, &until);
    if (result == 0 || last || errno != ETIMEDOUT) return result;
  }
}
long syscall(long number, ...) {
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  const struct timespec *end = (const struct timespec *)a[3];
  int waits = number == SYS_futex && end && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET &&
              (a[1] & FUTEX_CLOCK_REALTIME);
  if (!waits) return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  struct timespec until;
  int last = slice(end, &until);
  long result = raw(number, a[0], a[1], a[2], (long)&until, a[4], a[5]);
  if (result == -1 && errno == ETIMEDOUT && !last) errno = EINTR;
  return result;
}
"""


def compiled(folder: Path, source: str) -> Path:
    """Returns the library of a source, in this folder; skips the test without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = folder / "preloaded.so"
    path.with_suffix(".c").write_text(source)
    command = [
        compiler,
        "-D_GNU_SOURCE",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-o",
        path,
        path.with_suffix(".c"),
    ]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return path
