// SPDX-License-Identifier: GPL-2.0
/*
 * Memslots with KVM_MEM_SPARSE: what userspace has not plugged, nobody gets at.
 *
 * The interface: what it takes and refuses, by a table and by random arguments against a
 * model.  The guarantee, with the MMU that the machine has (boot with kvm.tdp_mmu=0 for
 * the other) and with a nested guest: a vCPU leaves with KVM_EXIT_MEMORY_FAULT for each
 * kind of access, and goes on once the block is plugged; nothing of an unplugged block is
 * left in KVM; instructions that KVM emulates and what it writes to the guest by itself
 * (steal time, kvmclock) do not get there either; page tables of the guest that are in
 * a block go with it (shadow paging: boot with kvm_amd.npt=0); a guest that sweeps
 * everything makes the host allocate nothing; and while a vCPU touches blocks at
 * random, one that was unplugged and discarded stays without a page.
 */
#include <getopt.h>
#include <linux/kvm_para.h>
#include <pthread.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kselftest.h"
#include "sparse_slot.h"

#define SLOT_SIZE	(2 * GIB)
#define NR_BLOCKS	(SLOT_SIZE / BLOCK)
/* Of the host's memory, for a sweep of so many GiB: what statistics may be off by. */
#define SWEEP_GIB	256
#define SWEEP_SLACK_KB	2048
/* The guest's own tables and code that are mapped meanwhile, in kB and in pages. */
#define TABLES_SLACK_KB	16
#define META_SLACK	8
#define FUZZ_ROUNDS	3000
#define EMULATION	"/sys/module/kvm/parameters/force_emulation_prefix"
#define HUGE_1G		"/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"

#define PREFIX_LEN	5	/* of KVM_FEP */

#define READ		KVM_MEMORY_EXIT_FLAG_READ
#define WRITE		KVM_MEMORY_EXIT_FLAG_WRITE
#define EXEC		KVM_MEMORY_EXIT_FLAG_EXEC

/* The guest maps a page here by a page table that can be moved to the slot. */
#define WALK_GVA	(2048 * GIB)

enum op { OP_READ, OP_WRITE, OP_ADD, OP_CALL, OP_TRY_READ, OP_EMULATED_READ,
	  OP_EMULATED_WRITE, OP_EMULATED_MOVS };

/* What the guest is to do next, and what came of it. */
struct shared {
	u64 op, at, value;	/* bytes from the start of the slot */
	u64 random;
	bool stop;
};

struct device {
	const char *name;	/* of the mode, in results */
	bool nested;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct shared *shared;
	char *mem;
	size_t size;
};

static int run_seconds = 3;
static unsigned int seed = 1;

/* For the guest's guest, which gets no arguments. */
static struct shared *shared;

