// SPDX-License-Identifier: GPL-2.0
/*
 * What page table reclaim costs those who gain nothing from it.
 *
 * Every pattern places pages in one PTE table, discards some of them by
 * MADV_DONTNEED and never empties the table: stock and patched kernel free the
 * same pages and no table.  The patterns differ in how hard it is to see that
 * the table is still in use.  fault-* measure page faults instead.
 *
 * Costs are guest instructions under QEMU's -icount (see pt_icount_shift()), ns
 * elsewhere.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "kselftest.h"
#include "pt_uffd.h"
#include "pt_util.h"

/*
 * The figure is the median over batches of the batch's mean: what is paid now
 * and then by one for many counts, what a timer or kswapd adds to a batch does
 * not.
 */
#define BATCH		128
#define MAX_BATCHES	8192

/* Pages that fit a PTE table, and the far end of one. */
#define NR_ENTRIES	512
#define FAR		(NR_ENTRIES - 1)

struct bench {
	char *table;		/* a PMD-aligned 2 MiB range, spanned by its VMA */
	size_t page;		/* bytes */
	unsigned int rounds;	/* measured rounds of the pattern */
	unsigned int seed;	/* of the wandering patterns */
	unsigned long discards;	/* madvise() calls that were measured */
	unsigned long long cost;	/* of the present batch, in pt_cost_unit() */
	unsigned long long total;	/* of the whole pattern */
	unsigned long faults;	/* page faults that were measured */
	double *batches;	/* mean cost of an operation in each batch */
	unsigned int nr_batches;
	int uffd;		/* userfaultfd registered on the table, or -1 */
	char *source;		/* a page to copy from */
};

/* Account what a batch took once it is full. */
static void end_batch(struct bench *b)
{
	if (b->nr_batches < MAX_BATCHES)
		b->batches[b->nr_batches++] = (double)b->cost / BATCH;
	b->cost = 0;
}

static void touch(struct bench *b, unsigned int i)
{
	pt_store(b->table + i * b->page, 1);
}

/* One measured operation, begun at @start. */
static void measured(struct bench *b, unsigned long long start)
{
	b->cost += pt_ticks() - start;
	if (++b->discards % BATCH == 0)
		end_batch(b);
}

static void discard(struct bench *b, unsigned int i, unsigned int nr)
{
	unsigned long long start = pt_ticks();

	if (madvise(b->table + i * b->page, nr * b->page, MADV_DONTNEED))
		ksft_exit_fail_perror("MADV_DONTNEED");
	measured(b, start);
}

/* A position away from the last one, from a small linear generator. */
static unsigned int wander(struct bench *b, unsigned int last)
{
	unsigned int next;

	do {
		b->seed = b->seed * 1103515245 + 12345;
		next = (b->seed >> 16) % NR_ENTRIES;
	} while (next + 1 >= last && next <= last + 1);
	return next;
}

/* Every page is there but the one just discarded: what balloons do. */
static void dense(struct bench *b)
{
	for (unsigned int r = 0; r < b->rounds; r++) {
		unsigned int i = (r * 7) % NR_ENTRIES;

		discard(b, i, 1);
		touch(b, i);
	}
}

/* One page stays at the start, others come and go at the far end. */
static void survivor(struct bench *b)
{
	touch(b, 0);
	for (unsigned int r = 0; r < b->rounds; r++) {
		touch(b, FAR - r % 64);
		discard(b, FAR - r % 64, 1);
	}
}

/* One page stays; ranges without a page are discarded all over the rest. */
static void hole(struct bench *b)
{
	touch(b, 0);
	for (unsigned int r = 0; r < b->rounds; r++)
		discard(b, 2 + (r * 8) % (NR_ENTRIES - 16), 8);
}

/* The one page that is left jumps between both ends of the table. */
static void pingpong(struct bench *b)
{
	touch(b, 0);
	for (unsigned int r = 0; r < b->rounds; r++) {
		touch(b, r & 1 ? 0 : FAR);
		discard(b, r & 1 ? FAR : 0, 1);
	}
}

