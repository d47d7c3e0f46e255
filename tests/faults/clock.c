/* Put before a program with LD_PRELOAD: the clock of the wall jumps by years, forwards and back.
 *
 * Every reading within the same tenth of a second (of the clock that cannot be set) is off by the
 * same amount, drawn from that tenth, so that a run sees hundreds of jumps. Other clocks are true. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/time.h>
#include <time.h>

static const int64_t YEAR = 365 * 24 * 3600;

static int true_clock(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  return real(clock, now);
}

static int64_t offset(void) {
  struct timespec steady;
  true_clock(CLOCK_MONOTONIC, &steady);
  uint64_t x = (uint64_t)steady.tv_sec * 10 + steady.tv_nsec / 100000000;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return (int64_t)((x ^ (x >> 31)) % (20 * YEAR)) - 10 * YEAR;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = true_clock(clock, now);
  if (!code && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec found;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &found);
  now->tv_sec = found.tv_sec;
  now->tv_usec = found.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *kept) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (kept) *kept = now.tv_sec;
  return now.tv_sec;
}