static void guest_movs(u64 to, u64 from, u64 words)
{
	asm volatile(KVM_FEP "rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

static void guest_op(void *arg)
{
	struct shared *s = arg;
	u64 *p = (u64 *)(SLOT_GVA + READ_ONCE(s->at));

	switch (READ_ONCE(s->op)) {
	case OP_READ:
		s->value = READ_ONCE(*p);
		break;
	case OP_WRITE:
		WRITE_ONCE(*p, s->value);
		break;
	case OP_ADD:
		__atomic_fetch_add(p, s->value, __ATOMIC_SEQ_CST);
		break;
	case OP_CALL:
		((void (*)(void))p)();
		break;
	case OP_TRY_READ:
		/* The vector of the exception, if there is one. */
		s->value = kvm_asm_safe("cmpq %%rax, (%%rax)", "a"(p));
		break;
	case OP_EMULATED_READ:
		asm volatile(KVM_FEP "mov (%1), %0" : "=a"(s->value) : "b"(p) : "memory");
		break;
	case OP_EMULATED_WRITE:
		asm volatile(KVM_FEP "mov %0, (%1)" : : "a"(s->value), "b"(p) : "memory");
		break;
	case OP_EMULATED_MOVS:
		/* From the 16 words in front of a block to the 16 around its start. */
		guest_movs((u64)p - 64, (u64)p - 256, 16);
		break;
	}
}

/* Touches blocks at random, until it is told to stop. */
static void guest_race(struct shared *s)
{
	while (!READ_ONCE(s->stop)) {
		s->random = s->random * 6364136223846793005ull + 1442695040888963407ull;
		WRITE_ONCE(*(u64 *)(SLOT_GVA + (s->random >> 33) % NR_BLOCKS * BLOCK), 1);
	}
}

static void l2_code(void)
{
	for (;;) {
		vmcall();
		guest_op(shared);
	}
}

static void guest_code(void *nested, struct shared *s)
{
	guest_loop(nested, l2_code, guest_op, s);
}

static void guest_code_race(void *nested, struct shared *s)
{
	GUEST_ASSERT(!nested);
	for (;;) {
		guest_race(s);
		GUEST_SYNC(1);
	}
}

/* A byte to each block, by one instruction of three bytes that the host can skip. */
static void guest_code_sweep(u64 bytes)
{
	for (u64 at = 0; at < bytes; at += BLOCK)
		asm volatile("movb $1, (%%rdi)" : : "D"(SLOT_GVA + at) : "memory");
	GUEST_DONE();
}

static int sparse_op(struct device *d, u32 op, u64 gpa, u64 size, void *bitmap)
{
	struct kvm_sparse_memory args = {
		.gpa = gpa, .size = size, .op = op, .bitmap = (u64)bitmap,
	};

	return __vm_ioctl(d->vm, KVM_SPARSE_MEMORY, &args) ? errno : 0;
}

/* Of blocks of the slot. */
static void change(struct device *d, u32 op, u64 block, u64 nr)
{
	int error = sparse_op(d, op, SLOT_GPA + block * BLOCK, nr * BLOCK, NULL);

	TEST_ASSERT(!error, "KVM_SPARSE_MEMORY %u of %lu blocks from %lu: %s", op,
		    (unsigned long)nr, (unsigned long)block, strerror(error));
}

static void plug(struct device *d, u64 block, u64 nr)
{
	change(d, KVM_SPARSE_MEMORY_PLUG, block, nr);
}

static void unplug(struct device *d, u64 block, u64 nr)
{
	change(d, KVM_SPARSE_MEMORY_UNPLUG, block, nr);
}

static void discard(struct device *d, u64 block, u64 nr)
{
	TEST_ASSERT(!madvise(d->mem + block * BLOCK, nr * BLOCK, MADV_DONTNEED),
		    "MADV_DONTNEED: %s", strerror(errno));
}

static int try_set_slot(struct device *d, u32 slot, u32 flags, u64 gpa, u64 size)
{
	return __vm_set_user_memory_region2(d->vm, slot, flags, gpa, size, d->mem, 0, 0) ?
	       errno : 0;
}

static void set_slot(struct device *d, u32 slot, u32 flags, u64 gpa, u64 size)
{
	int error = try_set_slot(d, slot, flags, gpa, size);

	TEST_ASSERT(!error, "KVM_SET_USER_MEMORY_REGION2: %s", strerror(error));
}

static void map_memory(struct device *d, size_t size, int flags)
{
	d->size = size;
	d->mem = kvm_mmap(size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1);
	madvise(d->mem, size, MADV_NOHUGEPAGE);
}

static void open_vm(struct device *d, const char *name, bool nested, void *code)
{
	gva_t pages, arg = 0;

	*d = (struct device){ .name = name, .nested = nested };
	d->vm = __vm_create_with_one_vcpu(&d->vcpu, 1024, code);
	pages = vm_alloc_pages(d->vm, 1);
	d->shared = addr_gva2hva(d->vm, pages);
	d->shared->random = seed;
	shared = (struct shared *)pages;
	sync_global_to_guest(d->vm, shared);
	virt_map_level(d->vm, SLOT_GVA, SLOT_GPA, SLOT_SIZE, PG_LEVEL_1G);
	virt_pg_map(d->vm, WALK_GVA, addr_gva2gpa(d->vm, pages));
	if (nested)
		arg = prepare_nested(d->vm, SLOT_SIZE);
	vcpu_args_set(d->vcpu, 2, arg, pages);
}

static void close_device(struct device *d)
{
	kvm_vm_free(d->vm);
	kvm_munmap(d->mem, d->size);
}

/* With the slot, in which nothing is plugged, and the guest waiting for what to do. */
static void open_device(struct device *d, const char *name, bool nested)
{
	open_vm(d, name, nested, guest_code);
	map_memory(d, SLOT_SIZE, 0);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, SLOT_SIZE);
	run_vcpu(d->vcpu);
	run_vcpu(d->vcpu);
}

static bool left_for_unplugged(struct device *d, u64 at, u64 access)
{
	struct kvm_run *run = d->vcpu->run;
	int ret = _vcpu_run(d->vcpu), error = errno;
	u64 gpa = SLOT_GPA + at / PAGE_SIZE * PAGE_SIZE;
	u64 flags = KVM_MEMORY_EXIT_FLAG_UNPLUGGED | access;

	if (ret == -1 && error == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
	    run->memory_fault.gpa == gpa && run->memory_fault.size == PAGE_SIZE &&
	    run->memory_fault.flags == flags)
		return true;
	ksft_print_msg("KVM_RUN %d, errno %d, exit reason %u, gpa %llx size %llx flags %llx\n",
		       ret, error, run->exit_reason, run->memory_fault.gpa,
		       run->memory_fault.size, run->memory_fault.flags);
	ksft_print_msg("    wanted -1, %d, %u, gpa %llx size %x flags %llx\n", EFAULT,
		       KVM_EXIT_MEMORY_FAULT, (unsigned long long)gpa, (u32)PAGE_SIZE,
		       (unsigned long long)flags);
	return false;
}

static void order(struct device *d, enum op what, u64 at, u64 value)
{
	d->shared->op = what;
	d->shared->at = at;
	d->shared->value = value;
}

/* The guest does something, which nothing keeps it from. */
static void do_op(struct device *d, enum op what, u64 at, u64 value)
{
	order(d, what, at, value);
	run_vcpu(d->vcpu);
}

static bool guest_reads(struct device *d, u64 at, u64 want)
{
	do_op(d, OP_READ, at, ~want);
	if (d->shared->value == want)
		return true;
	ksft_print_msg("the guest reads %lx at %lx, want %lx\n",
		       (unsigned long)d->shared->value, (unsigned long)at, (unsigned long)want);
	return false;
}

/* Does the host have memory for a part of these blocks? */
static bool is_populated(struct device *d, u64 block, u64 nr)
{
	size_t pages = nr * BLOCK / PAGE_SIZE;
	unsigned char *vec = calloc(pages, 1);
	bool populated;

	TEST_ASSERT(vec && !mincore(d->mem + block * BLOCK, nr * BLOCK, vec), "mincore: %s",
		    strerror(errno));
	populated = memchr(vec, 1, pages);
	free(vec);
	return populated;
}

static bool has_no_memory(struct device *d, u64 block, const char *when)
{
	if (!is_populated(d, block, 1))
		return true;
	ksft_print_msg("%s: block %lu has memory\n", when, (unsigned long)block);
	return false;
}

/*
 * KVM has skipped the prefix that asks for emulation: have it emulate the instruction
 * again, and not the CPU execute it.
 */
static void back_to_prefix(struct device *d)
{
	struct kvm_regs regs;

	vcpu_regs_get(d->vcpu, &regs);
	regs.rip -= PREFIX_LEN;
	vcpu_regs_set(d->vcpu, &regs);
}

/* The vCPU leaves, twice the same way, until the block is plugged; then it is done. */
static bool needs_plug(struct device *d, enum op what, u64 at, u64 value, u64 access)
{
	bool emulated = what >= OP_EMULATED_READ, had = is_populated(d, at / BLOCK, 1);

	order(d, what, at, value);
	for (int i = 0; i < 2; i++) {
		if (!left_for_unplugged(d, at, access))
			return false;
		if (emulated)
			back_to_prefix(d);
	}
	if (!had && !has_no_memory(d, at / BLOCK, "touched"))
		return false;
	plug(d, at / BLOCK, 1);
	run_vcpu(d->vcpu);
	return true;
}

/* Each kind of access, to blocks of their own. */
static bool test_access(struct device *d)
{
	bool ok;

	ok = needs_plug(d, OP_READ, 3 * BLOCK + 0x5008, 1, READ) && d->shared->value == 0;
	ok = ok && needs_plug(d, OP_WRITE, 5 * BLOCK, 7, WRITE) && guest_reads(d, 5 * BLOCK, 7);
	/* A locked instruction is a write from the start. */
	ok = ok && needs_plug(d, OP_ADD, 8 * BLOCK - 8, 9, WRITE) &&
	     guest_reads(d, 8 * BLOCK - 8, 9);
	d->mem[100 * BLOCK] = 0xc3;	/* RET */
	ok = ok && needs_plug(d, OP_CALL, 100 * BLOCK, 0, EXEC);
	return ok;
}

/* What was plugged and is not any more; the host still has its contents. */
static bool test_unplug(struct device *d)
{
	bool ok = true;

	plug(d, 0, NR_BLOCKS);
	for (u64 block = 40; block < 60; block++)
		do_op(d, OP_WRITE, block * BLOCK, block);
	unplug(d, 45, 10);
	for (u64 block = 40; ok && block < 60; block++) {
		if (block >= 45 && block < 55)
			ok = needs_plug(d, block % 2 ? OP_READ : OP_ADD, block * BLOCK, 0,
					block % 2 ? READ : WRITE);
		ok = ok && guest_reads(d, block * BLOCK, block);
	}
	return ok;
}

/* Unplugged, discarded and plugged again, a block is as it was at first. */
static bool test_replug(struct device *d)
{
	bool ok = true;

	for (u64 round = 1; ok && round < 10; round++) {
		plug(d, 30, 2);
		do_op(d, OP_WRITE, 30 * BLOCK, round);
		do_op(d, OP_WRITE, 31 * BLOCK, round);
		unplug(d, 30, 1);
		discard(d, 30, 1);
		ok = needs_plug(d, OP_READ, 30 * BLOCK, ~0ull, READ) && !d->shared->value &&
		     guest_reads(d, 31 * BLOCK, round);
		unplug(d, 30, 1);
		discard(d, 30, 1);
	}
	return ok;
}

/* KVM's page tables and metadata for blocks go with them, the host's memory does not. */
static bool test_tables(struct device *d)
{
	long tables, meta, left_kb, left_pages;

	unplug(d, 0, NR_BLOCKS);
	pt_grace_period();
	tables = meminfo_kb("SecPageTables");
	meta = vm_stat_or_none(d->vm, "mmu_slot_pages");
	plug(d, 0, NR_BLOCKS);
	for (u64 block = 0; block < NR_BLOCKS; block += 3)
		do_op(d, OP_WRITE, block * BLOCK, 1);
	unplug(d, 0, NR_BLOCKS);
	pt_grace_period();
	left_kb = meminfo_kb("SecPageTables") - tables;
	left_pages = vm_stat_or_none(d->vm, "mmu_slot_pages") - meta;
	if (left_kb > TABLES_SLACK_KB || left_pages > META_SLACK)
		ksft_print_msg("left: %ld kB of page tables, %ld pages of metadata\n", left_kb,
			       left_pages);
	return left_kb <= TABLES_SLACK_KB && left_pages <= META_SLACK && is_populated(d, 0, 1);
}

/* Bits stay when flags change or the slot moves, and a moved slot is reached. */
static bool test_slot_changes(struct device *d)
{
	u64 before[NR_BLOCKS / 64], after[NR_BLOCKS / 64];
	bool ok;

	unplug(d, 0, NR_BLOCKS);
	for (u64 block = 0; block < NR_BLOCKS; block += 1 + block % 7)
		plug(d, block, 1);
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, SLOT_SIZE, before);
	set_slot(d, SLOT, KVM_MEM_SPARSE | KVM_MEM_LOG_DIRTY_PAGES, SLOT_GPA, SLOT_SIZE);
	do_op(d, OP_WRITE, 0, 11);
	unplug(d, 0, 1);
	ok = needs_plug(d, OP_WRITE, 0, 12, WRITE) && guest_reads(d, 0, 12);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, SLOT_SIZE);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA + SLOT_SIZE, SLOT_SIZE);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, SLOT_SIZE);
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, SLOT_SIZE, after);
	if (memcmp(before, after, sizeof(before))) {
		ksft_print_msg("blocks that are plugged changed\n");
		ok = false;
	}
	return ok && needs_plug(d, OP_READ, 2 * BLOCK, 0, READ) && guest_reads(d, 0, 12);
}

