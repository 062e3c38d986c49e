// SPDX-License-Identifier: GPL-2.0
/*
 * Does a discard free the page tables that it empties, and only those?
 *
 * Every test places pages in PTE tables of its own and compares VmPTE with the
 * exact number of tables expected.  Tests named keep_* guard against freeing
 * too much and pass on every kernel; all others fail where only a discard that
 * covers the whole range of a table frees it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "pt_uffd.h"
#include "pt_util.h"

#define PAGE		4096ul
#define NR_ENTRIES	512
#define TABLE_SIZE	(NR_ENTRIES * PAGE)
#define NR_TABLES	8
#define TABLE_KB	4

enum kind { ANON, SHMEM, FILE_PRIVATE };

FIXTURE(pt_reclaim) {
	char *mem;		/* NR_TABLES tables, all their range one VMA */
	char *area;		/* 1 GiB around it: PMD table of its own */
	int fd;
	long base_kb;		/* VmPTE with no PTE table under mem */
};

FIXTURE_VARIANT(pt_reclaim) {
	enum kind kind;
};

FIXTURE_VARIANT_ADD(pt_reclaim, anon) {
	.kind = ANON,
};

FIXTURE_VARIANT_ADD(pt_reclaim, shmem) {
	.kind = SHMEM,
};

FIXTURE_VARIANT_ADD(pt_reclaim, file) {
	.kind = FILE_PRIVATE,
};

static void restore_controls(void)
{
	pt_write_file(PT_CONTROL "background", "1");
	pt_write_file(PT_CONTROL "zeropages", "0");
	pt_write_file(PT_CONTROL "period_ms", "10000");
}

static int file_of(enum kind kind, size_t size)
{
	char name[] = "/tmp/pt_reclaim.XXXXXX";
	int fd = -1;

	if (kind == SHMEM)
		fd = memfd_create("pt_reclaim", 0);
	if (kind == FILE_PRIVATE) {
		fd = mkstemp(name);
		if (fd >= 0)
			unlink(name);
	}
	if (fd >= 0 && ftruncate(fd, size)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static char *map(enum kind kind, int fd, char *where, size_t size)
{
	int flags = MAP_FIXED | MAP_NORESERVE;

	flags |= kind == SHMEM ? MAP_SHARED : MAP_PRIVATE;
	if (kind == ANON)
		flags |= MAP_ANONYMOUS;
	return mmap(where, size, PROT_READ | PROT_WRITE, flags, fd, 0);
}

/* Tables that hang below the area's PMD table now. */
#define tables(self)	((pt_vmpte_kb(0) - (self)->base_kb) / TABLE_KB)

FIXTURE_SETUP(pt_reclaim)
{
	size_t gib = 1ul << 30;
	char *raw;

	pt_settle();

	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	raw = mmap(NULL, 2 * gib, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		   -1, 0);
	ASSERT_NE(MAP_FAILED, raw);
	self->area = (char *)(((unsigned long)raw + gib - 1) & -gib);
	self->mem = self->area + TABLE_SIZE;
	self->fd = -1;
	if (variant->kind != ANON) {
		self->fd = file_of(variant->kind, NR_TABLES * TABLE_SIZE);
		ASSERT_GE(self->fd, 0);
	}
	ASSERT_EQ(self->mem, map(variant->kind, self->fd, self->mem, NR_TABLES * TABLE_SIZE));
	madvise(self->mem, NR_TABLES * TABLE_SIZE, MADV_NOHUGEPAGE);

	/* A page elsewhere in the GiB keeps the upper tables out of the figure. */
	ASSERT_EQ(self->area + gib / 2, map(ANON, -1, self->area + gib / 2, PAGE));
	self->area[gib / 2] = 1;
	self->base_kb = pt_vmpte_kb(0);
	ASSERT_GT(self->base_kb, 0);
}

FIXTURE_TEARDOWN(pt_reclaim)
{
	restore_controls();
	munmap(self->area, 1ul << 30);
	if (self->fd >= 0)
		close(self->fd);
}

static char *entry(char *mem, size_t table, size_t index)
{
	return mem + table * TABLE_SIZE + index * PAGE;
}

static void touch(char *mem, size_t table, size_t index)
{
	pt_store(entry(mem, table, index), (char)(index % 127 + 1));
}

static bool intact(char *mem, size_t table, size_t index)
{
	return pt_load(entry(mem, table, index)) == (char)(index % 127 + 1);
}

static int discard(char *mem, size_t table, size_t index, size_t nr)
{
	return madvise(entry(mem, table, index), nr * PAGE, MADV_DONTNEED);
}

TEST_F(pt_reclaim, two_halves)
{
	for (int i = 0; i < NR_ENTRIES; i += 64)
		touch(self->mem, 1, i);
	ASSERT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 1, 0, 256));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 1, 256, 256));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, page_by_page)
{
	for (int i = 0; i < NR_ENTRIES; i++)
		touch(self->mem, 2, i);
	for (int i = 0; i < NR_ENTRIES; i++) {
		ASSERT_EQ(1, tables(self));
		ASSERT_EQ(0, discard(self->mem, 2, (i * 37) % NR_ENTRIES, 1));
	}
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, unaligned_head_and_tail)
{
	for (int t = 0; t < 4; t++)
		touch(self->mem, t, 300);
	ASSERT_EQ(4, tables(self));
	/* From the middle of the first table to the middle of the last. */
	ASSERT_EQ(0, madvise(entry(self->mem, 0, 256), 3 * TABLE_SIZE,
			     MADV_DONTNEED));
	/* Entry 300 of the last table is beyond the end. */
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 3, 300));
	ASSERT_EQ(0, discard(self->mem, 3, 299, 3));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, part_that_was_never_populated)
{
	touch(self->mem, 1, 5);
	ASSERT_EQ(0, discard(self->mem, 1, 0, 16));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, first_and_last_entry)
{
	touch(self->mem, 0, 0);
	touch(self->mem, 1, NR_ENTRIES - 1);
	ASSERT_EQ(2, tables(self));
	ASSERT_EQ(0, discard(self->mem, 0, 0, 1));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 1, NR_ENTRIES - 1, 1));
	EXPECT_EQ(0, tables(self));
}

