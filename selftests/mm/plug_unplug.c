// SPDX-License-Identifier: GPL-2.0
/*
 * A virtio-mem device in miniature: blocks of a large sparse region are plugged
 * (populated) and unplugged (discarded), and the page tables of every process
 * that maps the region are compared with what the plugged blocks need.
 *
 * Without arguments a kselftest; with arguments a driver for measurements, see
 * print_help().  What is checked after every phase:
 *  - VmPTE of each process against the ideal: the reading before the first
 *    touch, plus 4 kB for each 2 MiB range that has a populated page, no slack; PMD
 *    and PUD tables of ranges that have none may stay for a while, and have to be
 *    gone in the end (of other ranges: upper_kb);
 *  - the contents of plugged pages against a model (a word made of the seed,
 *    the page and how often its block was plugged);
 *  - that unplugged pages are not there (/proc/self/pagemap), and at the very
 *    end, on a sample, that they read zero: reading populates.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <linux/falloc.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "kselftest.h"
#include "pt_util.h"

enum backing { ANON, MEMFD, MEMFD2 };
enum order { SEQ, RANDOM, FRAGMENT };
enum discard { DONTNEED, REMOVE, PUNCH, QEMU };

static const char * const backings[] = { "anon", "memfd", "memfd2", NULL };
static const char * const orders[] = { "seq", "random", "fragment", NULL };
static const char * const discards[] = { "dontneed", "remove", "punch", "qemu", NULL };
static const char * const switches[] = { "off", "on", NULL };

struct config {
	const char *name;
	size_t region, block, piece;	/* bytes */
	size_t touch;			/* pages of a block; 0: all */
	int plugged;			/* percent of the blocks at the peak */
	int unplug;			/* percent of these in the first unplug */
	int cycles;
	int day;			/* steps of a day's trace; 0: cycles */
	int backing, order, discard, thp;
	unsigned int seed;
	bool at_once, json, scan, strict, touched_only;
	bool settle;			/* wait for upper tables after each unplug */
};

struct device {
	const struct config *c;
	char *mem;
	int memfd;
	size_t page, nr_blocks, nr_tables, pages_per_block, stride;
	unsigned int *generation;	/* of each block: how often it was plugged */
	bool *plugged;
	bool *table_used;		/* scratch: 2 MiB ranges with a page */
	bool *gib_touched;		/* 1 GiB ranges ever touched */
	bool *gib_used;			/* scratch: 1 GiB ranges with a page */
	size_t *list;			/* scratch: blocks in the order of a phase */
	unsigned int rng;
	long base_kb, peer_base_kb;	/* VmPTE before the first touch */
	pid_t peer;
	int to_peer, from_peer;
	unsigned long long plug_cost, discard_cost;	/* in pt_cost_unit() */
	size_t plug_blocks, discard_blocks, calls;
	long left_kb, ideal_left_kb, peer_left_kb, upper_kb, peak_kb;
	double sum_kb, ideal_sum_kb;	/* over the steps of a day */
	bool wrong;			/* contents: never forgiven */
	bool leftover;			/* more tables than ideal */
	char why[256];
};

static int stopped;	/* the signal that wants us to end */

static void on_signal(int sig)
{
	pt_store(&stopped, sig);
}

static unsigned int next_random(struct device *d)
{
	d->rng = d->rng * 1103515245 + 12345;
	return d->rng >> 16;
}

static size_t random_below(struct device *d, size_t bound)
{
	return (((size_t)next_random(d) << 16) ^ next_random(d)) % bound;
}

/* What the first word of a plugged page holds; never 0. */
static unsigned long pattern(const struct device *d, size_t page)
{
	size_t block = page / d->pages_per_block;

	return ((page + 1) * 0x9e3779b97f4a7c15ul ^ d->c->seed) +
	       d->generation[block] * 2 + 1;
}

static unsigned long *word_of(const struct device *d, size_t page)
{
	return (unsigned long *)(d->mem + page * d->page);
}

static void __printf(3, 4)
complain(struct device *d, bool *what, const char *format, ...)
{
	va_list args;

	if (!d->wrong && !d->leftover) {
		va_start(args, format);
		vsnprintf(d->why, sizeof(d->why), format, args);
		va_end(args);
	}
	*what = true;
}

static void must(bool ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "error: %s: %s\n", what, strerror(errno));
	exit(KSFT_FAIL);
}

static void plug(struct device *d, size_t block)
{
	size_t first = block * d->pages_per_block;

	d->generation[block]++;
	for (size_t i = 0; i < d->pages_per_block; i += d->stride)
		*word_of(d, first + i) = pattern(d, first + i);
	d->plugged[block] = true;
	d->gib_touched[block * d->c->block / PT_PUD_SIZE] = true;
}

