// SPDX-License-Identifier: GPL-2.0
/*
 * What page tables of a sparse mapping cost: memory, discards, and everything
 * that has to walk, copy or unmap them.
 *
 * Four benchmarks, each a line of JSON or of text; see print_help().  Memory is
 * that of one anonymous mapping without huge pages.  Costs are guest instructions
 * under QEMU's -icount (see pt_icount_shift()), ns elsewhere; VmPTE and VmRSS
 * are those of /proc/self/status, in kB.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "kselftest.h"
#include "pt_util.h"

/*
 * Runs of an operation whose median is reported, odd: of faults on a whole mapping, and
 * of system calls that are short enough for a timer interrupt to show.
 */
#define RUNS		7
#define OP_RUNS		21
#define MAX_THREADS	64
/* Discards whose latency is kept one by one. */
#define MAX_COUNT	65536
#define MIB		(1024 * 1024ul)

enum state { POPULATED, UNPLUGGED, DENSE };

static const char * const states[] = { "populated", "unplugged", "dense", NULL };

struct config {
	const char *mode, *name;
	size_t size, block, piece;	/* bytes */
	unsigned long count;		/* operations to measure */
	int threads;
	int state;
	bool sparse, json;
};

static void must(bool ok, const char *what)
{
	if (!ok)
		ksft_exit_fail_perror(what);
}