/* At every position: one page keeps the table, and its discard frees it. */
TEST_F(pt_reclaim, each_last_survivor)
{
	for (int i = 0; i < NR_ENTRIES; i++) {
		int other = (i + 200) % NR_ENTRIES;

		if (i % 16 == 0)
			pt_grace_period();
		touch(self->mem, 1, i);
		touch(self->mem, 1, other);
		ASSERT_EQ(0, discard(self->mem, 1, other, 1));
		ASSERT_EQ(1, tables(self)) TH_LOG("survivor %d", i);
		ASSERT_TRUE(intact(self->mem, 1, i)) TH_LOG("survivor %d", i);
		ASSERT_EQ(0, discard(self->mem, 1, i, 1));
		ASSERT_EQ(0, tables(self)) TH_LOG("survivor %d", i);
	}
}

TEST_F(pt_reclaim, keep_neighbours_of_the_range)
{
	touch(self->mem, 1, 99);
	touch(self->mem, 1, 100);
	ASSERT_EQ(0, discard(self->mem, 1, 100, 20));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 99));
	touch(self->mem, 1, 120);
	ASSERT_EQ(0, discard(self->mem, 1, 99, 21));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 120));
}

TEST_F(pt_reclaim, dontneed_locked)
{
	if (mlock(self->mem, 16 * PAGE))
		SKIP(return, "mlock: %s", strerror(errno));
	ASSERT_EQ(1, tables(self));
	ASSERT_EQ(-1, madvise(self->mem, PAGE, MADV_DONTNEED));
	/* Locking split the VMA; one piece again, so that it spans the table. */
	ASSERT_EQ(0, mlock(self->mem, NR_TABLES * TABLE_SIZE));
	ASSERT_EQ(NR_TABLES, tables(self));
	for (int i = 0; i < NR_ENTRIES; i += 128)
		ASSERT_EQ(0, madvise(entry(self->mem, 0, i), 128 * PAGE,
				     MADV_DONTNEED_LOCKED));
	EXPECT_EQ(NR_TABLES - 1, tables(self));
}

TEST_F(pt_reclaim, process_madvise)
{
	struct iovec parts[] = {
		{ entry(self->mem, 1, 0), 100 * PAGE },
		{ entry(self->mem, 1, 100), 412 * PAGE },
		{ entry(self->mem, 3, 7), PAGE },
	};
	int pidfd = syscall(SYS_pidfd_open, getpid(), 0);

	ASSERT_GE(pidfd, 0);
	touch(self->mem, 1, 50);
	touch(self->mem, 1, 150);
	touch(self->mem, 3, 7);
	ASSERT_EQ(2, tables(self));
	ASSERT_EQ((ssize_t)(513 * PAGE),
		  syscall(SYS_process_madvise, pidfd, parts, 3, MADV_DONTNEED, 0));
	EXPECT_EQ(0, tables(self));
	close(pidfd);
}

TEST_F(pt_reclaim, zeropage_is_an_entry)
{
	if (variant->kind == SHMEM)
		SKIP(return, "shared memory has no zeropage");
	/* A read fault: the zeropage, or a page of the file. */
	pt_load(entry(self->mem, 1, 9));
	touch(self->mem, 1, 400);
	ASSERT_EQ(0, discard(self->mem, 1, 400, 1));
	EXPECT_EQ(1, tables(self));
	/* Fault-around of a file maps its neighbours. */
	ASSERT_EQ(0, discard(self->mem, 1, 0, 64));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, refault_after_free)
{
	touch(self->mem, 1, 77);
	ASSERT_EQ(0, discard(self->mem, 1, 70, 20));
	EXPECT_EQ(0, tables(self));
	/* Shared memory keeps its contents, private memory starts over. */
	EXPECT_EQ(variant->kind == SHMEM, intact(self->mem, 1, 77));
	EXPECT_EQ(1, tables(self));
	touch(self->mem, 1, 78);
	EXPECT_TRUE(intact(self->mem, 1, 78));
}

TEST_F(pt_reclaim, guard_outside_keeps_inside_frees_later)
{
	touch(self->mem, 1, 10);
	if (madvise(entry(self->mem, 1, 300), PAGE, MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions");
	ASSERT_EQ(0, discard(self->mem, 1, 0, 100));
	EXPECT_EQ(1, tables(self));
	/* A discard leaves guards where they are. */
	ASSERT_EQ(0, discard(self->mem, 1, 200, 200));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, madvise(entry(self->mem, 1, 300), PAGE, MADV_GUARD_REMOVE));
	touch(self->mem, 1, 11);
	ASSERT_EQ(0, discard(self->mem, 1, 11, 1));
	EXPECT_EQ(0, tables(self));
}

/* A userfaultfd with all of mem registered; -1 if it is not to be had. */
static int uffd_with(char *mem, unsigned long long features, unsigned long long mode)
{
	return pt_uffd_for(mem, NR_TABLES * TABLE_SIZE, features, mode);
}

TEST_F(pt_reclaim, keep_uffd_wp_markers)
{
	struct uffdio_writeprotect wp = {
		.range = { (unsigned long)entry(self->mem, 1, 40), PAGE },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int uffd;

	if (variant->kind != SHMEM)
		SKIP(return, "markers outlive a discard in shared memory only");
	uffd = uffd_with(self->mem, UFFD_FEATURE_PAGEFAULT_FLAG_WP |
			 UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_REGISTER_MODE_WP);
	if (uffd < 0)
		SKIP(return, "no userfaultfd write protection");
	touch(self->mem, 1, 40);
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	ASSERT_EQ(0, discard(self->mem, 1, 0, 256));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 1, 256, 256));
	EXPECT_EQ(1, tables(self));
	close(uffd);
}

