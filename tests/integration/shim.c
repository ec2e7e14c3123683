/* Between distq and its C library: makes system calls fail as broken machines make them fail. Loaded with LD_PRELOAD;
 * environment variables say what breaks, a test sets them for one rank.
 *
 *     SHIM_FILE    what a path must contain for its file to be broken
 *     SHIM_WRITE   bytes after which writing to it finds the disk full
 *     SHIM_KILL    bytes after which writing to it kills the process
 *     SHIM_READ    reading it: `read` fails with EIO, `map` gives pages that can't be read
 *     SHIM_READS   calls that `read` lets pass first
 *     SHIM_SLOW    seconds that a write of 16 KiB or more to it takes
 *     SHIM_RENAME  renaming it finds the quota exceeded
 *     SHIM_SYNC    what was written to it does not reach the disk
 *     SHIM_OPEN    opening it for writing finds too many files open
 *     SHIM_SPACE   no file system says how much room it has
 *     SHIM_CLOCK   seconds by which the wall clock is off
 *     SHIM_MPI     what the MPI library says it is
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
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
    if (count >= 16384 && broken(fd, "SHIM_SLOW"))
        sleep(atoi(getenv("SHIM_SLOW")));
    return full(fd, count) ? -1 : NEXT(pwrite64)(fd, bytes, count, at);
}

static int named(const char *path, const char *how)
{
    const char *wanted = getenv("SHIM_FILE");
    return wanted && getenv(how) && strstr(path, wanted) != NULL;
}

int rename(const char *from, const char *to)
{
    if (named(from, "SHIM_RENAME")) {
        errno = EDQUOT;
        return -1;
    }
    return NEXT(rename)(from, to);
}

int fsync(int fd)
{
    if (broken(fd, "SHIM_SYNC")) {
        errno = EIO;
        return -1;
    }
    return NEXT(fsync)(fd);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if ((flags & O_ACCMODE) != O_RDONLY && named(path, "SHIM_OPEN")) {
        errno = EMFILE;
        return -1;
    }
    return NEXT(open64)(path, flags, mode);
}

int fstatvfs64(int fd, struct statvfs64 *found)
{
    int result = NEXT(fstatvfs64)(fd, found);
    if (getenv("SHIM_SPACE"))
        found->f_blocks = found->f_bfree = found->f_bavail = 0;
    return result;
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
