// SPDX-License-Identifier: GPL-2.0
/*
 * agent: the only program, process 1, of the guest that `make e2e` starts.
 *
 * It does what it is told over the first virtio-serial port.  A command is one
 * line, and so is its answer, "ok" and results or "error" and a reason:
 *
 *	mem			MemTotal and MemFree, in kB
 *	fill SLOT MIB SEED	map MIB MiB, or take the SLOT that there is, and fill
 *				it with a pattern made of SEED; its checksum
 *	sum SLOT		the checksum, computed anew
 *	where SLOT ADDRESS	how many pages of the buffer are at this guest
 *				physical address (hex) or above, and how many it has
 *	drop SLOT		unmap the buffer
 *	write SLOT DISK		write the buffer to the start of DISK, around the page
 *				cache: the device reads from the buffer's own pages
 *	read SLOT DISK		the reverse; the checksum of what was read
 *	cat FILE		the size in bytes, then the contents after the line
 *
 * Slots are numbers from 0.  The kernel panics when process 1 ends, which the
 * other side cannot miss: whatever is impossible ends it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define PORT		"/dev/vport0p1"
#define NR_SLOTS	4
#define PAGE		4096
#define MIB		(1UL << 20)
#define PFN_MASK	((1UL << 55) - 1)
#define PRESENT		(1UL << 63)

struct buffer {
	unsigned long *words;
	size_t bytes;
};

static struct buffer slots[NR_SLOTS];
static FILE *answers;

static void die(const char *what)
{
	fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
	exit(1);
}

__attribute__((format(printf, 1, 2)))
static void ok(const char *format, ...)
{
	va_list args;

	fputs("ok ", answers);
	va_start(args, format);
	vfprintf(answers, format, args);
	va_end(args);
	fputc('\n', answers);
}

static void error(const char *what)
{
	fprintf(answers, "error %s: %s\n", what, strerror(errno));
}

/* The position is part of each word: two pages exchanged are noticed. */
static void fill(struct buffer *b, unsigned long seed)
{
	size_t i;

	for (i = 0; i < b->bytes / sizeof(*b->words); i++)
		b->words[i] = (i ^ seed) * 0x9e3779b97f4a7c15;
}

static unsigned long checksum(const struct buffer *b)
{
	unsigned long sum = 0;
	size_t i;

	for (i = 0; i < b->bytes / sizeof(*b->words); i++)
		sum = (sum ^ b->words[i]) * 0x100000001b3 + (sum >> 47);
	return sum;
}

static struct buffer *slot(const char *args)
{
	unsigned long n = strtoul(args, NULL, 10);

	errno = EINVAL;
	return n < NR_SLOTS ? &slots[n] : NULL;
}

static struct buffer *mapped_slot(const char *args)
{
	struct buffer *b = slot(args);

	return b && b->words ? b : NULL;
}

static void do_mem(void)
{
	unsigned long total, free;
	FILE *f = fopen("/proc/meminfo", "r");

	if (!f || fscanf(f, "MemTotal: %lu kB MemFree: %lu kB", &total, &free) != 2)
		die("/proc/meminfo");
	fclose(f);
	ok("%lu %lu", total, free);
}

static void do_fill(const char *args)
{
	struct buffer *b = slot(args);
	unsigned long mib, seed;

	if (!b || sscanf(args, "%*u %lu %lu", &mib, &seed) != 2)
		return error("fill SLOT MIB SEED");
	if (!b->words) {
		b->bytes = mib * MIB;
		b->words = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (b->words == MAP_FAILED) {
			b->words = NULL;
			return error("mmap");
		}
	}
	fill(b, seed);
	ok("%lx", checksum(b));
}

static void do_sum(const char *args)
{
	struct buffer *b = mapped_slot(args);

	if (!b)
		return error("no such buffer");
	ok("%lx", checksum(b));
}

static void do_drop(const char *args)
{
	struct buffer *b = mapped_slot(args);

	if (!b)
		return error("no such buffer");
	if (munmap(b->words, b->bytes))
		die("munmap");
	b->words = NULL;
	ok("dropped");
}