TEST_F(pt_reclaim, keep_swap_entries)
{
	bool mine = false;

	if (variant->kind != ANON)
		SKIP(return, "swap entries are those of anonymous memory here");
	/* A spare disk of a test machine, if the caller says that there is one. */
	if (getenv("PT_SWAP_DISK") && !swapon(getenv("PT_SWAP_DISK"), 0))
		mine = true;
	touch(self->mem, 1, 20);
	touch(self->mem, 1, 420);
	madvise(entry(self->mem, 1, 20), PAGE, MADV_PAGEOUT);
	if (!(pt_pagemap(entry(self->mem, 1, 20)) >> 62 & 1)) {
		if (mine)
			swapoff(getenv("PT_SWAP_DISK"));
		SKIP(return, "the page was not swapped out (no swap? see PT_SWAP_DISK)");
	}
	ASSERT_EQ(0, discard(self->mem, 1, 420, 1));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 20));
	ASSERT_EQ(0, discard(self->mem, 1, 20, 1));
	EXPECT_EQ(0, tables(self));
	if (mine)
		EXPECT_EQ(0, swapoff(getenv("PT_SWAP_DISK")));
}

/* Half of the table belongs to a VMA of other protection: it must stay. */
TEST_F(pt_reclaim, keep_what_a_neighbour_shares)
{
	long skipped = pt_vmstat("pt_reclaim_skip_shared");

	touch(self->mem, 1, 10);
	touch(self->mem, 1, 500);
	ASSERT_EQ(0, mprotect(entry(self->mem, 1, 256), 256 * PAGE, PROT_READ));
	ASSERT_EQ(0, discard(self->mem, 1, 256, 256));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 10));
	ASSERT_EQ(0, discard(self->mem, 1, 0, 256));
	EXPECT_EQ(1, tables(self));
	if (skipped >= 0)
		EXPECT_LT(skipped, pt_vmstat("pt_reclaim_skip_shared"));
}

TEST_F(pt_reclaim, keep_table_of_a_small_vma)
{
	ASSERT_EQ(0, munmap(entry(self->mem, 1, 0), 8 * PAGE));
	touch(self->mem, 1, 10);
	ASSERT_EQ(0, discard(self->mem, 1, 10, 1));
	EXPECT_EQ(1, tables(self));
	touch(self->mem, 1, 11);
	EXPECT_TRUE(intact(self->mem, 1, 11));
}

/* A huge page that is split by a discard of part of it, then of the rest. */
TEST_F(pt_reclaim, split_huge_page)
{
	if (variant->kind != ANON)
		SKIP(return, "huge pages at will are those of anonymous memory");
	if (madvise(self->mem, NR_TABLES * TABLE_SIZE, MADV_HUGEPAGE))
		SKIP(return, "no transparent huge pages");
	touch(self->mem, 2, 0);
	/* A huge page has a table in deposit. */
	ASSERT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 2, 0, 511));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 2, 511, 1));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, fork_both_sides)
{
	int status;
	pid_t pid;

	touch(self->mem, 1, 30);
	touch(self->mem, 1, 330);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		long before;
		bool ok;

		/* Shared mappings are not copied but faulted in; so is code. */
		discard(self->mem, 7, 0, 1);
		ok = intact(self->mem, 1, 30) && intact(self->mem, 1, 330);
		before = pt_vmpte_kb(0);
		discard(self->mem, 1, 30, 1);
		discard(self->mem, 1, 330, 30);
		discard(self->mem, 1, 300, 30);
		_exit(ok && before - pt_vmpte_kb(0) == TABLE_KB ? 0 : 1);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_TRUE(intact(self->mem, 1, 330));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, discard(self->mem, 1, 330, 1));
	ASSERT_EQ(0, discard(self->mem, 1, 30, 1));
	EXPECT_EQ(0, tables(self));
}

/* Entries that come by mremap, not by a fault: the hint knows nothing of fork. */
TEST_F(pt_reclaim, populated_by_mremap)
{
	char *from = entry(self->mem, 0, 0), *to = entry(self->mem, 1, 333);

	if (variant->kind != ANON)
		SKIP(return, "moves of anonymous memory only");
	touch(self->mem, 0, 0);
	touch(self->mem, 1, 5);
	ASSERT_EQ(to, mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED |
			     MREMAP_DONTUNMAP, to));
	EXPECT_EQ(1, pt_load(to));
	ASSERT_EQ(0, discard(self->mem, 1, 5, 1));
	EXPECT_EQ(1, pt_load(to));
}

/*
 * Unmapping a range of the file.  Entries of a file are populated by reading, for
 * what is written to a private mapping is not the file's any more; fault-around
 * maps up to 16 pages then, so that holes are of 16 pages.
 */
#define AROUND		16

static void populate(char *mem, enum kind kind, size_t table, size_t index)
{
	if (kind == SHMEM)
		touch(mem, table, index);
	else
		pt_load(entry(mem, table, index));
}

static int punch(int fd, size_t table, size_t index, size_t nr)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			 (table * NR_ENTRIES + index) * PAGE, nr * PAGE);
}

TEST_F(pt_reclaim, punch_whole_table)
{
	if (variant->kind == ANON)
		SKIP(return, "anonymous memory has no file");
	populate(self->mem, variant->kind, 1, 100);
	ASSERT_EQ(1, tables(self));
	ASSERT_EQ(0, punch(self->fd, 1, 0, NR_ENTRIES));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, punch_pieces)
{
	if (variant->kind == ANON)
		SKIP(return, "anonymous memory has no file");
	populate(self->mem, variant->kind, 1, 3);
	populate(self->mem, variant->kind, 1, 500);
	populate(self->mem, variant->kind, 2, 200);
	ASSERT_EQ(2, tables(self));
	ASSERT_EQ(0, punch(self->fd, 1, 0, AROUND));
	EXPECT_EQ(2, tables(self));
	/* The rest of one table and the beginning of the next. */
	ASSERT_EQ(0, punch(self->fd, 1, 496, AROUND + 10));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, punch(self->fd, 2, 192, AROUND));
	EXPECT_EQ(0, tables(self));
	/* And it is a hole. */
	EXPECT_EQ(0, pt_load(entry(self->mem, 1, 3)));
}

