// SPDX-License-Identifier: GPL-2.0
/*
 * Page tables that a discard frees, where memory for them is short.
 *
 * limit: page tables are charged to the memory cgroup.  A process that plugs and
 * unplugs by pieces smaller than a table must fit into a limit that the tables it
 * would leave behind exceed several times over; it is killed where they stay.
 *
 * progress: a table that goes must be charged again by whoever comes next, and the
 * limit may say no.  Whoever works in memory that others discard gets on all the
 * same.
 *
 * inject: every single allocation of an operation fails once (fail-nth), with the
 * table that the operation needs freed by a discard before.
 *
 * Root only; what cannot be arranged is skipped, with the reason.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "pt_uffd.h"
#include "pt_util.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED 0x2000
#endif
#ifndef UFFDIO_MOVE
#define UFFD_FEATURE_MOVE 0x10000
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
struct uffdio_move {
	__u64 dst;
	__u64 src;
	__u64 len;
	__u64 mode;
	__s64 move;
};
#endif

#define PAGE		4096ul
#define NR_ENTRIES	512
#define TABLE_SIZE	(NR_ENTRIES * PAGE)
#define TABLE_KB	4
#define KILO		1024l

/* Said by a process that cannot use the harness, for want of memory or of a name. */
struct verdict {
	char text[160];		/* what went wrong, if anything */
};

/* Returns false, for those who return whether all is well; the first word counts. */
static bool __printf(2, 3)
wrong(struct verdict *verdict, const char *format, ...)
{
	va_list args;

	if (verdict->text[0])
		return false;
	va_start(args, format);
	vsnprintf(verdict->text, sizeof(verdict->text), format, args);
	va_end(args);
	return false;
}

/*
 * What the program changes of the machine: made by main() before the first test, and
 * undone by main() after the last one, whatever became of the tests.
 */
static pid_t owner;		/* main(), and none of its children */

/* One memory cgroup, which each test makes for itself. */
static struct {
	char skip[128];		/* why there is none */
	char root[128];		/* where cgroup2 is mounted */
	char dir[192];
	char home[4096];	/* the cgroup.procs of where this program was started */
	bool mounted, enabled;	/* by us */
} group;

static bool group_write(const char *name, const char *text)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", group.dir, name);
	return pt_write_file(path, text);
}

/* A number of one of the group's files: of the line @field, or the only one. */
static long group_read(const char *name, const char *field)
{
	char path[256], text[16384];

	snprintf(path, sizeof(path), "%s/%s", group.dir, name);
	if (pt_read_file(path, text, sizeof(text)) < 0)
		return -1;
	return field ? pt_field(text, field) : strtol(text, NULL, 10);
}

static bool group_is_gone(void *arg __maybe_unused)
{
	return !rmdir(group.dir) || errno == ENOENT;
}

/* Whoever is left in it is killed, and takes a moment to go. */
static void group_remove(void)
{
	group_write("cgroup.kill", "1");
	pt_wait_until(group_is_gone, NULL, 10);
}

static bool group_make(void)
{
	group_remove();
	/* No swap: what is over the limit has no place to go. */
	return !mkdir(group.dir, 0755) &&
	       (group_write("memory.swap.max", "0") || errno == ENOENT);
}

static bool group_limit(long kb)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", kb * KILO);
	return group_write("memory.max", text);
}

/* Pages come and go on every CPU, for whatever group this process is in. */
#define STIR_PAGES	256	/* on each; the kernel sums up after 64, times CPUs */

static bool stir(int fd)
{
	static const char page[PAGE];
	cpu_set_t all, one;
	bool ok = true;

	if (sched_getaffinity(0, sizeof(all), &all))
		return false;
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		ok &= !sched_setaffinity(0, sizeof(one), &one);
		for (int i = 0; i < STIR_PAGES; i++)
			ok &= pwrite(fd, page, PAGE, i * PAGE) == (ssize_t)PAGE;
		ok &= !ftruncate(fd, 0);
	}
	return !sched_setaffinity(0, sizeof(all), &all) && ok;
}

/*
 * Have the kernel sum up the group's statistics.  By itself it does so every two
 * seconds, but not while the CPU whose timer that is has nothing to do; and what a CPU
 * counted while others summed up may wait until that CPU counts again.  The first
 * round, outside, brings the page tables that this process itself still wants.
 */
static bool group_sum_up(void)
{
	int fd = memfd_create("stir", MFD_CLOEXEC);
	bool ok = fd >= 0 && stir(fd) && group_write("memory.max", "max") &&
		  group_write("cgroup.procs", "0");

	ok = ok && stir(fd);
	ok = pt_write_file(group.home, "0") && ok;
	if (fd >= 0)
		close(fd);
	return ok;
}

static bool group_has_no_tables(void *arg __maybe_unused)
{
	return group_sum_up() && group_read("memory.stat", "pagetables") == 0;
}

/*
 * All processes of the group are gone: so are all tables that were charged to it, after
 * a grace period.  What is left was leaked, and in whatever mm.
 */
static bool group_leaked_nothing(void)
{
	if (pt_wait_until(group_has_no_tables, NULL, 10))
		return true;
	fprintf(stderr, "# %ld bytes of page tables are left\n",
		group_read("memory.stat", "pagetables"));
	return false;
}

/* Where this process is when it is not in the group. */
static bool find_home(void)
{
	char text[4096], *path;

	if (pt_read_file("/proc/self/cgroup", text, sizeof(text)) < 0)
		return false;
	path = strstr(text, "0::/");
	if (!path)
		return false;
	path += strlen("0::");
	path[strcspn(path, "\n")] = '\0';
	return snprintf(group.home, sizeof(group.home), "%s%s/cgroup.procs", group.root,
			path) < (int)sizeof(group.home);
}

static bool find_cgroup2(char *where, size_t len)
{
	static char mounts[65536];
	char *line, *type;

	if (pt_read_file("/proc/mounts", mounts, sizeof(mounts)) < 0)
		return false;
	type = strstr(mounts, " cgroup2 ");
	if (!type)
		return false;
	*type = '\0';
	line = strrchr(mounts, '\n');
	snprintf(where, len, "%s", strchr(line ? line : mounts, ' ') + 1);
	return true;
}

static bool mount_cgroup2(void)
{
	char where[] = "/tmp/pt_reclaim_cgroup.XXXXXX";

	if (!mkdtemp(where))
		return false;
	if (mount("cgroup2", where, "cgroup2", 0, NULL)) {
		rmdir(where);
		return false;
	}
	snprintf(group.root, sizeof(group.root), "%s", where);
	group.mounted = true;
	return true;
}

static bool has_word(const char *path, const char *word)
{
	char text[256];

	return pt_read_file(path, text, sizeof(text)) > 0 && strstr(text, word);
}

static void prepare_group(void)
{
	char path[192];

	if (geteuid()) {
		snprintf(group.skip, sizeof(group.skip), "a memory cgroup takes root");
		return;
	}
	if (!find_cgroup2(group.root, sizeof(group.root)) && !mount_cgroup2()) {
		snprintf(group.skip, sizeof(group.skip), "no cgroup2: %s", strerror(errno));
		return;
	}
	snprintf(group.dir, sizeof(group.dir), "%s/pt_reclaim_pressure.%d", group.root, owner);
	if (!find_home()) {
		snprintf(group.skip, sizeof(group.skip), "where it is in cgroup2 is unknown");
		return;
	}
	snprintf(path, sizeof(path), "%s/cgroup.controllers", group.root);
	if (!has_word(path, "memory")) {
		snprintf(group.skip, sizeof(group.skip), "cgroup2 has no memory controller");
		return;
	}
	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", group.root);
	if (has_word(path, "memory"))
		return;
	group.enabled = pt_write_file(path, "+memory");
	if (!group.enabled)
		snprintf(group.skip, sizeof(group.skip), "no memory controller for groups: %s",
			 strerror(errno));
}