/* The one page that is left jumps to a random place. */
static void relay(struct bench *b)
{
	unsigned int last = 0, next;

	touch(b, last);
	for (unsigned int r = 0; r < b->rounds; r++, last = next) {
		next = wander(b, last);
		touch(b, next);
		discard(b, last, 1);
	}
}

/* Eight pages come, nine leave but the first: as many stale hints as can be. */
static void batch(struct bench *b)
{
	unsigned int pos[9] = { 0 };

	touch(b, pos[0]);
	for (unsigned int r = 0; r < b->rounds; r += 8) {
		for (int i = 1; i < 9; i++) {
			pos[i] = wander(b, pos[i - 1]);
			touch(b, pos[i]);
		}
		/* Keep one of the newcomers, seldom the newest. */
		pos[0] = pos[1 + r / 8 % 8];
		for (int i = 1; i < 9; i++) {
			if (pos[i] != pos[0])
				discard(b, pos[i], 1);
		}
		discard(b, pos[0] ? 0 : 1, 1);
	}
}

static void uffd_copy(struct bench *b, unsigned int i)
{
	struct uffdio_copy copy = {
		.dst = (unsigned long)(b->table + i * b->page),
		.src = (unsigned long)b->source,
		.len = b->page,
	};

	if (ioctl(b->uffd, UFFDIO_COPY, &copy))
		ksft_exit_fail_perror("UFFDIO_COPY");
}

/* relay(), populated by userfaultfd, as post-copy migration does. */
static void relay_uffd(struct bench *b)
{
	unsigned int last = 0, next;

	uffd_copy(b, last);
	for (unsigned int r = 0; r < b->rounds; r++, last = next) {
		next = wander(b, last);
		uffd_copy(b, next);
		discard(b, last, 1);
	}
}

static void mremap_in(struct bench *b, unsigned int i)
{
	pt_store(b->source, 1);
	/* MREMAP_DONTUNMAP keeps the VMAs as they are but moves the page. */
	if (mremap(b->source, b->page, b->page, MREMAP_MAYMOVE | MREMAP_FIXED |
		   MREMAP_DONTUNMAP, b->table + i * b->page) == MAP_FAILED)
		ksft_exit_fail_perror("mremap");
}

/* relay(), populated by mremap(). */
static void relay_mremap(struct bench *b)
{
	unsigned int last = 0, next;

	mremap_in(b, last);
	for (unsigned int r = 0; r < b->rounds; r++, last = next) {
		next = wander(b, last);
		mremap_in(b, next);
		discard(b, last, 1);
	}
}

/* A page moves about by UFFDIO_MOVE, and one stays: the cost of a move. */
static void move_uffd(struct bench *b)
{
	unsigned int last = 2, next;

	uffd_copy(b, FAR);
	uffd_copy(b, last);
	for (unsigned int r = 0; r < b->rounds; r++, last = next) {
		struct uffdio_move move = { .len = b->page };
		unsigned long long start;

		next = wander(b, last) % FAR;
		if (next == last)
			continue;
		move.src = (unsigned long)(b->table + last * b->page);
		move.dst = (unsigned long)(b->table + next * b->page);
		start = pt_ticks();
		if (ioctl(b->uffd, UFFDIO_MOVE, &move))
			ksft_exit_fail_perror("UFFDIO_MOVE");
		measured(b, start);
	}
	/* As it was: with nothing in the way of the next run. */
	madvise(b->table, NR_ENTRIES * b->page, MADV_DONTNEED);
}

/* Guards come and go beside a page that stays: the cost of removing one. */
static void guard(struct bench *b)
{
	touch(b, FAR);
	for (unsigned int r = 0; r < b->rounds; r++) {
		char *where = b->table + (r * 7) % FAR * b->page;
		unsigned long long start;

		if (madvise(where, b->page, MADV_GUARD_INSTALL))
			ksft_exit_fail_perror("MADV_GUARD_INSTALL");
		start = pt_ticks();
		madvise(where, b->page, MADV_GUARD_REMOVE);
		measured(b, start);
	}
}