TEST_F(pt_reclaim, truncate)
{
	if (variant->kind == ANON)
		SKIP(return, "anonymous memory has no file");
	/* Truncation takes copies that a private mapping made, too. */
	touch(self->mem, 1, 100);
	populate(self->mem, variant->kind, 2, 7);
	touch(self->mem, 5, 7);
	ASSERT_EQ(3, tables(self));
	ASSERT_EQ(0, ftruncate(self->fd, TABLE_SIZE + 50 * PAGE));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, madv_remove)
{
	if (variant->kind != SHMEM)
		SKIP(return, "MADV_REMOVE wants a shared mapping");
	touch(self->mem, 1, 3);
	touch(self->mem, 1, 300);
	ASSERT_EQ(0, madvise(entry(self->mem, 1, 3), PAGE, MADV_REMOVE));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 300));
	ASSERT_EQ(0, madvise(entry(self->mem, 1, 256), 256 * PAGE, MADV_REMOVE));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, copies_of_a_private_mapping_stay)
{
	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	touch(self->mem, 1, 5);
	populate(self->mem, variant->kind, 1, 300);
	ASSERT_EQ(0, punch(self->fd, 1, 0, NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 1, 5));
	ASSERT_EQ(0, discard(self->mem, 1, 5, 1));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, keep_what_a_neighbour_shares_of_a_file)
{
	if (variant->kind == ANON)
		SKIP(return, "anonymous memory has no file");
	populate(self->mem, variant->kind, 1, 3);
	ASSERT_EQ(0, mprotect(entry(self->mem, 1, 256), 256 * PAGE, PROT_READ));
	ASSERT_EQ(0, punch(self->fd, 1, 0, 256));
	EXPECT_EQ(1, tables(self));
}

/* A vhost-user backend in miniature: it maps the file, and we punch the hole. */
TEST_F(pt_reclaim, punch_frees_tables_of_another_process)
{
	int down[2], up[2], status;
	char step;
	pid_t pid;

	if (variant->kind != SHMEM)
		SKIP(return, "memory that processes share");
	ASSERT_EQ(0, pipe(down));
	ASSERT_EQ(0, pipe(up));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		long before;

		touch(self->mem, 7, 0);
		before = pt_vmpte_kb(0);
		touch(self->mem, 1, 40);
		touch(self->mem, 2, 40);
		if (pt_vmpte_kb(0) != before + 2 * TABLE_KB)
			_exit(2);
		if (write(up[1], "", 1) != 1 || read(down[0], &step, 1) != 1)
			_exit(3);
		_exit(pt_vmpte_kb(0) == before ? 0 : 1);
	}
	ASSERT_EQ(1, read(up[0], &step, 1));
	ASSERT_EQ(0, punch(self->fd, 1, 32, 16));
	ASSERT_EQ(0, punch(self->fd, 2, 0, NR_ENTRIES));
	ASSERT_EQ(1, write(down[1], "", 1));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFEXITED(status));
	EXPECT_EQ(0, WEXITSTATUS(status));
}

/* What empties entries without being a discard. */

TEST_F(pt_reclaim, guard_remove)
{
	touch(self->mem, 2, 8);
	if (madvise(entry(self->mem, 1, 100), 300 * PAGE, MADV_GUARD_INSTALL) ||
	    madvise(entry(self->mem, 2, 9), 10 * PAGE, MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions");
	ASSERT_EQ(2, tables(self));
	ASSERT_EQ(0, madvise(entry(self->mem, 1, 100), 200 * PAGE, MADV_GUARD_REMOVE));
	EXPECT_EQ(2, tables(self));
	ASSERT_EQ(0, madvise(entry(self->mem, 1, 300), 600 * PAGE, MADV_GUARD_REMOVE));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 2, 8));
}

TEST_F(pt_reclaim, uffdio_move)
{
	struct uffdio_move move = {
		.src = (unsigned long)entry(self->mem, 1, 10),
		.dst = (unsigned long)entry(self->mem, 4, 20),
		.len = 2 * PAGE,
	};
	int uffd;

	if (variant->kind != ANON)
		SKIP(return, "moves are of anonymous memory");
	touch(self->mem, 1, 10);
	touch(self->mem, 1, 11);
	touch(self->mem, 1, 400);
	uffd = uffd_with(self->mem, UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING);
	if (uffd < 0)
		SKIP(return, "no UFFDIO_MOVE");
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_MOVE, &move));
	EXPECT_EQ(2, tables(self));
	EXPECT_EQ(11, pt_load(entry(self->mem, 4, 20)));
	move.src = (unsigned long)entry(self->mem, 1, 400);
	move.dst = (unsigned long)entry(self->mem, 4, 30);
	move.len = PAGE;
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_MOVE, &move));
	EXPECT_EQ(1, tables(self));
	close(uffd);
}

TEST_F(pt_reclaim, uffdio_move_of_holes)
{
	struct uffdio_move move = {
		.src = (unsigned long)entry(self->mem, 1, 500),
		.dst = (unsigned long)entry(self->mem, 4, 0),
		.len = 30 * PAGE,
		.mode = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
	};
	int uffd;

	if (variant->kind != ANON)
		SKIP(return, "moves are of anonymous memory");
	uffd = uffd_with(self->mem, UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING);
	if (uffd < 0)
		SKIP(return, "no UFFDIO_MOVE");
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_MOVE, &move));
	EXPECT_EQ(0, tables(self));
	close(uffd);
}

