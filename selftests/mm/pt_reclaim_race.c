// SPDX-License-Identifier: GPL-2.0
/*
 * Discards that free page tables, against everybody else who uses them.
 *
 * Each test runs threads for PT_RACE_SECONDS (environment; default 4), or until
 * all of them got somewhere, that discard parts of a PTE table until it is empty
 * and freed, while others work in the same table, in a VMA next to it, or in
 * another process that maps the same file.  Three things must hold: no write
 * is lost (a page that only its owner discards still has the owner's last
 * word), every side made progress, and the kernel has nothing to say on its
 * console (which whoever runs this has to watch; use a kernel with KASAN,
 * PROVE_LOCKING, DEBUG_VM and PAGE_TABLE_CHECK).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "pt_uffd.h"
#include "pt_util.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED 0x2000
#endif

#define PAGE		4096ul
#define NR_ENTRIES	512
#define TABLE_SIZE	(NR_ENTRIES * PAGE)
#define NR_TABLES	4
#define SIZE		(NR_TABLES * TABLE_SIZE)
#define MAP_SIZE	(SIZE + 4 * TABLE_SIZE)
#define MAX_THREADS	6
#define PATIENCE	15	/* times PT_RACE_SECONDS, for progress */
#define TIMEOUT		(8 * PATIENCE)	/* seconds, with PT_RACE_SECONDS up to 7 */

struct race;

struct actor {
	struct race *race;
	bool (*step)(struct actor *a);	/* one operation; false: a write was lost */
	unsigned int nr;		/* which of its kind */
	unsigned int seed;
	unsigned long steps;
	pid_t child;			/* of its last step, if it has one */
	pthread_t thread;
};

struct race {
	char *mem;			/* SIZE bytes, aligned to a table */
	int uffd, fd;
	bool stop;
	char lost[128];			/* what went wrong, if anything */
	const char *counter;		/* of tables that are to be freed meanwhile */
	long freed;			/* what it was before; -1: unknown, or none is */
	struct actor actors[MAX_THREADS];
	int nr_actors;
};

static unsigned int rnd(struct actor *a, unsigned int bound)
{
	a->seed = a->seed * 1103515245 + 12345;
	return (a->seed >> 16) % bound;
}

static unsigned long *word(struct race *r, size_t page)
{
	return (unsigned long *)(r->mem + page * PAGE);
}

static void count_freed(struct race *r, const char *counter)
{
	r->counter = counter;
	r->freed = pt_vmstat(counter);
}

static int seconds(void)
{
	const char *text = getenv("PT_RACE_SECONDS");

	return text && atoi(text) > 0 ? atoi(text) : 4;
}

static bool __printf(2, 3)
lost(struct race *r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(r->lost, sizeof(r->lost), format, args);
	va_end(args);
	return false;
}

