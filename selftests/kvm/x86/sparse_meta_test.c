// SPDX-License-Identifier: GPL-2.0
/*
 * What KVM keeps for each page of a memslot follows what is mapped, not the slot.
 *
 * Rmaps, and counts of who tracks writes, exist where the shadow MMU is: without the
 * TDP MMU (boot with kvm.tdp_mmu=0), and since a guest ran a guest of its own.  Both
 * are tested, as the machine allows, with a vCPU or its guest writing a page here
 * and there in a slot of 256 GiB:
 *
 *   empty      making the slot, and a guest's first guest, takes 1 % of the memory
 *              that flat arrays would
 *   largest    there can be a slot with more flat metadata than the machine has memory
 *   follows    the pages taken are those for what is mapped, at each step of plugging
 *              and unplugging at random
 *   dirty      dirty bits are those of the pages that were written
 *   failures   each allocation of a vCPU's faults and of a new slot fails once: the
 *              caller hears of it, and nothing else happens
 *   delete     what a slot has goes with it, and a slot that moves takes nothing along
 */
#include <fcntl.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kselftest.h"
#include "sparse_slot.h"

#define SIZE		(256 * GIB)
#define LARGEST		(16 * 1024 * GIB)
#define NR_BLOCKS	64	/* of the slot, that are ever plugged */
#define NR_STEPS	12
#define MAX_FAILURES	400
/* Tables of the guest, in the library's slot, that are mapped and tracked meanwhile. */
#define SLACK		8

struct shared {
	u64 nr, round;
	u64 at[NR_BLOCKS];	/* where to write, bytes from the start of the slot */
};

struct device {
	const char *name;	/* of the mode, in results */
	bool nested;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct shared *shared;
	char *mem;
	u64 size;
	bool plugged[NR_BLOCKS];
	u64 at[NR_BLOCKS];	/* of the page in each block that is written */
	long base;		/* pages of metadata when nothing is plugged */
};

/* For the guest's guest, which gets no arguments. */
static struct shared *shared;

static void write_pages(void *arg)
{
	struct shared *s = arg;

	for (u64 i = 0; i < READ_ONCE(s->nr); i++)
		WRITE_ONCE(*(u64 *)(SLOT_GVA + s->at[i]), s->round);
}

static void l2_code(void)
{
	for (;;) {
		vmcall();
		write_pages(shared);
	}
}

static void guest_code(void *nested, struct shared *s)
{
	guest_loop(nested, l2_code, write_pages, s);
}

/* Returns 0, or an errno, and the guest is where it was. */
static int try_run(struct device *d)
{
	return __vcpu_run(d->vcpu) ? errno : 0;
}

static void enter_guest(struct device *d)
{
	int error = try_run(d);

	TEST_ASSERT(!error, "KVM_RUN: %s", strerror(error));
	expect_sync(d->vcpu);
}

static int try_set_slot(struct device *d, u32 flags, u64 gpa, u64 size)
{
	return __vm_set_user_memory_region(d->vm, SLOT, flags, gpa, size, d->mem) ? errno : 0;
}

static void set_slot(struct device *d, u32 flags, u64 gpa, u64 size)
{
	int error = try_set_slot(d, flags, gpa, size);

	TEST_ASSERT(!error, "KVM_SET_USER_MEMORY_REGION: %s", strerror(error));
}

static long slot_pages(struct device *d)
{
	return vm_stat_or_none(d->vm, "mmu_slot_pages");
}

/* A page of each block, none of which share what is kept for a block; some a GiB. */
static void choose_pages(struct device *d, unsigned int seed)
{
	srandom(seed);
	for (int i = 0; i < NR_BLOCKS; i++) {
		u64 gib = i * (d->size / GIB) / NR_BLOCKS / 2 * 2;
		u64 block = i % 2 * 256 + random() % 256;

		d->at[i] = gib * GIB + block * BLOCK + random() % (BLOCK / 4096) * 4096;
		d->plugged[i] = false;
	}
}

