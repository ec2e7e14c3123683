/* Between distq and its C library: makes system calls fail as broken machines make them fail. Loaded with LD_PRELOAD;
 * environment variables say what breaks, a test sets them for one rank.
 *
 *     SHIM_FILE    what a path must contain for its file to be broken
 *     SHIM_WRITE   bytes after which writing to it finds the disk full
 *     SHIM_KILL    bytes after which writing to it kills the process
 *     SHIM_READ    reading it: `read` fails with EIO, `map` gives pages that can't be read
 *     SHIM_READS   calls that `read` lets pass first
 *     SHIM_CLOCK   seconds by which the wall clock is off
 *     SHIM_MPI     what the MPI library says it is
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int broken(int fd, const char *how)
{
    char link[64], path[4096];
    const char *wanted = getenv("SHIM_FILE");
    if (!wanted || !getenv(how))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, wanted) != NULL;
}

static int full(int fd, size_t bytes)
{
    static atomic_size_t written, before;
    if (broken(fd, "SHIM_KILL") && atomic_fetch_add(&before, bytes) + bytes > strtoul(getenv("SHIM_KILL"), NULL, 10))
        kill(getpid(), SIGKILL);
    if (!broken(fd, "SHIM_WRITE") || atomic_fetch_add(&written, bytes) + bytes <= strtoul(getenv("SHIM_WRITE"), NULL, 10))
        return 0;
    errno = ENOSPC;
    return 1;
}

static int unreadable(int fd, const char *way)
{
    return broken(fd, "SHIM_READ") && !strcmp(getenv("SHIM_READ"), way);
}

ssize_t write(int fd, const void *bytes, size_t count)
{
    return full(fd, count) ? -1 : NEXT(write)(fd, bytes, count);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at)
{
    return full(fd, count) ? -1 : NEXT(pwrite64)(fd, bytes, count, at);
}

ssize_t pread64(int fd, void *bytes, size_t count, off64_t at)
{
    static atomic_long reads;
    const char *pass = getenv("SHIM_READS");
    /* Headers can still be read: they lie in the first pages. */
    if (at >= 16384 && unreadable(fd, "read") && atomic_fetch_add(&reads, 1) >= (pass ? atol(pass) : 0)) {
        errno = EIO;
        return -1;
    }
    return NEXT(pread64)(fd, bytes, count, at);
}

void *mmap64(void *where, size_t length, int protection, int flags, int fd, off64_t at)
{
    if (fd >= 0 && at >= 16384 && unreadable(fd, "map")) {
        /* Pages beyond the end of a file raise the signal that a disk's read error raises. */
        int nothing = memfd_create("nothing", 0);
        return NEXT(mmap64)(where, length, protection, flags, nothing, 0);
    }
    return NEXT(mmap64)(where, length, protection, flags, fd, at);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = NEXT(clock_gettime)(clock, now);
    if (clock == CLOCK_REALTIME && getenv("SHIM_CLOCK"))
        now->tv_sec += atol(getenv("SHIM_CLOCK"));
    return result;
}

int MPI_Get_library_version(char *text, int *length)
{
    const char *name = getenv("SHIM_MPI");
    if (!name)
        return NEXT(MPI_Get_library_version)(text, length);
    strcpy(text, name);
    *length = strlen(name);
    return 0;
}