/* One call of the kind that the configuration wants. */
static void discard_range(struct device *d, size_t offset, size_t len)
{
	char *start = d->mem + offset;
	int how = d->c->discard;

	d->calls++;
	if (how == PUNCH || how == QEMU)
		must(!fallocate(d->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				offset, len), "fallocate");
	if (how == REMOVE)
		must(!madvise(start, len, MADV_REMOVE), "MADV_REMOVE");
	if (how == DONTNEED || how == QEMU)
		must(!madvise(start, len, MADV_DONTNEED), "MADV_DONTNEED");
	/* Of shared memory, DONTNEED drops the mapping and not the contents. */
	if (how == DONTNEED && d->memfd >= 0)
		must(!fallocate(d->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				offset, len), "fallocate");
}

static void unplug(struct device *d, size_t block)
{
	size_t start = block * d->c->block, end = start + d->c->block;
	size_t step = d->c->touched_only ? d->stride * d->page : d->c->piece;

	for (size_t at = start; at < end; at += step) {
		size_t len = d->c->piece < end - at ? d->c->piece : end - at;

		discard_range(d, at, len);
	}
	d->plugged[block] = false;
}

static size_t nr_gibs(const struct device *d)
{
	return (d->c->region + PT_PUD_SIZE - 1) / PT_PUD_SIZE;
}

/* kB of PTE tables that the plugged blocks need; leaves ->gib_used. */
static long ideal_tables_kb(struct device *d)
{
	long tables = 0;

	memset(d->table_used, 0, d->nr_tables);
	memset(d->gib_used, 0, nr_gibs(d) * sizeof(*d->gib_used));
	for (size_t b = 0; b < d->nr_blocks; b++) {
		size_t first = b * d->pages_per_block;

		if (!d->plugged[b])
			continue;
		for (size_t i = 0; i < d->pages_per_block; i += d->stride) {
			bool *used = &d->table_used[(first + i) / PT_PTE_ENTRIES];

			tables += !*used;
			*used = true;
			d->gib_used[(first + i) * d->page / PT_PUD_SIZE] = true;
		}
	}
	return tables * (long)(d->page / 1024);
}

/*
 * kB of PMD and PUD tables for these ranges of 1 GiB.  The region is aligned to 512 GiB:
 * it has PUD tables of its own.
 */
static long upper_tables_kb(const struct device *d, const bool *gibs)
{
	size_t tables = 0;
	bool pud = false;

	for (size_t i = 0; i < nr_gibs(d); i++) {
		pud &= i % PT_PTE_ENTRIES != 0;
		tables += gibs[i] + (gibs[i] && !pud);
		pud |= gibs[i];
	}
	return tables * (long)(d->page / 1024);
}

/* kB of upper tables that the plugged blocks need, after ideal_tables_kb(). */
static long needed_upper_kb(const struct device *d)
{
	/* CONFIG_PT_RECLAIM_UPPER=n: those of what was ever touched stay until munmap. */
	if (pt_vmstat("pt_reclaim_pte") >= 0 && pt_vmstat("pt_reclaim_pmd") < 0)
		return upper_tables_kb(d, d->gib_touched);
	return upper_tables_kb(d, d->gib_used);
}

/* Does any page of [offset, offset + len) show in pagemap? Does not populate. */
static bool anything_there(struct device *d, size_t offset, size_t len)
{
	unsigned long long entries[512];
	size_t nr = len / d->page;
	bool there = false;
	int fd;

	if (nr > ARRAY_SIZE(entries))
		nr = ARRAY_SIZE(entries);
	fd = open("/proc/self/pagemap", O_RDONLY);
	must(fd >= 0, "/proc/self/pagemap");
	must(pread(fd, entries, nr * 8, (unsigned long)(d->mem + offset) / d->page * 8) ==
	     (ssize_t)nr * 8, "reading /proc/self/pagemap");
	close(fd);
	for (size_t i = 0; i < nr; i++)
		there |= entries[i] >> 62;
	return there;
}

/* All pages of plugged blocks, and a sample of the unplugged ones. */
static void check_contents(struct device *d, const char *phase)
{
	for (size_t b = 0; b < d->nr_blocks && !d->wrong; b++) {
		size_t first = b * d->pages_per_block;

		if (d->plugged[b]) {
			for (size_t i = 0; i < d->pages_per_block; i += d->stride) {
				if (*word_of(d, first + i) != pattern(d, first + i))
					complain(d, &d->wrong, "%s: page %zu lost its contents",
						 phase, first + i);
			}
		} else if (b % (d->nr_blocks / 64 + 1) == 0 &&
			   anything_there(d, b * d->c->block, d->c->block)) {
			complain(d, &d->wrong, "%s: unplugged block %zu still has pages",
				 phase, b);
		}
	}
}