static void open_device(struct device *d, const char *name, bool nested, u64 size)
{
	gva_t pages, arg = 0;

	*d = (struct device){ .name = name, .nested = nested, .size = size };
	d->vm = __vm_create_with_one_vcpu(&d->vcpu, 1024, guest_code);
	pages = vm_alloc_pages(d->vm, 1);
	d->shared = addr_gva2hva(d->vm, pages);
	shared = (struct shared *)pages;
	sync_global_to_guest(d->vm, shared);
	virt_map_level(d->vm, SLOT_GVA, SLOT_GPA, SIZE, PG_LEVEL_1G);
	if (nested)
		arg = prepare_nested(d->vm, SIZE);
	vcpu_args_set(d->vcpu, 2, arg, pages);
	d->mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(d->mem != MAP_FAILED, "mmap: %s", strerror(errno));
	madvise(d->mem, size, MADV_NOHUGEPAGE);
	enter_guest(d);
}

static void close_device(struct device *d)
{
	kvm_vm_free(d->vm);
	munmap(d->mem, d->size);
}

/* With the slot, and whatever the guest needs to run in it. */
static void open_with_slot(struct device *d, const char *name, bool nested)
{
	open_device(d, name, nested, SIZE);
	set_slot(d, 0, SLOT_GPA, SIZE);
	choose_pages(d, 1);
	enter_guest(d);
	d->base = slot_pages(d);
}

static void plug(struct device *d, int first, int nr)
{
	d->shared->round++;
	d->shared->nr = 0;
	for (int i = first; i < first + nr; i++) {
		d->shared->at[d->shared->nr++] = d->at[i];
		d->plugged[i] = true;
	}
}

static void discard(struct device *d, u64 at, u64 size)
{
	TEST_ASSERT(!madvise(d->mem + at, size, MADV_DONTNEED), "MADV_DONTNEED: %s",
		    strerror(errno));
}

static void unplug(struct device *d, int i)
{
	discard(d, d->at[i] / BLOCK * BLOCK, BLOCK);
	d->plugged[i] = false;
}

static void unplug_all(struct device *d)
{
	discard(d, 0, d->size);
	memset(d->plugged, 0, sizeof(d->plugged));
}

/* A chunk for each block, and a directory for each GiB with one. */
static long ideal(struct device *d)
{
	u64 last_gib = -1ull;
	long pages = 0;

	for (int i = 0; i < NR_BLOCKS; i++) {
		if (!d->plugged[i])
			continue;
		pages += 1 + (d->at[i] / GIB != last_gib);
		last_gib = d->at[i] / GIB;
	}
	return pages;
}

static bool is_ideal(struct device *d, const char *when)
{
	long got = slot_pages(d) - d->base, want = ideal(d);

	if (got >= want && got <= want + SLACK)
		return true;
	ksft_print_msg("%s: %ld pages of metadata, want %ld\n", when, got, want);
	return false;
}

static bool contents_are_right(struct device *d, const u64 *rounds)
{
	for (int i = 0; i < NR_BLOCKS; i++) {
		u64 want = d->plugged[i] ? rounds[i] : 0, got = *(u64 *)(d->mem + d->at[i]);

		/* Looking at what is unplugged maps the zeropage at most. */
		if (got == want)
			continue;
		ksft_print_msg("block %d: %lu, want %lu\n", i, (unsigned long)got,
			       (unsigned long)want);
		return false;
	}
	return true;
}

static bool test_follows(struct device *d)
{
	u64 rounds[NR_BLOCKS] = { };
	bool ok = slot_pages(d) >= 0;

	if (!ok)
		ksft_print_msg("the kernel has no statistic mmu_slot_pages\n");
	for (int step = 0; ok && step < NR_STEPS; step++) {
		int first = random() % NR_BLOCKS;

		plug(d, first, random() % (NR_BLOCKS - first + 1));
		enter_guest(d);
		for (u64 i = 0; i < d->shared->nr; i++)
			rounds[first + i] = d->shared->round;
		ok = ok && is_ideal(d, "plugged");
		for (int i = 0; i < NR_BLOCKS; i++) {
			if (d->plugged[i] && random() % 2)
				unplug(d, i);
		}
		ok = ok && is_ideal(d, "half unplugged") && contents_are_right(d, rounds);
	}
	unplug_all(d);
	return ok && is_ideal(d, "all unplugged");
}

