// SPDX-License-Identifier: GPL-2.0
/*
 * Random calls, valid ones and nonsense, on memory whose contents a model knows.
 *
 * A region of anonymous and of shared memory, with PTE tables that two mappings share,
 * is written, discarded, guarded, paged out, moved, forked and asked to give back its
 * page tables, at random places and in random pieces; between these come calls
 * that the kernel has to refuse.  What must hold: every page reads as the model says,
 * guards stay where they are, and in the end the region's page tables are gone.
 *
 *   root       as it is; meanwhile the controls in /sys get random text, and the
 *              background pass runs as often as it can
 *   nobody     by a user without privileges, who must not change the controls, nor
 *              touch other people's tables
 *   inject     an allocation of each call may fail: then the call says so, nothing that
 *              was there is lost, and the same call succeeds when it is made again
 *
 * PT_FUZZ_CALLS (default 3000) and PT_FUZZ_SEED (default 1) in the environment; what was
 * called last is printed when something is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "pt_util.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGE		4096ul
#define NR_ENTRIES	512
#define TABLE_SIZE	(NR_ENTRIES * PAGE)
#define NR_TABLES	12
#define NR_PAGES	(NR_TABLES * NR_ENTRIES)
#define SIZE		(NR_PAGES * PAGE)
#define GIB		(1024ul * 1024 * 1024)
/* The region, and the room that its pages are moved to, have an upper table each. */
#define REGION		((char *)(1ul << 43))
#define ROOM		(REGION + GIB)
/* Anonymous, shared, anonymous; none of these begins at a table but the first. */
#define SHARED_FIRST	(4 * NR_ENTRIES + 100)
#define SHARED_END	(8 * NR_ENTRIES - 7)
#define NOBODY		65534
#define MAX_NTH		6
#define DEBUGFS		"/sys/kernel/debug/"

static const char * const controls[] = { "background", "period_ms", "zeropages", "upper" };

/* What the model knows of a page. */
struct page {
	unsigned long word;	/* its first, 0 if it was never written */
	bool guarded;
	bool may_be_lost;	/* by MADV_FREE: reads as the word or as 0 */
};

struct fuzz {
	struct page pages[NR_PAGES];
	unsigned long state, calls, refused, failed;
	int fd, pidfd;
	bool inject, root;
	char last[160];		/* the last call */
	char wrong[256];	/* what is not as it must be, first finding */
};

/* A call that confines itself to pages [first, first + nr) of one mapping. */
struct range {
	size_t first, nr;
	bool shared;
};

static unsigned long next_random(struct fuzz *f)
{
	f->state = f->state * 6364136223846793005ul + 1442695040888963407ul;
	return f->state >> 33;
}

static unsigned long below(struct fuzz *f, unsigned long bound)
{
	return next_random(f) % bound;
}

static bool __printf(2, 3)
wrong(struct fuzz *f, const char *format, ...)
{
	va_list args;

	if (f->wrong[0])
		return false;
	va_start(args, format);
	vsnprintf(f->wrong, sizeof(f->wrong), format, args);
	va_end(args);
	return false;
}

static void __printf(2, 3)
called(struct fuzz *f, const char *format, ...)
{
	va_list args;

	f->calls++;
	va_start(args, format);
	vsnprintf(f->last, sizeof(f->last), format, args);
	va_end(args);
}

static char *address(size_t page)
{
	return REGION + page * PAGE;
}

static bool is_shared(size_t page)
{
	return page >= SHARED_FIRST && page < SHARED_END;
}

/* The page behind the last one of the mapping that a page is in. */
static size_t mapping_end(size_t page)
{
	if (page < SHARED_FIRST)
		return SHARED_FIRST;
	return page < SHARED_END ? SHARED_END : NR_PAGES;
}

/* Single pages, a few, whole tables, much: and often what begins or ends with a table. */
static struct range pick(struct fuzz *f)
{
	static const size_t most[] = { 1, 16, NR_ENTRIES, 3 * NR_ENTRIES };
	struct range r = { .first = below(f, NR_PAGES) };
	size_t room;

	if (below(f, 4) == 0)
		r.first -= r.first % NR_ENTRIES;
	r.shared = is_shared(r.first);
	room = mapping_end(r.first) - r.first;
	r.nr = 1 + below(f, most[below(f, ARRAY_SIZE(most))]);
	if (below(f, 4) == 0)
		r.nr = NR_ENTRIES - r.first % NR_ENTRIES;
	if (r.nr > room)
		r.nr = room;
	return r;
}