/* vhost-user's side: maps the memfd, touches what it is told to, checks it. */
static void peer_main(struct device *d, int in, int out)
{
	size_t block;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	munmap(d->mem, d->c->region);
	pt_settle();
	must(mmap(d->mem, d->c->region, PROT_READ | PROT_WRITE,
		  MAP_FIXED_NOREPLACE | MAP_NORESERVE | MAP_SHARED, d->memfd, 0) == d->mem,
	     "mmap in the second process");
	must(write(out, "", 1) == 1, "telling that the second process is there");
	while (read(in, &block, sizeof(block)) == sizeof(block)) {
		size_t first = block * d->pages_per_block;
		char ok = 1;

		/* The model's words are in memory that both share. */
		for (size_t i = 0; i < d->pages_per_block; i += d->stride)
			ok &= *word_of(d, first + i) == pattern(d, first + i);
		if (write(out, &ok, 1) != 1)
			break;
	}
	_exit(0);
}

static void start_peer(struct device *d)
{
	int down[2], up[2];

	must(!pipe(down) && !pipe(up), "pipe");
	d->peer = fork();
	must(d->peer >= 0, "fork");
	if (!d->peer) {
		close(down[1]);
		close(up[0]);
		peer_main(d, down[0], up[1]);
	}
	close(down[0]);
	close(up[1]);
	d->to_peer = down[1];
	d->from_peer = up[0];
}

static void peer_ready(struct device *d)
{
	char ready;

	must(read(d->from_peer, &ready, 1) == 1, "the second process");
}

static void peer_touch(struct device *d, size_t block)
{
	char ok = 0;

	must(write(d->to_peer, &block, sizeof(block)) == sizeof(block), "telling the peer");
	must(read(d->from_peer, &ok, 1) == 1, "the peer's answer");
	if (!ok)
		complain(d, &d->wrong, "the second process sees other contents in block %zu",
			 block);
}

static void stop_peer(struct device *d)
{
	if (!d->peer)
		return;
	close(d->to_peer);
	close(d->from_peer);
	waitpid(d->peer, NULL, 0);
	d->peer = 0;
}

static void read_tables(struct device *d)
{
	d->left_kb = pt_vmpte_kb(0) - d->base_kb;
	if (d->peer)
		d->peer_left_kb = pt_vmpte_kb(d->peer) - d->peer_base_kb;
}

static bool upper_are_gone(void *arg)
{
	struct device *d = arg;

	read_tables(d);
	return pt_load(&stopped) || (d->left_kb <= d->ideal_left_kb + d->upper_kb &&
				     d->peer_left_kb <= d->ideal_left_kb + d->upper_kb);
}

/*
 * Upper tables go in the next pass of the background; a lock that could not be had
 * puts that off by another.
 */
static void wait_for_upper(struct device *d)
{
	char period_ms[32];

	if (pt_vmstat("pt_reclaim_pmd") < 0 ||
	    pt_read_file(PT_CONTROL "period_ms", period_ms, sizeof(period_ms)) < 0)
		return;
	pt_wait_until(upper_are_gone, d, 3 * (atoi(period_ms) / 1000 + 1));
}

/* Are the tables what the plugged blocks need, or, until @settled, a few upper ones more? */
static void check_tables(struct device *d, const char *phase, bool settled)
{
	long least, most;

	d->ideal_left_kb = ideal_tables_kb(d);
	d->upper_kb = needed_upper_kb(d);
	if (settled)
		wait_for_upper(d);
	read_tables(d);
	if (d->left_kb > d->peak_kb)
		d->peak_kb = d->left_kb;
	/* A huge page has its table deposited (anon) or none (shmem). */
	least = d->c->thp ? 0 : d->ideal_left_kb + d->upper_kb;
	most = d->ideal_left_kb +
	       (settled ? d->upper_kb : upper_tables_kb(d, d->gib_touched));
	if (d->left_kb < least || d->left_kb > most)
		complain(d, &d->leftover, "%s: %ld kB of page tables, %ld to %ld kB are needed",
			 phase, d->left_kb, least, most);
	if (d->peer && d->peer_left_kb > most)
		complain(d, &d->leftover, "%s: second process: %ld kB, %ld kB are needed",
			 phase, d->peer_left_kb, most);
}

static void progress(const struct device *d, const char *phase)
{
	if (isatty(2) && !pt_load(&stopped))
		fprintf(stderr, "\r%s: %s \r", d->c->name, phase);
}

/* The blocks of one phase, in the configured order, into d->list. */
static size_t make_list(struct device *d, bool plugged, size_t want)
{
	size_t nr = 0, half = 0;

	for (size_t b = 0; b < d->nr_blocks; b++) {
		if (d->plugged[b] == plugged)
			d->list[nr++] = b;
	}
	if (d->c->order == RANDOM) {
		for (size_t i = nr; i > 1; i--) {
			size_t j = random_below(d, i), swap = d->list[j];

			d->list[j] = d->list[i - 1];
			d->list[i - 1] = swap;
		}
	}
	/* Every other one first, then those between: all tables half empty. */
	if (d->c->order == FRAGMENT && !plugged)
		return nr < want ? nr : want;
	if (d->c->order == FRAGMENT) {
		size_t *copy = d->list + d->nr_blocks;

		for (size_t i = 0; i < nr; i += 2)
			copy[half++] = d->list[i];
		for (size_t i = 1; i < nr; i += 2)
			copy[half++] = d->list[i];
		memcpy(d->list, copy, nr * sizeof(*copy));
	}
	return nr < want ? nr : want;
}