static bool test_dirty(struct device *d)
{
	unsigned long *bitmap = calloc(d->size / 4096 / 8, 1), bits = 0;
	bool ok = true;

	plug(d, 0, NR_BLOCKS / 2);
	enter_guest(d);
	set_slot(d, KVM_MEM_LOG_DIRTY_PAGES, SLOT_GPA, d->size);
	kvm_vm_get_dirty_log(d->vm, SLOT, bitmap);
	/* A half of them was there before, a half was not. */
	plug(d, NR_BLOCKS / 4, NR_BLOCKS / 2);
	enter_guest(d);
	kvm_vm_get_dirty_log(d->vm, SLOT, bitmap);
	for (u64 i = 0; i < d->size / 4096 / 64; i++)
		bits += __builtin_popcountl(bitmap[i]);
	for (u64 i = 0; i < d->shared->nr; i++) {
		u64 page = d->shared->at[i] / 4096;

		ok = ok && bitmap[page / 64] >> page % 64 & 1;
	}
	if (!ok || bits != d->shared->nr)
		ksft_print_msg("%lu dirty pages, %lu were written%s\n", bits,
			       (unsigned long)d->shared->nr, ok ? "" : ", others");
	ok = ok && bits == d->shared->nr;
	set_slot(d, 0, SLOT_GPA, d->size);
	free(bitmap);
	unplug_all(d);
	return ok;
}

static bool test_delete(struct device *d)
{
	bool ok;

	plug(d, 0, NR_BLOCKS);
	enter_guest(d);
	set_slot(d, 0, SLOT_GPA + d->size, d->size);
	memset(d->plugged, 0, sizeof(d->plugged));
	ok = is_ideal(d, "moved");
	set_slot(d, 0, SLOT_GPA, d->size);
	plug(d, 0, NR_BLOCKS);
	enter_guest(d);
	ok = is_ideal(d, "moved back and plugged") && ok;
	set_slot(d, 0, 0, 0);
	memset(d->plugged, 0, sizeof(d->plugged));
	ok = is_ideal(d, "deleted") && ok;
	set_slot(d, 0, SLOT_GPA, d->size);
	unplug_all(d);
	return ok;
}

/* Of the allocations of this thread from now on, the n-th fails.  0: none. */
static void arm(int fd, int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", n);

	TEST_ASSERT(pwrite(fd, text, len, 0) == len, "fail-nth: %s", strerror(errno));
}

static bool has_fired(int fd)
{
	char text[16] = "";

	TEST_ASSERT(pread(fd, text, sizeof(text) - 1, 0) > 0, "fail-nth: %s", strerror(errno));
	arm(fd, 0);
	return atoi(text) == 0;
}

/* Allocations of any kind may fail, but only where fail-nth says so. */
static bool prepare_failures(void)
{
	static const char * const knobs[][2] = {
		{ "fail_page_alloc/ignore-gfp-wait", "N" }, { "fail_page_alloc/min-order", "0" },
		{ "fail_page_alloc/ignore-gfp-highmem", "N" }, { "fail_page_alloc/verbose", "0" },
		{ "failslab/ignore-gfp-wait", "N" }, { "failslab/verbose", "0" },
	};
	char path[128];

	for (size_t i = 0; i < ARRAY_SIZE(knobs); i++) {
		snprintf(path, sizeof(path), "/sys/kernel/debug/%s", knobs[i][0]);
		if (!pt_write_file(path, knobs[i][1]))
			return false;
	}
	return true;
}

static bool fail_faults(struct device *d, int fd, int *failed)
{
	bool fired = true;
	int n;

	for (n = 1; fired && n < MAX_FAILURES; n++) {
		int error;

		plug(d, 0, 2);
		arm(fd, n);
		error = try_run(d);
		fired = has_fired(fd);
		if (error && (!fired || (error != ENOMEM && error != EFAULT))) {
			ksft_print_msg("allocation %d: KVM_RUN: %s\n", n, strerror(error));
			return false;
		}
		*failed += !!error;
		if (error)
			enter_guest(d);
		else
			expect_sync(d->vcpu);
		if (!is_ideal(d, "after a failure"))
			return false;
		unplug_all(d);
	}
	return !fired && is_ideal(d, "after all failures");
}