/*
 * Whether contents are what they must be.
 */

/* The first word of a page, without a signal: guards answer with EFAULT. */
static bool read_word(size_t page, unsigned long *word)
{
	struct iovec local = { word, sizeof(*word) }, remote = { address(page), sizeof(*word) };

	return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == sizeof(*word);
}

static bool page_is_right(struct fuzz *f, size_t page)
{
	struct page *p = &f->pages[page];
	unsigned long word = 0;
	bool readable = read_word(page, &word);

	if (readable == p->guarded)
		return wrong(f, "page %zu is %sreadable", page, readable ? "" : "not ");
	if (p->guarded || word == p->word || (p->may_be_lost && !word))
		return true;
	return wrong(f, "page %zu has %lx, not %lx", page, word, p->word);
}

/* All pages that have contents, and some of those that have not: reading populates. */
static bool contents_are_right(struct fuzz *f)
{
	for (size_t page = 0; page < NR_PAGES; page++) {
		struct page *p = &f->pages[page];

		if ((p->word || p->guarded || below(f, 64) == 0) && !page_is_right(f, page))
			return false;
	}
	return true;
}

static bool range_is_right(struct fuzz *f, struct range r)
{
	for (size_t i = 0; i < 4; i++) {
		if (!page_is_right(f, r.first + below(f, r.nr)))
			return false;
	}
	return true;
}

/*
 * Calls with an effect on contents, and the model of it.
 */

static void forget(struct fuzz *f, struct range r)
{
	for (size_t page = r.first; page < r.first + r.nr; page++) {
		f->pages[page].word = 0;
		f->pages[page].may_be_lost = false;
	}
}

static void set_guards(struct fuzz *f, struct range r, bool guarded)
{
	for (size_t page = r.first; page < r.first + r.nr; page++)
		f->pages[page].guarded = guarded;
}

static bool write_range(struct fuzz *f, struct range r)
{
	size_t step = 1 + below(f, 200);

	called(f, "write %zu+%zu step %zu", r.first, r.nr, step);
	for (size_t page = r.first; page < r.first + r.nr; page += step) {
		if (f->pages[page].guarded)
			continue;
		f->pages[page].word = f->calls << 16 | page;
		f->pages[page].may_be_lost = false;
		pt_store((unsigned long *)address(page), f->pages[page].word);
	}
	return true;
}

/* Has one of the next allocations fail. */
static void arm(struct fuzz *f)
{
	char nth[16];

	if (!f->inject)
		return;
	snprintf(nth, sizeof(nth), "%lu", below(f, MAX_NTH));
	pt_write_file("/proc/thread-self/fail-nth", nth);
}

static void disarm(struct fuzz *f)
{
	if (f->inject)
		pt_write_file("/proc/thread-self/fail-nth", "0");
}

/* madvise() by one of its two names; returns 0 or an errno. */
static int advise(struct fuzz *f, char *at, size_t len, int advice)
{
	struct iovec range = { at, len };
	long ret;

	errno = 0;
	if (advice == MADV_TRIM_TABLES && below(f, 2) && len) {
		ret = syscall(__NR_process_madvise, f->pidfd, &range, 1, advice, 0);
		return ret < 0 ? errno : ret == (long)len ? 0 : EAGAIN;
	}
	return madvise(at, len, advice) ? errno : 0;
}

/* A failure is allowed with injection only, and the second try has to succeed. */
static int advise_twice(struct fuzz *f, struct range r, int advice)
{
	int error;

	arm(f);
	error = advise(f, address(r.first), r.nr * PAGE, advice);
	disarm(f);
	if (!f->inject || (error != ENOMEM && error != EAGAIN))
		return error;
	f->failed++;
	return advise(f, address(r.first), r.nr * PAGE, advice);
}

static bool expect(struct fuzz *f, int error, int wanted)
{
	return error == wanted || wrong(f, "error %d (%s), want %d", error, strerror(error),
					wanted);
}

static bool discard(struct fuzz *f, struct range r)
{
	static const int advices[] = { MADV_DONTNEED, MADV_DONTNEED_LOCKED };
	int advice = advices[below(f, 2)];

	called(f, "madvise %zu+%zu, %d", r.first, r.nr, advice);
	if (!r.shared)
		forget(f, r);
	return expect(f, advise_twice(f, r, advice), 0) && range_is_right(f, r);
}

