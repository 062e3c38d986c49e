/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the page table reclaim tests and the plug/unplug workload share: how
 * much page tables cost, by the kernel's own account, and how to wait for it.
 *
 * Sources: VmPTE of /proc/PID/status (kB; all levels of one mm but the top
 * one; exact at once), /proc/vmstat (events since boot, system wide) and
 * nr_page_table_pages there (pages; drops only after an RCU grace period).
 */
#ifndef PT_UTIL_H
#define PT_UTIL_H

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* Bytes that one PTE table maps, and the entries it has: x86-64 with 4K pages. */
#define PT_PTE_ENTRIES		(PT_PAGE_SIZE / sizeof(unsigned long long))
#define PT_PMD_SIZE		(PT_PAGE_SIZE * PT_PTE_ENTRIES)
#define PT_PUD_SIZE		(PT_PMD_SIZE * PT_PTE_ENTRIES)
#define PT_PAGE_SIZE		((size_t)sysconf(_SC_PAGESIZE))

/**
 * pt_read_file - read a small file without allocating
 * @path: the file
 * @buf: where to put its text, NUL-terminated
 * @len: size of @buf in bytes; a longer file is cut
 *
 * No stdio: a buffer that malloc maps would itself change the figures.
 *
 * Return: bytes read, or -1 with errno set.
 */
static inline ssize_t pt_read_file(const char *path, char *buf, size_t len)
{
	size_t done = 0;
	ssize_t got = 0;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	while (done < len - 1) {
		got = read(fd, buf + done, len - 1 - done);
		if (got <= 0)
			break;
		done += got;
	}
	close(fd);
	buf[done] = '\0';
	return got < 0 ? -1 : (ssize_t)done;
}

/**
 * pt_field - find a number in "name value" or "name: value" lines
 * @text: the lines
 * @name: the whole name, without the colon
 *
 * Return: the value, or -1 when no line has that name.
 */
static inline long pt_field(const char *text, const char *name)
{
	size_t len = strlen(name);
	const char *line = text;

	while (line) {
		if (!strncmp(line, name, len) && strchr(": \t", line[len]))
			return strtol(line + len + strspn(line + len, ": \t"), NULL, 10);
		line = strchr(line, '\n');
		if (line)
			line++;
	}
	return -1;
}

/**
 * pt_vmpte_kb - page tables of one process, all levels but the top
 * @pid: the process; 0 is the caller
 *
 * Return: kB, or -1 when /proc has no such process.
 */
static inline long pt_vmpte_kb(pid_t pid)
{
	char path[64], buf[8192];

	if (pid)
		snprintf(path, sizeof(path), "/proc/%d/status", pid);
	else
		snprintf(path, sizeof(path), "/proc/self/status");
	if (pt_read_file(path, buf, sizeof(buf)) < 0)
		return -1;
	return pt_field(buf, "VmPTE");
}

/**
 * pt_vmstat - one line of /proc/vmstat
 * @name: e.g. "pt_reclaim_pte"
 *
 * Return: events or pages, or -1 when this kernel has no such line.
 */
static inline long pt_vmstat(const char *name)
{
	char buf[32768];

	if (pt_read_file("/proc/vmstat", buf, sizeof(buf)) < 0)
		return -1;
	return pt_field(buf, name);
}

/**
 * pt_now_ns - monotonic time
 *
 * Return: nanoseconds since boot.
 */
static inline unsigned long long pt_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

/**
 * pt_icount_shift - are costs counted in instructions here?
 *
 * Under QEMU with -icount shift=N one guest instruction is 2^N ns of virtual
 * time and the TSC counts virtual ns, so that instructions are TSC ticks >> N:
 * exact, and the same on every run but for timer interrupts.  Whoever starts
 * such a machine says so with PT_ICOUNT_SHIFT=N in the environment.
 *
 * Return: N, or -1 where costs are in ns of CLOCK_MONOTONIC.
 */
static inline int pt_icount_shift(void)
{
	static int shift = -2;
	const char *text;

	if (shift == -2) {
		text = getenv("PT_ICOUNT_SHIFT");
		shift = text ? atoi(text) : -1;
	}
	return shift;
}

/**
 * pt_ticks - the clock that costs are measured with
 *
 * Return: guest instructions or ns since some start, see pt_cost_unit().
 */
static inline unsigned long long pt_ticks(void)
{
#ifdef __x86_64__
	if (pt_icount_shift() >= 0)
		return __builtin_ia32_rdtsc() >> pt_icount_shift();
#endif
	return pt_now_ns();
}

/**
 * pt_cost_unit - what pt_ticks() counts
 *
 * Return: "insn" or "ns".
 */
static inline const char *pt_cost_unit(void)
{
	return pt_icount_shift() >= 0 ? "insn" : "ns";
}

/**
 * pt_write_file - write a text to a file of the kernel's
 * @path: the file, which must exist
 * @text: what to write, in one go
 *
 * Return: true when all of it was taken; errno tells otherwise.
 */
static inline bool pt_write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