static void undo_group(void)
{
	char path[192];

	if (group.dir[0])
		group_remove();
	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", group.root);
	if (group.enabled)
		pt_write_file(path, "-memory");
	if (group.mounted && !umount(group.root))
		rmdir(group.root);
}

/*
 * Allocations of every kind may fail, but only those of a task that asks by fail-nth:
 * the probability for all others stays 0.  None of them says so on the console.
 */
#define DEBUGFS "/sys/kernel/debug/"

static const struct {
	const char *path, *value;
} knobs[] = {
	{ DEBUGFS "fail_page_alloc/ignore-gfp-wait", "N" },
	{ DEBUGFS "fail_page_alloc/ignore-gfp-highmem", "N" },
	{ DEBUGFS "fail_page_alloc/min-order", "0" },
	{ DEBUGFS "fail_page_alloc/verbose", "0" },
	{ DEBUGFS "failslab/ignore-gfp-wait", "N" },
	{ DEBUGFS "failslab/verbose", "0" },
};

static char knobs_before[ARRAY_SIZE(knobs)][32];
static char no_injection[128];	/* why not */

static void prepare_injection(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++) {
		if (pt_read_file(knobs[i].path, knobs_before[i], sizeof(knobs_before[i])) > 0 &&
		    pt_write_file(knobs[i].path, knobs[i].value))
			continue;
		snprintf(no_injection, sizeof(no_injection), "no fault injection: %s: %s",
			 knobs[i].path, strerror(errno));
		return;
	}
	if (access("/proc/self/fail-nth", W_OK))
		snprintf(no_injection, sizeof(no_injection),
			 "no fault injection: /proc/self has no fail-nth");
}

static void undo_injection(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++) {
		if (knobs_before[i][0])
			pt_write_file(knobs[i].path, knobs_before[i]);
	}
}

static void undo_everything(void)
{
	if (getpid() != owner)
		return;
	undo_injection();
	undo_group();
}

static void killed(int signal)
{
	undo_everything();
	_exit(128 + signal);
}

/* Runs @work in a child that is a member of the group; returns its pid. */
static pid_t start_member(bool (*work)(void *arg), void *arg)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	if (!group.skip[0] && !group_write("cgroup.procs", "0"))
		_exit(100);
	_exit(work(arg) ? 0 : 1);
}