/* Blocks that the host maps by one huge page each, and their neighbours. */
static bool test_huge(struct device *d)
{
	long huge;
	bool ok;

	unplug(d, 200, 4);
	discard(d, 200, 4);
	madvise(d->mem + 200 * BLOCK, 4 * BLOCK, MADV_HUGEPAGE);
	huge = vm_stat_or_none(d->vm, "pages_2m");
	plug(d, 200, 4);
	for (u64 block = 200; block < 204; block++)
		do_op(d, OP_WRITE, block * BLOCK + 8, block);
	huge = vm_stat_or_none(d->vm, "pages_2m") - huge;
	if (huge < 4) {
		ksft_print_msg("of 4 blocks %ld are mapped by a huge page\n", huge);
		return false;
	}
	unplug(d, 201, 1);
	ok = guest_reads(d, 200 * BLOCK + 8, 200) && guest_reads(d, 202 * BLOCK + 8, 202) &&
	     needs_plug(d, OP_READ, 201 * BLOCK + 8, 0, READ) && d->shared->value == 201;
	madvise(d->mem + 200 * BLOCK, 4 * BLOCK, MADV_NOHUGEPAGE);
	return ok;
}

static bool test_pre_fault(struct device *d)
{
	struct kvm_pre_fault_memory range = { .gpa = SLOT_GPA + 300 * BLOCK, .size = PAGE_SIZE };
	int ret, error;

	unplug(d, 300, 1);
	discard(d, 300, 1);
	ret = __vcpu_ioctl(d->vcpu, KVM_PRE_FAULT_MEMORY, &range);
	error = errno;
	if (ret != -1 || error != ENOENT) {
		ksft_print_msg("KVM_PRE_FAULT_MEMORY: %d, errno %d\n", ret, error);
		return false;
	}
	return has_no_memory(d, 300, "prefaulted") && needs_plug(d, OP_READ, 300 * BLOCK, 1, READ);
}

