// SPDX-License-Identifier: GPL-2.0
/*
 * KVM lets others run while it walks its page tables for a large memslot.
 *
 * A real-time thread on the same CPU wants to run every millisecond meanwhile.  How
 * late it is at worst is the longest time that the walk held mmu_lock, or anything
 * else that keeps the kernel from being preempted, without a chance to yield.  Two
 * walks are watched: the shadow MMU's over the rmaps of a memslot with nothing in
 * it, when dirty logging is switched on; and the discard of a memslot of up to 1 TiB, of
 * which 4 GiB have a page in each 2 MiB.
 */
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kselftest.h"
#include "sparse_slot.h"

#define EMPTY_SIZE	(64 * GIB)
#define DISCARD_SIZE	(1024 * GIB)
#define POPULATED	(4 * GIB)
#define PERIOD_NS	1000000ull
/* Whoever else has the CPU, a hypervisor for one, disturbs: the best counts. */
#define NR_ATTEMPTS	5
/* Percent of the walk that the thread may be late, unless that is nothing to speak of. */
#define LIMIT		25
#define TRIFLE_NS	(2 * PERIOD_NS)

struct watch {
	unsigned long long worst_ns;
	bool stop;
};

struct slot {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	char *mem;
	u64 size;
};

/* Writes a page of each block that is to be populated, each time it is entered. */
static void guest_code(void)
{
	for (u64 round = 1;; round++) {
		for (u64 at = 0; at < POPULATED; at += BLOCK)
			WRITE_ONCE(*(u64 *)(SLOT_GVA + at), round);
		GUEST_SYNC(round);
	}
}

/* How late the thread was at worst, beyond the period that it sleeps. */
static void *watch_thread(void *arg)
{
	struct watch *w = arg;
	struct timespec period = { .tv_nsec = PERIOD_NS };
	unsigned long long before, slept;

	while (!READ_ONCE(w->stop)) {
		before = pt_now_ns();
		nanosleep(&period, NULL);
		slept = pt_now_ns() - before;
		if (slept > PERIOD_NS && slept - PERIOD_NS > w->worst_ns)
			w->worst_ns = slept - PERIOD_NS;
	}
	return NULL;
}

static pthread_t start_watch(struct watch *w)
{
	struct sched_param param = { .sched_priority = 50 };
	pthread_attr_t attr;
	pthread_t thread;
	int error;

	pthread_attr_init(&attr);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	error = pthread_create(&thread, &attr, watch_thread, w);
	if (error)
		ksft_exit_skip("no real-time thread: %s\n", strerror(error));
	return thread;
}

/*
 * The delay of the thread during one call of @walk, in percent of what that took.  A walk
 * may take less than the thread sleeps, and delays nobody by more than it takes: what goes
 * beyond that is somebody else's doing.
 */
static unsigned long long delay_during(void (*walk)(struct slot *s), struct slot *s)
{
	struct watch w = { };
	unsigned long long took_ns, delay_ns;
	pthread_t thread;

	thread = start_watch(&w);
	usleep(10000);
	took_ns = pt_now_ns();
	walk(s);
	took_ns = pt_now_ns() - took_ns;
	WRITE_ONCE(w.stop, true);
	pthread_join(thread, NULL);
	ksft_print_msg("walk: %llu us, thread late by %llu us\n", took_ns / 1000,
		       w.worst_ns / 1000);
	delay_ns = min(w.worst_ns, took_ns);
	return delay_ns < TRIFLE_NS ? 0 : delay_ns * 100 / took_ns;
}

static void set_region(struct slot *s, u32 flags)
{
	vm_set_user_memory_region(s->vm, SLOT, flags, SLOT_GPA, s->size, s->mem);
}

static void open_slot(struct slot *s, u64 size)
{
	s->size = size;
	s->vm = __vm_create_with_one_vcpu(&s->vcpu, POPULATED / PAGE_SIZE / 256, guest_code);
	virt_map_level(s->vm, SLOT_GVA, SLOT_GPA, POPULATED, PG_LEVEL_1G);
	s->mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(s->mem != MAP_FAILED, "mmap: %s", strerror(errno));
	madvise(s->mem, size, MADV_NOHUGEPAGE);
	set_region(s, 0);
}

static void close_slot(struct slot *s)
{
	kvm_vm_free(s->vm);
	munmap(s->mem, s->size);
}

static void populate(struct slot *s)
{
	vcpu_run(s->vcpu);
	TEST_ASSERT_EQ(get_ucall(s->vcpu, NULL), UCALL_SYNC);
}

static void discard(struct slot *s)
{
	TEST_ASSERT(!madvise(s->mem, s->size, MADV_DONTNEED), "MADV_DONTNEED: %s",
		    strerror(errno));
}

static void log_dirty_pages(struct slot *s)
{
	set_region(s, KVM_MEM_LOG_DIRTY_PAGES);
}

static void test_empty_rmaps(void)
{
	unsigned long long best = -1ull;
	struct slot s;

	if (kvm_cpu_has_tdp() && get_kvm_param_bool("tdp_mmu")) {
		ksft_test_result_skip("no rmaps with the TDP MMU; boot with kvm.tdp_mmu=0\n");
		return;
	}
	open_slot(&s, EMPTY_SIZE);
	/* There are rmaps from now on; and none in use, then. */
	populate(&s);
	discard(&s);
	for (int i = 0; i < NR_ATTEMPTS; i++) {
		best = min(best, delay_during(log_dirty_pages, &s));
		set_region(&s, 0);
	}
	close_slot(&s);
	ksft_test_result(best < LIMIT, "switching dirty logging, nothing there\n");
}

/* As much of 1 TiB as the guest's physical addresses have room for. */
static u64 discard_size(void)
{
	struct kvm_vm *vm = vm_create_barebones();
	u64 size = DISCARD_SIZE;

	while (size > POPULATED && !slot_fits(vm, size))
		size /= 2;
	kvm_vm_free(vm);
	return size;
}

static void test_discard(void)
{
	unsigned long long best = -1ull;
	struct slot s;

	open_slot(&s, discard_size());
	for (int i = 0; i < NR_ATTEMPTS; i++) {
		populate(&s);
		best = min(best, delay_during(discard, &s));
	}
	close_slot(&s);
	ksft_print_msg("%lu GiB were discarded\n", (unsigned long)(s.size / GIB));
	ksft_test_result(best < LIMIT, "discard of a large memslot\n");
}

int main(void)
{
	TEST_REQUIRE(open("/dev/kvm", O_RDWR) >= 0);
	ksft_print_header();
	ksft_set_plan(2);
	pin_self_to_any_cpu();
	test_empty_rmaps();
	test_discard();
	ksft_finished();
}