static char *map_anon(char *where, size_t size)
{
	char *mem = mmap(where, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS |
			 MAP_NORESERVE | (where ? MAP_FIXED : 0), -1, 0);

	if (mem != MAP_FAILED)
		madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static char *map_shared(char *where, size_t size, int fd)
{
	char *mem = mmap(where, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE |
			 (where ? MAP_FIXED : 0), fd, 0);

	if (mem != MAP_FAILED)
		madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static int memory_file(size_t size)
{
	int fd = memfd_create("pt_reclaim_pressure", MFD_CLOEXEC);

	if (fd >= 0 && ftruncate(fd, size)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static bool punch(int fd, size_t offset, size_t len)
{
	return !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, len);
}

static bool discard(char *mem, size_t len)
{
	return !madvise(mem, len, MADV_DONTNEED);
}

/*
 * A sparse device: blocks of the size of a table with one page in use.  Some stay
 * plugged.  Stock leaves a table for each block, and one in the second process.
 */
#define LIMIT_KB	(4 * KILO)
#define KEEP_EACH	64	/* blocks, of which one stays plugged */
#define ROUND		32	/* blocks that both processes have at a time */

/* Seconds.  It takes a few in an emulated debug kernel. */
#define LIMIT_TIMEOUT	120

struct device {
	size_t blocks, piece;
	bool shared;
	struct verdict *verdict;
	char *mem;
	int fd;
	int request, answer;	/* ends of pipes to the other process */
};

FIXTURE(limit) {
	struct verdict verdict;	/* of all processes: this is shared memory */
};

FIXTURE_VARIANT(limit) {
	size_t blocks, piece;	/* bytes that one call discards */
	bool shared;
};

/* 16 MiB of tables, of one process or of two. */
FIXTURE_VARIANT_ADD(limit, anon_page) {
	.blocks = 4096,
	.piece = PAGE,
};

FIXTURE_VARIANT_ADD(limit, anon_half_table) {
	.blocks = 4096,
	.piece = TABLE_SIZE / 2,
};

FIXTURE_VARIANT_ADD(limit, memfd_two_processes) {
	.blocks = 2048,
	.piece = PAGE,
	.shared = true,
};

FIXTURE_SETUP(limit)
{
	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	if (group.skip[0])
		SKIP(return, "%s", group.skip);
	ASSERT_TRUE(group_make());
}

FIXTURE_TEARDOWN_PARENT(limit)
{
	if (!group.skip[0])
		group_remove();
}

static unsigned long *page_of(struct device *dev, size_t block)
{
	return (unsigned long *)(dev->mem + block * TABLE_SIZE + block * 37 % NR_ENTRIES * PAGE);
}

/* Discards the piece that holds the page of a block, and no other. */
static bool unplug(struct device *dev, size_t block)
{
	size_t offset = (char *)page_of(dev, block) - dev->mem;

	offset -= offset % dev->piece;
	if (dev->shared ? punch(dev->fd, offset, dev->piece) :
			  discard(dev->mem + offset, dev->piece))
		return true;
	return wrong(dev->verdict, "unplugging block %zu: %s", block, strerror(errno));
}

static bool has_words(struct device *dev, size_t first, size_t nr, size_t step)
{
	for (size_t block = first; block < first + nr; block += step) {
		if (pt_load(page_of(dev, block)) != block + 1)
			return wrong(dev->verdict, "block %zu has %lx", block,
				     pt_load(page_of(dev, block)));
	}
	return true;
}

/* The second process reads what the first one plugged, by tables of its own. */
static bool read_along(struct device *dev)
{
	size_t first;

	while (read(dev->request, &first, sizeof(first)) == sizeof(first)) {
		if (!has_words(dev, first, ROUND, 1) ||
		    write(dev->answer, &first, sizeof(first)) != sizeof(first))
			return false;
	}
	return true;
}

static bool start_reader(struct device *dev)
{
	int ask[2], tell[2];
	pid_t pid;

	if (pipe(ask) || pipe(tell))
		return wrong(dev->verdict, "pipe: %s", strerror(errno));
	pid = fork();
	if (pid < 0)
		return wrong(dev->verdict, "fork: %s", strerror(errno));
	dev->request = pid ? ask[1] : ask[0];
	dev->answer = pid ? tell[0] : tell[1];
	close(pid ? ask[0] : ask[1]);
	close(pid ? tell[1] : tell[0]);
	if (!pid)
		_exit(!read_along(dev));
	return true;
}

static bool shown_to_reader(struct device *dev, size_t first)
{
	if (!dev->shared)
		return true;
	if (write(dev->request, &first, sizeof(first)) == sizeof(first) &&
	    read(dev->answer, &first, sizeof(first)) == sizeof(first))
		return true;
	return wrong(dev->verdict, "the second process is gone at block %zu", first);
}

/*
 * A table that was freed is charged until a grace period is over, some 30 ms or less.
 * On a fast machine a loop without a break would have more tables on the way than fit
 * into the limit, on any kernel that frees them at all; a device has its breaks.
 */
static bool plug_and_unplug(struct device *dev, size_t first)
{
	for (size_t block = first; block < first + ROUND; block++)
		pt_store(page_of(dev, block), block + 1);
	if (!shown_to_reader(dev, first))
		return false;
	for (size_t block = first; block < first + ROUND; block++) {
		if (block % KEEP_EACH && !unplug(dev, block))
			return false;
	}
	usleep(4000);
	return true;
}

static bool map_device(struct device *dev)
{
	size_t size = dev->blocks * TABLE_SIZE;

	dev->fd = dev->shared ? memory_file(size) : -1;
	/* A table more, to begin where a table begins. */
	dev->mem = map_anon(NULL, size + TABLE_SIZE);
	if (dev->mem == MAP_FAILED)
		return wrong(dev->verdict, "mmap: %s", strerror(errno));
	dev->mem = (char *)(((unsigned long)dev->mem + TABLE_SIZE - 1) & -TABLE_SIZE);
	if (dev->shared && map_shared(dev->mem, size, dev->fd) != dev->mem)
		return wrong(dev->verdict, "mapping the memfd: %s", strerror(errno));
	return !dev->shared || start_reader(dev);
}

static bool run_device(void *arg)
{
	struct device *dev = arg;
	long before, kb, bound;

	/* First, for it would populate the device as well. */
	pt_settle();
	if (!map_device(dev))
		return false;
	before = pt_vmpte_kb(0);
	for (size_t first = 0; first < dev->blocks; first += ROUND) {
		if (!plug_and_unplug(dev, first))
			return false;
	}
	/* What is plugged; a PMD table for each GiB and part of one; a PUD table or two. */
	bound = (dev->blocks / KEEP_EACH + dev->blocks / NR_ENTRIES + 1 + 2) * TABLE_KB;
	kb = pt_vmpte_kb(0) - before;
	if (kb > bound)
		return wrong(dev->verdict, "%ld kB of page tables, %ld needed", kb, bound);
	return has_words(dev, 0, dev->blocks, KEEP_EACH);
}

TEST_F_TIMEOUT(limit, plug_and_unplug, LIMIT_TIMEOUT)
{
	struct device dev = {
		.blocks = variant->blocks,
		.piece = variant->piece,
		.shared = variant->shared,
		.verdict = &self->verdict,
	};
	long tables_kb = dev.blocks * (dev.shared ? 2 : 1) * TABLE_KB;
	int status;
	pid_t pid;

	/* Otherwise a kernel that leaves all tables behind would pass. */
	ASSERT_LE(4 * LIMIT_KB, tables_kb);
	ASSERT_TRUE(group_limit(LIMIT_KB));
	pid = start_member(run_device, &dev);
	ASSERT_GT(pid, 0);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	TH_LOG("limit %ld kB, peak %ld kB, %ld times at the limit; tables for all: %ld kB",
	       LIMIT_KB, group_read("memory.peak", NULL) / KILO,
	       group_read("memory.events", "max"), tables_kb);
	EXPECT_STREQ("", self->verdict.text);
	EXPECT_EQ(0, status) {
		TH_LOG("wait status %x (9: killed)", status);
	}
	EXPECT_EQ(0, group_read("memory.events", "oom_kill"));
	EXPECT_LT(0, group_read("memory.peak", NULL));
	EXPECT_GE(LIMIT_KB * KILO, group_read("memory.peak", NULL));
}

/*
 * One page, over and over.  Its table is one at a time, and whatever is on its way out
 * must fit into the limit.
 */
#define LOOP_ROUNDS	20000
#define LOOP_LIMIT_KB	1024l

static bool run_loop(void *arg)
{
	struct verdict *verdict = arg;
	char *mem = map_anon(NULL, 2 * TABLE_SIZE);

	if (mem == MAP_FAILED)
		return wrong(verdict, "mmap: %s", strerror(errno));
	mem = (char *)(((unsigned long)mem + TABLE_SIZE - 1) & -TABLE_SIZE);
	for (int i = 0; i < LOOP_ROUNDS; i++) {
		pt_store(mem, (char)1);
		if (!discard(mem, PAGE))
			return wrong(verdict, "MADV_DONTNEED: %s", strerror(errno));
	}
	return true;
}

TEST_F_TIMEOUT(limit, loop, LIMIT_TIMEOUT)
{
	int status;
	pid_t pid;

	if (variant->shared || variant->piece != PAGE)
		SKIP(return, "one page of anonymous memory");
	ASSERT_TRUE(group_limit(LOOP_LIMIT_KB));
	pid = start_member(run_loop, &self->verdict);
	ASSERT_GT(pid, 0);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	TH_LOG("peak %ld kB, %ld times at the limit", group_read("memory.peak", NULL) / KILO,
	       group_read("memory.events", "max"));
	EXPECT_STREQ("", self->verdict.text);
	EXPECT_EQ(0, status);
	EXPECT_EQ(0, group_read("memory.events", "oom_kill"));
}

/*
 * Who works in memory that is discarded all the time has to charge the tables again
 * that the discards freed, while those are still charged until a grace period is over.
 * The limit is what the workers have at most, all at once, so that they fit, and what is
 * on its way out does not: "max" of memory.events tells how often.  From time to time
 * the limit is 0, until some charges failed for good.
 *
 * What may be asked of the kernel then?  Not that no charge fails, nor that nobody is
 * killed: when reclaim finds nothing, the answer is the OOM killer, which does not know
 * of grace periods.  But whoever is refused must have lost nothing, and since what he
 * waits for comes back by itself, whoever tries again must get through.  A page fault
 * that is retried for ever, because the table that it had charged went before its page
 * was charged, would be a livelock.
 *
 * So nobody can be killed, charges fail and page faults are retried; calls that were
 * refused for want of memory are tried again, and no worker may take longer than STALL
 * for any step.  The second test is of the OOM killer: the victims must be gone in that
 * time, and leave no table behind.
 */
#define NR_THREADS	5
#define NR_WORKERS	7	/* the last two are processes */
#define WORK_TABLES	8
#define WORK_SIZE	(WORK_TABLES * TABLE_SIZE)
#define LEAST_STEPS	3	/* of each worker before and after each squeeze */
#define SQUEEZES	4	/* times that the limit is 0 */
#define LEAST_FAILURES	3	/* charges that fail for good in each of them */
#define LEAST_AT_LIMIT	10	/* charges that failed at first, with room for all in use */
#define SLACK_KB	32	/* for odds and ends, such as the userfaultfds */
#define STALL		20	/* seconds that one step may take */
#define PROGRESS_TIMEOUT 200

/* Seen by the test and by the processes of the group. */
struct work_state {
	struct verdict verdict;
	int phase;		/* enum work_phase */
	int holding;		/* processes that hold what they will have */
	unsigned long steps[NR_WORKERS], refused[NR_WORKERS];
};

enum work_phase {
	WORK_STARTS,		/* to hold everything that it will have at once */
	WORK_IS_READY,		/* to be measured */
	WORK_IS_LIMITED,	/* to that */
	WORK_RUNS,
	WORK_STOPS,
};

struct worker {
	struct work_state *state;
	bool (*step)(struct worker *w);	/* to its end; false: something is wrong */
	unsigned int nr;
	unsigned long word;	/* of this step */
	char *mem;		/* WORK_SIZE bytes, aligned to a table */
	int fd, uffd;
	pthread_t thread;
};

FIXTURE(progress) {
	struct work_state state;
};

FIXTURE_SETUP(progress)
{
	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	if (group.skip[0])
		SKIP(return, "%s", group.skip);
	ASSERT_TRUE(group_make());
	/* As many tables as possible on their way out. */
	pt_set_paced(false);
}

FIXTURE_TEARDOWN_PARENT(progress)
{
	pt_set_paced(true);
	if (!group.skip[0])
		group_remove();
}

static int phase_of(struct work_state *state)
{
	return __atomic_load_n(&state->phase, __ATOMIC_ACQUIRE);
}

static void set_phase(struct work_state *state, int phase)
{
	__atomic_store_n(&state->phase, phase, __ATOMIC_RELEASE);
}

/* One page of each table, at a place that only tells tables apart. */
static unsigned long *work_page(struct worker *w, size_t table)
{
	return (unsigned long *)(w->mem + table * TABLE_SIZE + (7 + 5 * table) * PAGE);
}

/* Was the last call refused for want of memory?  Then it is worth another try. */
static bool refused(struct worker *w, const char *what)
{
	if (errno != ENOMEM && errno != EAGAIN)
		return wrong(&w->state->verdict, "%s: %s", what, strerror(errno));
	__atomic_add_fetch(&w->state->refused[w->nr], 1, __ATOMIC_RELAXED);
	sched_yield();
	return phase_of(w->state) != WORK_STOPS;
}

static bool has_words_of_step(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++) {
		if (pt_load(work_page(w, t)) != w->word + t)
			return wrong(&w->state->verdict, "worker %u, table %zu: %lx, not %lx",
				     w->nr, t, pt_load(work_page(w, t)), w->word + t);
	}
	return true;
}

/* A discard has no reason to fail, least of all for want of memory. */
static bool discard_work(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++) {
		if (w->fd >= 0 ? !punch(w->fd, (char *)work_page(w, t) - w->mem, PAGE) :
				 !discard((char *)work_page(w, t), PAGE))
			return wrong(&w->state->verdict, "worker %u: a discard: %s", w->nr,
				     strerror(errno));
	}
	return true;
}

static bool fault_step(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++)
		pt_store(work_page(w, t), w->word + t);
	return has_words_of_step(w) && discard_work(w);
}