static void *act(void *arg)
{
	struct actor *a = arg;

	while (!__atomic_load_n(&a->race->stop, __ATOMIC_RELAXED)) {
		if (!a->step(a)) {
			__atomic_store_n(&a->race->stop, true, __ATOMIC_RELAXED);
			break;
		}
		__atomic_store_n(&a->steps, a->steps + 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void add(struct race *r, bool (*step)(struct actor *a))
{
	struct actor *a = &r->actors[r->nr_actors];

	a->race = r;
	a->step = step;
	a->nr = r->nr_actors;
	a->seed = 17 * ++r->nr_actors;
}

/* Have all threads done their least, and was a table freed? */
static bool all_moved(struct race *r, int first, unsigned long least)
{
	for (int i = first; i < r->nr_actors; i++) {
		if (__atomic_load_n(&r->actors[i].steps, __ATOMIC_RELAXED) < least)
			return false;
	}
	return r->freed < 0 || r->freed < pt_vmstat(r->counter);
}

/*
 * For PT_RACE_SECONDS, and then until every thread has done @least steps: a debug
 * kernel under emulation on a busy machine is slow, but a thread that has not moved
 * after many times as long is stuck.
 */
static void run_from(struct race *r, int first, unsigned long least)
{
	struct timespec tick = { .tv_nsec = 20000000 };
	unsigned long long start = pt_now_ns();
	unsigned long long end = start + seconds() * 1000000000ull;
	unsigned long long limit = start + PATIENCE * seconds() * 1000000000ull;

	for (int i = first; i < r->nr_actors; i++)
		pthread_create(&r->actors[i].thread, NULL, act, &r->actors[i]);
	while (!__atomic_load_n(&r->stop, __ATOMIC_RELAXED) && pt_now_ns() < limit &&
	       (pt_now_ns() < end || !all_moved(r, first, least)))
		nanosleep(&tick, NULL);
	__atomic_store_n(&r->stop, true, __ATOMIC_RELAXED);
	for (int i = first; i < r->nr_actors; i++)
		pthread_join(r->actors[i].thread, NULL);
}

static void run(struct race *r, unsigned long least)
{
	run_from(r, 0, least);
}

static bool discard(struct race *r, size_t page, size_t nr)
{
	return !madvise(word(r, page), nr * PAGE, MADV_DONTNEED) ||
	       lost(r, "MADV_DONTNEED: %s", strerror(errno));
}

/*
 * The owner of every 16th page, from its own number on: writes a word, looks
 * at it again, discards the page or a few around it, and finds it zero.  The
 * pages between are nobody's, so that tables become empty; what looking leaves is
 * discarded too, for 4 tables that keep a few pages each would never be.
 */
static bool own_pages(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (rnd(a, 4) == 0)
		sched_yield();
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	if (!discard(r, page, 1))
		return false;
	if (rnd(a, 8))
		return true;
	if (*word(r, page))
		return lost(r, "page %zu: discarded and not zero", page);
	return discard(r, page, 1);
}

/*
 * Discards pages that have no owner (numbers 8 to 15), in pieces of any length.
 * Leaves nothing of what it writes: 4 tables with a few leftovers each would never
 * be empty again.
 */
static bool discard_strangers(struct actor *a)
{
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + 8;
	size_t length = 1 + rnd(a, 8);

	*word(a->race, page + rnd(a, length)) = 1;
	madvise(word(a->race, page), length * PAGE, MADV_DONTNEED);
	return true;
}

FIXTURE(race) {
	struct race r;
	char *raw;
};

FIXTURE_VARIANT(race) {
	bool shared;
};

FIXTURE_VARIANT_ADD(race, anon) {
	.shared = false,
};

FIXTURE_VARIANT_ADD(race, shmem) {
	.shared = true,
};

FIXTURE_SETUP(race)
{
	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	pt_settle();
	pt_set_paced(false);
	self->raw = mmap(NULL, MAP_SIZE, PROT_READ | PROT_WRITE, MAP_NORESERVE |
			 MAP_ANONYMOUS | (variant->shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
	ASSERT_NE(MAP_FAILED, self->raw);
	madvise(self->raw, MAP_SIZE, MADV_NOHUGEPAGE);
	memset(&self->r, 0, sizeof(self->r));
	self->r.uffd = -1;
	self->r.mem = (char *)(((unsigned long)self->raw + TABLE_SIZE) & -TABLE_SIZE);
	count_freed(&self->r, "pt_reclaim_partial");
}

FIXTURE_TEARDOWN(race)
{
	pt_set_paced(true);
	munmap(self->raw, MAP_SIZE);
	if (self->r.uffd >= 0)
		close(self->r.uffd);
}

/* Nothing lost; everybody got somewhere. */
#define check_progress(fixture, least) do {					\
	struct race *_r = &(fixture)->r;					\
	EXPECT_STREQ("", _r->lost);						\
	for (int nr = 0; nr < _r->nr_actors; nr++) {				\
		EXPECT_LE((unsigned long)(least), _r->actors[nr].steps) {	\
			TH_LOG("thread %d", nr);				\
		}								\
	}									\
} while (0)

/* And tables were freed meanwhile, as far as the kernel tells. */
#define check(fixture, least) do {						\
	__typeof__(fixture) f = (fixture);					\
	check_progress(f, least);						\
	if (f->r.freed < 0) {							\
		TH_LOG("no pt_reclaim counters: whether tables were freed is unknown"); \
	} else {								\
		EXPECT_LT(f->r.freed, pt_vmstat(f->r.counter));			\
	}									\
} while (0)

/* Shared memory keeps its contents through a discard: own it without zeroes. */
static bool own_shared_pages(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (!discard(r, page, 1 + rnd(a, 4)))
		return false;
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	return discard(r, page, 1);
}

#define owner(variant)	((variant)->shared ? own_shared_pages : own_pages)

/* Refill against discard, and several who discard in the same tables. */
TEST_F_TIMEOUT(race, refill, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, owner(variant));
	add(&self->r, discard_strangers);
	add(&self->r, owner(variant));
	run(&self->r, 20);
	check(self, 20);
}

/*
 * Owners of the first and last page of full tables, while others discard all
 * that is between in one go: many pages, so that the batch of the mmu_gather
 * overflows, the lock is dropped midway and early entries are refilled.
 */
static bool fill_and_discard(struct actor *a)
{
	size_t first = a->nr * NR_ENTRIES;

	for (size_t i = 8; i < NR_ENTRIES; i++)
		*word(a->race, first + i) = 1;
	madvise(word(a->race, first + 8), (NR_ENTRIES - 8) * PAGE, MADV_DONTNEED);
	return true;
}

static bool refill_early(struct actor *a)
{
	struct race *r = a->race;
	size_t page = (a->nr - 2) * NR_ENTRIES + rnd(a, 8);
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (rnd(a, 16) == 0)
		sched_yield();
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	madvise(word(r, page), PAGE, MADV_DONTNEED);
	return true;
}

TEST_F_TIMEOUT(race, refill_while_unlocked, TIMEOUT)
{
	add(&self->r, fill_and_discard);
	add(&self->r, fill_and_discard);
	add(&self->r, refill_early);
	add(&self->r, refill_early);
	run(&self->r, 2);
	check(self, 2);
}

/* Everybody discards a part of one table at once, round after round. */
static bool round_of_discards(struct actor *a)
{
	struct race *r = a->race;
	size_t page = a->nr * (NR_ENTRIES / 4);

	*word(r, page + rnd(a, NR_ENTRIES / 4)) = 1;
	madvise(word(r, page), NR_ENTRIES / 4 * PAGE, MADV_DONTNEED);
	return true;
}

TEST_F_TIMEOUT(race, one_table_many_discards, TIMEOUT)
{
	long before, after;

	before = pt_vmpte_kb(0);
	for (int i = 0; i < 4; i++)
		add(&self->r, round_of_discards);
	run(&self->r, 20);
	check(self, 20);
	/* Not one table twice, not one table forgotten: upper levels at most. */
	madvise(self->r.mem, SIZE, MADV_DONTNEED);
	after = pt_vmpte_kb(0);
	EXPECT_LE(before, after);
	/* Stacks and arenas of four threads, a PMD and a PUD table. */
	EXPECT_GE(before + 15 * 4, after);
}

/*
 * A VMA that commutes between two tables.  One of them it shares with a VMA
 * whose pages are discarded, so that the table is empty when the VMA arrives.
 */
static bool move_neighbour(struct actor *a)
{
	char *away = a->race->mem + SIZE + 16 * PAGE;
	char *home = away + TABLE_SIZE;
	char *from = a->steps % 2 ? away : home, *to = a->steps % 2 ? home : away;
	unsigned int value = ++a->seed;

	*(unsigned int *)(from + 3 * PAGE) = value;
	if (mremap(from, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		return lost(a->race, "mremap: %s", strerror(errno));
	if (*(unsigned int *)(to + 3 * PAGE) != value)
		return lost(a->race, "mremap lost %x", value);
	return true;
}

/* Discards in the VMA next to the moving one, in the table that both share. */
static bool discard_beside(struct actor *a)
{
	char *page = a->race->mem + SIZE + rnd(a, 16) * PAGE;

	*page = 1;
	madvise(page, PAGE, MADV_DONTNEED);
	return true;
}

TEST_F_TIMEOUT(race, neighbour_moves, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, move_neighbour);
	add(&self->r, discard_beside);
	add(&self->r, discard_beside);
	run(&self->r, 5);
	check(self, 5);
}

/* A VMA in the last table, split and joined again by protection. */
static bool split_neighbour(struct actor *a)
{
	size_t page = SIZE / PAGE - 1 - rnd(a, 4) * 16;
	int prot = a->steps % 2 ? PROT_READ | PROT_WRITE : PROT_READ | PROT_WRITE | PROT_EXEC;

	if (mprotect(word(a->race, page), PAGE, prot))
		return lost(a->race, "mprotect: %s", strerror(errno));
	return true;
}

TEST_F_TIMEOUT(race, vma_splits, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, owner(variant));
	add(&self->r, split_neighbour);
	add(&self->r, discard_strangers);
	run(&self->r, 5);
	check(self, 5);
}

/* The child has a consistent copy, and discards in it. */
static bool fork_and_check(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	int status;
	pid_t pid;

	*word(r, page) = a->seed;
	pid = fork();
	if (pid < 0)
		return lost(r, "fork: %s", strerror(errno));
	if (!pid) {
		if (*word(r, page) != a->seed)
			_exit(1);
		madvise(r->mem, SIZE / 2 + 7 * PAGE, MADV_DONTNEED);
		madvise(r->mem + SIZE / 2 + 7 * PAGE, SIZE / 2 - 7 * PAGE, MADV_DONTNEED);
		_exit(0);
	}
	if (waitpid(pid, &status, 0) != pid || status)
		return lost(r, "page %zu: the child ended with status %x", page, status);
	return discard(r, page, 1);
}

TEST_F_TIMEOUT(race, fork, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, discard_strangers);
	add(&self->r, fork_and_check);
	run(&self->r, 2);
	check(self, 2);
}

/* GUP-fast by vmsplice(), the slow path by process_vm_readv(). */
static bool pin_pages(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	struct iovec iov = { word(r, page), PAGE };
	unsigned long copy = 0;
	struct iovec to = { &copy, sizeof(copy) }, from = { word(r, page), sizeof(copy) };
	int fds[2];

	*word(r, page) = a->seed;
	if (pipe(fds))
		return lost(r, "pipe: %s", strerror(errno));
	if (vmsplice(fds[1], &iov, 1, 0) != PAGE ||
	    read(fds[0], &copy, sizeof(copy)) != sizeof(copy) || copy != a->seed)
		lost(r, "page %zu: a pin of %x read %lx", page, a->seed, copy);
	close(fds[0]);
	close(fds[1]);
	copy = 0;
	if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != sizeof(copy) || copy != a->seed)
		return lost(r, "page %zu: process_vm_readv of %x read %lx", page, a->seed, copy);
	madvise(word(r, page), PAGE, MADV_DONTNEED_LOCKED);
	return !r->lost[0];
}