/* Instructions that KVM emulates; one of them half done when it comes to the block. */
static bool test_emulator(struct device *d)
{
	u64 at = 400 * BLOCK, *words;
	bool ok;

	unplug(d, 399, 2);
	discard(d, 399, 2);
	ok = needs_plug(d, OP_EMULATED_READ, at, ~0ull, READ) && d->shared->value == 0;
	unplug(d, 400, 1);
	discard(d, 400, 1);
	ok = ok && needs_plug(d, OP_EMULATED_WRITE, at + 16, 21, WRITE) &&
	     guest_reads(d, at + 16, 21);
	unplug(d, 400, 1);
	discard(d, 400, 1);
	plug(d, 399, 1);
	words = (u64 *)(d->mem + at - 256);
	for (int i = 0; i < 16; i++)
		words[i] = i + 1;
	ok = ok && needs_plug(d, OP_EMULATED_MOVS, at, 0, WRITE);
	words = (u64 *)(d->mem + at - 64);
	for (int i = 0; ok && i < 16; i++)
		ok = words[i] == (u64)i + 1;
	if (!ok)
		ksft_print_msg("emulated instructions went wrong\n");
	return ok;
}

/* What KVM writes to the guest's memory by itself, through caches of either kind. */
static bool test_caches(struct device *d)
{
	u64 block = 500, gpa = SLOT_GPA + block * BLOCK;
	struct kvm_clock_data clock = { };
	struct kvm_steal_time *steal = (void *)(d->mem + block * BLOCK);
	/* The version that struct pvclock_vcpu_time_info begins with. */
	u32 *time = (u32 *)(d->mem + block * BLOCK + PAGE_SIZE);
	u32 versions[2];
	bool ok = true;

	plug(d, block, 1);
	do_op(d, OP_READ, 0, 0);
	vcpu_set_msr(d->vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
	vcpu_set_msr(d->vcpu, MSR_KVM_SYSTEM_TIME_NEW, (gpa + PAGE_SIZE) | KVM_MSR_ENABLED);
	for (int round = 0; ok && round < 3; round++) {
		vm_ioctl(d->vm, KVM_SET_CLOCK, &clock);
		do_op(d, OP_READ, 0, 0);
		if (!READ_ONCE(steal->version) || !READ_ONCE(*time)) {
			ksft_print_msg("plugged: steal time version %u, clock version %u\n",
				       steal->version, *time);
			ok = false;
		}
		unplug(d, block, 1);
		/* A VM whose guest unplugged what it gave KVM the address of can be restored. */
		vcpu_set_msr(d->vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
		vcpu_set_msr(d->vcpu, MSR_KVM_PV_EOI_EN, (gpa + 2048) | KVM_MSR_ENABLED);
		vcpu_set_msr(d->vcpu, MSR_KVM_ASYNC_PF_EN, (gpa + 1024) | KVM_ASYNC_PF_ENABLED);
		/* First with the memory there, which nothing tells KVM of. */
		versions[0] = READ_ONCE(steal->version);
		versions[1] = READ_ONCE(*time);
		vm_ioctl(d->vm, KVM_SET_CLOCK, &clock);
		do_op(d, OP_READ, 0, 0);
		if (READ_ONCE(steal->version) != versions[0] || READ_ONCE(*time) != versions[1]) {
			ksft_print_msg("unplugged, and KVM's clocks still tick there\n");
			ok = false;
		}
		discard(d, block, 1);
		vm_ioctl(d->vm, KVM_SET_CLOCK, &clock);
		do_op(d, OP_READ, 0, 0);
		do_op(d, OP_READ, 0, 0);
		vcpu_set_msr(d->vcpu, MSR_KVM_WALL_CLOCK_NEW, gpa + 2 * PAGE_SIZE);
		ok = ok && has_no_memory(d, block, "unplugged, with KVM's clocks in it");
		plug(d, block, 1);
	}
	vcpu_set_msr(d->vcpu, MSR_KVM_STEAL_TIME, 0);
	vcpu_set_msr(d->vcpu, MSR_KVM_SYSTEM_TIME_NEW, 0);
	vcpu_set_msr(d->vcpu, MSR_KVM_PV_EOI_EN, 0);
	vcpu_set_msr(d->vcpu, MSR_KVM_ASYNC_PF_EN, 0);
	return ok;
}

/* A vCPU touches blocks at random; one is unplugged, and stays without memory. */
struct racer {
	struct device *d;
	u64 left;	/* exits for unplugged blocks */
};

/* The entry of the guest's page tables that points to the last table for an address. */
static u64 *guest_pde(struct kvm_vm *vm, u64 gva)
{
	u64 gpa = vm->mmu.pgd, *table;

	for (int level = vm->mmu.pgtable_levels; level > PG_LEVEL_2M; level--) {
		table = addr_gpa2hva(vm, gpa);
		gpa = table[gva >> (PAGE_SHIFT + 9 * (level - 1)) & 511] & PHYSICAL_PAGE_MASK;
	}
	table = addr_gpa2hva(vm, gpa);
	return &table[gva >> (PAGE_SHIFT + 9) & 511];
}

/* A CPU that walks the guest's tables leaves; KVM that does finds no table. */
static bool walk_fails(struct device *d, u64 gpa)
{
	struct kvm_run *run = d->vcpu->run;

	order(d, OP_TRY_READ, WALK_GVA - SLOT_GVA, 0);
	if (!d->nested && !kvm_cpu_has_tdp()) {
		run_vcpu(d->vcpu);
		return d->shared->value == PF_VECTOR;
	}
	return _vcpu_run(d->vcpu) == -1 && errno == EFAULT &&
	       run->exit_reason == KVM_EXIT_MEMORY_FAULT && run->memory_fault.gpa == gpa &&
	       run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_UNPLUGGED;
}

/* A page table of the guest in a block that goes, and comes back as it was. */
static bool test_guest_tables(struct device *d)
{
	u64 block = 600, gpa = SLOT_GPA + block * BLOCK, *pde = guest_pde(d->vm, WALK_GVA);
	u64 *table = (u64 *)((u64)vm_get_pte(d->vm, WALK_GVA) & PAGE_MASK);

	plug(d, block, 1);
	memcpy(d->mem + block * BLOCK, table, PAGE_SIZE);
	*pde = (*pde & ~PHYSICAL_PAGE_MASK) | gpa;
	for (int round = 0; round < 3; round++) {
		do_op(d, OP_TRY_READ, WALK_GVA - SLOT_GVA, ~0ull);
		if (d->shared->value) {
			ksft_print_msg("exception %lu though the table is plugged\n",
				       (unsigned long)d->shared->value);
			return false;
		}
		unplug(d, block, 1);
		if (!walk_fails(d, gpa)) {
			ksft_print_msg("an unplugged page table is still in use\n");
			return false;
		}
		plug(d, block, 1);
		/* What it was about to do. */
		if (d->nested || kvm_cpu_has_tdp())
			run_vcpu(d->vcpu);
	}
	return true;
}

static void *run_racer(void *arg)
{
	struct racer *racer = arg;
	struct device *d = racer->d;
	struct kvm_regs start;

	vcpu_regs_get(d->vcpu, &start);
	for (;;) {
		if (!_vcpu_run(d->vcpu)) {
			/* By GUEST_SYNC(), for it was told to stop. */
			expect_sync(d->vcpu);
			return NULL;
		}
		TEST_ASSERT(errno == EFAULT &&
			    d->vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT,
			    "KVM_RUN: %s, exit reason %u", strerror(errno),
			    d->vcpu->run->exit_reason);
		racer->left++;
		/* From the start: which block is next is in memory. */
		vcpu_regs_set(d->vcpu, &start);
	}
}

static bool stays_unplugged(struct device *d, u64 block)
{
	unplug(d, block, 1);
	discard(d, block, 1);
	for (int i = 0; i < 3; i++) {
		if (!has_no_memory(d, block, "unplugged under a vCPU"))
			return false;
		sched_yield();
	}
	return true;
}

static void test_race(const char *name)
{
	unsigned int state = seed;
	struct racer racer = { };
	u64 cycles = 0, written = 0;
	struct device d;
	pthread_t thread;
	bool ok = true;
	u64 end, last;

	open_vm(&d, name, false, guest_code_race);
	map_memory(&d, SLOT_SIZE, 0);
	set_slot(&d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, SLOT_SIZE);
	plug(&d, 0, NR_BLOCKS);
	vcpu_set_msr(d.vcpu, MSR_KVM_STEAL_TIME, (SLOT_GPA + 7 * BLOCK) | KVM_MSR_ENABLED);
	racer.d = &d;
	TEST_ASSERT(!pthread_create(&thread, NULL, run_racer, &racer), "pthread_create");
	/* Longer where the two hardly meet, so that they have raced at all. */
	end = pt_now_ns() + run_seconds * 1000000000ull;
	last = end + 10 * run_seconds * 1000000000ull;
	while (ok && (pt_now_ns() < end || ((!written || !READ_ONCE(racer.left)) &&
					    pt_now_ns() < last))) {
		/* The block with the steal time, as often as all others. */
		u64 block = rand_r(&state) % 2 ? 7 : rand_r(&state) % NR_BLOCKS;

		if (cycles % 64 == 0)
			set_slot(&d, SLOT, KVM_MEM_SPARSE |
				 (cycles % 128 ? KVM_MEM_LOG_DIRTY_PAGES : 0), SLOT_GPA, SLOT_SIZE);
		/* KVM alone may have written to the block with the steal time. */
		written += block != 7 && is_populated(&d, block, 1);
		ok = stays_unplugged(&d, block);
		plug(&d, block, 1);
		cycles++;
	}
	WRITE_ONCE(d.shared->stop, true);
	pthread_join(thread, NULL);
	close_device(&d);
	ksft_print_msg("%s: %lu cycles, %lu blocks had memory before, %lu exits\n", name,
		       (unsigned long)cycles, (unsigned long)written,
		       (unsigned long)racer.left);
	ksft_test_result(ok && written && racer.left, "%s: race\n", name);
}

/* A hostile guest: nothing is plugged, it touches everything. */
static void test_sweep(const char *name)
{
	u64 size = SWEEP_GIB * GIB, exits = 0;
	long free, tables;
	struct kvm_run *run;
	struct device d;
	bool ok = true;

	d.vm = __vm_create_with_one_vcpu(&d.vcpu, 1024, guest_code_sweep);
	if (!slot_fits(d.vm, size)) {
		kvm_vm_free(d.vm);
		ksft_test_result_skip("%s: sweep: too few address bits\n", name);
		return;
	}
	map_memory(&d, size, 0);
	virt_map_level(d.vm, SLOT_GVA, SLOT_GPA, size, PG_LEVEL_1G);
	set_slot(&d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, size);
	vcpu_args_set(d.vcpu, 1, size);
	/* Registers come with the exit: no ioctl that allocates. */
	run = d.vcpu->run;
	run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	free = free_kb();
	tables = meminfo_kb("SecPageTables");
	for (; ok && exits < size / BLOCK; exits++) {
		ok = left_for_unplugged(&d, exits * BLOCK, WRITE);
		run->s.regs.regs.rip += 3;
		run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	}
	if (ok) {
		vcpu_run(d.vcpu);
		TEST_ASSERT_EQ(get_ucall(d.vcpu, NULL), UCALL_DONE);
		free -= free_kb();
		tables = meminfo_kb("SecPageTables") - tables;
		ksft_print_msg("%s: %lu blocks touched: %ld kB taken, %ld of them page tables\n",
			       name, (unsigned long)exits, free, tables);
		ok = free < SWEEP_SLACK_KB && vcpu_get_stat(d.vcpu, unplugged_exits) == exits;
	}
	close_device(&d);
	ksft_test_result(ok, "%s: sweep\n", name);
}

static char gigantic_pages[32];

static void restore_gigantic_pages(void)
{
	pt_write_file(HUGE_1G, gigantic_pages);
}

/* One more than there are, until restore_gigantic_pages(). */
static bool add_gigantic_page(void)
{
	char text[32];
	int more;

	if (pt_read_file(HUGE_1G, gigantic_pages, sizeof(gigantic_pages)) <= 0)
		return false;
	more = atoi(gigantic_pages) + 1;
	snprintf(text, sizeof(text), "%d", more);
	atexit(restore_gigantic_pages);
	if (!pt_write_file(HUGE_1G, text) || pt_read_file(HUGE_1G, text, sizeof(text)) <= 0)
		return false;
	if (atoi(text) >= more)
		return true;
	restore_gigantic_pages();
	return false;
}

/* One page of 1 GiB: mapped as a whole while all of it is plugged, and not otherwise. */
static void test_gigantic(const char *name)
{
	struct device d;
	bool ok;

	if (!kvm_cpu_has(X86_FEATURE_GBPAGES) || !add_gigantic_page()) {
		ksft_test_result_skip("%s: gigantic: no page of 1 GiB to be had\n", name);
		return;
	}
	open_vm(&d, name, false, guest_code);
	d.size = GIB;
	d.mem = kvm_mmap(GIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS |
			 MAP_HUGETLB | (30 << MAP_HUGE_SHIFT), -1);
	set_slot(&d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, GIB);
	run_vcpu(d.vcpu);
	run_vcpu(d.vcpu);
	plug(&d, 0, 512);
	do_op(&d, OP_WRITE, 77 * BLOCK, 77);
	ksft_print_msg("%s: mapped by %ld pages of 1 GiB\n", name,
		       vm_stat_or_none(d.vm, "pages_1g"));
	ok = vm_stat_or_none(d.vm, "pages_1g") == 1;
	unplug(&d, 100, 1);
	ok = guest_reads(&d, 77 * BLOCK, 77) && vm_stat_or_none(d.vm, "pages_1g") == 0 && ok;
	ok = needs_plug(&d, OP_READ, 100 * BLOCK, 1, READ) && ok;
	unplug(&d, 100, 1);
	ok = guest_reads(&d, 99 * BLOCK, 0) && guest_reads(&d, 101 * BLOCK, 0) && ok;
	ok = needs_plug(&d, OP_READ, 100 * BLOCK, 1, READ) && ok;
	close_device(&d);
	restore_gigantic_pages();
	ksft_test_result(ok, "%s: gigantic\n", name);
}

static bool refuses(const char *what, int got, int want)
{
	if (got == want)
		return true;
	ksft_print_msg("%s: errno %d, want %d\n", what, got, want);
	return false;
}

static int sparse_args(struct device *d, struct kvm_sparse_memory args)
{
	return __vm_ioctl(d->vm, KVM_SPARSE_MEMORY, &args) ? errno : 0;
}

/* The slot is the first GiB, a slot that isn't sparse the second, nothing the third. */
static bool test_arguments(struct device *d)
{
	const u64 gpa = SLOT_GPA, size = BLOCK;
	const u32 op = KVM_SPARSE_MEMORY_PLUG;
	u64 bitmap;
	bool ok = true;

	set_slot(d, SLOT, 0, 0, 0);
	set_slot(d, SLOT, KVM_MEM_SPARSE, gpa, GIB);
	set_slot(d, SLOT + 1, 0, gpa + GIB, GIB);
#define REFUSED(error, ...)								\
	(ok = refuses(#__VA_ARGS__, sparse_args(d, (struct kvm_sparse_memory)		\
						{ __VA_ARGS__ }), error) && ok)
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = 0);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = 4);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = ~0u);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = op, .flags = 1);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = op, .flags = 1u << 31);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = op, .bitmap = (u64)&bitmap);
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = op, .reserved = { 1 });
	REFUSED(EINVAL, .gpa = gpa, .size = size, .op = op, .reserved = { 0, 0, 0, 1ull << 63 });
	REFUSED(EINVAL, .gpa = gpa, .op = op);
	REFUSED(EINVAL, .gpa = gpa + PAGE_SIZE, .size = size, .op = op);
	REFUSED(EINVAL, .gpa = gpa, .size = size + PAGE_SIZE, .op = op);
	REFUSED(EINVAL, .gpa = gpa, .size = -size, .op = op);
	REFUSED(EINVAL, .gpa = -size, .size = 2 * size, .op = op);
	REFUSED(EINVAL, .gpa = gpa + GIB, .size = size, .op = op);
	REFUSED(EINVAL, .gpa = gpa + GIB - size, .size = 2 * size, .op = op);
	REFUSED(ENOENT, .gpa = gpa + 2 * GIB, .size = size, .op = op);
	REFUSED(ENOENT, .gpa = gpa - size, .size = 2 * size, .op = op);
	REFUSED(ENOENT, .gpa = 0ull - 2 * size, .size = size, .op = op);
	REFUSED(EFAULT, .gpa = gpa, .size = size, .op = KVM_SPARSE_MEMORY_QUERY, .bitmap = 8);
	ok = refuses("a bad pointer", ioctl(d->vm->fd, KVM_SPARSE_MEMORY, 8) ? errno : 0,
		     EFAULT) && ok;
	/* Nothing of that has plugged anything. */
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, gpa, 64 * BLOCK, &bitmap);
	ok = refuses("plugged after errors", !!bitmap, 0) && ok;
	set_slot(d, SLOT + 1, 0, 0, 0);
	return ok;
}