static void plug_phase(struct device *d, const char *phase, size_t want)
{
	size_t nr = make_list(d, false, want);
	unsigned long long start;

	progress(d, phase);
	start = pt_ticks();
	for (size_t i = 0; i < nr && !pt_load(&stopped); i++)
		plug(d, d->list[i]);
	d->plug_cost += pt_ticks() - start;
	d->plug_blocks += nr;
	for (size_t i = 0; i < nr && d->peer && !pt_load(&stopped); i++)
		peer_touch(d, d->list[i]);
	check_tables(d, phase, false);
	check_contents(d, phase);
}

static void unplug_phase(struct device *d, const char *phase, size_t want)
{
	size_t nr = make_list(d, true, want);
	unsigned long long start;

	progress(d, phase);
	/* What went in an earlier phase was a while ago, as it is with a device. */
	pt_grace_period();
	start = pt_ticks();
	if (d->c->at_once && nr == want) {
		discard_range(d, 0, d->c->region);
		memset(d->plugged, 0, d->nr_blocks);
	} else {
		for (size_t i = 0; i < nr && !pt_load(&stopped); i++)
			unplug(d, d->list[i]);
	}
	d->discard_cost += pt_ticks() - start;
	d->discard_blocks += nr;
	check_tables(d, phase, d->c->settle);
	check_contents(d, phase);
}

/*
 * A dump or a migration reads what is unplugged, which maps the zeropage there;
 * then a manager asks for the tables that this took, where the kernel listens.
 */
static void scan_phase(struct device *d)
{
	progress(d, "scan");
	for (size_t page = 0; page < d->c->region / d->page && !pt_load(&stopped); page++) {
		if (!d->plugged[page / d->pages_per_block] && pt_load(word_of(d, page)))
			complain(d, &d->wrong, "page %zu is unplugged and not zero", page);
	}
	must(!madvise(d->mem, d->c->region, MADV_TRIM_TABLES) || errno == EINVAL,
	     "MADV_TRIM_TABLES");
	check_tables(d, "scan", d->c->settle);
}

/* Unplugged memory reads zero; this populates, so it comes last. */
static void check_zero(struct device *d)
{
	size_t pages = d->c->region / d->page;

	for (int i = 0; i < 256 && !d->wrong; i++) {
		size_t page = random_below(d, pages);

		if (!d->plugged[page / d->pages_per_block] && *word_of(d, page))
			complain(d, &d->wrong, "page %zu is unplugged and not zero", page);
	}
}

