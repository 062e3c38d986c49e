// SPDX-License-Identifier: GPL-2.0
/*
 * PMD and PUD tables that become empty while their VMA lives on.
 *
 * A region of two GiB, with its own PUD table, is populated here and there and
 * discarded in some way; VmPTE of each process that maps it must fall to what it was
 * before the first touch: at once, where the tables are asked for (MADV_TRIM_TABLES), or
 * in the next pass of the background.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "pt_util.h"

#define PAGE		4096ul
#define TABLE_SIZE	(512 * PAGE)
#define GIB		(512 * TABLE_SIZE)
#define SIZE		(2 * GIB)
#define STEP		(64 * TABLE_SIZE)	/* one page in each is touched */
#define PIECE		(16 * TABLE_SIZE)	/* of a discard that no upper table goes by */
#define TABLE_KB	4
/* Of a populated region: PTE tables, two PMD tables, a PUD table. */
#define UPPER_KB	(TABLE_KB * 3)
#define POPULATED_KB(kind)	((is_hugetlb(kind) ? 0 : TABLE_KB * (long)(SIZE / STEP)) + UPPER_KB)
#define TRACING		"/sys/kernel/tracing/"

enum kind { ANON, SHMEM, HUGE, FILE_PRIVATE, HUGETLB, HUGETLB_PRIVATE };

struct region {
	char *mem;
	int fd;
	enum kind kind;
	long base_kb;			/* VmPTE before the first touch */
};

FIXTURE(upper) {
	struct region r;
};

FIXTURE_VARIANT(upper) {
	enum kind kind;
};

FIXTURE_VARIANT_ADD(upper, anon) {
	.kind = ANON,
};

FIXTURE_VARIANT_ADD(upper, shmem) {
	.kind = SHMEM,
};

FIXTURE_VARIANT_ADD(upper, huge) {
	.kind = HUGE,
};

FIXTURE_VARIANT_ADD(upper, file) {
	.kind = FILE_PRIVATE,
};

FIXTURE_VARIANT_ADD(upper, hugetlb) {
	.kind = HUGETLB,
};

FIXTURE_VARIANT_ADD(upper, hugetlb_private) {
	.kind = HUGETLB_PRIVATE,
};

static bool is_hugetlb(enum kind kind)
{
	return kind == HUGETLB || kind == HUGETLB_PRIVATE;
}

static bool is_shared(enum kind kind)
{
	return kind == SHMEM || kind == HUGETLB;
}