static void do_where(const char *args)
{
	struct buffer *b = mapped_slot(args);
	size_t page, pages, above = 0;
	unsigned long address, entry;
	int fd;

	if (!b || sscanf(args, "%*u %lx", &address) != 1)
		return error("where SLOT ADDRESS");
	fd = open("/proc/self/pagemap", O_RDONLY);
	if (fd < 0)
		die("pagemap");
	pages = b->bytes / PAGE;
	for (page = 0; page < pages; page++) {
		if (pread(fd, &entry, sizeof(entry), ((unsigned long)b->words / PAGE + page) *
			  sizeof(entry)) != sizeof(entry))
			die("pagemap");
		if ((entry & PRESENT) && (entry & PFN_MASK) * PAGE >= address)
			above++;
	}
	close(fd);
	ok("%zu %zu", above, pages);
}

static bool transfer(int fd, struct buffer *b, bool out)
{
	char *at = (char *)b->words;
	size_t done;
	ssize_t n;

	for (done = 0; done < b->bytes; done += MIB) {
		n = out ? pwrite(fd, at + done, MIB, done) : pread(fd, at + done, MIB, done);
		if (n != MIB)
			return false;
	}
	return !out || !fsync(fd);
}

static void do_disk(const char *args, bool out)
{
	struct buffer *b = mapped_slot(args);
	char disk[64];
	bool done;
	int fd;

	if (!b || sscanf(args, "%*u %63s", disk) != 1)
		return error("SLOT DISK");
	fd = open(disk, O_RDWR | O_DIRECT);
	if (fd < 0)
		return error(disk);
	errno = 0;
	done = transfer(fd, b, out);
	close(fd);
	if (!done)
		return error(out ? "write" : "read");
	ok("%lx", checksum(b));
}

static void do_cat(const char *args)
{
	static char text[1 << 18];
	char path[128];
	size_t n;
	FILE *f;

	if (sscanf(args, "%127s", path) != 1)
		return error("cat FILE");
	f = fopen(path, "r");
	if (!f)
		return error(path);
	n = fread(text, 1, sizeof(text), f);
	fclose(f);
	ok("%zu", n);
	fwrite(text, 1, n, answers);
}

static void obey(const char *line)
{
	char verb[16];
	int end;

	if (sscanf(line, "%15s%n", verb, &end) != 1)
		return;
	line += end;
	if (!strcmp(verb, "mem"))
		do_mem();
	else if (!strcmp(verb, "fill"))
		do_fill(line);
	else if (!strcmp(verb, "sum"))
		do_sum(line);
	else if (!strcmp(verb, "where"))
		do_where(line);
	else if (!strcmp(verb, "drop"))
		do_drop(line);
	else if (!strcmp(verb, "write"))
		do_disk(line, true);
	else if (!strcmp(verb, "read"))
		do_disk(line, false);
	else if (!strcmp(verb, "cat"))
		do_cat(line);
	else
		fprintf(answers, "error no command %s\n", verb);
	fflush(answers);
}

/* The port appears when the device has told of it, some time after boot. */
static int open_port(void)
{
	int fd, tries;

	for (tries = 0; tries < 3000; tries++) {
		fd = open(PORT, O_RDWR);
		if (fd >= 0)
			return fd;
		usleep(10000);
	}
	die(PORT);
	return -1;
}

static void mount_all(void)
{
	/* The kernel makes /dev, and not /proc. */
	if (mkdir("/proc", 0755) || mount("proc", "/proc", "proc", 0, NULL))
		die("/proc");
	if (mount("dev", "/dev", "devtmpfs", 0, NULL))
		die("/dev");
}

int main(void)
{
	char line[256];
	size_t used = 0;
	ssize_t n;
	int port;

	mount_all();
	port = open_port();
	answers = fdopen(dup(port), "w");
	if (!answers)
		die("fdopen");
	/* The port reads as ended while nobody is connected at its other side. */
	while ((n = read(port, line + used, 1)) >= 0 || errno == EINTR) {
		if (n <= 0) {
			usleep(10000);
		} else if (line[used] == '\n') {
			line[used] = '\0';
			obey(line);
			used = 0;
		} else if (++used == sizeof(line)) {
			errno = E2BIG;
			die("a command");
		}
	}
	die("read");
}