TEST_F(pt_reclaim, mremap_dontunmap)
{
	char *from = entry(self->mem, 0, 0), *to = entry(self->mem, 1, 333);

	if (variant->kind != ANON)
		SKIP(return, "moves of anonymous memory only");
	touch(self->mem, 0, 0);
	ASSERT_EQ(to, mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED |
			     MREMAP_DONTUNMAP, to));
	EXPECT_EQ(1, tables(self));
	EXPECT_EQ(1, pt_load(to));
	EXPECT_EQ(0, pt_load(from));
}

/*
 * A table that nobody frees at once: reclaim unmaps pages of a file by rmap.  A
 * page elsewhere is private, for fork() does not look at a mapping without.
 */
static bool make_empty_table(char *mem, size_t table)
{
	pt_load(entry(mem, table, 100));
	touch(mem, NR_TABLES - 1, 0);
	/* A page may be in somebody else's hands for a moment. */
	for (int tries = 0; tries < 20; tries++) {
		madvise(entry(mem, table, 0), TABLE_SIZE, MADV_PAGEOUT);
		if (!(pt_pagemap(entry(mem, table, 100)) >> 63))
			return true;
		usleep(20000);
	}
	return false;
}

/* What the first moments of a child need in page tables, in kB. */
static long child_vmpte_kb(void)
{
	long kb = -1;
	int fds[2];
	pid_t pid;

	if (pipe(fds))
		return -1;
	pid = fork();
	if (!pid) {
		kb = pt_vmpte_kb(0);
		_exit(write(fds[1], &kb, sizeof(kb)) != sizeof(kb));
	}
	if (pid < 0 || read(fds[0], &kb, sizeof(kb)) != sizeof(kb))
		kb = -1;
	waitpid(pid, NULL, 0);
	close(fds[0]);
	close(fds[1]);
	return kb;
}

TEST_F(pt_reclaim, fork_leaves_empty_tables_behind)
{
	long before;

	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	touch(self->mem, NR_TABLES - 1, 0);
	before = child_vmpte_kb();
	ASSERT_GT(before, 0);
	ASSERT_TRUE(make_empty_table(self->mem, 1));
	ASSERT_TRUE(make_empty_table(self->mem, 3));
	EXPECT_EQ(before, child_vmpte_kb());
}

/* MADV_TRIM_TABLES. */

static int trim(char *mem, size_t table, size_t index, size_t nr)
{
	return madvise(entry(mem, table, index), nr * PAGE, MADV_TRIM_TABLES);
}

TEST_F(pt_reclaim, trim_empty_tables)
{
	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	for (int t = 0; t < 3; t++)
		ASSERT_TRUE(make_empty_table(self->mem, t));
	ASSERT_EQ(0, trim(self->mem, 0, 0, NR_TABLES * NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, NR_TABLES - 1, 0));
}

TEST_F(pt_reclaim, trim_zeropages)
{
	long zero = pt_vmstat("pt_reclaim_zero");

	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	for (int i = 0; i < NR_ENTRIES; i++)
		pt_load(entry(self->mem, 1, i));
	pt_load(entry(self->mem, 2, 7));
	pt_load(entry(self->mem, 3, 7));
	touch(self->mem, 3, 8);
	ASSERT_EQ(3, tables(self));
	/* A part of a table's range stands for the table. */
	ASSERT_EQ(0, trim(self->mem, 1, 30, 1));
	EXPECT_EQ(2, tables(self));
	ASSERT_EQ(0, trim(self->mem, 2, 0, 2 * NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 3, 8));
	EXPECT_EQ(0, pt_load(entry(self->mem, 1, 99)));
	EXPECT_EQ(2, tables(self));
	EXPECT_LE(zero + 2, pt_vmstat("pt_reclaim_zero"));
}