/**
 * pt_pagemap - what /proc/self/pagemap has of an address
 * @where: the address
 *
 * Return: the entry, see Documentation/admin-guide/mm/pagemap.rst: bit 63 present,
 * 62 swapped, 57 write-protected by userfaultfd; 0 if it cannot be read.
 */
static inline unsigned long long pt_pagemap(const void *where)
{
	unsigned long long entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY);

	if (pread(fd, &entry, sizeof(entry), (unsigned long)where / getpagesize() *
		  sizeof(entry)) != sizeof(entry))
		entry = 0;
	if (fd >= 0)
		close(fd);
	return entry;
}

/**
 * pt_wait_until - poll a condition
 * @cond: returns true once the wait is over; must not allocate
 * @arg: handed to @cond
 * @seconds: give up after so long; chosen by the caller to be far above an
 *           RCU grace period on the slowest machine (emulated, debug kernel)
 *
 * Return: true when @cond held in time.
 */
static inline bool pt_wait_until(bool (*cond)(void *arg), void *arg, int seconds)
{
	unsigned long long deadline = pt_now_ns() + seconds * 1000000000ull;

	for (;;) {
		if (cond(arg))
			return true;
		if (pt_now_ns() > deadline)
			return false;
		usleep(2000);
	}
}

/**
 * pt_parse_size - a number of bytes, with K, M or G behind it or nothing
 * @text: e.g. "64G"
 *
 * Return: bytes, a multiple of a page and at most 64 TiB, or 0 for bad input.
 */
static inline size_t pt_parse_size(const char *text)
{
	unsigned long long value;
	int shift = 0;
	char *end;

	errno = 0;
	value = strtoull(text, &end, 10);
	if (*end == 'K')
		shift = 10;
	else if (*end == 'M')
		shift = 20;
	else if (*end == 'G')
		shift = 30;
	if (shift)
		end++;
	if (errno || *end || end == text || *text == '-' ||
	    value > (1ull << 46) >> shift || (value << shift) % PT_PAGE_SIZE)
		return 0;
	return value << shift;
}

/**
 * pt_plain_label - can a label stand in JSON and in a table as it is?
 * @text: the label
 *
 * Return: true for letters, digits and plain punctuation alone.
 */
static inline bool pt_plain_label(const char *text)
{
	for (; *text; text++) {
		if (!isalnum((unsigned char)*text) && !strchr(" .,:;+-_/()", *text))
			return false;
	}
	return true;
}

/* One access to memory that the compiler may neither drop nor join. */
#define pt_load(where)		__atomic_load_n(where, __ATOMIC_RELAXED)
#define pt_store(where, value)	__atomic_store_n(where, value, __ATOMIC_RELAXED)

/**
 * pt_hugetlb_free - huge pages that hugetlb has to give
 *
 * Return: pages of the default size.
 */
static inline size_t pt_hugetlb_free(void)
{
	char buf[8192];
	long nr = -1;

	if (pt_read_file("/proc/meminfo", buf, sizeof(buf)) > 0)
		nr = pt_field(buf, "HugePages_Free");
	return nr > 0 ? nr : 0;
}

/* The switches of page table reclaim, for root. */
#define PT_CONTROL	"/sys/kernel/mm/pt_reclaim/"

/* What older headers lack. */
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_TRIM_TABLES
#define MADV_TRIM_TABLES 26
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

/**
 * pt_grace_period - wait for an RCU grace period
 *
 * Discards of less than a table free the table of one place only once in a grace
 * period: who wants it to be freed again waits for the next.  With one CPU online,
 * membarrier() has nothing to wait for, and returns at once.
 */
static inline void pt_grace_period(void)
{
#ifdef __NR_membarrier
	/* MEMBARRIER_CMD_GLOBAL */
	if (!syscall(__NR_membarrier, 1, 0, 0))
		return;
#endif
	/* A multiple of any. */
	usleep(200000);
}

/**
 * pt_set_paced - have discards free tables as often as they are empty, or not
 * @paced: false: each time; for stress tests
 *
 * For root, with debugfs, and without an effect elsewhere.
 */
static inline void pt_set_paced(bool paced)
{
	pt_write_file("/sys/kernel/debug/pt_reclaim_paced", paced ? "Y" : "N");
}

/**
 * pt_settle - have the page tables of code, libraries and stack in place
 *
 * To be called before a first reading of VmPTE: a child of fork() has no tables
 * for its file mappings yet, and a library may reach into a second table that
 * only some later call faults in.  What cannot be populated is left alone.
 */
static inline void pt_settle(void)
{
	static char maps[65536];
	char stack[65536], *line = maps;
	unsigned long start, end;
	char readable;

	memset(stack, 1, sizeof(stack));
	__asm__ volatile("" : : "r"(stack) : "memory");
	if (pt_read_file("/proc/self/maps", maps, sizeof(maps)) < 0)
		return;
	while (line && *line) {
		if (sscanf(line, "%lx-%lx %c", &start, &end, &readable) == 3 && readable == 'r')
			madvise((void *)start, end - start, MADV_POPULATE_READ);
		line = strchr(line, '\n');
		if (line)
			line++;
	}
	pt_vmpte_kb(0);
}

#endif /* PT_UTIL_H */