/* With a guest_memfd that is good for a memslot which isn't sparse. */
static bool refuses_guest_memfd(struct device *d)
{
	const u32 flags = KVM_MEM_GUEST_MEMFD;
	bool ok = true;
	int fd;

	if (!kvm_has_cap(KVM_CAP_GUEST_MEMFD))
		return true;
	fd = vm_create_guest_memfd(d->vm, GIB, 0);
	ok = refuses("a sparse guest_memfd",
		     __vm_set_user_memory_region2(d->vm, SLOT, flags | KVM_MEM_SPARSE, SLOT_GPA,
						  GIB, d->mem, fd, 0) ? errno : 0, EINVAL);
	ok = refuses("a guest_memfd",
		     __vm_set_user_memory_region2(d->vm, SLOT, flags, SLOT_GPA, GIB, d->mem, fd,
						  0) ? errno : 0, 0) && ok;
	vm_set_user_memory_region2(d->vm, SLOT, 0, SLOT_GPA, 0, NULL, 0, 0);
	close(fd);
	return ok;
}

static bool test_regions(struct device *d)
{
	const u64 gpa = SLOT_GPA;
	bool ok = true;

	set_slot(d, SLOT, 0, 0, 0);
	ok = refuses("an unaligned address", try_set_slot(d, SLOT, KVM_MEM_SPARSE,
							  gpa + PAGE_SIZE, GIB), EINVAL) && ok;
	ok = refuses("an unaligned size", try_set_slot(d, SLOT, KVM_MEM_SPARSE, gpa,
						       GIB + PAGE_SIZE), EINVAL) && ok;
	ok = refuses_guest_memfd(d) && ok;
	ok = refuses("KVM_SET_USER_MEMORY_REGION",
		     __vm_set_user_memory_region(d->vm, SLOT, KVM_MEM_SPARSE, gpa, GIB, d->mem) ?
		     errno : 0, EINVAL) && ok;
	set_slot(d, SLOT, 0, gpa, GIB);
	ok = refuses("to become sparse", try_set_slot(d, SLOT, KVM_MEM_SPARSE, gpa, GIB),
		     EINVAL) && ok;
	set_slot(d, SLOT, 0, 0, 0);
	set_slot(d, SLOT, KVM_MEM_SPARSE, gpa, GIB);
	ok = refuses("to become dense", try_set_slot(d, SLOT, 0, gpa, GIB), EINVAL) && ok;
	ok = refuses("a move to an unaligned address",
		     try_set_slot(d, SLOT, KVM_MEM_SPARSE, gpa + PAGE_SIZE, GIB), EINVAL) && ok;
	return ok;
}

