// SPDX-License-Identifier: GPL-2.0
/*
 * What one large memslot costs KVM, by its size and by what is populated in it.
 *
 * A virtio-mem device is one memslot with a little memory in it.  The life of
 * such a slot is gone through step by step, and each step is measured: create,
 * first nested entry (optional), populate by a vCPU, dirty logging on, get the
 * dirty log, dirty logging off, unplug everything, populate and unplug again,
 * dirty logging on and off over what was unplugged, delete.  All of it several times;
 * what is reported is the median of each step.
 *
 * With --plug, what it costs to plug and to unplug blocks of 2 MiB is measured instead:
 * in a slot with KVM_MEM_SPARSE, or, where the kernel has none, by a memslot for each
 * block, which is what a VMM has to do there to keep the guest out of the rest.  --slots
 * has the VM have so many memslots besides.
 *
 * Costs are guest instructions under QEMU's -icount (see pt_icount_shift()), ns
 * elsewhere, for the ioctl or madvise() that the step consists of.  Metadata is
 * the growth of VmallocUsed and Slab of /proc/meminfo and of the VM's statistic
 * mmu_slot_pages, what dirty logging takes is what MemFree loses, page tables are
 * SecPageTables of /proc/meminfo, in kB: system wide, so the machine has to be quiet.
 */
#include <fcntl.h>
#include <getopt.h>
#include <sys/mman.h>

#include "test_util.h"
#include "sparse_slot.h"

#define MAX_LIVES	9
/* A machine's caches have settled in the second; odd, for the median. */
#define LIVES		3
/* Memslots that are there besides: how many at most, and their numbers. */
#define MAX_OTHERS	16000
#define FIRST_OTHER	16384

struct config {
	const char *name;
	size_t size, populated;		/* bytes */
	int lives, others;
	bool nested, plug, json;
};

/* One device under test. */
struct slot {
	const struct config *c;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	char *mem;
	void *bitmap;
	size_t bitmap_size;
	bool sparse;		/* one slot with KVM_MEM_SPARSE, for plugging */
};

static struct figure {
	const char *name;
	double values[MAX_LIVES];
	int nr;
} figures[32];

/* Each life records the same figures, in the same order. */
static void record(const char *name, double value)
{
	struct figure *figure = figures;

	while (figure->name && strcmp(figure->name, name))
		figure++;
	TEST_ASSERT(figure < figures + ARRAY_SIZE(figures) - 1, "too many figures");
	figure->name = name;
	figure->values[figure->nr++] = value;
}

static int by_value(const void *a, const void *b)
{
	const double *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

static double median(struct figure *figure)
{
	qsort(figure->values, figure->nr, sizeof(*figure->values), by_value);
	return figure->values[figure->nr / 2];
}

/* The cost of one statement, recorded under a name. */
#define measure(name, statement) do {					\
	unsigned long long start = pt_ticks();				\
									\
	statement;							\
	record(name, pt_ticks() - start);				\
} while (0)

static long metadata_kb(struct slot *s)
{
	long pages = vm_stat_or_none(s->vm, "mmu_slot_pages");

	return meminfo_kb("VmallocUsed") + meminfo_kb("Slab") + max(pages, 0l) * 4;
}

/* L2 does nothing but leave. */
static void l2_guest_code(void)
{
	vmcall();
}

/* Writes a page of each block whenever it is entered, up to a number of bytes. */
static void guest_code(void *nested, u64 bytes)
{
	u64 round = 1;

	GUEST_SYNC(0);
	if (nested) {
		enter_l2(nested, l2_guest_code);
		GUEST_SYNC(0);
	}
	for (;; round++) {
		for (u64 at = 0; at < bytes; at += BLOCK)
			WRITE_ONCE(*(u64 *)(SLOT_GVA + at), round);
		GUEST_SYNC(round);
	}
}

static void set_region(struct slot *s, u32 flags, u64 size)
{
	vm_set_user_memory_region(s->vm, SLOT, flags, SLOT_GPA, size, s->mem);
}