static bool discard_lazily(struct fuzz *f, struct range r)
{
	called(f, "MADV_FREE %zu+%zu", r.first, r.nr);
	if (r.shared)
		return expect(f, advise_twice(f, r, MADV_FREE), EINVAL);
	for (size_t page = r.first; page < r.first + r.nr; page++)
		f->pages[page].may_be_lost = true;
	return expect(f, advise_twice(f, r, MADV_FREE), 0);
}

static bool remove_contents(struct fuzz *f, struct range r)
{
	called(f, "MADV_REMOVE %zu+%zu", r.first, r.nr);
	if (!r.shared)
		return expect(f, advise_twice(f, r, MADV_REMOVE), EINVAL);
	forget(f, r);
	return expect(f, advise_twice(f, r, MADV_REMOVE), 0) && range_is_right(f, r);
}

static bool punch(struct fuzz *f, struct range r)
{
	called(f, "hole %zu+%zu", r.first, r.nr);
	if (!r.shared)
		return true;
	forget(f, r);
	return !fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			  (r.first - SHARED_FIRST) * PAGE, r.nr * PAGE) ||
	       wrong(f, "no hole: %s", strerror(errno));
}

static bool guard(struct fuzz *f, struct range r)
{
	bool install = below(f, 3) == 0;

	called(f, "guards %s %zu+%zu", install ? "on" : "off", r.first, r.nr);
	if (install && !r.shared)
		forget(f, r);
	set_guards(f, r, install);
	return expect(f, advise_twice(f, r, install ? MADV_GUARD_INSTALL : MADV_GUARD_REMOVE),
		      0) && range_is_right(f, r);
}

/* Advice that leaves contents alone; what it returns depends on what is there. */
static bool advise_only(struct fuzz *f, struct range r)
{
	static const int advices[] = {
		MADV_TRIM_TABLES, MADV_TRIM_TABLES, MADV_TRIM_TABLES, MADV_PAGEOUT, MADV_COLD,
		MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE, MADV_WILLNEED,
	};
	int advice = advices[below(f, ARRAY_SIZE(advices))], error;

	called(f, "madvise %zu+%zu, %d", r.first, r.nr, advice);
	error = advise_twice(f, r, advice);
	if (advice == MADV_TRIM_TABLES && error)
		return wrong(f, "MADV_TRIM_TABLES: %s", strerror(error));
	return range_is_right(f, r);
}

/* For all of the region, for a part would split it, and tables in two parts stay. */
static bool advise_region(struct fuzz *f)
{
	static const int advices[] = { MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_RANDOM, MADV_NORMAL };
	int advice = advices[below(f, ARRAY_SIZE(advices))], error;

	called(f, "madvise of all, %d", advice);
	error = madvise(REGION, SIZE, advice) ? errno : 0;
	/* Of a kernel without huge pages. */
	return error == EINVAL || expect(f, error, 0);
}

/* Read only for a while, when tables are asked for and pages read. */
static bool protect(struct fuzz *f, struct range r)
{
	char *at = address(r.first);
	bool ok;

	called(f, "mprotect %zu+%zu", r.first, r.nr);
	if (mprotect(at, r.nr * PAGE, PROT_READ))
		return wrong(f, "mprotect: %s", strerror(errno));
	ok = expect(f, advise_twice(f, r, MADV_TRIM_TABLES), 0) && range_is_right(f, r);
	return !mprotect(at, r.nr * PAGE, PROT_READ | PROT_WRITE) && ok;
}

/*
 * Where advice has split the mapping the kernel may refuse.  Nothing is made to fail here:
 * of several mappings some would have moved, and who knows which.
 */
static bool try_move(char *from, char *to, size_t len, int flags)
{
	return mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to) == to;
}

/* Away and back; what comes back is all that was there. */
static bool move(struct fuzz *f, struct range r)
{
	char *at = address(r.first), *away = ROOM + r.first % NR_ENTRIES * PAGE;
	size_t len = r.nr * PAGE;

	called(f, "mremap %zu+%zu", r.first, r.nr);
	if (!try_move(at, away, len, 0))
		return range_is_right(f, r);
	madvise(away, len, MADV_TRIM_TABLES);
	if (!try_move(away, at, len, 0))
		return wrong(f, "mremap back: %s", strerror(errno));
	return range_is_right(f, r);
}