static void *shared_array(size_t nr, size_t size)
{
	void *p = mmap(NULL, nr * size, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	must(p != MAP_FAILED, "mmap of the model");
	return p;
}

/* Map the region where no other mapping shares a page table with it. */
static void map_region(struct device *d)
{
	const struct config *c = d->c;
	size_t align = PT_PUD_SIZE * PT_PTE_ENTRIES;
	char *hint = (char *)(16 * align);

	d->memfd = -1;
	if (c->backing != ANON) {
		d->memfd = memfd_create("plug_unplug", MFD_CLOEXEC);
		must(d->memfd >= 0 && !ftruncate(d->memfd, c->region), "memfd");
	}
	d->mem = mmap(hint, c->region, PROT_READ | PROT_WRITE, MAP_FIXED_NOREPLACE |
		      MAP_NORESERVE | (d->memfd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS),
		      d->memfd, 0);
	must(d->mem != MAP_FAILED, "mmap of the region");
	/* Without THP in the kernel this fails, and 4K pages are what we get. */
	madvise(d->mem, c->region, c->thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

static void open_device(struct device *d, const struct config *c)
{
	memset(d, 0, sizeof(*d));
	d->c = c;
	d->page = PT_PAGE_SIZE;
	d->rng = c->seed;
	d->nr_blocks = c->region / c->block;
	d->nr_tables = c->region / PT_PMD_SIZE + 1;
	d->pages_per_block = c->block / d->page;
	d->stride = c->touch ? d->pages_per_block / c->touch : 1;
	d->generation = shared_array(d->nr_blocks, sizeof(*d->generation));
	d->plugged = shared_array(d->nr_blocks, sizeof(*d->plugged));
	d->table_used = shared_array(d->nr_tables, sizeof(*d->table_used));
	d->gib_touched = shared_array(nr_gibs(d), sizeof(*d->gib_touched));
	d->gib_used = shared_array(nr_gibs(d), sizeof(*d->gib_used));
	d->list = shared_array(2 * d->nr_blocks, sizeof(*d->list));
	pt_settle();
	map_region(d);
	if (c->backing == MEMFD2) {
		start_peer(d);
		peer_ready(d);
		d->peer_base_kb = pt_vmpte_kb(d->peer);
	}
	d->base_kb = pt_vmpte_kb(0);
	must(d->base_kb >= 0, "/proc/self/status has no VmPTE");
}

static void close_device(struct device *d)
{
	stop_peer(d);
	munmap(d->mem, d->c->region);
	if (d->memfd >= 0)
		close(d->memfd);
	munmap(d->generation, d->nr_blocks * sizeof(*d->generation));
	munmap(d->plugged, d->nr_blocks);
	munmap(d->table_used, d->nr_tables);
	munmap(d->gib_touched, nr_gibs(d));
	munmap(d->gib_used, nr_gibs(d));
	munmap(d->list, 2 * d->nr_blocks * sizeof(*d->list));
}

static void run_cycles(struct device *d, size_t peak)
{
	size_t part = peak * d->c->unplug / 100;

	for (int i = 0; i < d->c->cycles && !pt_load(&stopped); i++) {
		plug_phase(d, "plug", peak);
		if (part) {
			unplug_phase(d, "unplug part", part);
			plug_phase(d, "replug", part);
			if (d->c->scan)
				scan_phase(d);
		}
		unplug_phase(d, "unplug all", peak);
		if (d->c->scan)
			scan_phase(d);
	}
}

/*
 * Blocks that are plugged at a step of the day: a tenth of all at midnight, the
 * peak at noon, in a straight line between, and up to 2 percent of noise.
 */
static size_t day_target(struct device *d, size_t peak, size_t step)
{
	size_t night = d->nr_blocks / 10, day = d->c->day, half = day / 2;
	size_t hours = step < half ? step : day - step;
	size_t noise = random_below(d, d->nr_blocks / 50 + 1);
	size_t target = night + (peak > night ? peak - night : 0) * hours / half + noise;

	return target < peak ? target : peak;
}

/* A day: the target of the hour, and a hundredth of the blocks that moves. */
static void run_day(struct device *d, size_t peak)
{
	size_t moving = d->nr_blocks / 100 + 1, plugged = 0, target;

	for (int i = 0; i < d->c->day && !pt_load(&stopped); i++) {
		target = day_target(d, peak, i);
		if (target > plugged)
			plug_phase(d, "day", target - plugged);
		else if (target < plugged)
			unplug_phase(d, "day", plugged - target);
		plugged = target;
		if (plugged > moving) {
			unplug_phase(d, "day", moving);
			plug_phase(d, "day", moving);
		}
		d->sum_kb += d->left_kb;
		d->ideal_sum_kb += d->ideal_left_kb + d->upper_kb;
	}
	unplug_phase(d, "unplug all", plugged);
}

/* All phases; true when everything was as it must be. */
static bool run(struct device *d)
{
	size_t peak = d->nr_blocks * d->c->plugged / 100;

	if (!peak)
		peak = 1;
	if (d->c->day)
		run_day(d, peak);
	else
		run_cycles(d, peak);
	if (!pt_load(&stopped))
		check_tables(d, "the end", true);
	if (!pt_load(&stopped))
		check_zero(d);
	return !d->wrong && !(d->leftover && d->c->strict);
}

static double per_block(unsigned long long cost, size_t blocks)
{
	return (double)cost / (blocks ? blocks : 1);
}

/* "config" is what was asked for, "figures" what came of it. */
static void report_json(const struct device *d)
{
	const struct config *c = d->c;

	printf("{\"name\":\"%s\",\"cost_unit\":\"%s\",\"contents\":%s,\"config\":{",
	       c->name, pt_cost_unit(), d->wrong ? "false" : "true");
	printf("\"backing\":\"%s\",\"discard\":\"%s\",\"order\":\"%s\",\"thp\":\"%s\",",
	       backings[c->backing], discards[c->discard], orders[c->order], switches[c->thp]);
	printf("\"region\":%zu,\"block\":%zu,\"piece\":%zu,\"touch\":%zu,",
	       c->region, c->block, c->piece, c->touch);
	printf("\"cycles\":%d,\"seed\":%u,\"day\":%d,\"blocks\":%zu,\"calls\":%zu},",
	       c->cycles, c->seed, c->day, d->discard_blocks, d->calls);
	printf("\"figures\":{\"peak_kb\":%ld,\"left_kb\":%ld,\"ideal_left_kb\":%ld,",
	       d->peak_kb, d->left_kb, d->ideal_left_kb);
	if (c->backing == MEMFD2)
		printf("\"second_left_kb\":%ld,", d->peer_left_kb);
	if (c->day)
		printf("\"mean_kb\":%.1f,\"ideal_mean_kb\":%.1f,", d->sum_kb / c->day,
		       d->ideal_sum_kb / c->day);
	printf("\"upper_kb\":%ld,\"discard_cost\":%.1f,\"plug_cost\":%.1f}}\n", d->upper_kb,
	       per_block(d->discard_cost, d->discard_blocks),
	       per_block(d->plug_cost, d->plug_blocks));
}

static void report_text(const struct device *d)
{
	const struct config *c = d->c;

	printf("%s: page tables %ld kB at the peak, %ld kB left", c->name, d->peak_kb, d->left_kb);
	printf(" (needed: %ld kB and %ld kB of upper levels)", d->ideal_left_kb, d->upper_kb);
	if (c->backing == MEMFD2)
		printf(", %ld kB left in the second process", d->peer_left_kb);
	if (c->day)
		printf(", %.0f kB on average (needed: %.0f kB)", d->sum_kb / c->day,
		       d->ideal_sum_kb / c->day);
	printf("; %.0f %s to discard a block, %.0f to plug it; contents %s\n",
	       per_block(d->discard_cost, d->discard_blocks), pt_cost_unit(),
	       per_block(d->plug_cost, d->plug_blocks), d->wrong ? "WRONG" : "right");
}

static void report(const struct device *d)
{
	if (d->c->json)
		report_json(d);
	else
		report_text(d);
	fflush(stdout);
}

static const struct config defaults = {
	.name = "plug_unplug",
	.region = 64ul << 30,
	.block = 2 << 20,
	.touch = 1,
	.plugged = 100,
	.cycles = 1,
	.seed = 1,
};

static struct config variant(const char *name)
{
	struct config c = defaults;

	c.name = name;
	c.region = 512 << 20;
	c.unplug = 50;
	c.cycles = 2;
	c.strict = true;
	return c;
}

static bool test_one(struct config c)
{
	struct device d;
	bool ok;

	if (!c.piece)
		c.piece = c.block;
	open_device(&d, &c);
	ok = run(&d);
	if (!ok)
		ksft_print_msg("%s\n", d.why);
	close_device(&d);
	ksft_test_result(ok, "%s\n", c.name);
	return ok;
}

/* CONFIG_PT_RECLAIM: does a discard of a whole table's range free the table? */
static bool kernel_reclaims(void)
{
	struct config c = variant("probe");
	struct device d;
	bool ok;

	c.piece = c.block;
	c.unplug = 0;
	c.cycles = 1;
	c.at_once = true;
	open_device(&d, &c);
	run(&d);
	ok = !d.wrong && d.left_kb <= upper_tables_kb(&d, d.gib_touched);
	close_device(&d);
	return ok;
}

static char period_ms[32];	/* of the background pass, before */

static void restore_period(void)
{
	pt_write_file(PT_CONTROL "period_ms", period_ms);
}

/* Root need not wait so long for upper tables; others do. */
static void use_short_period(void)
{
	if (pt_read_file(PT_CONTROL "period_ms", period_ms, sizeof(period_ms)) > 0 &&
	    pt_write_file(PT_CONTROL "period_ms", "1000"))
		atexit(restore_period);
}

static int selftest(void)
{
	struct config c;
	bool ok = true;

	ksft_print_header();
	if (PT_PAGE_SIZE != 4096)
		ksft_exit_skip("the geometry is that of 4K pages\n");
	use_short_period();
	if (!kernel_reclaims())
		ksft_exit_skip("MADV_DONTNEED frees no page tables (CONFIG_PT_RECLAIM)\n");
	ksft_set_plan(17);

	c = variant("anon, whole blocks");
	ok &= test_one(c);

	c = variant("anon, 1 MiB pieces");
	c.piece = 1 << 20;
	ok &= test_one(c);

	c = variant("anon, only the touched pages");
	c.piece = 4096;
	c.touch = 4;
	c.touched_only = true;
	ok &= test_one(c);

	c = variant("anon, unaligned pieces of 12 KiB, all pages touched");
	c.region = 32 << 20;
	c.piece = 12 << 10;
	c.touch = 0;
	ok &= test_one(c);

	c = variant("anon, blocks of 1 GiB by 512 MiB, down to the PUD table");
	c.region = 6ul << 30;
	c.block = 1 << 30;
	c.piece = 512 << 20;
	c.touch = 16;
	c.settle = true;
	ok &= test_one(c);

	c = variant("anon, blocks of 64 KiB, fragmenting");
	c.block = 64 << 10;
	c.order = FRAGMENT;
	ok &= test_one(c);

	c = variant("anon, blocks of 256 KiB, random");
	c.block = 256 << 10;
	c.order = RANDOM;
	c.seed = 7;
	ok &= test_one(c);

	c = variant("anon, blocks of 5 tables in pieces of 3 MiB");
	c.region = 640 << 20;
	c.block = 10 << 20;
	c.piece = 3 << 20;
	c.touch = 5;
	ok &= test_one(c);

	c = variant("anon, huge pages, 1 MiB pieces");
	c.region = 64 << 20;
	c.piece = 1 << 20;
	c.thp = 1;
	ok &= test_one(c);

	c = variant("anon, 1 MiB pieces, scanned and trimmed");
	c.region = 128 << 20;
	c.piece = 1 << 20;
	c.order = RANDOM;
	c.scan = true;
	ok &= test_one(c);

	c = variant("anon, huge pages, scanned and trimmed");
	c.region = 64 << 20;
	c.thp = 1;
	c.scan = true;
	ok &= test_one(c);

	c = variant("memfd, 1 MiB pieces");
	c.backing = MEMFD;
	c.piece = 1 << 20;
	ok &= test_one(c);

	c = variant("memfd and a second process, holes of 512 MiB, down to the PUD table");
	c.region = 6ul << 30;
	c.backing = MEMFD2;
	c.discard = PUNCH;
	c.block = 1 << 30;
	c.piece = 512 << 20;
	c.touch = 16;
	c.settle = true;
	ok &= test_one(c);

	c = variant("memfd, holes of 1 MiB");
	c.backing = MEMFD;
	c.discard = PUNCH;
	c.piece = 1 << 20;
	ok &= test_one(c);

	c = variant("memfd, MADV_REMOVE of blocks of 256 KiB, random");
	c.backing = MEMFD;
	c.discard = REMOVE;
	c.block = 256 << 10;
	c.order = RANDOM;
	ok &= test_one(c);

	c = variant("memfd and a second process, holes of 1 MiB");
	c.backing = MEMFD2;
	c.discard = PUNCH;
	c.piece = 1 << 20;
	ok &= test_one(c);

	c = variant("memfd and a second process, punch and DONTNEED, fragmenting");
	c.backing = MEMFD2;
	c.discard = QEMU;
	c.block = 64 << 10;
	c.order = FRAGMENT;
	ok &= test_one(c);

	if (ok)
		ksft_exit_pass();
	ksft_exit_fail();
}

static void print_help(FILE *to)
{
	fputs("usage: plug_unplug                 run as a kselftest\n"
	      "       plug_unplug OPTION...       one run, measured\n"
	      "Sizes are bytes, or with K, M or G; all are multiples of a page.\n"
	      "  --region SIZE     mapped without reserve (default 64G)\n"
	      "  --block SIZE      4K to 1G, divides the region (default 2M)\n"
	      "  --touch N|full    pages populated in each block, evenly spread (default 1)\n"
	      "  --plugged P       percent of the blocks that are plugged (default 100)\n"
	      "  --phase-unplug P  percent of these unplugged and replugged midway (default 0)\n"
	      "  --cycles N        plug and unplug so often (default 1)\n"
	      "  --day STEPS       in place of cycles: a day in STEPS steps (24 to 100000), the\n"
	      "                    plugged part following the hours between 10 percent at night\n"
	      "                    and --plugged, some blocks moving at every step\n"
	      "  --backing B       anon, memfd, or memfd2: mapped by a second process too\n"
	      "  --discard D       dontneed, remove (MADV_REMOVE), punch (fallocate), or\n"
	      "                    qemu: punch, then dontneed, as QEMU does for shared memory\n"
	      "  --piece SIZE      bytes of one discarding call (default: the block)\n"
	      "  --touched-only    discard only --piece bytes from each populated page\n"
	      "  --at-once         unplug all by one call over the region\n"
	      "  --scan            read all that is unplugged, as a dump does, and ask for the\n"
	      "                    tables of that (MADV_TRIM_TABLES, where the kernel has it);\n"
	      "                    anon only, and not with --day\n"
	      "  --order O         seq, random, or fragment: every other block first\n"
	      "  --seed N          of the random order and of the contents (default 1)\n"
	      "  --thp on|off      MADV_HUGEPAGE or MADV_NOHUGEPAGE (default off)\n"
	      "  --name LABEL      of this run in the output\n"
	      "  --json            one JSON object on a line; *_kb is VmPTE over what it was\n"
	      "                    before the first touch, *_cost is for a block: ns, or guest\n"
	      "                    instructions with PT_ICOUNT_SHIFT=N in the environment, on\n"
	      "                    a machine under QEMU's -icount shift=N\n"
	      "  --expect-ideal    page tables left over are a failure, as in the kselftest\n"
	      "Exit status: 0 as it must be, 1 not (with a line that says what), 2 usage,\n"
	      "4 skipped, 130 interrupted.\n", to);
}

static void __noreturn bad(const char *what, const char *value)
{
	fprintf(stderr, "error: %s: %s\n", what, value);
	print_help(stderr);
	exit(2);
}

static size_t parse_size(const char *option, const char *text)
{
	size_t size = pt_parse_size(text);

	if (!size)
		bad(option, text);
	return size;
}

static long parse_number(const char *option, const char *text, long min, long max)
{
	char *end;
	long value = strtol(text, &end, 10);

	if (*end || end == text || value < min || value > max)
		bad(option, text);
	return value;
}

static int parse_word(const char *option, const char *text, const char * const *words)
{
	for (int i = 0; words[i]; i++) {
		if (!strcmp(text, words[i]))
			return i;
	}
	bad(option, text);
}

static struct config parse(int argc, char **argv)
{
	enum { REGION, BLOCK, TOUCH, PLUGGED, UNPLUG, CYCLES, DAY, BACKING, DISCARD, PIECE,
	       TOUCHED, AT_ONCE, SCAN, ORDER, SEED, THP, NAME, JSON, STRICT, HELP };
	static const struct option options[] = {
		{ "region", 1, NULL, REGION }, { "block", 1, NULL, BLOCK },
		{ "touch", 1, NULL, TOUCH }, { "plugged", 1, NULL, PLUGGED },
		{ "phase-unplug", 1, NULL, UNPLUG }, { "cycles", 1, NULL, CYCLES },
		{ "day", 1, NULL, DAY }, { "backing", 1, NULL, BACKING },
		{ "discard", 1, NULL, DISCARD },
		{ "piece", 1, NULL, PIECE }, { "touched-only", 0, NULL, TOUCHED },
		{ "at-once", 0, NULL, AT_ONCE }, { "scan", 0, NULL, SCAN },
		{ "order", 1, NULL, ORDER }, { "seed", 1, NULL, SEED },
		{ "thp", 1, NULL, THP },
		{ "name", 1, NULL, NAME }, { "json", 0, NULL, JSON },
		{ "expect-ideal", 0, NULL, STRICT }, { "help", 0, NULL, HELP }, { }
	};
	struct config c = defaults;
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case REGION:
			c.region = parse_size("--region", optarg);
			break;
		case BLOCK:
			c.block = parse_size("--block", optarg);
			break;
		case TOUCH:
			c.touch = strcmp(optarg, "full") ?
				  parse_number("--touch", optarg, 1, 1 << 18) : 0;
			break;
		case PLUGGED:
			c.plugged = parse_number("--plugged", optarg, 1, 100);
			break;
		case UNPLUG:
			c.unplug = parse_number("--phase-unplug", optarg, 0, 100);
			break;
		case CYCLES:
			c.cycles = parse_number("--cycles", optarg, 1, 1000000);
			break;
		case DAY:
			c.day = parse_number("--day", optarg, 24, 100000);
			break;
		case BACKING:
			c.backing = parse_word("--backing", optarg, backings);
			break;
		case DISCARD:
			c.discard = parse_word("--discard", optarg, discards);
			break;
		case PIECE:
			c.piece = parse_size("--piece", optarg);
			break;
		case TOUCHED:
			c.touched_only = true;
			break;
		case AT_ONCE:
			c.at_once = true;
			break;
		case SCAN:
			c.scan = true;
			break;
		case ORDER:
			c.order = parse_word("--order", optarg, orders);
			break;
		case SEED:
			c.seed = parse_number("--seed", optarg, 0, 0x7fffffff);
			break;
		case THP:
			c.thp = parse_word("--thp", optarg, switches);
			break;
		case NAME:
			if (!pt_plain_label(optarg))
				bad("--name wants letters, digits and plain punctuation", optarg);
			c.name = optarg;
			break;
		case JSON:
			c.json = true;
			break;
		case STRICT:
			c.strict = true;
			break;
		case HELP:
			print_help(stdout);
			exit(0);
		default:
			print_help(stderr);
			exit(2);
		}
	}
	if (optind < argc)
		bad("unexpected argument", argv[optind]);
	if (c.block > PT_PUD_SIZE || c.region % c.block)
		bad("--block", "at most 1G, and a divisor of the region");
	if (c.touch > c.block / PT_PAGE_SIZE)
		bad("--touch", "more pages than a block has");
	if (!c.piece)
		c.piece = c.block;
	if (c.piece > c.block)
		bad("--piece", "larger than the block");
	if (c.at_once && (c.unplug || c.day))
		bad("--at-once", "unplugs everything: not with --phase-unplug or --day");
	if (c.scan && (c.backing != ANON || c.day))
		bad("--scan", "anonymous memory only, and not with --day");
	if (c.backing == ANON && c.discard != DONTNEED)
		bad("--discard", "anonymous memory has dontneed only");
	return c;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct config c;
	struct device d;
	bool ok;

	if (argc == 1)
		return selftest();
	c = parse(argc, argv);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	open_device(&d, &c);
	ok = run(&d);
	if (pt_load(&stopped)) {
		close_device(&d);
		fprintf(stderr, "interrupted\n");
		return 130;
	}
	report(&d);
	if (!ok)
		fprintf(stderr, "error: %s: %s\n", c.name, d.why);
	close_device(&d);
	return ok ? 0 : 1;
}