static int file_of(enum kind kind)
{
	char name[] = "/tmp/pt_upper.XXXXXX";
	int fd;

	if (kind == SHMEM || is_hugetlb(kind)) {
		fd = memfd_create("pt_upper", is_hugetlb(kind) ? MFD_HUGETLB : 0);
	} else {
		fd = mkstemp(name);
		unlink(name);
	}
	if (fd >= 0 && ftruncate(fd, SIZE)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* At an address of its own: 512 GiB that nobody else has a part of. */
static char *map_region(enum kind kind, int fd)
{
	int flags = MAP_FIXED_NOREPLACE | MAP_NORESERVE;
	char *mem;

	flags |= is_shared(kind) ? MAP_SHARED : MAP_PRIVATE;
	if (fd < 0)
		flags |= MAP_ANONYMOUS;
	mem = mmap((char *)(16 * 512 * GIB), SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (mem != MAP_FAILED && !is_hugetlb(kind))
		madvise(mem, SIZE, kind == HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return mem;
}

static void restore_controls(void)
{
	pt_write_file(PT_CONTROL "upper", "1");
	pt_write_file(PT_CONTROL "background", "1");
	pt_write_file(PT_CONTROL "period_ms", "10000");
}

/* Is a page of the region a huge one? */
static bool has_huge_pages(void)
{
	char *mem = map_region(HUGE, -1);
	char buf[8192];
	bool has;

	if (mem == MAP_FAILED)
		return false;
	pt_store(mem, 1);
	has = pt_read_file("/proc/self/smaps_rollup", buf, sizeof(buf)) > 0 &&
	      pt_field(buf, "AnonHugePages") > 0;
	munmap(mem, SIZE);
	return has;
}

static bool use_background(void)
{
	return pt_write_file(PT_CONTROL "period_ms", "1000") &&
	       pt_write_file(PT_CONTROL "background", "1");
}

FIXTURE_SETUP(upper)
{
	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	if (pt_vmstat("pt_reclaim_pte") >= 0 && pt_vmstat("pt_reclaim_pmd") < 0)
		SKIP(return, "CONFIG_PT_RECLAIM_UPPER is not set");
	pt_settle();
	self->r.kind = variant->kind;
	self->r.fd = -1;
	if (self->r.kind == HUGE && !has_huge_pages())
		SKIP(return, "no huge pages to be had");
	if (is_hugetlb(self->r.kind) && pt_hugetlb_free() < 2 * SIZE / STEP)
		SKIP(return, "too few huge pages of hugetlb");
	if (self->r.kind != ANON && self->r.kind != HUGE) {
		self->r.fd = file_of(self->r.kind);
		ASSERT_GE(self->r.fd, 0);
	}
	self->r.mem = map_region(self->r.kind, self->r.fd);
	ASSERT_NE(MAP_FAILED, self->r.mem);
	self->r.base_kb = pt_vmpte_kb(0);
	ASSERT_GT(self->r.base_kb, 0);
	/* A pass at the wrong moment would hold a lock that is only tried. */
	pt_write_file(PT_CONTROL "background", "0");
}

FIXTURE_TEARDOWN(upper)
{
	restore_controls();
	munmap(self->r.mem, SIZE);
	if (self->r.fd >= 0)
		close(self->r.fd);
}

static char pattern(size_t at)
{
	return at / STEP % 126 + 1;
}

static void populate(char *mem)
{
	for (size_t at = 0; at < SIZE; at += STEP)
		pt_store(mem + at + PAGE, pattern(at));
}

static bool intact(char *mem, size_t start, size_t end)
{
	for (size_t at = start; at < end; at += STEP) {
		if (pt_load(mem + at + PAGE) != pattern(at))
			return false;
	}
	return true;
}

static bool discard(char *mem, size_t start, size_t end, size_t piece)
{
	for (; start < end; start += piece) {
		if (madvise(mem + start, piece, MADV_DONTNEED))
			return false;
	}
	return true;
}

static bool punch(int fd, size_t start, size_t end, size_t piece)
{
	for (; start < end; start += piece) {
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, piece))
			return false;
	}
	return true;
}

static long tables_kb(const struct region *r)
{
	return pt_vmpte_kb(0) - r->base_kb;
}

struct awaited {
	pid_t pid;
	long kb;
};

static bool has_so_many(void *arg)
{
	struct awaited *a = arg;

	return pt_vmpte_kb(a->pid) == a->kb;
}

/*
 * Without being asked: a second is the shortest period of the background, the time is
 * for the slowest machine.
 */
static bool falls_to(const struct region *r, long more)
{
	struct awaited upper = { 0, r->base_kb + more };

	return pt_wait_until(has_so_many, &upper, 20);
}

struct trimmed {
	char *mem;
	long kb;
};

static bool is_trimmed(void *arg)
{
	struct trimmed *t = arg;

	madvise(t->mem, SIZE, MADV_TRIM_TABLES);
	return pt_vmpte_kb(0) == t->kb;
}

/*
 * Asked for once; but khugepaged looks at memory that may have huge pages, and holds a lock
 * then that the freeing of upper tables only tries.
 */
static bool trims_to(const struct region *r, long more)
{
	struct trimmed upper = { r->mem, r->base_kb + more };

	return pt_wait_until(is_trimmed, &upper, r->kind == HUGE ? 20 : 0);
}

/* Huge pages hold one table each in deposit. */
static bool populates_to(const struct region *r, long more)
{
	populate(r->mem);
	return tables_kb(r) == more;
}

TEST_F_TIMEOUT(upper, one_call, 120)
{
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

/* Each GiB by itself; the PUD table goes with the last. */
TEST_F_TIMEOUT(upper, call_for_each_gib, 120)
{
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, GIB, GIB));
	/* Half of all, but for the PUD table. */
	EXPECT_TRUE(trims_to(&self->r, (POPULATED_KB(self->r.kind) + TABLE_KB) / 2))
		TH_LOG("%ld kB left", tables_kb(&self->r));
	EXPECT_TRUE(intact(self->r.mem, GIB, SIZE));
	ASSERT_TRUE(discard(self->r.mem, GIB, SIZE, GIB));
	EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

/* Without being asked. */
TEST_F_TIMEOUT(upper, background, 120)
{
	if (!use_background())
		SKIP(return, PT_CONTROL "background: %s", strerror(errno));
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, PIECE));
	EXPECT_TRUE(falls_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

/* What is in use stays, at each level, and what it says. */
TEST_F_TIMEOUT(upper, last_page, 120)
{
	const long last_kb = is_hugetlb(self->r.kind) ? 2 * TABLE_KB : 3 * TABLE_KB;

	if (!use_background())
		SKIP(return, PT_CONTROL "background: %s", strerror(errno));
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE - STEP, PIECE));
	EXPECT_TRUE(falls_to(&self->r, last_kb)) TH_LOG("%ld kB left", tables_kb(&self->r));
	EXPECT_TRUE(intact(self->r.mem, SIZE - STEP, SIZE));
	ASSERT_TRUE(discard(self->r.mem, SIZE - STEP, SIZE, PIECE));
	EXPECT_TRUE(falls_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

TEST_F_TIMEOUT(upper, refill, 120)
{
	for (int i = 0; i < 8; i++) {
		ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
		EXPECT_TRUE(intact(self->r.mem, 0, SIZE));
		ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
		EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
	}
}

TEST_F_TIMEOUT(upper, trim, 120)
{
	if (self->r.kind == HUGE)
		SKIP(return, "khugepaged may hold the lock now");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, PIECE));
	EXPECT_EQ(UPPER_KB, tables_kb(&self->r));
	/* Of a part, the table that it has a part in. */
	ASSERT_EQ(0, madvise(self->r.mem + GIB, PAGE, MADV_TRIM_TABLES));
	EXPECT_EQ(2 * TABLE_KB, tables_kb(&self->r));
	ASSERT_EQ(0, madvise(self->r.mem, SIZE, MADV_TRIM_TABLES));
	EXPECT_EQ(0, tables_kb(&self->r));
}