/* The address space of SMM has its own memslots: it is no way around. */
static void test_smm(struct device *d)
{
	const u32 smm_slot = 1 << 16 | SLOT;
	u64 bitmap;
	bool ok;

	if (kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) < 2) {
		ksft_test_result_skip("api: SMM: no second address space\n");
		return;
	}
	set_slot(d, SLOT, 0, 0, 0);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, GIB);
	set_slot(d, smm_slot, 0, SLOT_GPA, GIB);
	ok = refuses("a slot of SMM that isn't sparse",
		     sparse_op(d, KVM_SPARSE_MEMORY_PLUG, SLOT_GPA, BLOCK, NULL), EINVAL);
	set_slot(d, smm_slot, 0, 0, 0);
	plug(d, 0, 2);
	set_slot(d, smm_slot, KVM_MEM_SPARSE, SLOT_GPA, GIB);
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, 64 * BLOCK, &bitmap);
	ok = refuses("plugged in one of two", bitmap, 0) && ok;
	plug(d, 1, 1);
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, 64 * BLOCK, &bitmap);
	ok = refuses("plugged in both", bitmap, 2) && ok;
	set_slot(d, smm_slot, 0, 0, 0);
	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, 64 * BLOCK, &bitmap);
	ok = refuses("plugged in the one that is left", bitmap, 3) && ok;
	ksft_test_result(ok, "api: SMM\n");
}