/* Write faults in a table that exists; the discard in between is not counted. */
static void fault_write(struct bench *b)
{
	touch(b, 0);
	for (unsigned int r = 0; r < b->rounds; r += BATCH) {
		unsigned long long start = pt_ticks();

		for (unsigned int i = 1; i <= BATCH; i++)
			touch(b, i * 3);
		b->cost += pt_ticks() - start;
		b->faults += BATCH;
		end_batch(b);
		madvise(b->table + b->page, FAR * b->page, MADV_DONTNEED);
	}
}

/* Read faults, which map the zeropage: the cheapest fault there is. */
static void fault_read(struct bench *b)
{
	touch(b, 0);
	for (unsigned int r = 0; r < b->rounds; r += BATCH) {
		unsigned long long start = pt_ticks();

		for (unsigned int i = 1; i <= BATCH; i++)
			pt_load(b->table + i * 3 * b->page);
		b->cost += pt_ticks() - start;
		b->faults += BATCH;
		end_batch(b);
		madvise(b->table + b->page, FAR * b->page, MADV_DONTNEED);
	}
}

static const struct pattern {
	const char *name;
	const char *goal;	/* most that patched may exceed stock by, percent */
	bool populate;		/* starts with every page there */
	bool uffd;
	void (*run)(struct bench *b);
} patterns[] = {
	{ "dense",		"1",	true,	false,	dense },
	{ "survivor",		"5",	false,	false,	survivor },
	{ "hole",		"5",	false,	false,	hole },
	{ "pingpong",		"5",	false,	false,	pingpong },
	{ "relay",		"5",	false,	false,	relay },
	{ "batch",		"5",	false,	false,	batch },
	{ "relay-uffd",		"5",	false,	true,	relay_uffd },
	{ "relay-mremap",	"5",	false,	false,	relay_mremap },
	{ "move-uffd",		"5",	false,	true,	move_uffd },
	{ "guard",		"10",	false,	false,	guard },
	{ "fault-write",	"0.5",	false,	false,	fault_write },
	{ "fault-read",		"0.5",	false,	false,	fault_read },
};