static void open_slot(struct slot *s, const struct config *c)
{
	size_t mapped = (c->populated + GIB - 1) & -GIB;
	gva_t nested = 0;

	s->c = c;
	s->vm = __vm_create_with_one_vcpu(&s->vcpu, mapped / PAGE_SIZE / 256, guest_code);
	TEST_REQUIRE(slot_fits(s->vm, c->size + c->others * BLOCK));
	TEST_REQUIRE(!c->nested || can_nest());
	if (c->nested)
		nested = prepare_nested(s->vm, 0);
	virt_map_level(s->vm, SLOT_GVA, SLOT_GPA, mapped, PG_LEVEL_1G);
	vcpu_args_set(s->vcpu, 2, nested, (u64)c->populated);
	s->mem = mmap((void *)(32 * 1024 * GIB), c->size, PROT_READ | PROT_WRITE,
		      MAP_FIXED_NOREPLACE | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(s->mem != MAP_FAILED, "mmap of %zu bytes: %s", c->size, strerror(errno));
	madvise(s->mem, c->size, MADV_NOHUGEPAGE);
	s->bitmap_size = c->size / PAGE_SIZE / 8;
	s->bitmap = mmap(NULL, s->bitmap_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	TEST_ASSERT(s->bitmap != MAP_FAILED, "mmap of the bitmap: %s", strerror(errno));
	run_vcpu(s->vcpu);
}

static void check_dirty(struct slot *s, bool populated)
{
	u64 *words = s->bitmap, bits = 0;

	for (size_t i = 0; i < s->bitmap_size / 8; i++)
		bits += __builtin_popcountll(words[i]);
	TEST_ASSERT(bits == (populated ? s->c->populated / BLOCK : 0),
		    "%lu pages are dirty, %lu were written", (unsigned long)bits,
		    (unsigned long)(populated ? s->c->populated / BLOCK : 0));
}

/* The least that a bitmap for the whole slot costs: the kernel zeroes it. */
static void zero_bitmap(struct slot *s)
{
	int fd = open("/dev/zero", O_RDONLY);

	TEST_ASSERT(read(fd, s->bitmap, s->bitmap_size) == (ssize_t)s->bitmap_size, "/dev/zero: %s",
		    strerror(errno));
	close(fd);
}

static void log_dirty_pages(struct slot *s)
{
	long before = free_kb();

	measure("dirty_on_cost", set_region(s, KVM_MEM_LOG_DIRTY_PAGES, s->c->size));
	/* Whatever was dirty from the start is taken, so that the rest is exact. */
	kvm_vm_get_dirty_log(s->vm, SLOT, s->bitmap);
	measure("get_clean_log_cost", kvm_vm_get_dirty_log(s->vm, SLOT, s->bitmap));
	check_dirty(s, false);
	run_vcpu(s->vcpu);
	measure("get_dirty_log_cost", kvm_vm_get_dirty_log(s->vm, SLOT, s->bitmap));
	check_dirty(s, true);
	record("dirty_log_kb", before - free_kb());
	measure("zero_bitmap_cost", zero_bitmap(s));
	measure("dirty_off_cost", set_region(s, 0, s->c->size));
}

static void unplug(struct slot *s)
{
	for (size_t at = 0; at < s->c->populated; at += BLOCK)
		TEST_ASSERT(!madvise(s->mem + at, BLOCK, MADV_DONTNEED), "MADV_DONTNEED");
}

static bool tables_below(void *limit_kb)
{
	return meminfo_kb("SecPageTables") <= *(long *)limit_kb;
}

/* Tables are freed by RCU: wait for what a kernel that frees them would reach. */
static void wait_for_tables(long base_kb)
{
	long limit_kb = base_kb + 64;

	pt_wait_until(tables_below, &limit_kb, 1);
}

static void live(const struct config *c)
{
	struct slot s = { };
	long metadata, tables;
	unsigned long long start;

	open_slot(&s, c);
	metadata = metadata_kb(&s);
	tables = meminfo_kb("SecPageTables");
	measure("create_cost", set_region(&s, 0, c->size));
	record("create_kb", metadata_kb(&s) - metadata);
	if (c->nested) {
		metadata = metadata_kb(&s);
		measure("nested_entry_cost", run_vcpu(s.vcpu));
		record("nested_entry_kb", metadata_kb(&s) - metadata);
	}
	start = pt_ticks();
	run_vcpu(s.vcpu);
	record("populate_cost", (double)(pt_ticks() - start) / (c->populated / BLOCK));
	log_dirty_pages(&s);
	run_vcpu(s.vcpu);
	record("tables_plugged_kb", meminfo_kb("SecPageTables") - tables);
	start = pt_ticks();
	unplug(&s);
	record("discard_cost", (double)(pt_ticks() - start) / (c->populated / BLOCK));
	wait_for_tables(tables);
	record("tables_left_kb", meminfo_kb("SecPageTables") - tables);
	start = pt_ticks();
	run_vcpu(s.vcpu);
	record("replug_cost", (double)(pt_ticks() - start) / (c->populated / BLOCK));
	unplug(&s);
	wait_for_tables(tables);
	measure("dirty_on_unplugged_cost", set_region(&s, KVM_MEM_LOG_DIRTY_PAGES, c->size));
	measure("dirty_off_unplugged_cost", set_region(&s, 0, c->size));
	measure("delete_cost", set_region(&s, 0, 0));
	munmap(s.mem, c->size);
	munmap(s.bitmap, s.bitmap_size);
	kvm_vm_free(s.vm);
}

/* Blocks of the slot, in one call if there is one for that. */
static void change_blocks(struct slot *s, bool plug, u64 at, u64 size)
{
	struct kvm_sparse_memory args = {
		.gpa = SLOT_GPA + at,
		.size = size,
		.op = plug ? KVM_SPARSE_MEMORY_PLUG : KVM_SPARSE_MEMORY_UNPLUG,
	};

	if (s->sparse) {
		vm_ioctl(s->vm, KVM_SPARSE_MEMORY, &args);
		return;
	}
	for (u64 end = at + size; at < end; at += BLOCK)
		vm_set_user_memory_region(s->vm, SLOT + at / BLOCK, 0, SLOT_GPA + at,
					  plug ? BLOCK : 0, s->mem + at);
}

/* For one block of a range, when each call is for @step bytes. */
static void measure_blocks(struct slot *s, const char *name, bool plug, u64 at, u64 size, u64 step)
{
	unsigned long long start = pt_ticks();

	for (u64 end = at + size; at < end; at += step)
		change_blocks(s, plug, at, step);
	record(name, (double)(pt_ticks() - start) / (size / BLOCK));
}

/* A page each, above the slot; what is in them is of no interest. */
static void add_other_slots(struct slot *s)
{
	for (int i = 0; i < s->c->others; i++)
		vm_set_user_memory_region(s->vm, FIRST_OTHER + i, 0,
					  SLOT_GPA + s->c->size + i * BLOCK, PAGE_SIZE, s->mem);
}

static void live_plugging(const struct config *c)
{
	u64 half = c->populated / BLOCK / 2 * BLOCK, rest = c->populated - half;
	unsigned long long start;
	struct slot s = { .sparse = kvm_has_cap(KVM_CAP_SPARSE_MEMSLOTS) };

	open_slot(&s, c);
	if (s.sparse)
		vm_set_user_memory_region2(s.vm, SLOT, KVM_MEM_SPARSE, SLOT_GPA, c->size, s.mem,
					   0, 0);
	add_other_slots(&s);
	measure_blocks(&s, "plug_cost", true, 0, c->populated, BLOCK);
	measure_blocks(&s, "unplug_empty_cost", false, 0, half, BLOCK);
	measure_blocks(&s, "unplug_empty_at_once_cost", false, half, rest, rest);
	change_blocks(&s, true, 0, c->populated);
	start = pt_ticks();
	run_vcpu(s.vcpu);
	record("populate_cost", (double)(pt_ticks() - start) / (c->populated / BLOCK));
	measure_blocks(&s, "unplug_cost", false, 0, half, BLOCK);
	measure_blocks(&s, "unplug_at_once_cost", false, half, rest, rest);
	if (s.sparse)
		set_region(&s, 0, 0);
	munmap(s.mem, c->size);
	munmap(s.bitmap, s.bitmap_size);
	kvm_vm_free(s.vm);
}

static void report(const struct config *c)
{
	if (c->json) {
		printf("{\"name\":\"%s\",\"cost_unit\":\"%s\",", c->name, pt_cost_unit());
		printf("\"config\":{\"size\":%zu,\"populated\":%zu,", c->size, c->populated);
		printf("\"nested\":%s,\"plug\":%s,\"slots\":%d},\"figures\":{",
		       c->nested ? "true" : "false", c->plug ? "true" : "false", c->others);
	} else {
		printf("%s (costs in %s):\n", c->name, pt_cost_unit());
	}
	for (struct figure *f = figures; f->name; f++)
		printf(c->json ? "%s\"%s\":%.1f" : "%s  %-26s %.1f\n",
		       c->json && f > figures ? "," : "", f->name, median(f));
	if (c->json)
		printf("}}\n");
}

static void print_help(FILE *to)
{
	fputs("usage: sparse_slot_bench [OPTION...]\n"
	      "  --size SIZE       of the memslot, a multiple of 1G (default 64G)\n"
	      "  --populated SIZE  of it that a vCPU writes to, a page in each 2 MiB; a multiple\n"
	      "                    of 2M, at most the size (default 1G)\n"
	      "  --lives N         median of so many, odd, at most 9 (default 3)\n"
	      "  --nested          measure a nested guest's first entry, too\n"
	      "  --plug            plug and unplug blocks instead: of a memslot with KVM_MEM_SPARSE,\n"
	      "                    or, where there is no such thing, by memslots\n"
	      "  --slots N         with --plug: so many memslots are there besides, at most 16000\n"
	      "                    (default 0)\n"
	      "  --name LABEL      of this run in the output\n"
	      "  --json            one JSON object on a line\n"
	      "*_cost: ns, or guest instructions with PT_ICOUNT_SHIFT=N in the environment, on a\n"
	      "machine under QEMU's -icount shift=N; discard, populate, plug and unplug for a block\n"
	      "of 2 MiB.\n"
	      "*_kb: kB of metadata (VmallocUsed, Slab and mmu_slot_pages), of memory that dirty\n"
	      "logging took (MemFree), or of KVM's page tables.\n"
	      "Exit status: 0 done, 2 usage, 4 skipped (no KVM, too few address bits), else failed.\n",
	      to);
}

static void __noreturn bad(const char *what, const char *value)
{
	fprintf(stderr, "error: %s: %s\n", what, value);
	print_help(stderr);
	exit(2);
}

static struct config parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "size", 1, NULL, 's' }, { "populated", 1, NULL, 'p' }, { "nested", 0, NULL, 'N' },
		{ "lives", 1, NULL, 'l' }, { "name", 1, NULL, 'n' }, { "json", 0, NULL, 'j' },
		{ "plug", 0, NULL, 'P' }, { "slots", 1, NULL, 'o' }, { "help", 0, NULL, 'h' }, { }
	};
	struct config c = { .name = "sparse_slot_bench", .size = 64 * GIB, .populated = GIB,
			    .lives = LIVES };
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case 's':
			c.size = pt_parse_size(optarg);
			break;
		case 'p':
			c.populated = pt_parse_size(optarg);
			break;
		case 'l':
			c.lives = atoi(optarg);
			if (c.lives < 1 || c.lives > MAX_LIVES || c.lives % 2 == 0)
				bad("--lives", "an odd number, at most 9");
			break;
		case 'o':
			c.others = atoi(optarg);
			if (c.others < 1 || c.others > MAX_OTHERS)
				bad("--slots", "1 to 16000");
			break;
		case 'N':
			c.nested = true;
			break;
		case 'P':
			c.plug = true;
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
	if (optind < argc)
		bad("unexpected argument", argv[optind]);
	if (!c.size || c.size % GIB)
		bad("--size", "a multiple of 1G, at most 64 TiB");
	if (!c.populated || c.populated % BLOCK || c.populated > c.size)
		bad("--populated", "a multiple of 2M, at most the size");
	if (c.plug && c.populated < 2 * BLOCK)
		bad("--populated", "at least 4M with --plug");
	if (c.others && !c.plug)
		bad("--slots", "with --plug only");
	return c;
}

int main(int argc, char **argv)
{
	struct config c = parse(argc, argv);

	TEST_REQUIRE(open("/dev/kvm", O_RDWR) >= 0);
	for (int i = 0; i < c.lives; i++)
		c.plug ? live_plugging(&c) : live(&c);
	report(&c);
	return 0;
}