static bool fail_slots(struct device *d, int fd, int *failed)
{
	bool fired = true;
	int n;

	for (n = 1; fired && n < MAX_FAILURES; n++) {
		int error;

		set_slot(d, 0, 0, 0);
		arm(fd, n);
		error = try_set_slot(d, 0, SLOT_GPA, d->size);
		fired = has_fired(fd);
		if (error && (!fired || error != ENOMEM)) {
			ksft_print_msg("allocation %d: a new slot: %s\n", n, strerror(error));
			return false;
		}
		*failed += !!error;
		if (error)
			set_slot(d, 0, SLOT_GPA, d->size);
		plug(d, 0, NR_BLOCKS);
		enter_guest(d);
		if (!is_ideal(d, "after a failure"))
			return false;
		unplug_all(d);
	}
	return !fired && is_ideal(d, "after all failures");
}

static void test_failures(struct device *d)
{
	int fd = open("/proc/thread-self/fail-nth", O_RDWR), faults = 0, slots = 0;
	bool ok;

	if (fd < 0 || !prepare_failures()) {
		ksft_test_result_skip("%s: failures: no fault injection\n", d->name);
		return;
	}
	ok = fail_faults(d, fd, &faults) && fail_slots(d, fd, &slots);
	close(fd);
	ksft_print_msg("KVM_RUN failed %d times, a new slot %d times\n", faults, slots);
	/* KVM_RUN may get by with what its caches have; a slot cannot, if anything fails. */
	ksft_test_result(ok && slots, "%s: failures\n", d->name);
}

static void test_empty(const char *name, bool nested)
{
	/* 8 bytes for each page, of which 1 %. */
	long limit_kb = SIZE / 4096 * 8 / 100 / 1024, before, took;
	struct device d;

	open_device(&d, name, nested, SIZE);
	before = free_kb();
	set_slot(&d, 0, SLOT_GPA, SIZE);
	enter_guest(&d);
	took = before - free_kb();
	close_device(&d);
	ksft_print_msg("%s: %ld kB were taken, the limit is %ld\n", name, took, limit_kb);
	ksft_test_result(took < limit_kb, "%s: empty\n", name);
}

static void test_largest(const char *name, bool nested)
{
	u64 size = LARGEST;
	struct device d;
	int error;

	open_device(&d, name, nested, SIZE);
	while (size > SIZE && !slot_fits(d.vm, size))
		size /= 2;
	munmap(d.mem, d.size);
	d.size = size;
	d.mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(d.mem != MAP_FAILED, "mmap: %s", strerror(errno));
	if (size / 4096 * 8 / 1024 < (u64)meminfo_kb("MemTotal")) {
		ksft_test_result_skip("%s: largest: %llu GiB of slot are no challenge\n", name,
				      size / GIB);
		close_device(&d);
		return;
	}
	error = try_set_slot(&d, 0, SLOT_GPA, size);
	if (!error)
		error = try_run(&d);
	ksft_print_msg("%s: a slot of %llu GiB: %s\n", name, size / GIB, strerror(error));
	close_device(&d);
	ksft_test_result(!error, "%s: largest\n", name);
}

#define NR_TESTS 6

static void test_mode(const char *name, bool nested)
{
	struct device d;

	test_empty(name, nested);
	test_largest(name, nested);
	open_with_slot(&d, name, nested);
	ksft_test_result(test_follows(&d), "%s: follows\n", name);
	ksft_test_result(test_dirty(&d), "%s: dirty\n", name);
	test_failures(&d);
	ksft_test_result(test_delete(&d), "%s: delete\n", name);
	close_device(&d);
}

static void skip_mode(const char *name, const char *why)
{
	for (int i = 0; i < NR_TESTS; i++)
		ksft_test_result_skip("%s: %s\n", name, why);
}

int main(void)
{
	bool tdp_mmu = kvm_cpu_has_tdp() && get_kvm_param_bool("tdp_mmu");

	TEST_REQUIRE(open("/dev/kvm", O_RDWR) >= 0);
	ksft_print_header();
	ksft_set_plan(2 * NR_TESTS);
	if (tdp_mmu)
		skip_mode("shadow", "no rmaps with the TDP MMU; boot with kvm.tdp_mmu=0");
	else
		test_mode("shadow", false);
	if (can_nest())
		test_mode("nested", true);
	else
		skip_mode("nested", "the machine cannot run guests of guests");
	ksft_finished();
}