static u64 fuzz_value(const u64 *values, int nr)
{
	return values[random() % nr] + (random() % 8 ? 0 : random() % 3 * BLOCK - BLOCK);
}

/* Random arguments, valid ones among them, against what the blocks must be by then. */
static bool test_fuzz(struct device *d)
{
	const u64 gpas[] = { SLOT_GPA, SLOT_GPA + 63 * BLOCK, SLOT_GPA + 64 * BLOCK,
			     SLOT_GPA + 500 * BLOCK, SLOT_GPA + GIB, SLOT_GPA + 2 * GIB, 0,
			     1ull << 52, ~0ull, SLOT_GPA + 1 };
	const u64 sizes[] = { BLOCK, 2 * BLOCK, 64 * BLOCK, 65 * BLOCK, GIB, 2 * GIB, 3 * GIB, 0,
			      1ull << 40, ~0ull, PAGE_SIZE };
	bool model[NR_BLOCKS] = { }, ok = true;
	u64 bitmap[NR_BLOCKS / 64];
	int done = 0;

	/* Two memslots, so that ranges span them. */
	set_slot(d, SLOT, 0, 0, 0);
	set_slot(d, SLOT, KVM_MEM_SPARSE, SLOT_GPA, GIB);
	set_slot(d, SLOT + 1, KVM_MEM_SPARSE, SLOT_GPA + GIB, GIB);
	srandom(seed);
	for (int round = 0; ok && round < FUZZ_ROUNDS; round++) {
		struct kvm_sparse_memory args = {
			.gpa = fuzz_value(gpas, ARRAY_SIZE(gpas)),
			.size = fuzz_value(sizes, ARRAY_SIZE(sizes)),
			.op = random() % 20 ? 1 + random() % 2 : (u32)random(),
			.flags = random() % 20 ? 0 : 1u << random() % 32,
		};
		bool valid = (args.op == 1 || args.op == 2) && !args.flags && args.size &&
			     args.gpa % BLOCK == 0 && args.size % BLOCK == 0 &&
			     args.gpa >= SLOT_GPA && args.size <= SLOT_SIZE &&
			     args.gpa - SLOT_GPA <= SLOT_SIZE - args.size;
		int error = sparse_args(d, args);

		if (valid == !!error) {
			ksft_print_msg("gpa %llx size %llx op %x flags %x: errno %d\n", args.gpa,
				       args.size, args.op, args.flags, error);
			ok = false;
		}
		if (valid)
			memset(&model[(args.gpa - SLOT_GPA) / BLOCK], args.op == 1,
			       args.size / BLOCK);
		done += valid;
		sparse_op(d, KVM_SPARSE_MEMORY_QUERY, SLOT_GPA, SLOT_SIZE, bitmap);
		for (u64 block = 0; ok && block < NR_BLOCKS; block++) {
			ok = (bitmap[block / 64] >> block % 64 & 1) == model[block];
			if (!ok)
				ksft_print_msg("round %d: block %lu is %splugged\n", round,
					       (unsigned long)block, model[block] ? "un" : "");
		}
	}
	ksft_print_msg("%d of %d calls were valid\n", done, FUZZ_ROUNDS);
	set_slot(d, SLOT + 1, 0, 0, 0);
	return ok && done;
}

