/* Preloaded into a process, makes the disk fail under the files whose path begins with FAULTS_PATH.

   What fails when is read from a page that the test shares (FAULTS_CONTROL), so that it can change
   while the process runs. Every other file, socket and call is left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static struct {
    int64_t syncs;      /* calls of fsync and fdatasync so far */
    int64_t fail_syncs; /* how many more of them fail */
    int64_t error;      /* errno of those */
    int64_t hold;       /* the next one waits until the test lets it go */
    int64_t room;       /* bytes by which files may still grow; below 0 nothing can be written at all */
} *control;
static const char *prefix;
static char reached[PATH_MAX], go[PATH_MAX];

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("FAULTS_CONTROL");
    prefix = getenv("FAULTS_PATH");
    int fd = path && prefix ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED) abort();
    snprintf(reached, sizeof reached, "%s.reached", path);
    snprintf(go, sizeof go, "%s.go", path);
    control = page;
}

/* Returns the size of a file that is ours, or -1. */
static int64_t size_of(int fd) {
    struct stat found;
    char link[64], path[PATH_MAX];
    if (!control || fstat(fd, &found) || !S_ISREG(found.st_mode)) return -1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return -1;
    path[length] = 0;
    return strncmp(path, prefix, strlen(prefix)) ? -1 : (int64_t)found.st_size;
}

static int sync_fails(int fd) {
    if (size_of(fd) < 0) return 0;
    __atomic_add_fetch(&control->syncs, 1, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(&control->hold, 0, __ATOMIC_SEQ_CST)) {
        close(open(reached, O_WRONLY)); /* each open waits for the test's */
        close(open(go, O_RDONLY));
    }
    if (__atomic_fetch_sub(&control->fail_syncs, 1, __ATOMIC_SEQ_CST) > 0) {
        errno = (int)control->error;
        return 1;
    }
    __atomic_store_n(&control->fail_syncs, 0, __ATOMIC_SEQ_CST);
    return 0;
}

static int no_room(int fd, int64_t end) {
    int64_t size = size_of(fd);
    if (size < 0) return 0;
    int64_t growth = end - size;
    if (control->room < 0 || (growth > 0 && growth > control->room)) {
        errno = ENOSPC;
        return 1;
    }
    control->room -= growth; /* what is cut off is free again */
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int fd) { return sync_fails(fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return sync_fails(fd) ? -1 : REAL(fdatasync)(fd); }

static int64_t written_to(int64_t size, int64_t end) { return end > size ? end : size; }

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    int64_t size = size_of(fd);
    if (size >= 0 && no_room(fd, written_to(size, (int64_t)at + (int64_t)count))) return -1;
    return REAL(pwrite)(fd, data, count, at);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    int64_t size = size_of(fd);
    if (size >= 0 && no_room(fd, written_to(size, (int64_t)at + (int64_t)count))) return -1;
    return REAL(pwrite64)(fd, data, count, at);
}
ssize_t write(int fd, const void *data, size_t count) {
    int64_t size = size_of(fd);
    if (size >= 0 && no_room(fd, written_to(size, (int64_t)lseek(fd, 0, SEEK_CUR) + (int64_t)count))) return -1;
    return REAL(write)(fd, data, count);
}
int ftruncate(int fd, off_t length) { return no_room(fd, length) ? -1 : REAL(ftruncate)(fd, length); }
int ftruncate64(int fd, off64_t length) { return no_room(fd, length) ? -1 : REAL(ftruncate64)(fd, length); }