/* Only anonymous memory: what is left is empty, what has gone is there. */
static bool move_contents(struct fuzz *f, struct range r)
{
	char *at = address(r.first), *away = ROOM + r.first % NR_ENTRIES * PAGE;
	size_t page = r.first + below(f, r.nr);
	struct page was = f->pages[page];
	bool ok = true;

	if (r.shared)
		return true;
	called(f, "MREMAP_DONTUNMAP %zu+%zu", r.first, r.nr);
	if (!try_move(at, away, r.nr * PAGE, MREMAP_DONTUNMAP))
		return range_is_right(f, r);
	forget(f, r);
	set_guards(f, r, false);
	if (was.word && !was.guarded && !was.may_be_lost)
		ok = pt_load((unsigned long *)(away + (page - r.first) * PAGE)) == was.word ||
		     wrong(f, "page %zu was lost on its way", page);
	return !munmap(away, r.nr * PAGE) && ok && range_is_right(f, r);
}

/* The child sees the same, and what it writes to anonymous memory is its own. */
static int child_of(struct fuzz *f)
{
	if (!contents_are_right(f))
		return 1;
	for (size_t page = below(f, 97); page < NR_PAGES; page += 97) {
		if (!is_shared(page) && !f->pages[page].guarded)
			pt_store((unsigned long *)address(page), 0xc0ffeeul);
	}
	madvise(REGION, SIZE, MADV_TRIM_TABLES);
	return 0;
}

static bool fork_once(struct fuzz *f, struct range r)
{
	int status;
	pid_t pid;

	called(f, "fork");
	arm(f);
	pid = fork();
	if (!pid) {
		disarm(f);
		_exit(child_of(f));
	}
	disarm(f);
	if (pid < 0) {
		f->failed++;
		return f->inject || wrong(f, "fork: %s", strerror(errno));
	}
	if (waitpid(pid, &status, 0) != pid || status)
		return wrong(f, "a child sees other contents (status %x)", status);
	return range_is_right(f, r);
}

/*
 * Nonsense.
 */

static bool refuse_advice(struct fuzz *f, struct range r)
{
	char *at = address(r.first);
	size_t len = r.nr * PAGE;
	int advice = MADV_TRIM_TABLES;

	switch (below(f, 5)) {
	case 0:
		at += 1 + below(f, PAGE - 1);
		break;
	case 1:
		len = -(below(f, 1000) + 1) * PAGE;
		break;
	case 2:
		len = -1ul - below(f, PAGE);
		break;
	case 3:
		advice = 104 + below(f, 1 << 20);
		break;
	case 4:
		advice = -1 - (int)below(f, 1 << 20);
		break;
	}
	called(f, "madvise(%p, %lx, %d)", at, len, advice);
	f->refused++;
	return expect(f, madvise(at, len, advice) ? errno : 0, EINVAL);
}

/* Where nothing is mapped there is nothing to trim, which is said afterwards. */
static bool trim_nowhere(struct fuzz *f)
{
	char *at = ROOM + GIB + below(f, 1 << 20) * PAGE;

	called(f, "MADV_TRIM_TABLES of nothing");
	f->refused++;
	return expect(f, madvise(at, (1 + below(f, 9999)) * PAGE, MADV_TRIM_TABLES) ? errno : 0,
		      ENOMEM);
}

/* Somebody else's memory: init's. */
static bool trim_others(struct fuzz *f)
{
	struct iovec range = { REGION, SIZE };
	int fd = syscall(__NR_pidfd_open, 1, 0);
	long ret;

	called(f, "process_madvise of init");
	if (fd < 0)
		return true;
	ret = syscall(__NR_process_madvise, fd, &range, 1, MADV_TRIM_TABLES, below(f, 2));
	f->refused++;
	close(fd);
	return (ret < 0 && (f->root || errno == EPERM || errno == EACCES || errno == EINVAL)) ||
	       wrong(f, "process_madvise of init: %ld, %s", ret, strerror(errno));
}