TEST_F_TIMEOUT(race, pins, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, discard_strangers);
	add(&self->r, pin_pages);
	add(&self->r, discard_strangers);
	run(&self->r, 5);
	check(self, 5);
}

static bool collapse(struct actor *a)
{
	madvise(a->race->mem + rnd(a, NR_TABLES) * TABLE_SIZE, TABLE_SIZE, MADV_COLLAPSE);
	return true;
}

TEST_F_TIMEOUT(race, collapse, TIMEOUT)
{
	if (madvise(self->r.mem, SIZE, MADV_HUGEPAGE))
		SKIP(return, "no transparent huge pages");
	add(&self->r, owner(variant));
	add(&self->r, owner(variant));
	add(&self->r, discard_strangers);
	add(&self->r, collapse);
	/* Huge pages most of the time, whose table nobody frees. */
	self->r.freed = -1;
	run(&self->r, 1);
	check_progress(self, 1);
}

/* Takes zeropages away from under everybody's eyes. */
static bool trim_some(struct actor *a)
{
	size_t page = rnd(a, SIZE / PAGE);

	if (madvise(word(a->race, page), (1 + rnd(a, SIZE / PAGE - page)) * PAGE,
		    MADV_TRIM_TABLES))
		return lost(a->race, "MADV_TRIM_TABLES: %s", strerror(errno));
	return true;
}

/* Fills tables with zeropages; nobody owns pages 8 to 15 of each 16. */
static bool read_strangers(struct actor *a)
{
	pt_load(word(a->race, rnd(a, SIZE / PAGE / 16) * 16 + 8 + rnd(a, 8)));
	return true;
}

TEST_F_TIMEOUT(race, trim, TIMEOUT)
{
	long zeroes;

	if (variant->shared)
		SKIP(return, "only anonymous memory has zeropages");
	zeroes = pt_vmstat("pt_reclaim_zero");
	add(&self->r, owner(variant));
	add(&self->r, read_strangers);
	add(&self->r, trim_some);
	add(&self->r, owner(variant));
	add(&self->r, fork_and_check);
	run(&self->r, 2);
	check(self, 2);
	EXPECT_LT(zeroes, pt_vmstat("pt_reclaim_zero"));
}