static void test_api(void)
{
	struct device d;

	ksft_test_result(kvm_check_cap(KVM_CAP_SPARSE_MEMSLOTS) == BLOCK, "api: block size\n");
	open_device(&d, "api", false);
	ksft_test_result(test_arguments(&d), "api: arguments\n");
	ksft_test_result(test_regions(&d), "api: regions\n");
	ksft_test_result(test_fuzz(&d), "api: fuzz\n");
	test_smm(&d);
	close_device(&d);
}

static void test_mode(const char *name, bool nested)
{
	bool tdp = !nested && kvm_cpu_has_tdp();
	struct device d;

	open_device(&d, name, nested);
	ksft_test_result(test_access(&d), "%s: access\n", name);
	ksft_test_result(test_unplug(&d), "%s: unplug\n", name);
	ksft_test_result(test_replug(&d), "%s: replug\n", name);
	ksft_test_result(test_tables(&d), "%s: tables\n", name);
	ksft_test_result(test_slot_changes(&d), "%s: slot changes\n", name);
	ksft_test_result(test_huge(&d), "%s: huge\n", name);
	if (tdp)
		ksft_test_result(test_pre_fault(&d), "%s: prefault\n", name);
	else
		ksft_test_result_skip("%s: prefault: nested, or no TDP\n", name);
	/* The prefix that asks for emulation is a #UD of the host's guest alone. */
	if (!nested && is_forced_emulation_enabled)
		ksft_test_result(test_emulator(&d), "%s: emulator\n", name);
	else
		ksft_test_result_skip("%s: emulator: nested, or not root\n", name);
	ksft_test_result(test_caches(&d), "%s: caches\n", name);
	ksft_test_result(test_guest_tables(&d), "%s: guest tables\n", name);
	close_device(&d);
	if (nested)
		return;
	test_gigantic(name);
	test_sweep(name);
	test_race(name);
}

static void skip_nested(void)
{
	for (int i = 0; i < 10; i++)
		ksft_test_result_skip("nested: the machine cannot run guests of guests\n");
}

static char emulation[16];

static void restore_emulation(void)
{
	pt_write_file(EMULATION, emulation);
}

/* Let guests ask for an instruction to be emulated. */
static void allow_emulation(void)
{
	if (pt_read_file(EMULATION, emulation, sizeof(emulation)) <= 0 ||
	    !pt_write_file(EMULATION, "1"))
		return;
	atexit(restore_emulation);
	is_forced_emulation_enabled = true;
}

static void parse(int argc, char **argv)
{
	int o;

	while ((o = getopt(argc, argv, "s:r:h")) != -1) {
		switch (o) {
		case 's':
			run_seconds = atoi_positive("seconds", optarg);
			break;
		case 'r':
			seed = atoi_positive("seed", optarg);
			break;
		default:
			printf("usage: %s [-s SECONDS] [-r SEED]\n"
			       "  -s  how long the race takes (default 3)\n"
			       "  -r  seed of everything random (default 1)\n", argv[0]);
			exit(o == 'h' ? 0 : 2);
		}
	}
}

int main(int argc, char **argv)
{
	bool tdp_mmu = kvm_cpu_has_tdp() && get_kvm_param_bool("tdp_mmu");

	parse(argc, argv);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_SPARSE_MEMSLOTS));
	ksft_print_header();
	ksft_set_plan(5 + 13 + 10);
	allow_emulation();
	test_api();
	test_mode(tdp_mmu ? "tdp" : "shadow", false);
	if (can_nest())
		test_mode("nested", true);
	else
		skip_nested();
	ksft_finished();
}