TEST_F(pt_reclaim, trim_huge_zeropage)
{
	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	if (madvise(self->mem, NR_TABLES * TABLE_SIZE, MADV_HUGEPAGE))
		SKIP(return, "no transparent huge pages");
	for (int t = 0; t < 3; t++)
		pt_load(entry(self->mem, t, 0));
	ASSERT_EQ(3, tables(self));
	/* Is one that was not read there as well? */
	if (!(pt_pagemap(entry(self->mem, 1, 300)) >> 63))
		SKIP(return, "no huge zeropage (see transparent_hugepage/use_zero_page)");
	ASSERT_EQ(0, trim(self->mem, 0, 0, NR_TABLES * NR_ENTRIES));
	EXPECT_EQ(0, tables(self));
	EXPECT_EQ(0, pt_load(entry(self->mem, 1, 5)));
	touch(self->mem, 2, 5);
	ASSERT_EQ(0, trim(self->mem, 0, 0, NR_TABLES * NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	EXPECT_TRUE(intact(self->mem, 2, 5));
}

/* Somebody was promised that these zeropages are there, or hears of it if not. */
TEST_F(pt_reclaim, keep_zeropages_that_are_locked_or_watched)
{
	int uffd;

	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	if (trim(self->mem, 0, 0, 1))
		SKIP(return, "no MADV_TRIM_TABLES");
	pt_load(entry(self->mem, 1, 0));
	ASSERT_EQ(0, mlock2(self->mem, NR_TABLES * TABLE_SIZE, MLOCK_ONFAULT));
	ASSERT_EQ(0, trim(self->mem, 1, 0, NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	ASSERT_EQ(0, munlock(self->mem, NR_TABLES * TABLE_SIZE));
	uffd = uffd_with(self->mem, UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING);
	if (uffd < 0)
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, trim(self->mem, 1, 0, NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
	close(uffd);
	ASSERT_EQ(0, trim(self->mem, 1, 0, NR_ENTRIES));
	EXPECT_EQ(0, tables(self));
}

TEST_F(pt_reclaim, keep_zeropages_that_a_neighbour_shares)
{
	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	if (trim(self->mem, 0, 0, 1))
		SKIP(return, "no MADV_TRIM_TABLES");
	pt_load(entry(self->mem, 1, 3));
	ASSERT_EQ(0, mprotect(entry(self->mem, 1, 256), 256 * PAGE, PROT_READ));
	ASSERT_EQ(0, trim(self->mem, 1, 0, NR_ENTRIES));
	EXPECT_EQ(1, tables(self));
}

/* A manager trims a virtual machine monitor. */
TEST_F(pt_reclaim, trim_another_process)
{
	int down[2], up[2], status, pidfd;
	struct iovec range = { self->mem, NR_TABLES * TABLE_SIZE };
	char step;
	pid_t pid;

	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	ASSERT_EQ(0, pipe(down));
	ASSERT_EQ(0, pipe(up));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		long before = pt_vmpte_kb(0);

		touch(self->mem, 3, 40);
		pt_load(entry(self->mem, 1, 40));
		if (pt_vmpte_kb(0) != before + 2 * TABLE_KB)
			_exit(2);
		if (write(up[1], "", 1) != 1 || read(down[0], &step, 1) != 1)
			_exit(3);
		_exit(intact(self->mem, 3, 40) && pt_vmpte_kb(0) == before + TABLE_KB ? 0 : 1);
	}
	ASSERT_EQ(1, read(up[0], &step, 1));
	pidfd = syscall(SYS_pidfd_open, pid, 0);
	EXPECT_EQ((ssize_t)range.iov_len,
		  syscall(SYS_process_madvise, pidfd, &range, 1, MADV_TRIM_TABLES, 0));
	ASSERT_EQ(1, write(down[1], "", 1));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFEXITED(status));
	EXPECT_EQ(0, WEXITSTATUS(status));
	close(pidfd);
}

/* Every kind of mapping that a process has may be named, and none suffers. */
TEST_F(pt_reclaim, trim_everything)
{
	static char maps[65536];
	unsigned long start, end;
	char *line = maps;

	for (int t = 0; t < NR_TABLES; t++)
		touch(self->mem, t, 50 + t);
	ASSERT_GT(pt_read_file("/proc/self/maps", maps, sizeof(maps)), 0);
	for (; line && *line; line = strchr(line, '\n'), line += !!line) {
		/* The vsyscall page is not in the user's half. */
		if (sscanf(line, "%lx-%lx", &start, &end) != 2 || (long)start < 0)
			continue;
		EXPECT_EQ(0, madvise((void *)start, end - start, MADV_TRIM_TABLES)) {
			TH_LOG("%s: %.80s", strerror(errno), line);
		}
	}
	for (int t = 0; t < NR_TABLES; t++)
		EXPECT_TRUE(intact(self->mem, t, 50 + t));
}

TEST_F(pt_reclaim, trim_refuses)
{
	struct iovec range = { self->mem, PAGE };
	int pidfd = syscall(SYS_pidfd_open, getpid(), 0);

	ASSERT_EQ(0, trim(self->mem, 0, 0, 0)) TH_LOG("no MADV_TRIM_TABLES");
	EXPECT_EQ(-1, madvise(self->mem + 1, PAGE, MADV_TRIM_TABLES));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(-1, madvise(self->mem, -PAGE, MADV_TRIM_TABLES));
	EXPECT_EQ(EINVAL, errno);
	ASSERT_EQ(0, munmap(entry(self->mem, 1, 0), PAGE));
	if (variant->kind == ANON) {
		/* As with all advice: what is mapped is dealt with all the same. */
		pt_load(entry(self->mem, 2, 0));
		EXPECT_EQ(-1, trim(self->mem, 0, 0, 3 * NR_ENTRIES));
		EXPECT_EQ(ENOMEM, errno);
		EXPECT_EQ(0, tables(self));
	}
	EXPECT_EQ(-1, syscall(SYS_process_madvise, pidfd, &range, 1, MADV_TRIM_TABLES, 1));
	EXPECT_EQ(EINVAL, errno);
	close(pidfd);
}

/* Of another process: only with CAP_SYS_NICE, and with the right to look at it. */
TEST_F(pt_reclaim, trim_wants_privilege)
{
	struct iovec range = { self->mem, PAGE };
	int status, pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	pid_t pid;

	if (geteuid())
		SKIP(return, "not root");
	if (trim(self->mem, 0, 0, 1))
		SKIP(return, "no MADV_TRIM_TABLES");
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		if (setresuid(65534, 65534, 65534))
			_exit(2);
		if (syscall(SYS_process_madvise, pidfd, &range, 1, MADV_TRIM_TABLES, 0) != -1)
			_exit(1);
		_exit(errno == EPERM || errno == EACCES ? 0 : 3);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	close(pidfd);
}

/* Any arguments: no error but those that are documented, no change of contents. */
TEST_F(pt_reclaim, trim_fuzz)
{
	unsigned int seed = 4242;

	ASSERT_EQ(0, trim(self->mem, 0, 0, 0)) TH_LOG("no MADV_TRIM_TABLES");
	for (int t = 0; t < NR_TABLES; t += 2)
		touch(self->mem, t, 11 * t);
	for (int i = 0; i < 3000; i++) {
		unsigned long start = (unsigned long)self->mem, len = NR_TABLES * TABLE_SIZE;

		start += rand_r(&seed) % (2 * len) - len / 2;
		if (rand_r(&seed) % 8)
			start &= -PAGE;
		if (rand_r(&seed) % 32 == 0)
			start ^= 1ul << rand_r(&seed) % 64;
		len = rand_r(&seed) % len;
		if (rand_r(&seed) % 32 == 0)
			len ^= 1ul << rand_r(&seed) % 64;
		/* Reads make tables of zeropages, or of the file. */
		pt_load(entry(self->mem, 1 + rand_r(&seed) % 6, rand_r(&seed) % NR_ENTRIES));
		errno = 0;
		madvise((void *)start, len, MADV_TRIM_TABLES);
		ASSERT_TRUE(errno == EINVAL || (start % PAGE == 0 && (!errno || errno == ENOMEM)))
			TH_LOG("%lx, %lx: %s", start, len, strerror(errno));
	}
	for (int t = 0; t < NR_TABLES; t += 2)
		EXPECT_TRUE(intact(self->mem, t, 11 * t));
}

/* The background pass. */

struct awaited {
	long base_kb, tables;
	char *mem;
};

static bool tables_are(void *arg)
{
	struct awaited *a = arg;

	return (pt_vmpte_kb(0) - a->base_kb) / TABLE_KB == a->tables;
}

/* A second is the shortest period, and a table goes in the second pass. */
#define wait_for_tables(self, nr)					\
	pt_wait_until(tables_are, &(struct awaited){ (self)->base_kb, nr, NULL }, 30)

TEST_F_TIMEOUT(pt_reclaim, background_takes_what_reclaim_emptied, 120)
{
	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	if (geteuid())
		SKIP(return, "not root");
	for (int t = 0; t < 3; t++)
		ASSERT_TRUE(make_empty_table(self->mem, t));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	EXPECT_TRUE(wait_for_tables(self, 1));
	EXPECT_TRUE(intact(self->mem, NR_TABLES - 1, 0));
}

TEST_F_TIMEOUT(pt_reclaim, background_takes_shared_memory_that_was_reclaimed, 120)
{
	if (variant->kind != SHMEM)
		SKIP(return, "shared memory only");
	if (geteuid())
		SKIP(return, "not root");
	touch(self->mem, 1, 100);
	touch(self->mem, 2, 100);
	madvise(self->mem, NR_TABLES * TABLE_SIZE, MADV_PAGEOUT);
	if (pt_pagemap(entry(self->mem, 1, 100)) >> 63)
		SKIP(return, "the page was not swapped out (no swap?)");
	ASSERT_EQ(2, tables(self));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	EXPECT_TRUE(wait_for_tables(self, 0));
	EXPECT_TRUE(intact(self->mem, 1, 100));
}

/* What a debugger or a dump does to memory that was never written. */
TEST_F_TIMEOUT(pt_reclaim, background_takes_zeropages_that_others_read, 120)
{
	char buf[8];
	struct iovec to = { buf, sizeof(buf) };
	struct iovec another = { entry(self->mem, 0, 10), sizeof(buf) };

	if (variant->kind != ANON)
		SKIP(return, "only anonymous memory has zeropages");
	if (geteuid())
		SKIP(return, "not root");
	for (int t = 0; t < 4; t++) {
		struct iovec from = { entry(self->mem, t, 9), sizeof(buf) };

		ASSERT_EQ((ssize_t)sizeof(buf),
			  process_vm_readv(getpid(), &to, 1, &from, 1, 0));
	}
	touch(self->mem, 3, 10);
	ASSERT_EQ(4, tables(self));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	/* Five passes would be enough, but without being told there is none. */
	sleep(5);
	EXPECT_EQ(4, tables(self));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "zeropages", "1"));
	/* Somebody has to read once more to bring the pass here. */
	ASSERT_EQ((ssize_t)sizeof(buf), process_vm_readv(getpid(), &to, 1, &another, 1, 0));
	EXPECT_TRUE(wait_for_tables(self, 1));
	EXPECT_TRUE(intact(self->mem, 3, 10));
}

TEST_F_TIMEOUT(pt_reclaim, background_takes_markers_that_were_removed, 120)
{
	struct uffdio_writeprotect wp = {
		.range = { (unsigned long)entry(self->mem, 1, 40), PAGE },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int uffd;

	if (variant->kind != SHMEM)
		SKIP(return, "markers are those of shared memory");
	if (geteuid())
		SKIP(return, "not root");
	uffd = uffd_with(self->mem, UFFD_FEATURE_PAGEFAULT_FLAG_WP |
			 UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_REGISTER_MODE_WP);
	if (uffd < 0)
		SKIP(return, "no userfaultfd write protection");
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	ASSERT_EQ(1, tables(self));
	wp.mode = 0;
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	EXPECT_TRUE(wait_for_tables(self, 0));
	close(uffd);
}

static bool stop_mapping;

static void *map_and_unmap(void *arg)
{
	while (!pt_load(&stop_mapping))
		munmap(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE);
	return arg;
}

/* Those who want the mmap lock get it, and the pass gets to the end all the same. */
TEST_F_TIMEOUT(pt_reclaim, background_gets_through, 120)
{
	pthread_t thread;

	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	if (geteuid())
		SKIP(return, "not root");
	pt_store(&stop_mapping, false);
	ASSERT_EQ(0, pthread_create(&thread, NULL, map_and_unmap, NULL));
	/* The thread has tables of its own. */
	sleep(1);
	self->base_kb = pt_vmpte_kb(0);
	for (int t = 0; t < 3; t++)
		EXPECT_TRUE(make_empty_table(self->mem, t));
	EXPECT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	EXPECT_TRUE(wait_for_tables(self, 1));
	pt_store(&stop_mapping, true);
	pthread_join(thread, NULL);
}

TEST_F_TIMEOUT(pt_reclaim, background_can_be_switched_off, 120)
{
	if (variant->kind != FILE_PRIVATE)
		SKIP(return, "private file mappings only");
	if (geteuid())
		SKIP(return, "not root");
	ASSERT_TRUE(pt_write_file(PT_CONTROL "background", "0"));
	ASSERT_TRUE(pt_write_file(PT_CONTROL "period_ms", "1000"));
	ASSERT_TRUE(make_empty_table(self->mem, 1));
	EXPECT_EQ(2, tables(self));
	/* Nothing to wait for but time: twice what two passes would take. */
	sleep(4);
	EXPECT_EQ(2, tables(self));
	/* And on again, with the marks that were made meanwhile. */
	ASSERT_TRUE(pt_write_file(PT_CONTROL "background", "1"));
	EXPECT_TRUE(wait_for_tables(self, 1));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "background", "maybe"));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "period_ms", "999"));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "period_ms", "86400001"));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "period_ms", "-1000"));
	EXPECT_FALSE(pt_write_file(PT_CONTROL "period_ms", "soon"));
	EXPECT_TRUE(pt_write_file(PT_CONTROL "period_ms", "10000"));
}