/*
 * Two CPUs and one page, turn by turn: both see the zeropage there, one writes,
 * the other must see it.  Whoever took the zeropage away meanwhile has to have
 * flushed it from the other's TLB.  A page in a table of its own.
 */
static struct {
	int turn;		/* 0: the writer's, 1: the reader's */
	unsigned long want;	/* what the reader must find */
} relay;

static bool my_turn(struct actor *a, int who)
{
	while (__atomic_load_n(&relay.turn, __ATOMIC_ACQUIRE) != who) {
		if (__atomic_load_n(&a->race->stop, __ATOMIC_RELAXED))
			return false;
		sched_yield();
	}
	return true;
}

static bool hand_over(struct actor *a, int who, unsigned long want)
{
	relay.want = want;
	__atomic_store_n(&relay.turn, !who, __ATOMIC_RELEASE);
	return my_turn(a, who);
}

static bool write_after_zero(struct actor *a)
{
	struct race *r = a->race;
	size_t page = NR_ENTRIES + 100;

	if (!my_turn(a, 0))
		return true;
	madvise(word(r, page), PAGE, MADV_DONTNEED);
	if (pt_load(word(r, page)))
		return lost(r, "discarded and not zero");
	/* The reader has the zeropage in its TLB now, and looks on. */
	if (!hand_over(a, 0, 0))
		return true;
	for (int i = rnd(a, 4); i; i--)
		sched_yield();
	pt_store(word(r, page), (unsigned long)a->seed | 1);
	hand_over(a, 0, (unsigned long)a->seed | 1);
	return true;
}

static bool read_what_was_written(struct actor *a)
{
	unsigned long found;

	if (!my_turn(a, 1))
		return true;
	found = pt_load(word(a->race, NR_ENTRIES + 100));
	if (found != relay.want)
		return lost(a->race, "read %lx after %lx was written", found, relay.want);
	__atomic_store_n(&relay.turn, 0, __ATOMIC_RELEASE);
	return true;
}

static bool trim_page(struct actor *a)
{
	if (madvise(word(a->race, NR_ENTRIES), PAGE, MADV_TRIM_TABLES))
		return lost(a->race, "MADV_TRIM_TABLES: %s", strerror(errno));
	return true;
}

TEST_F_TIMEOUT(race, trim_flushes, TIMEOUT)
{
	long zeroes = pt_vmstat("pt_reclaim_zero");

	if (variant->shared)
		SKIP(return, "only anonymous memory has zeropages");
	memset(&relay, 0, sizeof(relay));
	add(&self->r, write_after_zero);
	add(&self->r, read_what_was_written);
	add(&self->r, trim_page);
	run(&self->r, 20);
	check_progress(self, 20);
	EXPECT_LT(zeroes, pt_vmstat("pt_reclaim_zero"));
}

/* Writes to a page, and forks: does the child have it? */
static bool child_has(struct race *r, size_t page, unsigned long value)
{
	int status;
	pid_t pid;

	*word(r, page) = value;
	pid = fork();
	if (pid < 0)
		return lost(r, "fork: %s", strerror(errno));
	if (!pid)
		_exit(*word(r, page) != value);
	if (waitpid(pid, &status, 0) != pid || status)
		return lost(r, "page %zu: the child ended with status %x", page, status);
	return true;
}

/*
 * One page in a table, and reclaim, which clears its entry before it writes the one
 * for swap, or puts it back: the child must have the page in either case.
 */
static bool fork_lone_page(struct actor *a)
{
	size_t page = rnd(a, NR_TABLES) * NR_ENTRIES + 77;

	return child_has(a->race, page, ((unsigned long)a->seed << 20) | 1);
}

static bool page_out_lone(struct actor *a)
{
	size_t page = rnd(a, NR_TABLES) * NR_ENTRIES + 77;

	madvise(word(a->race, page), PAGE, MADV_PAGEOUT);
	return true;
}

TEST_F_TIMEOUT(race, fork_of_lone_pages, TIMEOUT)
{
	if (variant->shared)
		SKIP(return, "fork does not copy shared memory");
	add(&self->r, fork_lone_page);
	add(&self->r, page_out_lone);
	add(&self->r, page_out_lone);
	/* Nobody discards. */
	self->r.freed = -1;
	run(&self->r, 5);
	check_progress(self, 5);
}

/* Readers of everything, and reclaim. */
static bool read_tables(struct actor *a)
{
	static __thread char buf[65536];
	ssize_t got;
	int fd;

	if (a->steps % 2) {
		fd = open("/proc/self/pagemap", O_RDONLY);
		got = pread(fd, buf, SIZE / PAGE * 8, (unsigned long)a->race->mem / PAGE * 8);
	} else {
		fd = open("/proc/self/smaps_rollup", O_RDONLY);
		got = read(fd, buf, sizeof(buf));
	}
	close(fd);
	return got > 0 || lost(a->race, "reading /proc/self: %s", strerror(errno));
}

static bool page_out(struct actor *a)
{
	madvise(a->race->mem + rnd(a, NR_TABLES) * TABLE_SIZE, TABLE_SIZE, MADV_PAGEOUT);
	return true;
}

TEST_F_TIMEOUT(race, readers_and_reclaim, TIMEOUT)
{
	add(&self->r, owner(variant));
	add(&self->r, discard_strangers);
	add(&self->r, read_tables);
	add(&self->r, page_out);
	run(&self->r, 5);
	check(self, 5);
}