/* Only root has them to write, and only what makes sense is taken. */
static bool write_controls(struct fuzz *f)
{
	static const char * const texts[] = {
		"0", "1", "1000", "999", "86400001", "-1", "4294967296", "18446744073709551616",
		"", " ", "yes", "1 1", "0x1", "\n", "%s%n", "1e3",
	};
	const char *name = controls[below(f, ARRAY_SIZE(controls))];
	const char *text = texts[below(f, ARRAY_SIZE(texts))];
	char path[64];
	bool taken;

	snprintf(path, sizeof(path), PT_CONTROL "%s", name);
	called(f, "write '%s' to %s", text, path);
	if (access(path, F_OK))
		return true;
	errno = 0;
	taken = pt_write_file(path, text);
	f->refused += !taken;
	if (!f->root)
		return (!taken && errno == EACCES) || wrong(f, "%s: %s", path, strerror(errno));
	return taken || errno == EINVAL || errno == ERANGE || !text[0] ||
	       wrong(f, "%s: %s", path, strerror(errno));
}

static bool one_call(struct fuzz *f)
{
	struct range r = pick(f);

	switch (below(f, 32)) {
	case 0 ... 7:
		return write_range(f, r);
	case 8 ... 12:
		return discard(f, r);
	case 13:
		return discard_lazily(f, r);
	case 14:
		return remove_contents(f, r);
	case 15:
		return punch(f, r);
	case 16 ... 17:
		return guard(f, r);
	case 18 ... 23:
		return advise_only(f, r);
	case 24:
		return protect(f, r);
	case 25:
		return move(f, r);
	case 26:
		return move_contents(f, r);
	case 27:
		return below(f, 8) ? advise_region(f) : fork_once(f, r);
	case 28 ... 29:
		return refuse_advice(f, r);
	case 30:
		return below(f, 2) ? trim_nowhere(f) : trim_others(f);
	default:
		return write_controls(f);
	}
}

/*
 * The region, and a run of it.
 */

static bool map_region(struct fuzz *f)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
	size_t len = (SHARED_END - SHARED_FIRST) * PAGE;

	f->fd = memfd_create("pt_reclaim_fuzz", MFD_CLOEXEC);
	f->pidfd = syscall(__NR_pidfd_open, getpid(), 0);
	return f->fd >= 0 && f->pidfd >= 0 && !ftruncate(f->fd, len) &&
	       mmap(REGION, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0) == REGION &&
	       mmap(address(SHARED_FIRST), len, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_NORESERVE | MAP_FIXED, f->fd, 0) == address(SHARED_FIRST);
}

struct tables {
	long most_kb, found_kb;
};

static bool tables_are_gone(void *arg)
{
	struct tables *t = arg;

	madvise(REGION, SIZE, MADV_TRIM_TABLES);
	t->found_kb = pt_vmpte_kb(0);
	return t->found_kb <= t->most_kb;
}

/*
 * Page tables that more than one mapping of the region has a part in: these stay, for a
 * call holds the lock of one mapping.  There are more of them than two when what was
 * moved away and back has not merged with its neighbours.
 */
static long count_shared_tables(void)
{
	static char maps[1 << 20];
	unsigned long start, last = 0;
	char *line = maps;
	long nr = 0;

	if (pt_read_file("/proc/self/maps", maps, sizeof(maps)) < 0)
		return 0;
	for (; line; line = strchr(line + 1, '\n')) {
		if (sscanf(line, "%lx-", &start) != 1 || start <= (unsigned long)REGION ||
		    start >= (unsigned long)REGION + SIZE || start % TABLE_SIZE == 0)
			continue;
		nr += start / TABLE_SIZE != last;
		last = start / TABLE_SIZE;
	}
	return nr;
}

static bool tables_fall_to(struct fuzz *f, const char *when, long kb)
{
	struct tables t = { .most_kb = kb };

	return pt_wait_until(tables_are_gone, &t, 30) ||
	       wrong(f, "%s: %ld kB of page tables, want %ld", when, t.found_kb, kb);
}

/* Nothing is left in it: neither guards nor contents nor tables. */
static bool empty_region(struct fuzz *f, long base_kb)
{
	long shared;

	called(f, "the end");
	pt_write_file(PT_CONTROL "upper", "1");
	madvise(REGION, SIZE, MADV_GUARD_REMOVE);
	madvise(REGION, SIZE, MADV_DONTNEED);
	madvise(REGION, SIZE, MADV_NORMAL);
	madvise(REGION, SIZE, MADV_NOHUGEPAGE);
	if (fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
		      (SHARED_END - SHARED_FIRST) * PAGE))
		return wrong(f, "the last hole: %s", strerror(errno));
	shared = count_shared_tables();
	/* With a PMD and a PUD table above them. */
	if (!tables_fall_to(f, "emptied", base_kb + (shared + 2) * (long)(PAGE / 1024)))
		return false;
	munmap(REGION, SIZE);
	return tables_fall_to(f, "unmapped", base_kb);
}