static void map_table(struct bench *b)
{
	size_t span = 4 * NR_ENTRIES * b->page;
	char *map;

	map = mmap(NULL, span, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	b->source = mmap(NULL, b->page, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED || b->source == MAP_FAILED)
		ksft_exit_fail_perror("mmap");
	madvise(map, span, MADV_NOHUGEPAGE);
	b->table = (char *)(((unsigned long)map + span / 2) & -(span / 4));
	*b->source = 1;
}

static bool register_uffd(struct bench *b)
{
	b->uffd = pt_uffd_for(b->table, NR_ENTRIES * b->page, UFFD_FEATURE_MOVE,
			      UFFDIO_REGISTER_MODE_MISSING);
	return b->uffd >= 0;
}

/* One run of a pattern in a table of its own; false: not to be had here. */
static bool run_pattern(const struct pattern *p, struct bench *b)
{
	unsigned int rounds = b->rounds;
	unsigned long long start;

	map_table(b);
	if (p->uffd && !register_uffd(b))
		return false;
	if (p->populate) {
		for (unsigned int i = 0; i < NR_ENTRIES; i++)
			touch(b, i);
	}

	/* Once unmeasured: code, slab and page caches of the kernel. */
	b->rounds = 256;
	p->run(b);
	if (!p->populate)
		madvise(b->table, NR_ENTRIES * b->page, MADV_DONTNEED);
	b->cost = 0;
	b->nr_batches = 0;
	b->discards = 0;
	b->faults = 0;

	b->rounds = rounds;
	b->seed = 1;
	start = pt_ticks();
	p->run(b);
	b->total = pt_ticks() - start;
	return true;
}

static int by_value(const void *a, const void *b)
{
	const double *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

static double median(struct bench *b)
{
	qsort(b->batches, b->nr_batches, sizeof(*b->batches), by_value);
	return b->batches[b->nr_batches / 2];
}

static void report(const struct pattern *p, const char *name, struct bench *b, bool json)
{
	unsigned long ops = b->faults ? b->faults : b->discards;

	if (json) {
		printf("{\"name\":\"%s\",\"cost_unit\":\"%s\",", name, pt_cost_unit());
		printf("\"config\":{\"goal_percent\":%s,\"ops\":%lu},", p->goal, ops);
		printf("\"figures\":{\"op_cost\":%.2f,\"round_cost\":%.2f}}\n",
		       median(b), (double)b->total / ops);
	} else {
		printf("%-14s %9.1f %s per %s, %9.1f with all around it (%lu)\n",
		       name, median(b), pt_cost_unit(),
		       b->faults ? "page fault" : "discard",
		       (double)b->total / ops, ops);
	}
	fflush(stdout);
}

static void print_help(FILE *to)
{
	fprintf(to, "usage: pt_reclaim_cost [--json] [--rounds N] [--pattern NAME [--name LABEL]]\n"
		"  --json          one JSON object for each pattern, on a line\n"
		"  --rounds N      discards or faults to measure, 512 to 1000000 (default 8192)\n"
		"  --pattern NAME  only this one:");
	for (size_t i = 0; i < ARRAY_SIZE(patterns); i++)
		fprintf(to, " %s", patterns[i].name);
	fprintf(to, "\n  --name LABEL    in place of the pattern's name in the output\n"
		"Costs are ns, or guest instructions with PT_ICOUNT_SHIFT=N in the environment,\n"
		"on a machine under QEMU's -icount shift=N.\n"
		"Exit status: 0 done, 1 a system call failed, 2 usage, 4 something was skipped.\n");
}

static int bad(const char *what, const char *value)
{
	fprintf(stderr, "error: %s: %s\n", what, value);
	print_help(stderr);
	return 2;
}

static const struct pattern *find_pattern(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(patterns); i++) {
		if (!strcmp(name, patterns[i].name))
			return &patterns[i];
	}
	return NULL;
}

/* One pattern from start to report; false: not to be had here. */
static bool measure(const struct pattern *p, const char *name, unsigned int rounds, bool json)
{
	static double batches[MAX_BATCHES];
	struct bench b = {
		.page = sysconf(_SC_PAGESIZE),
		.rounds = rounds,
		.seed = 1,
		.uffd = -1,
		.batches = batches,
	};

	if (!run_pattern(p, &b)) {
		fprintf(stderr, "%s: skipped, no userfaultfd\n", name);
		return false;
	}
	report(p, name, &b, json);
	return true;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "json", no_argument, NULL, 'j' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "pattern", required_argument, NULL, 'p' },
		{ "name", required_argument, NULL, 'n' },
		{ "help", no_argument, NULL, 'h' },
		{ }
	};
	const struct pattern *only = NULL;
	const char *name = NULL;
	unsigned long rounds = 8192;
	bool json = false, all = true;
	char *end;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 'j':
			json = true;
			break;
		case 'r':
			rounds = strtoul(optarg, &end, 10);
			if (*end || rounds < 512 || rounds > 1000000)
				return bad("not a number of rounds from 512 to 1000000", optarg);
			break;
		case 'p':
			only = find_pattern(optarg);
			if (!only)
				return bad("no such pattern", optarg);
			break;
		case 'n':
			if (!pt_plain_label(optarg))
				return bad("--name wants letters, digits, punctuation", optarg);
			name = optarg;
			break;
		case 'h':
			print_help(stdout);
			return 0;
		default:
			print_help(stderr);
			return 2;
		}
	}
	if (optind < argc)
		return bad("unexpected argument", argv[optind]);
	if (name && !only)
		return bad("--name wants one --pattern", name);
	if (sysconf(_SC_PAGESIZE) != 4096) {
		fprintf(stderr, "error: the patterns are laid out for pages of 4096 bytes\n");
		return KSFT_SKIP;
	}

	for (size_t i = 0; i < ARRAY_SIZE(patterns); i++) {
		const struct pattern *p = &patterns[i];

		if (!only || only == p)
			all &= measure(p, name ? name : p->name, rounds, json);
	}
	return all ? 0 : KSFT_SKIP;
}