/* Pages come by userfaultfd, whose table may go under it: that is no error. */
static bool copy_in(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	unsigned long source[PAGE / sizeof(unsigned long)] = { a->seed };
	struct uffdio_copy copy = {
		.dst = (unsigned long)word(r, page),
		.src = (unsigned long)source,
		.len = PAGE,
	};

	if (ioctl(r->uffd, UFFDIO_COPY, &copy))
		return lost(r, "UFFDIO_COPY: %s", strerror(errno));
	if (*word(r, page) != a->seed)
		return lost(r, "page %zu: copied %x, found %lx", page, a->seed, *word(r, page));
	/* A page for each thread and no more, so that tables become empty. */
	return discard(r, page, 1);
}

TEST_F_TIMEOUT(race, userfaultfd_copy, TIMEOUT)
{
	if (variant->shared)
		SKIP(return, "shared memory keeps what a discard unmaps");
	self->r.uffd = pt_uffd_for(self->r.mem, SIZE, 0, UFFDIO_REGISTER_MODE_MISSING);
	if (self->r.uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(errno));
	add(&self->r, copy_in);
	add(&self->r, copy_in);
	add(&self->r, copy_in);
	run(&self->r, 20);
	check(self, 20);
}

/* A marker that was asked for is there, whatever became of the table meanwhile. */
static bool protect_nothing(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	struct uffdio_writeprotect wp = {
		.range = { (unsigned long)word(r, page), PAGE },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	if (ioctl(r->uffd, UFFDIO_WRITEPROTECT, &wp))
		return errno == EAGAIN || lost(r, "UFFDIO_WRITEPROTECT: %s", strerror(errno));
	if (!(pt_pagemap(word(r, page)) >> 57 & 1))
		return lost(r, "page %zu: protected and no marker", page);
	wp.mode = 0;
	if (ioctl(r->uffd, UFFDIO_WRITEPROTECT, &wp))
		return errno == EAGAIN || lost(r, "unprotecting: %s", strerror(errno));
	return true;
}

TEST_F_TIMEOUT(race, userfaultfd_markers, TIMEOUT)
{
	self->r.uffd = pt_uffd_for(self->r.mem, SIZE, UFFD_FEATURE_PAGEFAULT_FLAG_WP |
				   UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED,
				   UFFDIO_REGISTER_MODE_WP);
	if (self->r.uffd < 0)
		SKIP(return, "no userfaultfd write protection: %s", strerror(errno));
	add(&self->r, protect_nothing);
	add(&self->r, discard_strangers);
	add(&self->r, protect_nothing);
	add(&self->r, discard_strangers);
	run(&self->r, 20);
	check(self, 20);
}

/*
 * Unmapping ranges of a file, which holds no lock of the mm at all.  The punchers
 * make and unmap pages that nobody owns, so that tables become empty all the time;
 * owners' pages are never punched and keep their words.
 */
FIXTURE(file_race) {
	struct race r;
	char *raw;
};

FIXTURE_VARIANT(file_race) {
	bool private;
};

FIXTURE_VARIANT_ADD(file_race, shared) {
	.private = false,
};

FIXTURE_VARIANT_ADD(file_race, private) {
	.private = true,
};

/* Room for the mapping itself and for one that moves about. */
#define FILE_ROOM	(4 * SIZE)

static char *map_file(struct race *r, char *where, bool private)
{
	char *mem = mmap(where, SIZE, PROT_READ | PROT_WRITE, MAP_FIXED |
			 (private ? MAP_PRIVATE : MAP_SHARED), r->fd, 0);

	if (mem != MAP_FAILED)
		madvise(mem, SIZE, MADV_NOHUGEPAGE);
	return mem;
}

FIXTURE_SETUP(file_race)
{
	struct race *r = &self->r;

	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	pt_settle();
	pt_set_paced(false);
	self->raw = mmap(NULL, FILE_ROOM, PROT_NONE, MAP_NORESERVE | MAP_ANONYMOUS | MAP_PRIVATE,
			 -1, 0);
	ASSERT_NE(MAP_FAILED, self->raw);
	memset(r, 0, sizeof(*r));
	r->uffd = -1;
	r->fd = memfd_create("pt_reclaim_race", 0);
	ASSERT_GE(r->fd, 0);
	ASSERT_EQ(0, ftruncate(r->fd, SIZE));
	r->mem = (char *)(((unsigned long)self->raw + TABLE_SIZE) & -TABLE_SIZE);
	ASSERT_EQ(r->mem, map_file(r, r->mem, variant->private));
	count_freed(&self->r, "pt_reclaim_partial");
}

FIXTURE_TEARDOWN(file_race)
{
	pt_set_paced(true);
	munmap(self->raw, FILE_ROOM);
	close(self->r.fd);
}

/* Pages 8 to 15 of each 16 are nobody's. */
static bool punch_strangers(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + 8;

	pt_load(word(r, page + rnd(a, 8)));
	if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, 8 * PAGE))
		return lost(r, "fallocate: %s", strerror(errno));
	return true;
}

/* As own_pages(), but the page goes by a hole, or, a private copy, by DONTNEED. */
static bool own_file_pages(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (rnd(a, 4) == 0)
		sched_yield();
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE) ||
	    madvise(word(r, page), PAGE, MADV_DONTNEED_LOCKED))
		return lost(r, "giving page %zu back: %s", page, strerror(errno));
	if (*word(r, page))
		return lost(r, "page %zu: punched and not zero", page);
	/* What was looked at may be locked. */
	madvise(word(r, page), PAGE, MADV_DONTNEED_LOCKED);
	return true;
}

TEST_F_TIMEOUT(file_race, punch_and_refill, TIMEOUT)
{
	add(&self->r, own_file_pages);
	add(&self->r, own_file_pages);
	add(&self->r, punch_strangers);
	add(&self->r, punch_strangers);
	run(&self->r, 20);
	check(self, 20);
}

