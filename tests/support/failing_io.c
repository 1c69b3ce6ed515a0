/* Lets one call that changes files below a folder fail: the n-th write, pwrite, fsync, fdatasync, rename or open for writing.

   Loaded with LD_PRELOAD. fault_arm(folder, n, code) arms it, fault_count() tells how many calls there were since. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char watched[4096];
static atomic_long count, failing;
static int code;

void fault_arm(const char *folder, long at, int with) {
    strncpy(watched, folder, sizeof watched - 1);
    code = with;
    count = 0;
    failing = at;
}

long fault_count(void) { return count; }

static int fails(void) {
    if (atomic_fetch_add(&count, 1) + 1 != failing) return 0;
    errno = code;
    return 1;
}

static int is_below(const char *path) { return watched[0] && path && !strncmp(path, watched, strlen(watched)); }

static int is_watched(int file) {
    char link[64], path[4096];
    if (!watched[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *from, size_t size) {
    return is_watched(file) && fails() ? -1 : NEXT(write)(file, from, size);
}
ssize_t writev(int file, const struct iovec *from, int parts) {
    return is_watched(file) && fails() ? -1 : NEXT(writev)(file, from, parts);
}
ssize_t pwrite(int file, const void *from, size_t size, off_t at) {
    return is_watched(file) && fails() ? -1 : NEXT(pwrite)(file, from, size, at);
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
    return is_watched(file) && fails() ? -1 : NEXT(pwrite64)(file, from, size, at);
}
int fsync(int file) { return is_watched(file) && fails() ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return is_watched(file) && fails() ? -1 : NEXT(fdatasync)(file); }
int rename(const char *from, const char *to) { return is_below(to) && fails() ? -1 : NEXT(rename)(from, to); }

#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...) {                      \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = va_arg(rest, mode_t);                           \
        va_end(rest);                                                 \
        if ((flags & O_ACCMODE) != O_RDONLY && is_below(path) && fails()) return -1; \
        return NEXT(name)(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)