TEST_F_TIMEOUT(upper, trim_by_process_madvise, 120)
{
	struct iovec parts[] = { { self->r.mem, GIB / 2 }, { self->r.mem + GIB, GIB / 2 } };
	int pidfd = syscall(SYS_pidfd_open, getpid(), 0);

	ASSERT_GE(pidfd, 0);
	if (self->r.kind == HUGE)
		SKIP(return, "khugepaged may hold the lock now");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, PIECE));
	ASSERT_EQ((ssize_t)GIB,
		  syscall(SYS_process_madvise, pidfd, parts, 2, MADV_TRIM_TABLES, 0));
	EXPECT_EQ(0, tables_kb(&self->r));
	close(pidfd);
}

/* Tables that another mapping has a part in stay, and go when it has not. */
TEST_F_TIMEOUT(upper, another_mapping, 120)
{
	const size_t size = TABLE_SIZE;

	if (self->r.kind != ANON)
		SKIP(return, "of anonymous memory only");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	/* It has no page: the table is empty all the same. */
	ASSERT_EQ(self->r.mem + GIB, mmap(self->r.mem + GIB, size, PROT_NONE, MAP_PRIVATE |
		  MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	EXPECT_TRUE(trims_to(&self->r, 2 * TABLE_KB)) TH_LOG("%ld kB left", tables_kb(&self->r));
	ASSERT_EQ(0, munmap(self->r.mem + GIB, size));
	/* Two mappings now; the second reaches to the end. */
	EXPECT_TRUE(trims_to(&self->r, TABLE_KB)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

enum wish { LOOK, DISCARD };

/* Waits for wishes on @in; the memory is @mem, or what it maps of the file. */
static void child(char *mem, int fd, int in, int out)
{
	char told;

	if (fd >= 0) {
		munmap(mem, SIZE);
		pt_settle();
		mem = map_region(SHMEM, fd);
		if (mem == MAP_FAILED)
			_exit(2);
	}
	while (write(out, "", 1) == 1 && read(in, &told, 1) == 1) {
		if (told == LOOK && !intact(mem, 0, SIZE))
			_exit(3);
		if (told == DISCARD && !discard(mem, 0, SIZE, PIECE))
			_exit(4);
	}
	_exit(0);
}

struct peer {
	pid_t pid;
	int to, from;
};

static bool start_peer(struct peer *peer, char *mem, int fd)
{
	int down[2], up[2];
	char ready;

	if (pipe(down) || pipe(up))
		return false;
	peer->pid = fork();
	if (!peer->pid) {
		close(down[1]);
		close(up[0]);
		child(mem, fd, down[0], up[1]);
	}
	close(down[0]);
	close(up[1]);
	peer->to = down[1];
	peer->from = up[0];
	return peer->pid > 0 && read(peer->from, &ready, 1) == 1;
}

static bool peer_does(struct peer *peer, enum wish wish)
{
	char told = wish, done;

	return write(peer->to, &told, 1) == 1 && read(peer->from, &done, 1) == 1;
}

static int stop_peer(struct peer *peer)
{
	int status = -1;

	close(peer->to);
	close(peer->from);
	waitpid(peer->pid, &status, 0);
	return status;
}

/* A hole that one process punches: the tables of all go. */
TEST_F_TIMEOUT(upper, hole_in_two_processes, 120)
{
	struct peer peer;
	long peer_kb;

	/* Processes that map all of a GiB of hugetlb have one table for it, and keep it. */
	if (self->r.kind != SHMEM)
		SKIP(return, "of shared memory only");
	if (!use_background())
		SKIP(return, PT_CONTROL "background: %s", strerror(errno));
	ASSERT_TRUE(start_peer(&peer, self->r.mem, self->r.fd));
	peer_kb = pt_vmpte_kb(peer.pid);
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(peer_does(&peer, LOOK));
	ASSERT_EQ(peer_kb + POPULATED_KB(self->r.kind), pt_vmpte_kb(peer.pid));
	ASSERT_TRUE(punch(self->r.fd, 0, SIZE, PIECE));
	EXPECT_TRUE(falls_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
	EXPECT_TRUE(pt_wait_until(has_so_many, &(struct awaited){ peer.pid, peer_kb }, 20))
		TH_LOG("%ld kB left in the other", pt_vmpte_kb(peer.pid) - peer_kb);
	EXPECT_EQ(0, stop_peer(&peer));
}

/* What the parent discards is the child's still. */
TEST_F_TIMEOUT(upper, child_keeps_its_own, 120)
{
	struct peer peer;

	/* Nor has hugetlb a page for each copy that a child would make. */
	if (is_shared(self->r.kind) || is_hugetlb(self->r.kind))
		SKIP(return, "of private memory only");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(start_peer(&peer, self->r.mem, -1));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
	EXPECT_TRUE(peer_does(&peer, LOOK));
	EXPECT_EQ(0, stop_peer(&peer));
}

/* A manager trims another process: its tables go, and nobody else's. */
TEST_F_TIMEOUT(upper, trim_of_another_process, 120)
{
	struct iovec part = { self->r.mem, GIB };
	struct peer peer;
	long kb;
	int pidfd;

	if (self->r.kind != ANON)
		SKIP(return, "of anonymous memory only");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(start_peer(&peer, self->r.mem, -1));
	pidfd = syscall(SYS_pidfd_open, peer.pid, 0);
	ASSERT_GE(pidfd, 0);
	kb = pt_vmpte_kb(peer.pid);
	ASSERT_TRUE(peer_does(&peer, DISCARD));
	EXPECT_EQ(kb - POPULATED_KB(ANON) + UPPER_KB, pt_vmpte_kb(peer.pid));
	ASSERT_EQ((ssize_t)GIB, syscall(SYS_process_madvise, pidfd, &part, 1,
					MADV_TRIM_TABLES, 0));
	part.iov_base += GIB;
	ASSERT_EQ((ssize_t)GIB, syscall(SYS_process_madvise, pidfd, &part, 1,
					MADV_TRIM_TABLES, 0));
	EXPECT_EQ(kb - POPULATED_KB(ANON), pt_vmpte_kb(peer.pid));
	EXPECT_EQ(POPULATED_KB(ANON), tables_kb(&self->r));
	EXPECT_TRUE(intact(self->r.mem, 0, SIZE));
	EXPECT_EQ(0, stop_peer(&peer));
	close(pidfd);
}

/* Marks that are made while it is off are not lost. */
TEST_F_TIMEOUT(upper, switched_off, 120)
{
	if (self->r.kind != ANON)
		SKIP(return, "of anonymous memory only");
	if (!use_background())
		SKIP(return, PT_CONTROL "background: %s", strerror(errno));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "upper", "0"));
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	ASSERT_EQ(0, madvise(self->r.mem, SIZE, MADV_TRIM_TABLES));
	/* Nothing to wait for but time: twice what a pass would take. */
	sleep(2);
	EXPECT_EQ(UPPER_KB, tables_kb(&self->r));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "upper", "maybe"));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "upper", "1"));
	EXPECT_TRUE(falls_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
}