/* The child's tables are in reach before they are populated: never an -ENOMEM. */
static bool fork_and_check_file(struct actor *a)
{
	struct race *r = a->race;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	bool ok = child_has(r, page, a->seed);

	/* The copy of a private page would keep its table. */
	madvise(word(r, page), PAGE, MADV_DONTNEED);
	return ok;
}

TEST_F_TIMEOUT(file_race, fork, TIMEOUT)
{
	add(&self->r, fork_and_check_file);
	add(&self->r, punch_strangers);
	add(&self->r, punch_strangers);
	run(&self->r, 2);
	check(self, 2);
}

/*
 * A second mapping of the file moves by one page, so that entries are moved and
 * not tables, while holes are punched: its new tables are empty to begin with.
 */
static bool move_mapping(struct actor *a)
{
	struct race *r = a->race;
	char *home = r->mem + SIZE + TABLE_SIZE, *away = home + SIZE + 17 * PAGE;
	char *from = a->steps % 2 ? away : home, *to = a->steps % 2 ? home : away;
	size_t page = rnd(a, SIZE / PAGE / 16) * 16 + a->nr;
	unsigned int value = a->seed;

	*(unsigned int *)(from + page * PAGE) = value;
	pt_load(from + rnd(a, SIZE / PAGE) * PAGE);
	if (mremap(from, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		return lost(r, "mremap: %s", strerror(errno));
	if (*(unsigned int *)(to + page * PAGE) != value)
		return lost(r, "mremap lost %x of page %zu", value, page);
	madvise(to + page * PAGE, PAGE, MADV_DONTNEED);
	return true;
}

TEST_F_TIMEOUT(file_race, mremap, TIMEOUT)
{
	char *home = self->r.mem + SIZE + TABLE_SIZE;

	ASSERT_EQ(home, map_file(&self->r, home, variant->private));
	add(&self->r, move_mapping);
	add(&self->r, punch_strangers);
	add(&self->r, punch_strangers);
	run(&self->r, 5);
	check(self, 5);
}

/* Another process that maps the file works in it while holes are punched here. */
TEST_F_TIMEOUT(file_race, second_process, TIMEOUT)
{
	struct race *r = &self->r;
	int status;
	pid_t pid;

	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		/* Threads of numbers that the parent's do not have. */
		for (int i = 0; i < 2; i++)
			add(r, own_file_pages);
		run(r, 1);
		if (r->lost[0])
			fprintf(stderr, "# second process: %s\n", r->lost);
		_exit(!!r->lost[0] || !r->actors[0].steps || !r->actors[1].steps);
	}
	r->nr_actors = 2;
	add(r, punch_strangers);
	add(r, punch_strangers);
	add(r, own_file_pages);
	/* The first two are the child's. */
	run_from(r, 2, 20);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	for (int nr = 0; nr < 2; nr++)
		r->actors[nr].steps = ~0ul;
	check(self, 20);
}

static bool page_out_or_read(struct actor *a)
{
	return a->steps % 2 ? read_tables(a) : page_out(a);
}

static bool protect_and_lock(struct actor *a)
{
	struct race *r = a->race;
	char *part = r->mem + rnd(a, NR_TABLES) * TABLE_SIZE + rnd(a, 2) * TABLE_SIZE / 2;

	/* Not what would make an owner's write fail. */
	mprotect(part, TABLE_SIZE / 2, PROT_READ | PROT_WRITE | (a->steps % 2 ? PROT_EXEC : 0));
	mlock(part, 16 * PAGE);
	munlock(part, 16 * PAGE);
	return true;
}

TEST_F_TIMEOUT(file_race, readers_reclaim_and_writers_of_the_mm, TIMEOUT)
{
	add(&self->r, own_file_pages);
	add(&self->r, punch_strangers);
	add(&self->r, page_out_or_read);
	add(&self->r, protect_and_lock);
	add(&self->r, pin_pages);
	run(&self->r, 5);
	check(self, 5);
}

/*
 * The background pass takes mms that are about to go: of processes that exit, that
 * exec, and whose memory a vfork child borrows, while its controls are written.
 */
static bool write_control(const char *name, const char *text)
{
	char path[64];

	snprintf(path, sizeof(path), PT_CONTROL "%s", name);
	return pt_write_file(path, text);
}

/* Not so often that no pass gets to start: a new period starts with each. */
static bool write_controls(struct actor *a)
{
	static const char * const controls[][2] = {
		{ "background", "0" }, { "background", "1" }, { "period_ms", "1000" },
		{ "zeropages", "1" }, { "background", "1" }, { "zeropages", "0" },
	};
	const char * const *control = controls[a->steps % ARRAY_SIZE(controls)];

	usleep(rnd(a, 1500) * 1000);
	return write_control(control[0], control[1]) ||
	       lost(a->race, "%s: %s", control[0], strerror(errno));
}

static void end_somehow(struct actor *a)
{
	pid_t pid;

	switch (rnd(a, 4)) {
	case 0:
		execl("/bin/true", "true", NULL);
		_exit(1);
	case 1:
		pid = vfork();
		if (!pid) {
			execl("/bin/true", "true", NULL);
			_exit(1);
		}
		_exit(pid < 0 || waitpid(pid, NULL, 0) != pid);
	case 2:
		/* A pass or two, and gone in the middle of one, perhaps. */
		usleep(rnd(a, 2500) * 1000);
	}
	_exit(0);
}

/* The child of one step ends in the next, so that there are always two of them. */
static bool live_and_die(struct actor *a)
{
	struct race *r = a->race;
	int status = 0;
	pid_t pid, old = a->child;

	pid = fork();
	if (pid < 0)
		return lost(r, "fork: %s", strerror(errno));
	if (!pid) {
		for (int t = 0; t < NR_TABLES; t++)
			pt_load(word(r, t * NR_ENTRIES + 15));
		madvise(r->mem, SIZE, MADV_PAGEOUT);
		end_somehow(a);
	}
	a->child = pid;
	if (old && (waitpid(old, &status, 0) != old || status))
		return lost(r, "a child ended with status %x", status);
	return true;
}

/* Unmaps by reclaim what is mapped of the file; a page may be in use for a moment. */
static bool page_out_all(struct race *r, size_t page)
{
	bool mapped = true;

	for (int tries = 0; mapped && tries < 50; tries++) {
		madvise(r->mem, SIZE, MADV_PAGEOUT);
		mapped = false;
		for (int t = 0; t < NR_TABLES; t++)
			mapped |= pt_pagemap(word(r, t * NR_ENTRIES + page)) >> 63;
		usleep(20000);
	}
	return !mapped;
}

static bool is_at_most(void *kb)
{
	return pt_vmpte_kb(0) <= *(long *)kb;
}

TEST_F_TIMEOUT(file_race, background, TIMEOUT)
{
	struct race *r = &self->r;
	long kb;

	if (!write_control("period_ms", "1000"))
		SKIP(return, PT_CONTROL "period_ms: %s", strerror(errno));
	add(r, live_and_die);
	add(r, live_and_die);
	add(r, own_file_pages);
	add(r, page_out_or_read);
	add(r, write_controls);
	/* Passes are a second apart. */
	run(r, 6);
	check_progress(self, 6);
	for (int nr = 0; nr < 2; nr++)
		waitpid(r->actors[nr].child, NULL, 0);

	/* And what is left over goes, too: clean pages of the file that nobody wants. */
	EXPECT_TRUE(write_control("zeropages", "0"));
	EXPECT_TRUE(write_control("background", "1"));
	discard(r, 0, SIZE / PAGE);
	kb = pt_vmpte_kb(0);
	for (int t = 0; t < NR_TABLES; t++)
		pt_load(word(r, t * NR_ENTRIES + 15));
	EXPECT_LT(kb, pt_vmpte_kb(0));
	EXPECT_TRUE(write_control("period_ms", "1000"));
	if (!page_out_all(r, 15))
		SKIP(return, "no swap, it seems: reclaim does not unmap the file's pages");
	EXPECT_TRUE(pt_wait_until(is_at_most, &kb, 30));
	EXPECT_TRUE(write_control("period_ms", "10000"));
}

/*
 * Upper tables: a few GiB with a few pages in each, so that PMD tables come and go all
 * the time, and the PUD table as well.
 */
#define NR_GIBS		4
#define GIB		(NR_ENTRIES * TABLE_SIZE)
#define GIBS_SIZE	(NR_GIBS * GIB)

FIXTURE(upper_race) {
	struct race r;
};

FIXTURE_VARIANT(upper_race) {
	bool shared, huge;
};

FIXTURE_VARIANT_ADD(upper_race, anon) {
	.shared = false,
};

FIXTURE_VARIANT_ADD(upper_race, huge) {
	.huge = true,
};

FIXTURE_VARIANT_ADD(upper_race, shmem) {
	.shared = true,
};

FIXTURE_SETUP(upper_race)
{
	struct race *r = &self->r;

	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	pt_settle();
	pt_set_paced(false);
	memset(r, 0, sizeof(*r));
	r->uffd = -1;
	r->fd = -1;
	if (variant->shared) {
		r->fd = memfd_create("pt_reclaim_race", 0);
		ASSERT_GE(r->fd, 0);
		ASSERT_EQ(0, ftruncate(r->fd, GIBS_SIZE));
	}
	/* Nobody else has a part in these 512 GiB. */
	r->mem = mmap((char *)(16 * NR_ENTRIES * GIB), GIBS_SIZE, PROT_READ | PROT_WRITE,
		      MAP_FIXED_NOREPLACE | MAP_NORESERVE |
		      (variant->shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS), r->fd, 0);
	ASSERT_NE(MAP_FAILED, r->mem);
	madvise(r->mem, GIBS_SIZE, variant->huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	count_freed(r, "pt_reclaim_pmd");
}

FIXTURE_TEARDOWN(upper_race)
{
	pt_set_paced(true);
	munmap(self->r.mem, GIBS_SIZE);
	if (self->r.fd >= 0)
		close(self->r.fd);
}

/*
 * A page of an actor's own, and with huge pages a table of its own: one of two tables
 * for it in each GiB.
 */
static size_t far_page(struct actor *a)
{
	size_t first = rnd(a, 2) ? NR_ENTRIES - MAX_THREADS : 0;
	size_t table = rnd(a, NR_GIBS) * NR_ENTRIES + first + a->nr;

	return table * NR_ENTRIES + rnd(a, 4) * (NR_ENTRIES / 4);
}

/* All that the table of a page maps. */
static bool discard_table(struct race *r, size_t page)
{
	return discard(r, page / NR_ENTRIES * NR_ENTRIES, NR_ENTRIES);
}

/* Writes it, finds what it wrote, and discards all of the table. */
static bool own_far_page(struct actor *a)
{
	struct race *r = a->race;
	size_t page = far_page(a);
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (rnd(a, 4) == 0)
		sched_yield();
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	if (r->fd >= 0 && rnd(a, 2))
		return !fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  page / NR_ENTRIES * TABLE_SIZE, TABLE_SIZE) ||
		       lost(r, "fallocate: %s", strerror(errno));
	return discard_table(r, page);
}

static bool trim_upper(struct actor *a)
{
	sched_yield();
	return !madvise(a->race->mem, GIBS_SIZE, MADV_TRIM_TABLES) ||
	       lost(a->race, "MADV_TRIM_TABLES: %s", strerror(errno));
}

/*
 * To another node, whoever has it: by the rmap, under none of the locks of those who have
 * it but us.
 */
static void move_page(void *where, int node)
{
	int status;

	syscall(SYS_move_pages, 0, 1, &where, &node, &status, 4 /* MPOL_MF_MOVE_ALL */);
}

static bool fork_far_page(struct actor *a)
{
	struct race *r = a->race;
	size_t page = far_page(a);
	int status;
	pid_t pid;

	*word(r, page) = a->seed;
	pid = fork();
	if (pid < 0)
		return lost(r, "fork: %s", strerror(errno));
	if (!pid) {
		if (*word(r, page) != a->seed)
			_exit(1);
		move_page(word(r, page), a->seed % 2);
		madvise(r->mem, GIBS_SIZE, MADV_DONTNEED);
		madvise(r->mem, GIBS_SIZE, MADV_TRIM_TABLES);
		_exit(r->fd >= 0 && *word(r, page) != a->seed);
	}
	if (waitpid(pid, &status, 0) != pid || status)
		return lost(r, "page %zu: the child ended with status %x", page, status);
	return discard_table(r, page);
}

/* Walks, and the rmap's walks. */
static bool look_from_afar(struct actor *a)
{
	struct race *r = a->race;
	size_t page = far_page(a);
	unsigned long value = ((unsigned long)a->seed << 20) | 1, copy = 0;
	struct iovec to = { &copy, sizeof(copy) }, from = { word(r, page), sizeof(copy) };

	*word(r, page) = value;
	if (rnd(a, 2))
		madvise(word(r, page), PAGE, MADV_PAGEOUT);
	if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != sizeof(copy) || copy != value)
		return lost(r, "page %zu: %lx was read, %lx written", page, copy, value);
	madvise(r->mem + rnd(a, NR_GIBS) * GIB, GIB, rnd(a, 2) ? MADV_COLD : MADV_PAGEOUT);
	pt_pagemap(word(r, page));
	if (rnd(a, 8) == 0)
		madvise(word(r, page / NR_ENTRIES * NR_ENTRIES), TABLE_SIZE, MADV_COLLAPSE);
	if (*word(r, page) != value)
		return lost(r, "page %zu: %lx, and %lx was written", page, *word(r, page), value);
	return discard_table(r, page);
}