static unsigned long number(const char *name, unsigned long otherwise)
{
	const char *text = getenv(name);

	return text && atol(text) > 0 ? (unsigned long)atol(text) : otherwise;
}

/* In a process of its own, which exits with 0 if all is well. */
static int run(struct fuzz *f)
{
	unsigned long most = number("PT_FUZZ_CALLS", 3000);
	bool ok = true;
	long base_kb;

	f->state = number("PT_FUZZ_SEED", 1);
	pt_settle();
	base_kb = pt_vmpte_kb(0);
	if (!map_region(f)) {
		printf("# no region: %s\n", strerror(errno));
		return 1;
	}
	while (ok && f->calls < most) {
		ok = one_call(f);
		if (ok && f->calls % 128 == 0)
			ok = contents_are_right(f);
	}
	ok = ok && contents_are_right(f) && empty_region(f, base_kb);
	if (ok)
		printf("# %lu calls, %lu of nonsense, %lu failed\n", f->calls, f->refused,
		       f->failed);
	else
		printf("# call %lu of seed %lu, %s: %s\n", f->calls, number("PT_FUZZ_SEED", 1),
		       f->last, f->wrong);
	fflush(stdout);
	return !ok;
}

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

FIXTURE(fuzz) {
	struct fuzz *f;
	char controls[ARRAY_SIZE(controls)][32];
	char knobs[ARRAY_SIZE(knobs)][32];
};

FIXTURE_VARIANT(fuzz) {
	bool nobody, inject;
};

FIXTURE_VARIANT_ADD(fuzz, root) { };
FIXTURE_VARIANT_ADD(fuzz, nobody) {
	.nobody = true,
};

FIXTURE_VARIANT_ADD(fuzz, inject) {
	.inject = true,
};

FIXTURE_SETUP(fuzz)
{
	char path[64];

	if (geteuid())
		SKIP(return, "only root can become nobody");
	if (pt_vmstat("pt_reclaim_pte") < 0)
		SKIP(return, "this kernel does not reclaim page tables");
	for (size_t i = 0; i < ARRAY_SIZE(controls); i++) {
		snprintf(path, sizeof(path), PT_CONTROL "%s", controls[i]);
		pt_read_file(path, self->controls[i], sizeof(self->controls[i]));
	}
	pt_write_file(PT_CONTROL "period_ms", "1000");
	for (size_t i = 0; variant->inject && i < ARRAY_SIZE(knobs); i++) {
		if (pt_read_file(knobs[i].path, self->knobs[i], sizeof(self->knobs[i])) <= 0 ||
		    !pt_write_file(knobs[i].path, knobs[i].value))
			SKIP(return, "no fault injection: %s", knobs[i].path);
	}
	self->f = mmap(NULL, sizeof(*self->f), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(self->f, MAP_FAILED);
	self->f->inject = variant->inject;
	self->f->root = !variant->nobody;
}

FIXTURE_TEARDOWN_PARENT(fuzz)
{
	char path[64];

	for (size_t i = 0; i < ARRAY_SIZE(controls); i++) {
		snprintf(path, sizeof(path), PT_CONTROL "%s", controls[i]);
		if (self->controls[i][0])
			pt_write_file(path, self->controls[i]);
	}
	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++) {
		if (self->knobs[i][0])
			pt_write_file(knobs[i].path, self->knobs[i]);
	}
}

TEST_F_TIMEOUT(fuzz, contents_and_tables, 400)
{
	int status;
	pid_t pid;

	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		if (variant->nobody && (setresgid(NOBODY, NOBODY, NOBODY) ||
					setresuid(NOBODY, NOBODY, NOBODY)))
			_exit(2);
		_exit(run(self->f));
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	ASSERT_EQ(status, 0);
	if (variant->inject)
		EXPECT_NE(self->f->failed, 0);
	EXPECT_NE(self->f->refused, 0);
}

TEST_HARNESS_MAIN