static bool populate_step(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++) {
		while (madvise(work_page(w, t), PAGE, MADV_POPULATE_WRITE)) {
			if (!refused(w, "MADV_POPULATE_WRITE"))
				return false;
		}
	}
	return fault_step(w);
}

static bool copy_step(struct worker *w)
{
	unsigned long source[PAGE / sizeof(unsigned long)] = { 0 };

	for (size_t t = 0; t < WORK_TABLES; t++) {
		struct uffdio_copy copy = {
			.dst = (unsigned long)work_page(w, t),
			.src = (unsigned long)source,
			.len = PAGE,
		};

		source[0] = w->word + t;
		while (ioctl(w->uffd, UFFDIO_COPY, &copy)) {
			if (!refused(w, "UFFDIO_COPY"))
				return false;
		}
	}
	return has_words_of_step(w) && discard_work(w);
}

static bool protect_range(int uffd, void *start, size_t len, bool protect)
{
	struct uffdio_writeprotect wp = {
		.range = { (unsigned long)start, len },
		.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	return !ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
}

/* Markers, which populate tables, and the tables that they leave when they go. */
static bool marker_step(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++) {
		while (!protect_range(w->uffd, work_page(w, t), PAGE, true)) {
			if (!refused(w, "UFFDIO_WRITEPROTECT"))
				return false;
		}
	}
	while (!protect_range(w->uffd, w->mem, WORK_SIZE, false)) {
		if (!refused(w, "unprotecting"))
			return false;
	}
	if (madvise(w->mem, WORK_SIZE, MADV_TRIM_TABLES))
		return wrong(&w->state->verdict, "MADV_TRIM_TABLES: %s", strerror(errno));
	return true;
}

/* The child is as likely a victim as we are: then it was refused, too. */
static bool fork_step(struct worker *w)
{
	int status;
	pid_t pid;

	for (size_t t = 0; t < WORK_TABLES; t++)
		pt_store(work_page(w, t), w->word + t);
	for (;;) {
		errno = 0;
		pid = fork();
		if (!pid)
			_exit(!has_words_of_step(w));
		if (pid > 0 && waitpid(pid, &status, 0) == pid) {
			if (!status)
				return discard_work(w);
			if (status != SIGKILL)
				return wrong(&w->state->verdict, "a child ended with %x", status);
			errno = ENOMEM;
		}
		if (!refused(w, "fork"))
			return false;
	}
}