/*
 * Splits the VMA where others are at work, moves the last GiB out of it and back, and
 * whole tables with it.
 */
static bool move_gib(struct actor *a)
{
	struct race *r = a->race;
	char *aside = r->mem + (NR_ENTRIES - 2) * GIB, *home = r->mem + (NR_GIBS - 1) * GIB;
	char *split = home - GIB + NR_ENTRIES / 2 * TABLE_SIZE;

	if (rnd(a, 2)) {
		mprotect(split, TABLE_SIZE, PROT_READ);
		sched_yield();
		mprotect(split, TABLE_SIZE, PROT_READ | PROT_WRITE);
		return true;
	}
	*word(r, (home - r->mem) / PAGE + a->nr * NR_ENTRIES) = a->seed;
	if (mremap(home, GIB, GIB, MREMAP_MAYMOVE | MREMAP_FIXED, aside) != aside)
		return lost(r, "mremap: %s", strerror(errno));
	if (*(unsigned long *)(aside + a->nr * TABLE_SIZE) != a->seed)
		return lost(r, "%x moved away, %lx came", a->seed,
			    *(unsigned long *)(aside + a->nr * TABLE_SIZE));
	madvise(aside, GIB, MADV_TRIM_TABLES);
	if (mremap(aside, GIB, GIB, MREMAP_MAYMOVE | MREMAP_FIXED, home) != home)
		return lost(r, "mremap back: %s", strerror(errno));
	if (*(unsigned long *)(home + a->nr * TABLE_SIZE) != a->seed)
		return lost(r, "%x moved back, %lx came", a->seed,
			    *(unsigned long *)(home + a->nr * TABLE_SIZE));
	return discard_table(r, (home - r->mem) / PAGE + a->nr * NR_ENTRIES);
}