TEST_F_TIMEOUT(upper, counters, 120)
{
	long pmd = pt_vmstat("pt_reclaim_pmd"), pud = pt_vmstat("pt_reclaim_pud");

	ASSERT_GE(pmd, 0) TH_LOG("this kernel does not tell");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
	EXPECT_LE(pmd + 2, pt_vmstat("pt_reclaim_pmd"));
	EXPECT_LE(pud + 1, pt_vmstat("pt_reclaim_pud"));
}

TEST_F_TIMEOUT(upper, tracepoint, 120)
{
	static const char * const levels[] = { "pmd", "pud" };
	const unsigned long start = (unsigned long)self->r.mem;
	char where[128], *trace;

	if (access(TRACING "trace", W_OK))
		SKIP(return, "no tracefs, or not root");
	ASSERT_TRUE(populates_to(&self->r, POPULATED_KB(self->r.kind)));
	ASSERT_TRUE(pt_write_file(TRACING "events/pt_reclaim/pt_reclaim_free/enable", "1"));
	pt_write_file(TRACING "trace", "");
	ASSERT_TRUE(discard(self->r.mem, 0, SIZE, SIZE));
	EXPECT_TRUE(trims_to(&self->r, 0)) TH_LOG("%ld kB left", tables_kb(&self->r));
	pt_write_file(TRACING "events/pt_reclaim/pt_reclaim_free/enable", "0");
	trace = malloc(1 << 20);
	ASSERT_NE(NULL, trace);
	ASSERT_GT(pt_read_file(TRACING "trace", trace, 1 << 20), 0);
	for (int i = 0; i < 2; i++) {
		snprintf(where, sizeof(where), "start=0x%lx end=0x%lx level=%s source=advice",
			 start, start + (i ? 512 : 1) * GIB, levels[i]);
		EXPECT_NE(NULL, strstr(trace, where)) TH_LOG("no event with %s", where);
	}
	free(trace);
}

TEST_HARNESS_MAIN