static void *work(void *arg)
{
	struct worker *w = arg;

	/* Wait for the limit. */
	while (phase_of(w->state) < WORK_RUNS)
		usleep(1000);
	for (unsigned long nr = 1; phase_of(w->state) == WORK_RUNS; nr++) {
		w->word = nr << 20 | w->nr << 16;
		if (!w->step(w))
			break;
		__atomic_add_fetch(&w->state->steps[w->nr], 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static bool hire(struct worker *w, struct work_state *state, unsigned int nr)
{
	static bool (*const steps[NR_WORKERS])(struct worker *w) = {
		fault_step, populate_step, copy_step, marker_step, fork_step,
		fault_step, fault_step,
	};
	char *raw = map_anon(NULL, WORK_SIZE + TABLE_SIZE);

	if (raw == MAP_FAILED)
		return wrong(&state->verdict, "mmap: %s", strerror(errno));
	*w = (struct worker) { .state = state, .nr = nr, .step = steps[nr], .fd = -1, .uffd = -1 };
	w->mem = (char *)(((unsigned long)raw + TABLE_SIZE - 1) & -TABLE_SIZE);
	/* The last one does as the one before, and punches holes. */
	if (nr == NR_WORKERS - 1)
		w->fd = memory_file(WORK_SIZE);
	if (w->fd >= 0 && map_shared(w->mem, WORK_SIZE, w->fd) == MAP_FAILED)
		return wrong(&state->verdict, "mapping a memfd: %s", strerror(errno));
	return true;
}

static void touch_work(struct worker *w)
{
	for (size_t t = 0; t < WORK_TABLES; t++)
		pt_store(work_page(w, t), 1ul);
}

/*
 * A process of one thread, which flushes no TLB but its own, discards much faster than
 * threads do: it is for these to see to it that the limit is reached.
 */
static bool start_process(struct worker *w)
{
	pid_t pid = fork();

	if (pid)
		return pid > 0 || wrong(&w->state->verdict, "fork: %s", strerror(errno));
	touch_work(w);
	__atomic_add_fetch(&w->state->holding, 1, __ATOMIC_RELEASE);
	work(w);
	_exit(0);
}

/* Not before all is held: whoever populates it would wait for ever. */
static bool arm_userfaultfd(struct worker *w)
{
	unsigned long long mode = w->step == copy_step ? UFFDIO_REGISTER_MODE_MISSING :
							 UFFDIO_REGISTER_MODE_WP;

	if (w->step != copy_step && w->step != marker_step)
		return true;
	w->uffd = pt_uffd(w->step == copy_step ? 0 : UFFD_FEATURE_PAGEFAULT_FLAG_WP |
						      UFFD_FEATURE_WP_UNPOPULATED);
	return (w->uffd >= 0 && pt_uffd_register(w->uffd, w->mem, WORK_SIZE, mode)) ||
	       wrong(&w->state->verdict, "userfaultfd: %s", strerror(errno));
}

/*
 * Has everything at once that the workers will have, a child of fork() included, while
 * the test reads how much that is and makes it the limit.
 */
static bool hold_everything(struct worker *workers, struct work_state *state)
{
	pid_t pid;

	for (int i = 0; i < NR_THREADS; i++)
		touch_work(&workers[i]);
	while (__atomic_load_n(&state->holding, __ATOMIC_ACQUIRE) < NR_WORKERS - NR_THREADS)
		usleep(1000);
	pid = fork();
	if (pid < 0)
		return wrong(&state->verdict, "fork: %s", strerror(errno));
	if (pid)
		return waitpid(pid, NULL, 0) == pid;
	/* Copies of its own. */
	touch_work(&workers[0]);
	set_phase(state, WORK_IS_READY);
	while (phase_of(state) == WORK_IS_READY)
		usleep(1000);
	_exit(0);
}

static bool start_workers(struct worker *workers, struct work_state *state)
{
	for (int i = 0; i < NR_WORKERS; i++) {
		if (!hire(&workers[i], state, i))
			return false;
	}
	/* Before there are threads, and memory that they would inherit. */
	for (int i = NR_THREADS; i < NR_WORKERS; i++) {
		if (!start_process(&workers[i]))
			return false;
	}
	for (int i = 0; i < NR_THREADS; i++) {
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			return wrong(&state->verdict, "no thread");
	}
	return true;
}

static bool run_workers(void *arg)
{
	struct work_state *state = arg;
	struct worker workers[NR_WORKERS];

	pt_settle();
	if (!start_workers(workers, state) || !hold_everything(workers, state))
		return false;
	for (int i = 0; i < NR_THREADS; i++) {
		if (!discard_work(&workers[i]) || !arm_userfaultfd(&workers[i]))
			return false;
	}
	set_phase(state, WORK_RUNS);
	for (int i = 0; i < NR_THREADS; i++)
		pthread_join(workers[i].thread, NULL);
	while (wait(NULL) > 0)
		;
	return !state->verdict.text[0];
}

/* What is charged and in use; to write memory.high returns what CPUs have in reserve. */
static long group_used_kb(void)
{
	/* And what was freed before needs its grace period. */
	usleep(200000);
	group_write("memory.high", "0");
	group_write("memory.high", "max");
	return group_read("memory.current", NULL) / KILO;
}

/* Starts the workers; returns the limit that they just fit into, or -1. */
static long start_work(struct work_state *state, pid_t *pid)
{
	unsigned long long deadline = pt_now_ns() + STALL * 1000000000ull;
	long kb;

	*pid = start_member(run_workers, state);
	while (phase_of(state) == WORK_STARTS && pt_now_ns() < deadline)
		usleep(10000);
	if (*pid < 0 || phase_of(state) == WORK_STARTS)
		return -1;
	kb = group_used_kb() + SLACK_KB;
	if (!group_limit(kb))
		return -1;
	set_phase(state, WORK_IS_LIMITED);
	return kb;
}

/* Until each worker has completed so many steps more, and @at_limit charges failed. */
static bool wait_for_steps(struct work_state *state, unsigned long least, long at_limit)
{
	unsigned long seen[NR_WORKERS];
	unsigned long long start = pt_now_ns();
	int slowest = 0;

	memcpy(seen, state->steps, sizeof(seen));
	while (slowest < NR_WORKERS || group_read("memory.events", "max") < at_limit) {
		if (state->verdict.text[0])
			return false;
		if (pt_now_ns() - start > least * STALL * 1000000000ull)
			return wrong(&state->verdict, "worker %d: %lu steps in %lu s", slowest,
				     state->steps[slowest] - seen[slowest], least * STALL);
		usleep(10000);
		for (slowest = 0; slowest < NR_WORKERS; slowest++) {
			if (pt_load(&state->steps[slowest]) - seen[slowest] < least)
				break;
		}
	}
	return true;
}

/* No limit that anybody fits into, until that was noticed. */
static bool squeeze(struct work_state *state, long limit_kb)
{
	unsigned long long deadline = pt_now_ns() + STALL * 1000000000ull;
	long failed;

	group_limit(0);
	/* Not those of the limit's change. */
	failed = group_read("memory.events", "oom") + LEAST_FAILURES;
	while (group_read("memory.events", "oom") < failed) {
		if (pt_now_ns() > deadline)
			return wrong(&state->verdict, "charges do not fail with a limit of 0");
		usleep(1000);
	}
	group_limit(limit_kb);
	return true;
}

static bool reap(pid_t pid, int *status)
{
	for (int i = 0; i < STALL * 100; i++) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		usleep(10000);
	}
	return false;
}

TEST_F_TIMEOUT(progress, refused, PROGRESS_TIMEOUT)
{
	struct work_state *state = &self->state;
	long limit_kb, at_limit;
	bool ok;
	int status;
	pid_t pid;

	ASSERT_TRUE(pt_write_file("/proc/self/oom_score_adj", "-1000"));
	limit_kb = start_work(state, &pid);
	ASSERT_STREQ("", state->verdict.text);
	ASSERT_LT(0, limit_kb);
	ok = wait_for_steps(state, LEAST_STEPS, LEAST_AT_LIMIT);
	at_limit = group_read("memory.events", "max");
	for (int i = 0; ok && i < SQUEEZES; i++)
		ok = squeeze(state, limit_kb) && wait_for_steps(state, LEAST_STEPS, 0);
	set_phase(state, WORK_STOPS);
	ASSERT_TRUE(reap(pid, &status));
	TH_LOG("limit %ld kB, %ld times at it; out of memory %ld times", limit_kb, at_limit,
	       group_read("memory.events", "oom"));
	EXPECT_STREQ("", state->verdict.text);
	EXPECT_EQ(0, status);
	for (int i = 0; i < NR_WORKERS; i++)
		TH_LOG("worker %d: %lu steps, refused %lu times", i, state->steps[i],
		       state->refused[i]);
	EXPECT_LE(LEAST_AT_LIMIT, at_limit);
	EXPECT_LE(SQUEEZES * LEAST_FAILURES, group_read("memory.events", "oom"));
	EXPECT_EQ(0, group_read("memory.events", "oom_kill"));
	EXPECT_TRUE(group_leaked_nothing());
}

TEST_F_TIMEOUT(progress, killed, PROGRESS_TIMEOUT)
{
	struct work_state *state = &self->state;
	int status = 0;
	pid_t pid;

	/* If one is killed, all are. */
	ASSERT_TRUE(group_write("memory.oom.group", "1"));
	ASSERT_LT(0, start_work(state, &pid));
	/* On a fast machine, one of them may be killed before. */
	while (!group_read("memory.events", "oom_kill") && !state->steps[0])
		usleep(1000);
	group_limit(0);
	ASSERT_TRUE(reap(pid, &status));
	EXPECT_STREQ("", state->verdict.text);
	EXPECT_EQ(SIGKILL, status);
	EXPECT_LT(0, group_read("memory.events", "oom_kill"));
	EXPECT_TRUE(group_leaked_nothing());
}

/*
 * Every allocation of an operation fails once, the n-th at its n-th run, until the
 * operation allocates no more than n - 1 times.  Before each run a discard frees the
 * tables that the operation wants.  It may fail with the errors that it has for want of
 * memory; then what was there is there, nothing new is but what it said was done, and
 * the second try succeeds.  The number of tables is exact at each step.
 */
#define NR_TABLES	6	/* of the mapping */
#define TARGETS		3	/* of them, from the first, without a table at first */
#define BYSTANDER	4	/* the table that nobody is to change */
#define MAX_ALLOCATIONS	1000
#define INJECT_TIMEOUT	120

/* In one table and around the boundary of two. */
#define ASTRIDE		(NR_ENTRIES - 2)
#define NR_ASTRIDE	4

struct injection {
	struct verdict verdict;
	unsigned int fired, failed;	/* allocations, and runs for want of them */
};

struct run {
	struct verdict *verdict;
	const struct op *op;
	int fail_nth;		/* of /proc */
	char *area;		/* 1 GiB with a PMD table of its own */
	char *mem;		/* in it, NR_TABLES tables */
	char *source;		/* in it, memory that is moved */
	int uffd, fd;
	long empty_kb;		/* VmPTE with no table in the area */
	size_t done;		/* bytes that the operation said are done */
};

struct op {
	bool (*prepare)(struct run *r);	/* before tables are freed, or NULL */
	bool (*prime)(struct run *r);	/* afterwards, or NULL */
	int (*act)(struct run *r);	/* 0, or an error as the kernel has it */
	bool (*kept)(struct run *r);	/* after a failure, or NULL */
	bool (*check)(struct run *r);	/* after success */
	int before, after;		/* tables, that of the bystander among them */
	bool never_fails;
	int other_error;		/* than ENOMEM */
	unsigned long long uffd_features;
	bool wants_uffd, shared, huge;
};

static char *entry(struct run *r, size_t table, size_t index)
{
	return r->mem + table * TABLE_SIZE + index * PAGE;
}

static void write_word(char *page, unsigned long word)
{
	pt_store((unsigned long *)page, word);
}

static bool has_word_at(struct run *r, char *page, unsigned long word)
{
	unsigned long found = pt_load((unsigned long *)page);

	return found == word || wrong(r->verdict, "page %td of the area: %lx, not %lx",
				      (page - r->area) / PAGE, found, word);
}

static bool tables_are(struct run *r, int tables, const char *when)
{
	long found = (pt_vmpte_kb(0) - r->empty_kb) / TABLE_KB;

	return found == tables ||
	       wrong(r->verdict, "%s: %ld tables, not %d", when, found, tables);
}

/* Looks without populating anything. */
static unsigned long long pagemap_entry(void *page)
{
	unsigned long long value = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (pread(fd, &value, sizeof(value), (unsigned long)page / PAGE * 8) != 8)
		value = 0;
	close(fd);
	return value;
}

/* Bits. */
#define PAGEMAP_PRESENT	63
#define PAGEMAP_UFFD_WP	57

static bool pagemap_is(struct run *r, char *page, int bit, bool set)
{
	return (pagemap_entry(page) >> bit & 1) == set ||
	       wrong(r->verdict, "page %td of the area: pagemap has %llx",
		     (page - r->area) / PAGE, pagemap_entry(page));
}

static int error_of(long ret)
{
	return ret < 0 ? errno : 0;
}

/* write fault */
static int store_page(struct run *r)
{
	write_word(entry(r, 0, 5), 0x5105);
	return 0;
}

static bool stored_page(struct run *r)
{
	return has_word_at(r, entry(r, 0, 5), 0x5105);
}

/* MADV_POPULATE_WRITE */
static int populate(struct run *r)
{
	return error_of(madvise(entry(r, 0, ASTRIDE), NR_ASTRIDE * PAGE, MADV_POPULATE_WRITE));
}

static bool populated(struct run *r)
{
	for (int i = 0; i < NR_ASTRIDE; i++) {
		if (!pagemap_is(r, entry(r, 0, ASTRIDE + i), PAGEMAP_PRESENT, true) ||
		    !has_word_at(r, entry(r, 0, ASTRIDE + i), 0))
			return false;
	}
	return true;
}

/* fork(): tables that are full, not there, and empty, for they belong to two VMAs. */
static bool split_last_table(struct run *r)
{
	for (int i = 0; i < NR_ENTRIES; i += 16)
		write_word(entry(r, 3, i), 0xf000 + i);
	write_word(entry(r, 5, 20), 1);
	return !mprotect(entry(r, 5, NR_ENTRIES / 2), PAGE, PROT_READ) &&
	       discard(entry(r, 5, 20), PAGE);
}

static bool still_full(struct run *r)
{
	for (int i = 0; i < NR_ENTRIES; i += 16) {
		if (!has_word_at(r, entry(r, 3, i), 0xf000 + i))
			return false;
	}
	return true;
}

static bool child_is_well(struct run *r)
{
	/* What is empty can be populated. */
	write_word(entry(r, 5, 21), 3);
	write_word(entry(r, 0, 5), 4);
	return still_full(r) && has_word_at(r, entry(r, BYSTANDER, 9), 0xb9) &&
	       has_word_at(r, entry(r, 5, 20), 0);
}

static int fork_and_look(struct run *r)
{
	int status;
	pid_t pid;

	pid = fork();
	if (pid < 0)
		return errno;
	if (!pid)
		_exit(!child_is_well(r));
	/* A copy of the stack's page now, for the kernel would not try again. */
	pt_store(&status, 0);
	if (waitpid(pid, &status, 0) != pid || status)
		wrong(r->verdict, "the child of fork ended with %x", status);
	return 0;
}

/* mremap() to one page after a table's begin: entries are moved, and not tables. */
#define MOVED_SIZE	(2 * TABLE_SIZE)

static const int moved_pages[] = { 0, 100, NR_ENTRIES - 1, NR_ENTRIES, 2 * NR_ENTRIES - 1 };

static bool map_moved(struct run *r)
{
	if (map_anon(r->source, MOVED_SIZE) != r->source)
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(moved_pages); i++)
		write_word(r->source + moved_pages[i] * PAGE, 0x3000 + i);
	return true;
}

static bool has_moved_words(struct run *r, char *where)
{
	for (size_t i = 0; i < ARRAY_SIZE(moved_pages); i++) {
		if (!has_word_at(r, where + moved_pages[i] * PAGE, 0x3000 + i))
			return false;
	}
	return true;
}

static bool not_moved(struct run *r)
{
	return has_moved_words(r, r->source);
}

static int move_by(struct run *r, int flags)
{
	void *to = entry(r, 0, 1);

	return mremap(r->source, MOVED_SIZE, MOVED_SIZE,
		      MREMAP_MAYMOVE | MREMAP_FIXED | flags, to) == to ? 0 : errno;
}

static int move_mapping(struct run *r)
{
	return move_by(r, 0);
}

static int move_entries(struct run *r)
{
	return move_by(r, MREMAP_DONTUNMAP);
}

static bool moved(struct run *r)
{
	return has_moved_words(r, entry(r, 0, 1));
}

static bool moved_and_left(struct run *r)
{
	if (!moved(r))
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(moved_pages); i++) {
		if (!has_word_at(r, r->source + moved_pages[i] * PAGE, 0))
			return false;
	}
	return true;
}