TEST_F_TIMEOUT(upper_race, refill, TIMEOUT)
{
	add(&self->r, own_far_page);
	add(&self->r, own_far_page);
	add(&self->r, trim_upper);
	add(&self->r, own_far_page);
	run(&self->r, 20);
	check(self, 20);
}

TEST_F_TIMEOUT(upper_race, fork_and_rmap, TIMEOUT)
{
	add(&self->r, own_far_page);
	add(&self->r, fork_far_page);
	add(&self->r, trim_upper);
	add(&self->r, look_from_afar);
	run(&self->r, 2);
	check(self, 2);
}

/* In the GiB that moves there is nobody but who moves it. */
static bool own_page_that_stays(struct actor *a)
{
	struct race *r = a->race;
	size_t page = far_page(a) % ((NR_GIBS - 1) * GIB / PAGE);
	unsigned long value = ((unsigned long)a->seed << 20) | 1;

	*word(r, page) = value;
	if (*word(r, page) != value)
		return lost(r, "page %zu: wrote %lx, found %lx", page, value, *word(r, page));
	return discard_table(r, page);
}

static bool trim_what_is_there(struct actor *a)
{
	sched_yield();
	madvise(a->race->mem, GIBS_SIZE, MADV_TRIM_TABLES);	/* a part may be away */
	return true;
}

TEST_F_TIMEOUT(upper_race, mremap_and_mprotect, TIMEOUT)
{
	add(&self->r, own_page_that_stays);
	add(&self->r, move_gib);
	add(&self->r, trim_what_is_there);
	run(&self->r, 5);
	check(self, 5);
}

TEST_HARNESS_MAIN