static bool is_gone_after_discard(void *arg)
{
	struct awaited *a = arg;

	discard(a->mem, 1, 9, 1);
	return tables_are(a);
}

/*
 * A loop over one page does not free a table each time, for they would all be on their
 * way out until the next grace period.  The last one goes by the first discard after.
 */
TEST_F(pt_reclaim, loop_frees_a_table_now_and_then)
{
	struct awaited none = { .mem = self->mem, .base_kb = self->base_kb };
	long kept = pt_vmstat("pt_reclaim_skip_lately");

	ASSERT_GE(kept, 0) TH_LOG("this kernel does not tell");
	for (int round = 0; round < 40 && pt_vmstat("pt_reclaim_skip_lately") == kept; round++) {
		for (int i = 0; i < 500; i++) {
			touch(self->mem, 1, 9);
			ASSERT_EQ(0, discard(self->mem, 1, 9, 1));
		}
	}
	EXPECT_LT(kept, pt_vmstat("pt_reclaim_skip_lately"));
	EXPECT_TRUE(pt_wait_until(is_gone_after_discard, &none, 30));
}

/* Each table once is no loop, however fast. */
TEST_F(pt_reclaim, all_tables_go_at_once)
{
	long kept = pt_vmstat("pt_reclaim_skip_lately");
	size_t size = 256 * TABLE_SIZE;
	char *mem = mmap(NULL, size + TABLE_SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	ASSERT_GE(kept, 0) TH_LOG("this kernel does not tell");
	ASSERT_NE(MAP_FAILED, mem);
	mem = (char *)(((unsigned long)mem + TABLE_SIZE - 1) & -TABLE_SIZE);
	madvise(mem, size, MADV_NOHUGEPAGE);
	for (int t = 0; t < 256; t++)
		touch(mem, t, 9);
	for (int t = 0; t < 256; t++)
		ASSERT_EQ(0, discard(mem, t, 9, 1));
	EXPECT_EQ(kept, pt_vmstat("pt_reclaim_skip_lately"));
	munmap(mem, size);
}

TEST_F(pt_reclaim, counters)
{
	long pte = pt_vmstat("pt_reclaim_pte"), partial = pt_vmstat("pt_reclaim_partial");
	long used = pt_vmstat("pt_reclaim_skip_in_use");

	ASSERT_GE(pte, 0) TH_LOG("this kernel has no pt_reclaim counters");
	for (int t = 0; t < NR_TABLES; t++)
		touch(self->mem, t, 9);
	touch(self->mem, 0, 10);
	ASSERT_EQ(0, discard(self->mem, 0, 9, 1));
	EXPECT_LT(used, pt_vmstat("pt_reclaim_skip_in_use"));
	for (int t = 0; t < NR_TABLES; t++)
		ASSERT_EQ(0, discard(self->mem, t, 9, 2));
	/* System wide, so others may have added to them. */
	EXPECT_LE(pte + NR_TABLES, pt_vmstat("pt_reclaim_pte"));
	EXPECT_LE(partial + NR_TABLES, pt_vmstat("pt_reclaim_partial"));
}

#define TRACING "/sys/kernel/tracing/"

TEST_F(pt_reclaim, tracepoint)
{
	char where[128], *trace;

	if (access(TRACING "trace", W_OK))
		SKIP(return, "no tracefs, or not root");
	ASSERT_TRUE(pt_write_file(TRACING "events/pt_reclaim/pt_reclaim_free/enable", "1"));
	pt_write_file(TRACING "trace", "");
	touch(self->mem, 1, 60);
	ASSERT_EQ(0, discard(self->mem, 1, 60, 4));
	pt_write_file(TRACING "events/pt_reclaim/pt_reclaim_free/enable", "0");
	trace = malloc(1 << 20);
	ASSERT_NE(NULL, trace);
	ASSERT_GT(pt_read_file(TRACING "trace", trace, 1 << 20), 0);
	snprintf(where, sizeof(where), "start=0x%lx end=0x%lx level=pte source=dontneed",
		 (unsigned long)entry(self->mem, 1, 60), (unsigned long)entry(self->mem, 1, 64));
	EXPECT_NE(NULL, strstr(trace, where)) TH_LOG("no event with %s", where);
	free(trace);
}

#define MANY 2000	/* tables, 8 MB: above what the rest of the system does */

static long many_before;

static bool pages_are_back(void *arg)
{
	(void)arg;
	return pt_vmstat("nr_page_table_pages") < many_before - MANY * 3 / 4;
}

/* The pages themselves come back, after a grace period. */
TEST(pages_return_to_the_system)
{
	size_t size = (MANY + 1) * TABLE_SIZE;
	char *raw, *mem;

	raw = mmap(NULL, size + TABLE_SIZE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(MAP_FAILED, raw);
	madvise(raw, size + TABLE_SIZE, MADV_NOHUGEPAGE);
	mem = (char *)(((unsigned long)raw + TABLE_SIZE - 1) & -TABLE_SIZE);
	for (int t = 0; t < MANY; t++)
		touch(mem, t, 17);
	many_before = pt_vmstat("nr_page_table_pages");
	ASSERT_GE(many_before, MANY);
	for (int t = 0; t < MANY; t++)
		ASSERT_EQ(0, discard(mem, t, 16, 4));
	EXPECT_TRUE(pt_wait_until(pages_are_back, NULL, 20));
	munmap(raw, size + TABLE_SIZE);
}

TEST_HARNESS_MAIN