/* UFFDIO_COPY and its kin: what they did before they failed, they say. */
static bool register_missing(struct run *r)
{
	return pt_uffd_register(r->uffd, r->mem, TARGETS * TABLE_SIZE,
			      UFFDIO_REGISTER_MODE_MISSING);
}

/* Of the bytes that are left; a part that was done is EAGAIN. */
static int account(struct run *r, long ret, long long done)
{
	int error = error_of(ret);

	if (!error)
		done = NR_ASTRIDE * PAGE - r->done;
	if (done > 0)
		r->done += done;
	if (error == EAGAIN && done <= 0)
		wrong(r->verdict, "EAGAIN though nothing was done: %lld", done);
	return error;
}

static int uffd_copy(struct run *r)
{
	static unsigned long source[NR_ASTRIDE][PAGE / sizeof(unsigned long)];
	struct uffdio_copy copy = {
		.dst = (unsigned long)entry(r, 0, ASTRIDE) + r->done,
		.src = (unsigned long)source + r->done,
		.len = NR_ASTRIDE * PAGE - r->done,
	};

	long ret;

	for (int i = 0; i < NR_ASTRIDE; i++)
		source[i][0] = 0xc0 + i;
	ret = ioctl(r->uffd, UFFDIO_COPY, &copy);
	return account(r, ret, copy.copy);
}

static int uffd_zero(struct run *r)
{
	struct uffdio_zeropage zero = {
		.range.start = (unsigned long)entry(r, 0, ASTRIDE) + r->done,
		.range.len = NR_ASTRIDE * PAGE - r->done,
	};
	long ret = ioctl(r->uffd, UFFDIO_ZEROPAGE, &zero);

	return account(r, ret, zero.zeropage);
}

/* Not one page more, and not one less. */
static bool there_is_what_was_done(struct run *r)
{
	for (size_t i = 0; i < NR_ASTRIDE; i++) {
		if (!pagemap_is(r, entry(r, 0, ASTRIDE + i), PAGEMAP_PRESENT,
				i < r->done / PAGE))
			return false;
	}
	return true;
}

static bool copied(struct run *r)
{
	for (int i = 0; i < NR_ASTRIDE; i++) {
		if (!has_word_at(r, entry(r, 0, ASTRIDE + i), 0xc0 + i))
			return false;
	}
	return there_is_what_was_done(r);
}

/* UFFDIO_WRITEPROTECT where nothing is populated: a marker in each entry. */
static bool register_protect(struct run *r)
{
	return pt_uffd_register(r->uffd, r->mem, TARGETS * TABLE_SIZE, UFFDIO_REGISTER_MODE_WP);
}

static int uffd_protect(struct run *r)
{
	return protect_range(r->uffd, r->mem, TARGETS * TABLE_SIZE, true) ? 0 : errno;
}

static bool protected_all(struct run *r)
{
	for (int i = 0; i < TARGETS * NR_ENTRIES; i += 73) {
		if (!pagemap_is(r, entry(r, 0, i), PAGEMAP_UFFD_WP, true))
			return false;
	}
	return pagemap_is(r, entry(r, TARGETS, 0) - PAGE, PAGEMAP_UFFD_WP, true);
}

/* UFFDIO_MOVE: each page is at the one place or at the other. */
static bool fill_source(struct run *r)
{
	if (map_anon(r->source, TABLE_SIZE) != r->source)
		return false;
	for (int i = 0; i < NR_ASTRIDE; i++)
		write_word(r->source + (100 + i) * PAGE, 0x3e00 + i);
	return register_missing(r);
}

