// SPDX-License-Identifier: GPL-2.0
/*
 * KVM gives back the page tables of guest memory that is discarded.
 *
 * A memslot is divided into blocks, as a virtio-mem device is.  vCPUs write to
 * blocks and check what they wrote; the host unplugs blocks by all the means
 * that virtual machine monitors have.  Three things are verified: a block that
 * was unplugged reads as zero and no other block changes; KVM's page tables
 * (SecPageTables of /proc/meminfo) are what the populated blocks need, no more
 * and no less; and the VM's statistic tells how many were freed.
 *
 * SecPageTables is system wide: the machine must run no other VM meanwhile.
 */
#include <fcntl.h>
#include <getopt.h>
#include <linux/falloc.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "test_util.h"
#include "kselftest.h"
#include "sparse_slot.h"

#define SLOT_HVA	((void *)BIT_ULL(45))
/* A whole GiB, so that upper tables can go as a whole, and a part of the next. */
#define NR_BLOCKS	544
#define SLOT_SIZE	(NR_BLOCKS * BLOCK)
#define MAX_VCPUS	4

/* Seconds; far above what a discard on an emulated debug kernel may lag. */
#define TABLES_TIMEOUT	10
/* The guest may touch a page of its own code or data for the first time. */
#define TABLES_SLACK_KB	8

enum state { EMPTY, FULL, BUSY };

/* Who has what block, shared by host and guest. */
struct block {
	u32 state;
	u32 round;
};

struct shared {
	struct block blocks[NR_BLOCKS];
	u32 nr_vcpus;
	u32 nr_pages;	/* that are written in each block */
	bool loop;
	bool stop;	/* in the middle of a round */
};

enum backing { ANON, THP, HUGETLB, MEMFD, HUGETLB_MEMFD, GUEST_MEMFD };
enum discard { DONTNEED, REMOVE, PUNCH, UNMAP };

struct config {
	const char *name;
	enum backing backing;
	enum discard discard;
	bool dirty_log;
	u32 nr_vcpus;
	u32 nr_pages;
};

struct device {
	const struct config *c;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	struct shared *shared;
	char *mem;
	int fd;
	long base_kb;		/* SecPageTables with nothing in the slot */
	bool stop;
};

static int run_seconds = 3;
static unsigned int seed = 1;
static u32 max_vcpus;

static u64 pattern(u64 block, u64 page, u64 round)
{
	return round ? block << 40 | page << 28 | round : 0;
}

/* The first and the last page, and what fits between at equal distances. */
static u64 page_offset(u64 i, u64 nr_pages)
{
	return nr_pages > 1 ? i * 511 / (nr_pages - 1) * PAGE_SIZE : 0;
}