/* Anonymous memory without huge pages, aligned to 1 GiB. */
static char *map_region(size_t size)
{
	size_t align = 1024 * MIB;
	char *raw, *mem;

	raw = mmap(NULL, size + align, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(raw != MAP_FAILED, "mmap");
	mem = (char *)(((unsigned long)raw + align - 1) & -align);
	munmap(raw, mem - raw);
	munmap(mem + size, raw + align - mem);
	must(!mprotect(mem, size, PROT_READ | PROT_WRITE), "mprotect");
	madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static void touch(char *mem, size_t size, size_t step)
{
	for (size_t at = 0; at < size; at += step)
		pt_store(mem + at, 1);
}

static void discard(char *mem, size_t size, size_t piece)
{
	for (size_t at = 0; at < size; at += piece)
		must(!madvise(mem + at, piece, MADV_DONTNEED), "MADV_DONTNEED");
}

static int by_value(const void *a, const void *b)
{
	const unsigned long long *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

static void sort(unsigned long long *values, size_t nr)
{
	qsort(values, nr, sizeof(*values), by_value);
}

static long rss_kb(void)
{
	char buf[8192];

	must(pt_read_file("/proc/self/status", buf, sizeof(buf)) > 0, "/proc/self/status");
	return pt_field(buf, "VmRSS");
}

static void print_head(const struct config *c)
{
	if (!c->json) {
		printf("%s:", c->name);
		return;
	}
	printf("{\"name\":\"%s\",\"cost_unit\":\"%s\",\"config\":{", c->name, pt_cost_unit());
	printf("\"size\":%zu,\"block\":%zu,\"piece\":%zu,", c->size, c->block, c->piece);
	printf("\"count\":%lu,\"threads\":%d,\"state\":\"%s\"},\"figures\":{",
	       c->count, c->threads, states[c->state]);
}

static void print_figure(const struct config *c, const char *name, double value, bool last)
{
	if (c->json)
		printf("\"%s\":%.1f%s", name, value, last ? "}" : ",");
	else
		printf(" %s %.1f%s", name, value, last ? "\n" : ",");
}

/*
 * The program that came with the kernel series which first freed page tables on
 * MADV_DONTNEED: 2 MiB are touched and discarded, over and over along a mapping.
 */
static void run_touch_discard(const struct config *c)
{
	size_t step = c->sparse ? c->block : PT_PAGE_SIZE;
	unsigned long long start, cost = 0;
	char *mem = map_region(c->size);
	long before = pt_vmpte_kb(0);

	for (size_t at = 0; at < c->size; at += c->block) {
		touch(mem + at, c->block, step);
		start = pt_ticks();
		discard(mem + at, c->block, c->piece);
		cost += pt_ticks() - start;
	}
	print_head(c);
	print_figure(c, "vmpte_before_kb", before, false);
	print_figure(c, "vmpte_after_kb", pt_vmpte_kb(0), false);
	print_figure(c, "rss_after_kb", rss_kb(), false);
	print_figure(c, "discard_cost", (double)cost / (c->size / c->block), true);
}

/* Per cents of a sorted array, as the points of a distribution. */
static void print_series(const unsigned long long *sorted, size_t nr)
{
	static const double at[] = { 0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100 };

	printf(",\"series\":{\"discard_cost\":[");
	for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
		size_t rank = (nr - 1) * at[i] / 100;

		printf("%s[%g,%llu]", i ? "," : "", at[i], sorted[rank]);
	}
	printf("]}");
}

/* How long one discard takes, each for itself. */
static void run_latency(const struct config *c)
{
	static unsigned long long cost[MAX_COUNT];
	size_t blocks = c->size / c->block, step = c->sparse ? c->block : PT_PAGE_SIZE;
	char *mem = map_region(c->size);

	for (unsigned long i = 0; i < c->count; i++) {
		char *block = mem + i % blocks * c->block;
		unsigned long long start;

		touch(block, c->block, step);
		start = pt_ticks();
		must(!madvise(block, c->block, MADV_DONTNEED), "MADV_DONTNEED");
		cost[i] = pt_ticks() - start;
	}
	sort(cost, c->count);
	print_head(c);
	print_figure(c, "median_cost", cost[c->count / 2], false);
	print_figure(c, "p99_cost", cost[c->count * 99 / 100], false);
	print_figure(c, "max_cost", cost[c->count - 1], true);
	if (c->json)
		print_series(cost, c->count);
}

struct toucher {
	pthread_t thread;
	char *mem;
	size_t size;
};

static void *touch_part(void *arg)
{
	struct toucher *t = arg;

	touch(t->mem, t->size, PT_PAGE_SIZE);
	return NULL;
}

/* Threads that populate a part each of one mapping, page by page. */
static void run_faults(const struct config *c)
{
	size_t part = c->size / c->threads;
	struct toucher touchers[MAX_THREADS];
	unsigned long long cost[RUNS];
	char *mem = map_region(c->size);

	for (int r = 0; r < RUNS; r++) {
		unsigned long long start = pt_ticks();

		for (int i = 0; i < c->threads; i++) {
			touchers[i].mem = mem + i * part;
			touchers[i].size = part;
			must(!pthread_create(&touchers[i].thread, NULL, touch_part, &touchers[i]),
			     "pthread_create");
		}
		for (int i = 0; i < c->threads; i++)
			pthread_join(touchers[i].thread, NULL);
		cost[r] = pt_ticks() - start;
		discard(mem, c->size, c->size);
	}
	sort(cost, RUNS);
	print_head(c);
	print_figure(c, "fault_cost", (double)cost[RUNS / 2] / (c->size / PT_PAGE_SIZE), true);
}

/* Bring the mapping into the state whose cost is asked for. */
static void prepare(const struct config *c, char *mem)
{
	touch(mem, c->size, c->state == DENSE ? PT_PAGE_SIZE : PT_PMD_SIZE);
	if (c->state == UNPLUGGED)
		discard(mem, c->size, c->piece);
}

static unsigned long long time_fork(void)
{
	unsigned long long start = pt_ticks();
	pid_t pid = fork();

	must(pid >= 0, "fork");
	if (!pid)
		_exit(0);
	must(waitpid(pid, NULL, 0) == pid, "waitpid");
	return pt_ticks() - start;
}

/* By one page, so that entries are moved and not tables. */
static unsigned long long time_mremap(const struct config *c, char *from, char *to)
{
	unsigned long long start = pt_ticks();

	must(mremap(from, c->size, c->size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
	return pt_ticks() - start;
}

/* fork and exit, a move, and munmap of a mapping in one state. */
static void run_ops(const struct config *c)
{
	unsigned long long forks[OP_RUNS], moves[OP_RUNS], unmaps[OP_RUNS], start;

	for (int r = 0; r < OP_RUNS; r++) {
		char *room = map_region(2 * c->size + 2 * PT_PMD_SIZE);
		char *to = room + c->size + PT_PMD_SIZE + PT_PAGE_SIZE;

		prepare(c, room);
		forks[r] = time_fork();
		moves[r] = time_mremap(c, room, to);
		start = pt_ticks();
		munmap(to, c->size);
		unmaps[r] = pt_ticks() - start;
		munmap(room, 2 * c->size + 2 * PT_PMD_SIZE);
	}
	sort(forks, OP_RUNS);
	sort(moves, OP_RUNS);
	sort(unmaps, OP_RUNS);
	print_head(c);
	print_figure(c, "fork_exit_cost", forks[OP_RUNS / 2], false);
	print_figure(c, "mremap_cost", moves[OP_RUNS / 2], false);
	print_figure(c, "munmap_cost", unmaps[OP_RUNS / 2], true);
}

static const struct mode {
	const char *name;
	void (*run)(const struct config *c);
} modes[] = {
	{ "touch-discard",	run_touch_discard },
	{ "latency",		run_latency },
	{ "faults",		run_faults },
	{ "ops",		run_ops },
};

static void print_help(FILE *to)
{
	fputs("usage: pt_reclaim_bench MODE [OPTION...]\n"
	      "  touch-discard  touch --block bytes and discard them in pieces of --piece, along\n"
	      "                 a mapping of --size: VmPTE and VmRSS before and after\n"
	      "  latency        --count discards of --block bytes: median, tail, distribution\n"
	      "  faults         --threads that populate --size bytes: cost of a page fault\n"
	      "  ops            fork and exit, mremap by one page, munmap of --size bytes\n"
	      "Sizes are bytes, or with K, M or G, and multiples of a page.\n"
	      "  --size SIZE    of the mapping (default 1G)\n"
	      "  --block SIZE   default 2M\n"
	      "  --piece SIZE   of one discarding call (default: the block)\n"
	      "  --count N      discards to measure, 1 to 65536 (default 1024)\n"
	      "  --threads N    1 to 64 (default 1)\n"
	      "  --sparse       touch one page of a block and not all\n"
	      "  --state S      for ops: populated (one page for each page table), unplugged\n"
	      "                 (that, then discarded in pieces), dense (all pages)\n"
	      "  --name LABEL   of this run in the output\n"
	      "  --json         one JSON object on a line\n"
	      "Costs are ns, or guest instructions with PT_ICOUNT_SHIFT=N in the environment,\n"
	      "on a machine under QEMU's -icount shift=N.\n"
	      "Exit status: 0 done, 1 a system call failed, 2 usage, 4 skipped.\n", to);
}

static void __noreturn bad(const char *what, const char *value)
{
	fprintf(stderr, "error: %s: %s\n", what, value);
	print_help(stderr);
	exit(2);
}

static unsigned long parse_number(const char *option, const char *text, unsigned long max)
{
	unsigned long value;
	char *end;

	errno = 0;
	value = strtoul(text, &end, 10);
	if (errno || *end || end == text || *text == '-' || !value || value > max)
		bad(option, text);
	return value;
}

static struct config parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "size", 1, NULL, 's' }, { "block", 1, NULL, 'b' }, { "piece", 1, NULL, 'p' },
		{ "count", 1, NULL, 'c' }, { "threads", 1, NULL, 't' },
		{ "sparse", 0, NULL, '1' }, { "state", 1, NULL, 'S' },
		{ "name", 1, NULL, 'n' }, { "json", 0, NULL, 'j' }, { "help", 0, NULL, 'h' }, { }
	};
	struct config c = { .size = 1024 * MIB, .block = 2 * MIB, .count = 1024, .threads = 1 };
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case 's':
			c.size = pt_parse_size(optarg);
			break;
		case 'b':
			c.block = pt_parse_size(optarg);
			break;
		case 'p':
			c.piece = pt_parse_size(optarg);
			if (!c.piece)
				bad("--piece", optarg);
			break;
		case 'c':
			c.count = parse_number("--count", optarg, MAX_COUNT);
			break;
		case 't':
			c.threads = parse_number("--threads", optarg, MAX_THREADS);
			break;
		case '1':
			c.sparse = true;
			break;
		case 'S':
			for (c.state = 0; states[c.state]; c.state++) {
				if (!strcmp(states[c.state], optarg))
					break;
			}
			if (!states[c.state])
				bad("--state", optarg);
			break;
		case 'n':
			if (!pt_plain_label(optarg))
				bad("--name wants letters, digits and plain punctuation", optarg);
			c.name = optarg;
			break;
		case 'j':
			c.json = true;
			break;
		case 'h':
			print_help(stdout);
			exit(0);
		default:
			print_help(stderr);
			exit(2);
		}
	}
	if (optind + 1 != argc)
		bad("want one MODE", optind < argc ? argv[argc - 1] : "none");
	c.mode = argv[optind];
	if (!c.name)
		c.name = c.mode;
	if (!c.size || !c.block || c.size % c.block)
		bad("--block", "a divisor of --size");
	if (!c.piece)
		c.piece = c.block;
	if (c.block % c.piece)
		bad("--piece", "a divisor of --block");
	return c;
}

int main(int argc, char **argv)
{
	struct config c = parse(argc, argv);

	if (PT_PAGE_SIZE != 4096)
		ksft_exit_skip("the geometry is that of 4K pages\n");
	pt_settle();
	for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
		if (strcmp(modes[i].name, c.mode))
			continue;
		modes[i].run(&c);
		if (c.json)
			printf("}\n");
		return 0;
	}
	bad("no such MODE", c.mode);
}