static int uffd_move(struct run *r)
{
	struct uffdio_move move = {
		.dst = (unsigned long)entry(r, 0, ASTRIDE) + r->done,
		.src = (unsigned long)r->source + 100 * PAGE + r->done,
		.len = NR_ASTRIDE * PAGE - r->done,
	};
	long ret = ioctl(r->uffd, UFFDIO_MOVE, &move);

	return account(r, ret, move.move);
}

static bool each_in_one_place(struct run *r)
{
	for (size_t i = 0; i < NR_ASTRIDE; i++) {
		bool is_done = i < r->done / PAGE;
		char *from = r->source + (100 + i) * PAGE, *to = entry(r, 0, ASTRIDE + i);

		if (!pagemap_is(r, from, PAGEMAP_PRESENT, !is_done) ||
		    !pagemap_is(r, to, PAGEMAP_PRESENT, is_done) ||
		    !has_word_at(r, is_done ? to : from, 0x3e00 + i))
			return false;
	}
	return true;
}

/* MADV_GUARD_INSTALL */
static int install_guards(struct run *r)
{
	return error_of(madvise(entry(r, 0, ASTRIDE), NR_ASTRIDE * PAGE, MADV_GUARD_INSTALL));
}

static bool is_guarded(struct run *r, char *page)
{
	char byte;
	struct iovec to = { &byte, 1 }, from = { page, 1 };

	return (process_vm_readv(getpid(), &to, 1, &from, 1, 0) < 0 && errno == EFAULT) ||
	       wrong(r->verdict, "page %td of the area is not guarded",
		     (page - r->area) / PAGE);
}

static bool guarded(struct run *r)
{
	for (int i = 0; i < NR_ASTRIDE; i++) {
		if (!is_guarded(r, entry(r, 0, ASTRIDE + i)))
			return false;
	}
	return true;
}

/* What frees tables needs memory, too, to gather them, and does without. */
static bool read_zeroes(struct run *r)
{
	for (int t = 0; t < TARGETS; t++)
		pt_load(entry(r, t, 77));
	return true;
}

static bool zeroes_again(struct run *r)
{
	for (int t = 0; t < TARGETS; t++) {
		if (!has_word_at(r, entry(r, t, 77), 0))
			return false;
	}
	return true;
}

static int trim(struct run *r)
{
	return error_of(madvise(r->mem, NR_TABLES * TABLE_SIZE, MADV_TRIM_TABLES));
}

static bool touch_three(struct run *r)
{
	for (int i = 4; i < 7; i++)
		write_word(entry(r, 1, i), i);
	return true;
}

static int discard_part(struct run *r)
{
	return error_of(madvise(entry(r, 1, 2), 8 * PAGE, MADV_DONTNEED));
}

static int punch_part(struct run *r)
{
	return punch(r->fd, TABLE_SIZE + 2 * PAGE, 8 * PAGE) ? 0 : errno;
}

/* With the table gone first, whose absence is what was asked for. */
static bool is_discarded(struct run *r)
{
	for (int i = 4; i < 7; i++) {
		if (!has_word_at(r, entry(r, 1, i), 0))
			return false;
	}
	return true;
}

/* MADV_COLLAPSE: some pages become a huge one, the table its deposit. */
static bool touch_some(struct run *r)
{
	for (int i = 0; i < NR_ENTRIES; i += 64)
		write_word(entry(r, 0, i), 0x7000 + i);
	return !madvise(r->mem, TABLE_SIZE, MADV_HUGEPAGE);
}

static int collapse(struct run *r)
{
	return error_of(madvise(r->mem, TABLE_SIZE, MADV_COLLAPSE));
}

static bool some_are_intact(struct run *r)
{
	for (int i = 0; i < NR_ENTRIES; i += 64) {
		if (!has_word_at(r, entry(r, 0, i), 0x7000 + i))
			return false;
	}
	return has_word_at(r, entry(r, 0, 1), 0);
}

FIXTURE(inject) {
	struct injection injection;
};

FIXTURE_VARIANT(inject) {
	struct op op;
};

FIXTURE_VARIANT_ADD(inject, fault) {
	.op = {
		.act = store_page, .check = stored_page,
		.before = 1, .after = 2, .never_fails = true,
	},
};

FIXTURE_VARIANT_ADD(inject, shared_fault) {
	.op = {
		.act = store_page, .check = stored_page,
		.before = 1, .after = 2, .never_fails = true, .shared = true,
	},
};

FIXTURE_VARIANT_ADD(inject, populate) {
	.op = {
		.act = populate, .check = populated,
		.before = 1, .after = 3,
	},
};

FIXTURE_VARIANT_ADD(inject, shared_populate) {
	.op = {
		.act = populate, .check = populated,
		.before = 1, .after = 3, .shared = true,
	},
};

FIXTURE_VARIANT_ADD(inject, fork) {
	.op = {
		.prepare = split_last_table, .act = fork_and_look,
		.kept = still_full, .check = still_full,
		.before = 3, .after = 3, .other_error = EAGAIN,
	},
};

/* Three tables for what filled two; the range of the second source table stays. */
FIXTURE_VARIANT_ADD(inject, mremap) {
	.op = {
		.prepare = map_moved, .act = move_mapping, .kept = not_moved, .check = moved,
		.before = 3, .after = 4,
	},
};

FIXTURE_VARIANT_ADD(inject, dontunmap) {
	.op = {
		.prepare = map_moved, .act = move_entries,
		.kept = not_moved, .check = moved_and_left,
		.before = 3, .after = 4,
	},
};

FIXTURE_VARIANT_ADD(inject, copy) {
	.op = {
		.prepare = register_missing, .act = uffd_copy,
		.kept = there_is_what_was_done, .check = copied,
		.before = 1, .after = 3, .other_error = EAGAIN, .wants_uffd = true,
	},
};

FIXTURE_VARIANT_ADD(inject, zeropage) {
	.op = {
		.prepare = register_missing, .act = uffd_zero,
		.kept = there_is_what_was_done, .check = there_is_what_was_done,
		.before = 1, .after = 3, .other_error = EAGAIN, .wants_uffd = true,
	},
};

FIXTURE_VARIANT_ADD(inject, protect) {
	.op = {
		.prepare = register_protect, .act = uffd_protect, .check = protected_all,
		.before = 1, .after = 1 + TARGETS, .wants_uffd = true,
		.uffd_features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED,
	},
};

FIXTURE_VARIANT_ADD(inject, move) {
	.op = {
		.prepare = fill_source, .act = uffd_move,
		.kept = each_in_one_place, .check = each_in_one_place,
		.before = 2, .after = 3, .other_error = EAGAIN, .wants_uffd = true,
		.uffd_features = UFFD_FEATURE_MOVE,
	},
};

FIXTURE_VARIANT_ADD(inject, guard) {
	.op = {
		.act = install_guards, .check = guarded,
		.before = 1, .after = 3,
	},
};

FIXTURE_VARIANT_ADD(inject, trim) {
	.op = {
		.prime = read_zeroes, .act = trim, .check = zeroes_again,
		.before = 1 + TARGETS, .after = 1, .never_fails = true,
	},
};

FIXTURE_VARIANT_ADD(inject, discard) {
	.op = {
		.prime = touch_three, .act = discard_part, .check = is_discarded,
		.before = 2, .after = 1, .never_fails = true,
	},
};

FIXTURE_VARIANT_ADD(inject, punch) {
	.op = {
		.prime = touch_three, .act = punch_part, .check = is_discarded,
		.before = 2, .after = 1, .never_fails = true, .shared = true,
	},
};

FIXTURE_VARIANT_ADD(inject, collapse) {
	.op = {
		.prime = touch_some, .act = collapse,
		.kept = some_are_intact, .check = some_are_intact,
		.before = 2, .after = 2, .other_error = EAGAIN, .huge = true,
	},
};