static void guest_use_block(struct shared *s, u64 b)
{
	struct block *block = &s->blocks[b];
	u32 state = __atomic_load_n(&block->state, __ATOMIC_RELAXED);

	if (state == BUSY || !__atomic_compare_exchange_n(&block->state, &state, BUSY, false,
							  __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return;
	GUEST_ASSERT(state == EMPTY ? !block->round : block->round);
	for (u64 i = 0; i < s->nr_pages; i++) {
		u64 *p = (u64 *)(SLOT_GVA + b * BLOCK + page_offset(i, s->nr_pages));

		GUEST_ASSERT_EQ(READ_ONCE(*p), pattern(b, i, block->round));
		WRITE_ONCE(*p, pattern(b, i, block->round + 1));
	}
	block->round++;
	__atomic_store_n(&block->state, FULL, __ATOMIC_RELEASE);
}

/* Each vCPU goes through all blocks, from where no other vCPU begins. */
static void guest_code(struct shared *s, u64 vcpu)
{
	u64 first = vcpu * NR_BLOCKS / s->nr_vcpus;

	GUEST_SYNC(0);
	for (;;) {
		do {
			for (u64 i = 0; i < NR_BLOCKS && !READ_ONCE(s->stop); i++)
				guest_use_block(s, (first + i) % NR_BLOCKS);
		} while (READ_ONCE(s->loop));
		GUEST_SYNC(1);
	}
}

/* Writes wherever it can, no matter what becomes of it. */
static void guest_code_churn(struct shared *s, u64 vcpu)
{
	GUEST_SYNC(0);
	for (u64 i = vcpu * NR_BLOCKS / s->nr_vcpus;; i++)
		WRITE_ONCE(*(u64 *)(SLOT_GVA + i % NR_BLOCKS * BLOCK), i);
}

struct reading {
	long want_kb, got_kb;
};

static bool tables_are(void *arg)
{
	struct reading *r = arg;

	r->got_kb = meminfo_kb("SecPageTables");
	return labs(r->got_kb - r->want_kb) <= TABLES_SLACK_KB;
}

/* One line of the test: are the tables, in pages, what the slot needs now? */
static bool expect_tables(struct device *d, const char *when, long pages)
{
	struct reading r = { .want_kb = d->base_kb + pages * 4 };

	if (pt_wait_until(tables_are, &r, TABLES_TIMEOUT))
		return true;
	ksft_print_msg("%s, %s: %ld kB of page tables, want %ld\n", d->c->name, when,
		       r.got_kb - d->base_kb, pages * 4);
	return false;
}

static void map_slot(struct device *d)
{
	int flags = d->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
	void *mem;

	if (d->c->backing == HUGETLB)
		flags |= MAP_HUGETLB | MAP_HUGE_2MB;
	mem = mmap(SLOT_HVA, SLOT_SIZE, PROT_READ | PROT_WRITE, flags | MAP_FIXED_NOREPLACE,
		   d->fd, 0);
	TEST_ASSERT(mem == SLOT_HVA, "mmap of the slot: %s", strerror(errno));
	if (d->c->backing == ANON || d->c->backing == THP)
		madvise(mem, SLOT_SIZE, d->c->backing == THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	d->mem = mem;
}

static bool open_backing(struct device *d)
{
	d->fd = -1;
	switch (d->c->backing) {
	case ANON:
	case THP:
		return true;
	case MEMFD:
		d->fd = memfd_create("slot", MFD_CLOEXEC);
		break;
	case HUGETLB:
		return meminfo_kb("HugePages_Free") >= NR_BLOCKS;
	case HUGETLB_MEMFD:
		if (meminfo_kb("HugePages_Free") < NR_BLOCKS)
			return false;
		d->fd = memfd_create("slot", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
		break;
	case GUEST_MEMFD:
		if ((vm_check_cap(d->vm, KVM_CAP_GUEST_MEMFD_FLAGS) &
		     GUEST_MEMFD_FLAG_INIT_SHARED) == 0)
			return false;
		d->fd = __vm_create_guest_memfd(d->vm, SLOT_SIZE, GUEST_MEMFD_FLAG_MMAP |
						GUEST_MEMFD_FLAG_INIT_SHARED);
		return d->fd >= 0;
	}
	return d->fd >= 0 && !ftruncate(d->fd, SLOT_SIZE);
}

static void set_slot(struct device *d, u32 flags, u64 size)
{
	bool gmem = d->c->backing == GUEST_MEMFD;

	vm_set_user_memory_region2(d->vm, SLOT, flags | (gmem ? KVM_MEM_GUEST_MEMFD : 0), SLOT_GPA,
				   size, d->mem, gmem ? d->fd : 0, 0);
}

static u32 slot_flags(struct device *d)
{
	return d->c->dirty_log ? KVM_MEM_LOG_DIRTY_PAGES : 0;
}

static bool open_device(struct device *d, const struct config *c, void *code)
{
	u64 pages = sizeof(struct shared) / PAGE_SIZE + 1;
	gva_t shared;

	memset(d, 0, sizeof(*d));
	d->c = c;
	d->vm = __vm_create(VM_SHAPE_DEFAULT, c->nr_vcpus, pages + 64);
	if (!open_backing(d)) {
		kvm_vm_free(d->vm);
		return false;
	}
	for (u32 i = 0; i < c->nr_vcpus; i++)
		d->vcpus[i] = vm_vcpu_add(d->vm, i, code);
	kvm_arch_vm_finalize_vcpus(d->vm);
	virt_map_level(d->vm, SLOT_GVA, SLOT_GPA, 2 * GIB, PG_LEVEL_1G);
	shared = vm_alloc_pages(d->vm, pages);
	d->shared = addr_gva2hva(d->vm, shared);
	d->shared->nr_vcpus = c->nr_vcpus;
	d->shared->nr_pages = c->nr_pages;
	for (u32 i = 0; i < c->nr_vcpus; i++) {
		vcpu_args_set(d->vcpus[i], 2, shared, (u64)i);
		run_vcpu(d->vcpus[i]);
	}
	map_slot(d);
	d->base_kb = meminfo_kb("SecPageTables");
	set_slot(d, slot_flags(d), SLOT_SIZE);
	return true;
}

static void close_device(struct device *d)
{
	kvm_vm_free(d->vm);
	munmap(d->mem, SLOT_SIZE);
	if (d->fd >= 0)
		close(d->fd);
}

/* Have the block to itself: no vCPU is in the middle of it. */
static void take_block(struct device *d, u32 b)
{
	struct block *block = &d->shared->blocks[b];
	u32 state = FULL;

	while (!__atomic_compare_exchange_n(&block->state, &state, BUSY, false,
					    __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
		if (state == BUSY) {
			sched_yield();
			state = FULL;
		}
	}
	block->round = 0;
}

static void discard_memory(struct device *d, size_t at, size_t size)
{
	int ret = 0;

	switch (d->c->discard) {
	case DONTNEED:
		ret = madvise(d->mem + at, size, MADV_DONTNEED);
		break;
	case REMOVE:
		ret = madvise(d->mem + at, size, MADV_REMOVE);
		break;
	case PUNCH:
		ret = fallocate(d->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size);
		break;
	case UNMAP:
		ret = mmap(d->mem + at, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE |
			   MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED;
		madvise(d->mem + at, size, MADV_NOHUGEPAGE);
		break;
	}
	TEST_ASSERT(!ret, "discard: %s", strerror(errno));
}

static void unplug(struct device *d, u32 first, u32 nr)
{
	for (u32 b = first; b < first + nr; b++)
		take_block(d, b);
	discard_memory(d, first * BLOCK, nr * BLOCK);
	for (u32 b = first; b < first + nr; b++)
		__atomic_store_n(&d->shared->blocks[b].state, EMPTY, __ATOMIC_RELEASE);
}

/* Without it, but with TDP, tables are direct shadow pages; else there are none. */
static bool has_tdp_mmu(void)
{
	return kvm_cpu_has_tdp() && get_kvm_param_bool("tdp_mmu");
}

/* Tables of 4 KiB entries: every full block has one unless it is a huge page. */
static long lowest_tables(struct device *d, long huge_before)
{
	long full = 0;

	for (u32 b = 0; b < NR_BLOCKS; b++)
		full += d->shared->blocks[b].state == FULL;
	return full - (vm_stat_or_none(d->vm, "pages_2m") - huge_before);
}

/*
 * Populate all, unplug every other block, then the rest at once.  Tables must
 * follow.
 */
static bool unplug_follows(struct device *d)
{
	long uppers = (SLOT_SIZE + GIB - 1) / GIB, huge = vm_stat_or_none(d->vm, "pages_2m");
	long lowest, freed = 0;

	for (int cycle = 0; cycle < 2; cycle++) {
		run_vcpu(d->vcpus[0]);
		lowest = lowest_tables(d, huge);
		if (!expect_tables(d, "populated", lowest + uppers))
			return false;
		freed += lowest + uppers;
		for (u32 b = 0; b < NR_BLOCKS; b += 2)
			unplug(d, b, 1);
		lowest = lowest_tables(d, huge);
		if (!expect_tables(d, "every other block unplugged", lowest + uppers))
			return false;
		unplug(d, 0, NR_BLOCKS);
		if (!expect_tables(d, "all unplugged", 0))
			return false;
		if (has_tdp_mmu() && vm_stat_or_none(d->vm, "tdp_mmu_discarded") != freed) {
			ksft_print_msg("tdp_mmu_discarded is %ld, want %ld\n",
				       vm_stat_or_none(d->vm, "tdp_mmu_discarded"), freed);
			return false;
		}
	}
	return true;
}

/* What takes mappings away for a while, or less than a table, frees no table. */
static bool others_keep(struct device *d)
{
	long uppers = (SLOT_SIZE + GIB - 1) / GIB;
	bool ok;

	run_vcpu(d->vcpus[0]);
	ok = expect_tables(d, "populated", NR_BLOCKS + uppers);
	TEST_ASSERT(!mprotect(d->mem, SLOT_SIZE, PROT_NONE), "mprotect");
	TEST_ASSERT(!mprotect(d->mem, SLOT_SIZE, PROT_READ | PROT_WRITE), "mprotect");
	ok = ok && expect_tables(d, "after mprotect()", NR_BLOCKS + uppers);
	run_vcpu(d->vcpus[0]);
	for (u32 b = 0; b < NR_BLOCKS; b++) {
		take_block(d, b);
		discard_memory(d, b * BLOCK, BLOCK / 2);
		discard_memory(d, b * BLOCK + BLOCK / 2, BLOCK / 2);
		d->shared->blocks[b].state = EMPTY;
	}
	ok = ok && expect_tables(d, "discarded in pieces of 1 MiB", NR_BLOCKS + uppers);
	run_vcpu(d->vcpus[0]);
	return ok && vm_stat_or_none(d->vm, "tdp_mmu_discarded") <= 0;
}

/* What the vCPUs left is what the host reads. */
static bool contents_are_right(struct device *d)
{
	for (u32 b = 0; b < NR_BLOCKS; b++) {
		for (u32 i = 0; i < d->c->nr_pages; i++) {
			u64 *p = (u64 *)(d->mem + b * BLOCK + page_offset(i, d->c->nr_pages));

			if (READ_ONCE(*p) != pattern(b, i, d->shared->blocks[b].round)) {
				ksft_print_msg("block %u page %u: %llx\n", b, i,
					       (unsigned long long)*p);
				return false;
			}
		}
	}
	return true;
}

/*
 * An unaligned discard frees the tables that it covers, and of the two that it
 * covers in part those that are empty then.  Each block has its first and its
 * last page populated.
 */
static bool edges_follow(struct device *d)
{
	long uppers = (SLOT_SIZE + GIB - 1) / GIB;
	bool ok;

	run_vcpu(d->vcpus[0]);
	for (u32 b = 0; b < 20; b++)
		take_block(d, b);
	discard_memory(d, 3 * PAGE_SIZE, 10 * BLOCK - 6 * PAGE_SIZE);
	ok = expect_tables(d, "10 blocks but their edges", NR_BLOCKS - 8 + uppers);
	discard_memory(d, 10 * BLOCK, PAGE_SIZE);
	discard_memory(d, 20 * BLOCK - PAGE_SIZE, PAGE_SIZE);
	ok = ok && expect_tables(d, "two single pages", NR_BLOCKS - 8 + uppers);
	discard_memory(d, 10 * BLOCK + BLOCK / 2, 9 * BLOCK);
	ok = ok && expect_tables(d, "the rest of 10 blocks", NR_BLOCKS - 8 - 10 + uppers);
	discard_memory(d, 0, 10 * BLOCK);
	for (u32 b = 0; b < 20; b++)
		d->shared->blocks[b].state = EMPTY;
	run_vcpu(d->vcpus[0]);
	return ok && contents_are_right(d);
}

/* Deletion zaps only this slot if userspace says so, and takes the tables. */
static bool delete_follows(struct device *d)
{
	long uppers = (SLOT_SIZE + GIB - 1) / GIB;
	bool ok;

	vm_enable_cap(d->vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	run_vcpu(d->vcpus[0]);
	ok = expect_tables(d, "populated", NR_BLOCKS + uppers);
	set_slot(d, 0, 0);
	ok = ok && expect_tables(d, "slot deleted", 0);
	set_slot(d, slot_flags(d), SLOT_SIZE);
	run_vcpu(d->vcpus[0]);
	return ok;
}

static void *vcpu_thread(void *vcpu)
{
	run_vcpu(vcpu);
	return NULL;
}

/* Switch dirty logging on and off, take the log meanwhile. */
static void *logger_thread(void *arg)
{
	struct device *d = arg;
	void *bitmap = calloc(1, SLOT_SIZE / PAGE_SIZE / 8);

	while (!READ_ONCE(d->stop)) {
		set_slot(d, KVM_MEM_LOG_DIRTY_PAGES, SLOT_SIZE);
		kvm_vm_get_dirty_log(d->vm, SLOT, bitmap);
		usleep(10000);
		kvm_vm_get_dirty_log(d->vm, SLOT, bitmap);
		set_slot(d, 0, SLOT_SIZE);
		usleep(10000);
	}
	free(bitmap);
	return NULL;
}

/* vCPUs write and check, the host unplugs what they are not at. */
static void unplug_while_running(struct device *d)
{
	unsigned long long end = pt_now_ns() + run_seconds * 1000000000ull;
	pthread_t threads[MAX_VCPUS], logger;
	unsigned long unplugged = 0;

	d->shared->loop = true;
	for (u32 i = 0; i < d->c->nr_vcpus; i++)
		pthread_create(&threads[i], NULL, vcpu_thread, d->vcpus[i]);
	if (d->c->dirty_log)
		pthread_create(&logger, NULL, logger_thread, d);
	while (pt_now_ns() < end || unplugged < NR_BLOCKS) {
		u32 first = rand_r(&seed) % NR_BLOCKS, nr = 1 + rand_r(&seed) % 8;

		/* All but nothing, now and then: upper tables go, too. */
		if (rand_r(&seed) % 32 == 0) {
			first = 0;
			nr = NR_BLOCKS;
		}
		nr = min_t(u32, nr, NR_BLOCKS - first);
		unplug(d, first, nr);
		unplugged += nr;
	}
	WRITE_ONCE(d->stop, true);
	if (d->c->dirty_log)
		pthread_join(logger, NULL);
	WRITE_ONCE(d->shared->loop, false);
	WRITE_ONCE(d->shared->stop, true);
	for (u32 i = 0; i < d->c->nr_vcpus; i++)
		pthread_join(threads[i], NULL);
	ksft_print_msg("%s: %lu blocks unplugged\n", d->c->name, unplugged);
}

static bool running_follows(struct device *d)
{
	bool ok;

	unplug_while_running(d);
	ok = contents_are_right(d);
	unplug(d, 0, NR_BLOCKS);
	return ok;
}

/* Leaves for MMIO while the slot is away; what it reads and writes is lost. */
static void *churn_vcpu_thread(void *vcpu)
{
	while (!_vcpu_run(vcpu))
		;
	return NULL;
}

static void *churn_discard_thread(void *arg)
{
	unsigned int local_seed = seed;
	struct device *d = arg;

	for (;;) {
		size_t at = rand_r(&local_seed) % SLOT_SIZE & PAGE_MASK;
		size_t size = rand_r(&local_seed) % (SLOT_SIZE - at) & PAGE_MASK;

		discard_memory(d, at, size ?: PAGE_SIZE);
	}
	return NULL;
}

/*
 * Creates, deletes, moves and logs the slot, until it is killed.  An error ends
 * the process at once, for the parent to see: TEST_ASSERT() would take seconds.
 */
static void __noreturn churn(const struct config *c)
{
	unsigned int local_seed = seed;
	struct device d;
	pthread_t thread;
	u64 size = SLOT_SIZE;

	if (!open_device(&d, c, guest_code_churn))
		exit(KSFT_SKIP);
	vm_enable_cap(d.vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL);
	for (u32 i = 0; i < c->nr_vcpus; i++)
		pthread_create(&thread, NULL, churn_vcpu_thread, d.vcpus[i]);
	pthread_create(&thread, NULL, churn_discard_thread, &d);
	for (;;) {
		u64 gpa = SLOT_GPA + rand_r(&local_seed) % 3 * BLOCK;
		u32 flags = rand_r(&local_seed) % 2 ? KVM_MEM_LOG_DIRTY_PAGES : 0;

		/* Only what is there can be deleted. */
		size = size && rand_r(&local_seed) % 3 == 0 ? 0 : SLOT_SIZE;
		if (__vm_set_user_memory_region(d.vm, SLOT, flags, gpa, size, d.mem))
			_exit(1);
		usleep(rand_r(&local_seed) % 20000);
	}
}

/*
 * Everything at once, and the VM is destroyed in the middle of it, several times.
 * No table may be lost on the way.
 */
static bool churn_leaks_nothing(const struct config *c)
{
	struct device d = { .c = c, .base_kb = meminfo_kb("SecPageTables") };

	for (int i = 0; i < 4; i++, seed++) {
		pid_t pid = fork();

		TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
		if (!pid)
			churn(c);
		usleep(run_seconds * 1000000ull / 4 + 500000);
		if (waitpid(pid, NULL, WNOHANG)) {
			ksft_print_msg("%s: a VM ended by itself\n", c->name);
			return false;
		}
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
	}
	return expect_tables(&d, "VMs killed", 0);
}

static bool running_and_tables_follow(struct device *d)
{
	return running_follows(d) && expect_tables(d, "after the run", 0);
}

static const struct config churns[] = {
	{ "churn, anon", ANON, DONTNEED, false, 2, 1 },
	{ "churn, THP", THP, DONTNEED, false, 2, 1 },
	{ "churn, memfd", MEMFD, PUNCH, false, 3, 1 },
};

static const struct test {
	bool (*fn)(struct device *d);
	bool (*fn_contents)(struct device *d);	/* without TDP; NULL: skip */
	struct config c;
} tests[] = {
#define TABLES(_name, ...)	{ unplug_follows, NULL, { _name, __VA_ARGS__ } }
#define RUNNING(_name, ...)	\
	{ running_and_tables_follow, running_follows, { _name, __VA_ARGS__ } }
	TABLES("anon, DONTNEED", ANON, DONTNEED, false, 1, 2),
	TABLES("anon, DONTNEED, dirty log", ANON, DONTNEED, true, 1, 2),
	TABLES("anon, 16 pages, DONTNEED", ANON, DONTNEED, false, 1, 16),
	TABLES("anon, remapped", ANON, UNMAP, false, 1, 2),
	TABLES("THP, DONTNEED", THP, DONTNEED, false, 1, 2),
	TABLES("THP, DONTNEED, dirty log", THP, DONTNEED, true, 1, 2),
	TABLES("memfd, hole punched", MEMFD, PUNCH, false, 1, 2),
	TABLES("memfd, hole punched, dirty log", MEMFD, PUNCH, true, 1, 2),
	TABLES("memfd, MADV_REMOVE", MEMFD, REMOVE, false, 1, 2),
	TABLES("hugetlb, DONTNEED", HUGETLB, DONTNEED, false, 1, 2),
	TABLES("hugetlb, DONTNEED, dirty log", HUGETLB, DONTNEED, true, 1, 2),
	TABLES("guest_memfd, hole punched", GUEST_MEMFD, PUNCH, false, 1, 2),
	{ edges_follow, NULL, { "unaligned", ANON, DONTNEED, false, 1, 2 } },
	{ delete_follows, NULL, { "slot deleted", ANON, DONTNEED, false, 1, 2 } },
	{ others_keep, NULL, { "mprotect() and small discards keep tables", ANON, DONTNEED,
			       false, 1, 2 } },
	RUNNING("1 vCPU running, anon", ANON, DONTNEED, false, 1, 3),
	RUNNING("2 vCPUs running, THP, dirty log toggled", THP, DONTNEED, true, 2, 2),
	RUNNING("2 vCPUs running, anon", ANON, DONTNEED, false, 2, 3),
	RUNNING("4 vCPUs running, memfd", MEMFD, PUNCH, false, 4, 2),
	/*
	 * Page tables of shared hugetlb memory may be shared, so mm announces a
	 * whole GiB for a hole of any size, and all blocks are faulted in again:
	 * tables can be compared in the end only.
	 */
	RUNNING("2 vCPUs running, hugetlb memfd", HUGETLB_MEMFD, PUNCH, false, 2, 2),
	RUNNING("4 vCPUs running, anon, dirty log toggled", ANON, DONTNEED, true, 4, 4),
};

static struct config for_this_machine(const struct config *config)
{
	struct config c = *config;

	c.nr_vcpus = vcpus_at_once(c.nr_vcpus, max_vcpus);
	if (c.nr_vcpus < config->nr_vcpus)
		ksft_print_msg("%s: %u in place of %u vCPUs\n", c.name, c.nr_vcpus,
			       config->nr_vcpus);
	return c;
}

static bool uses_hugetlb(const struct config *c)
{
	return c->backing == HUGETLB || c->backing == HUGETLB_MEMFD;
}

static void set_nr_hugepages(int nr)
{
	FILE *file = fopen("/proc/sys/vm/nr_hugepages", "w");

	if (file) {
		fprintf(file, "%d\n", nr);
		fclose(file);
	}
}

static void run_test(const struct test *t)
{
	bool (*fn)(struct device *d) = kvm_cpu_has_tdp() ? t->fn : t->fn_contents;
	struct config c = for_this_machine(&t->c);
	struct device d;
	bool ok;

	/* Lent to the tests that want them, not to starve the others. */
	set_nr_hugepages(uses_hugetlb(&t->c) ? NR_BLOCKS : 0);
	if (!fn) {
		ksft_test_result_skip("%s: no TDP\n", t->c.name);
		return;
	}
	if (!open_device(&d, &c, guest_code)) {
		ksft_test_result_skip("%s: no such memory\n", t->c.name);
		return;
	}
	ok = fn(&d);
	close_device(&d);
	ksft_test_result(ok, "%s\n", t->c.name);
}

static void run_churn(const struct config *config)
{
	struct config c = for_this_machine(config);

	ksft_test_result(churn_leaks_nothing(&c), "%s\n", c.name);
}

static void help(FILE *to)
{
	fprintf(to, "usage: sparse_slot_test [-s SECONDS] [-r SEED] [-v VCPUS] [-t NAME]\n"
		"  -s  of each test with running vCPUs (default %d)\n"
		"  -r  of the order in which these unplug blocks (default %u)\n"
		"  -v  at most, also on an emulated machine (default there: 1; see vcpus_at_once())\n"
		"  -t  only tests with NAME in their name\n", run_seconds, seed);
}

int main(int argc, char **argv)
{
	const char *only = "";
	unsigned int nr = 0;
	long hugepages;
	int o;

	while ((o = getopt(argc, argv, "s:r:v:t:h")) != -1) {
		switch (o) {
		case 's':
			run_seconds = atoi_positive("seconds", optarg);
			break;
		case 'r':
			seed = atoi_non_negative("seed", optarg);
			break;
		case 'v':
			max_vcpus = atoi_positive("vCPUs", optarg);
			break;
		case 't':
			only = optarg;
			break;
		default:
			help(o == 'h' ? stdout : stderr);
			return o == 'h' ? 0 : 2;
		}
	}
	TEST_REQUIRE(open("/dev/kvm", O_RDWR) >= 0);
	for (size_t i = 0; i < ARRAY_SIZE(tests); i++)
		nr += !!strstr(tests[i].c.name, only);
	for (size_t i = 0; i < ARRAY_SIZE(churns); i++)
		nr += !!strstr(churns[i].name, only);
	ksft_print_header();
	ksft_set_plan(nr);
	hugepages = meminfo_kb("HugePages_Total");
	for (size_t i = 0; i < ARRAY_SIZE(tests); i++) {
		if (strstr(tests[i].c.name, only))
			run_test(&tests[i]);
	}
	for (size_t i = 0; i < ARRAY_SIZE(churns); i++) {
		if (strstr(churns[i].name, only))
			run_churn(&churns[i]);
	}
	set_nr_hugepages(hugepages);
	ksft_finished();
}