FIXTURE_SETUP(inject)
{
	if (sysconf(_SC_PAGESIZE) != PAGE)
		SKIP(return, "the layout is that of 4K pages");
	if (no_injection[0])
		SKIP(return, "%s", no_injection);
	if (variant->op.wants_uffd) {
		int uffd = pt_uffd(variant->op.uffd_features);

		if (uffd < 0)
			SKIP(return, "no userfaultfd of that kind: %s", strerror(errno));
		close(uffd);
	}
	if (variant->op.huge && access("/sys/kernel/mm/transparent_hugepage", F_OK))
		SKIP(return, "no transparent huge pages");
	if (!group.skip[0])
		ASSERT_TRUE(group_make());
}

FIXTURE_TEARDOWN_PARENT(inject)
{
	if (!group.skip[0])
		group_remove();
}

/* Everything anew: no table is left in the area. */
static bool reset(struct run *r)
{
	char *mem;

	if (mmap(r->area, 1ul << 29, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
		 MAP_FIXED, -1, 0) == MAP_FAILED)
		return wrong(r->verdict, "mmap: %s", strerror(errno));
	if (r->empty_kb && !tables_are(r, 0, "with all unmapped"))
		return false;
	mem = map_anon(r->mem, NR_TABLES * TABLE_SIZE);
	if (r->op->shared) {
		punch(r->fd, 0, NR_TABLES * TABLE_SIZE);
		mem = map_shared(r->mem, NR_TABLES * TABLE_SIZE, r->fd);
	}
	r->done = 0;
	return mem == r->mem || wrong(r->verdict, "mmap: %s", strerror(errno));
}

static bool bystander_is_intact(struct run *r)
{
	for (int i = 1; i < NR_ENTRIES; i += 8) {
		if (!has_word_at(r, entry(r, BYSTANDER, i), 0xb0 + i))
			return false;
	}
	return true;
}

/* Populated once, and emptied by pieces: a table that was there, and is no more. */
static bool free_targets(struct run *r)
{
	for (int t = 0; t < TARGETS; t++) {
		write_word(entry(r, t, 3), 1);
		write_word(entry(r, t, 300), 1);
		for (int i = 3; i <= 300; i += 297) {
			if (r->op->shared ? !punch(r->fd, entry(r, t, i) - r->mem, PAGE) :
					    !discard(entry(r, t, i), PAGE))
				return wrong(r->verdict, "a discard: %s", strerror(errno));
		}
	}
	return true;
}

static bool arrange(struct run *r)
{
	if (!reset(r))
		return false;
	for (int i = 1; i < NR_ENTRIES; i += 8)
		write_word(entry(r, BYSTANDER, i), 0xb0 + i);
	if (!free_targets(r))
		return false;
	if (r->op->prepare && !r->op->prepare(r))
		return wrong(r->verdict, "preparing it: %s", strerror(errno));
	if (r->op->prime && !r->op->prime(r))
		return wrong(r->verdict, "preparing it: %s", strerror(errno));
	return tables_are(r, r->op->before, "before");
}

/* Of the allocations of this thread from now on, the n-th fails.  0: none. */
static void arm(struct run *r, int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", n);

	if (pwrite(r->fail_nth, text, len, 0) != len)
		wrong(r->verdict, "fail-nth: %s", strerror(errno));
}

/* Did it?  Otherwise there were fewer. */
static bool has_fired(struct run *r)
{
	char text[16] = "";

	if (pread(r->fail_nth, text, sizeof(text) - 1, 0) <= 0)
		wrong(r->verdict, "fail-nth: %s", strerror(errno));
	arm(r, 0);
	return atoi(text) == 0;
}

static bool may_fail_so(const struct op *op, int error)
{
	return !op->never_fails && (error == ENOMEM || error == op->other_error);
}

/* A huge page is nothing that a machine owes us. */
static bool no_huge_page(const struct op *op, int error)
{
	return op->huge && error == ENOMEM;
}

/* One run, in which the n-th allocation fails; sets @fired. */
static bool run_once(struct run *r, struct injection *result, int n, bool *fired)
{
	const struct op *op = r->op;
	int error;

	if (!arrange(r))
		return false;
	arm(r, n);
	error = op->act(r);
	*fired = has_fired(r);
	result->fired += *fired;
	if (error && !no_huge_page(op, error) && (!*fired || !may_fail_so(op, error)))
		return wrong(r->verdict, "allocation %d %s: %s", n,
			     *fired ? "failed" : "is none", strerror(error));
	if (error) {
		result->failed++;
		if (!bystander_is_intact(r) || (op->kept && !op->kept(r)))
			return false;
		error = op->act(r);
		if (error && !no_huge_page(op, error))
			return wrong(r->verdict, "a second try: %s", strerror(error));
	}
	return tables_are(r, op->after, "after") && bystander_is_intact(r) && op->check(r);
}

static bool start_run(struct run *r)
{
	size_t gib = 1ul << 30;
	char *raw;

	r->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	raw = mmap(NULL, 2 * gib, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	r->area = (char *)(((unsigned long)raw + gib - 1) & -gib);
	r->mem = r->area + TABLE_SIZE;
	r->source = r->area + 64 * TABLE_SIZE;
	r->fd = r->op->shared ? memory_file(NR_TABLES * TABLE_SIZE) : -1;
	r->uffd = r->op->wants_uffd ? pt_uffd(r->op->uffd_features) : -1;
	if (r->fail_nth < 0 || raw == MAP_FAILED || (r->op->shared && r->fd < 0) ||
	    map_anon(r->area + gib / 2, PAGE) == MAP_FAILED)
		return wrong(r->verdict, "starting: %s", strerror(errno));
	/* A page elsewhere in the GiB keeps the upper tables out of the figure. */
	r->area[gib / 2] = 1;
	if (!reset(r))
		return false;
	r->empty_kb = pt_vmpte_kb(0);
	return true;
}

struct assignment {
	struct injection *result;
	const struct op *op;
};

static bool run_all(void *arg)
{
	struct assignment *assignment = arg;
	struct injection *result = assignment->result;
	struct run r = { .verdict = &result->verdict, .op = assignment->op };
	bool fired = true;

	pt_settle();
	if (!start_run(&r))
		return false;
	for (int n = 1; fired; n++) {
		if (n > MAX_ALLOCATIONS)
			return wrong(r.verdict, "more than %d allocations", MAX_ALLOCATIONS);
		if (!run_once(&r, result, n, &fired)) {
			fprintf(stderr, "# in the run whose allocation %d was to fail\n", n);
			return false;
		}
	}
	return reset(&r);
}

TEST_F_TIMEOUT(inject, each_allocation, INJECT_TIMEOUT)
{
	struct injection *result = &self->injection;
	struct assignment assignment = { result, &variant->op };
	int status;
	pid_t pid;

	pid = start_member(run_all, &assignment);
	ASSERT_GT(pid, 0);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	TH_LOG("%u allocations failed, and %u calls", result->fired, result->failed);
	EXPECT_STREQ("", result->verdict.text);
	EXPECT_EQ(0, status);
	EXPECT_LT(0, result->fired);
	if (!variant->op.never_fails)
		EXPECT_LT(0, result->failed);
	if (group.skip[0])
		TH_LOG("whether a table was leaked is unknown: %s", group.skip);
	else
		EXPECT_TRUE(group_leaked_nothing());
}

/*
 * The kernel writes to a thread's rseq area when it returns to it, and kills it if that
 * fails, which it does if the page has to be copied, after fork(), and its allocation
 * is the one to fail.  That is how it is, and nothing to do with page tables.
 */
static void live_without_rseq(char **argv)
{
	static const char tunable[] = "glibc.pthread.rseq=0";
	const char *set = getenv("GLIBC_TUNABLES");

	if (set && !strcmp(set, tunable))
		return;
	setenv("GLIBC_TUNABLES", tunable, 1);
	execv("/proc/self/exe", argv);
}

int main(int argc, char **argv)
{
	live_without_rseq(argv);
	owner = getpid();
	prepare_group();
	prepare_injection();
	atexit(undo_everything);
	signal(SIGINT, killed);
	signal(SIGTERM, killed);
	return test_harness_run(argc, argv);
}
