// SPDX-License-Identifier: GPL-2.0
/*
 * A virtio-mem device in a small VMM, and its driver in the guest: one memslot of 64 GiB
 * in which blocks of 2 MiB come and go at random places.
 *
 * The driver asks for each change by a request of virtio-mem (an exit to the VMM in place
 * of a virtqueue), fills what it is given, and checks all it has before it gives
 * something back.  The device checks requests, plugs a block before it answers, and
 * unplugs and discards it before it answers.  Where KVM has KVM_CAP_SPARSE_MEMSLOTS the
 * memslot is sparse; elsewhere it is an ordinary one, as VMMs have it today.
 *
 *   day        blocks come and go as by day and night: contents are what the driver
 *              wrote, new blocks are zero, only plugged blocks have memory, and KVM's
 *              page tables are those that plugged blocks need
 *   nothing    after all was unplugged nothing is left of the tables of KVM, nor of
 *              the VMM's PTE tables
 *   nonsense   requests that a device has to refuse change nothing
 *   hostile    a driver that touches everything that it does not have: it is stopped,
 *              and the host has allocated nothing
 *
 * With anonymous memory and with a memfd, with the MMU that the machine has (boot with
 * kvm.tdp_mmu=0 or kvm_amd.npt=0 for others), and with the driver in a guest's guest.
 */
#include <getopt.h>
#include <linux/falloc.h>
#include <linux/virtio_mem.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kselftest.h"
#include "sparse_slot.h"

#define DEVICE_SIZE	(64 * GIB)
#define NR_BLOCKS	(DEVICE_SIZE / BLOCK)
#define NR_GIBS		(DEVICE_SIZE / GIB)
#define PEAK_BLOCKS	192	/* that are plugged at noon */
#define MAX_REQUEST	4	/* blocks of one request */
#define DEFAULT_STEPS	16	/* of a day */
#define STRIDE		(BLOCK / 4)	/* of what the driver fills and checks */
/* Tables of the guest's own memory that are made meanwhile; of an upper level. */
#define TABLES_SLACK_KB	64

/* What GUEST_SYNC() says: guest_loop() uses 0 and 1. */
#define REQUEST		2

enum order { RESIZE, ASK, SWEEP };

/* What the VMM and the driver tell each other. */
struct shared {
	struct virtio_mem_req req;
	struct virtio_mem_resp resp;
	u64 order;
	u64 requested;		/* blocks that the driver is to have in the end */
	u64 random;
};

struct device {
	const char *name;	/* of the mode, in results */
	bool nested, sparse;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct shared *shared;
	char *mem;
	int memfd;		/* or -1: anonymous memory */
	u64 requested, nr_plugged;	/* blocks */
	u64 stopped_at;		/* address in the slot that the guest may not touch */
	bool plugged[NR_BLOCKS];
	long vmpte, tables;	/* kB, when nothing is plugged */
};

static int nr_steps = DEFAULT_STEPS;
static unsigned int seed = 1;

/*
 * The driver, in the guest.
 */

/* For the guest's guest, which gets no arguments. */
static struct shared *shared;
/* How often a block was filled, 0 for one that the driver has not, and before. */
static u16 filled[NR_BLOCKS], before[NR_BLOCKS];
static u64 nr_filled;

static u64 next_random(u64 *state)
{
	*state = *state * 6364136223846793005ull + 1442695040888963407ull;
	return *state >> 33;
}

static u64 *guest_word(u64 block, u64 at)
{
	return (u64 *)(SLOT_GVA + block * BLOCK + at);
}

static u64 pattern(u64 block, u64 at)
{
	return block << 40 | (u64)filled[block] << 24 | at;
}

static void guest_fill(u64 block)
{
	filled[block] = ++before[block];
	nr_filled++;
	for (u64 at = 0; at < BLOCK; at += STRIDE) {
		GUEST_ASSERT_EQ(READ_ONCE(*guest_word(block, at)), 0);
		WRITE_ONCE(*guest_word(block, at), pattern(block, at));
	}
}

static void guest_check(u64 block)
{
	for (u64 at = 0; at < BLOCK; at += STRIDE)
		GUEST_ASSERT_EQ(READ_ONCE(*guest_word(block, at)), pattern(block, at));
}

static void guest_request(struct shared *s, u16 type, u64 block, u16 nr)
{
	s->req.type = type;
	/* Plug, unplug and state have the same form. */
	s->req.u.plug.addr = SLOT_GPA + block * BLOCK;
	s->req.u.plug.nb_blocks = nr;
	s->resp.type = ~0;
	GUEST_SYNC(REQUEST);
	GUEST_ASSERT_EQ(READ_ONCE(s->resp.type), VIRTIO_MEM_RESP_ACK);
}

/* The first of up to @most blocks in a row that the driver has, or has not; sets @nr. */
static u64 guest_pick(struct shared *s, bool have, u64 most, u64 *nr)
{
	u64 block = next_random(&s->random) % NR_BLOCKS;

	while (!filled[block] == have)
		block = (block + 1) % NR_BLOCKS;
	for (*nr = 1; *nr < most && block + *nr < NR_BLOCKS; ++*nr) {
		if (!filled[block + *nr] == have)
			break;
	}
	return block;
}

static u64 at_most(struct shared *s, u64 missing)
{
	return min(missing, next_random(&s->random) % MAX_REQUEST + 1);
}

static void guest_resize(struct shared *s)
{
	u64 block, nr, want = READ_ONCE(s->requested);

	for (block = 0; block < NR_BLOCKS; block++) {
		if (filled[block])
			guest_check(block);
	}
	while (nr_filled < want) {
		block = guest_pick(s, false, at_most(s, want - nr_filled), &nr);
		guest_request(s, VIRTIO_MEM_REQ_PLUG, block, nr);
		while (nr--)
			guest_fill(block++);
	}
	while (nr_filled > want) {
		block = guest_pick(s, true, at_most(s, nr_filled - want), &nr);
		guest_request(s, VIRTIO_MEM_REQ_UNPLUG, block, nr);
		nr_filled -= nr;
		while (nr--)
			filled[block++] = 0;
	}
}

/* Writes to all that the driver does not have. */
static void guest_sweep(void)
{
	for (u64 block = 0; block < NR_BLOCKS; block++) {
		if (!filled[block])
			WRITE_ONCE(*guest_word(block, 0), 1);
	}
}

static void guest_work(void *arg)
{
	struct shared *s = arg;

	switch (READ_ONCE(s->order)) {
	case RESIZE:
		guest_resize(s);
		break;
	case ASK:
		GUEST_SYNC(REQUEST);
		break;
	case SWEEP:
		guest_sweep();
		break;
	}
}

static void l2_code(void)
{
	for (;;) {
		vmcall();
		guest_work(shared);
	}
}

static void guest_code(void *nested, struct shared *s)
{
	guest_loop(nested, l2_code, guest_work, s);
}

/*
 * The device, in the VMM.
 */

static void sparse_op(struct device *d, u32 op, u64 block, u64 nr, u64 *bitmap)
{
	struct kvm_sparse_memory args = {
		.gpa = SLOT_GPA + block * BLOCK, .size = nr * BLOCK, .op = op,
		.bitmap = (u64)bitmap,
	};

	if (d->sparse)
		vm_ioctl(d->vm, KVM_SPARSE_MEMORY, &args);
}

static void discard(struct device *d, u64 block, u64 nr)
{
	u64 at = block * BLOCK, size = nr * BLOCK;
	int ret;

	if (d->memfd < 0)
		ret = madvise(d->mem + at, size, MADV_DONTNEED);
	else
		ret = fallocate(d->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size);
	TEST_ASSERT(!ret, "the memory could not be freed: %s", strerror(errno));
}

static void set_plugged(struct device *d, u64 block, u64 nr, bool plugged)
{
	memset(d->plugged + block, plugged, nr);
	d->nr_plugged += plugged ? nr : -nr;
}

static u64 count_plugged(struct device *d, u64 block, u64 nr)
{
	u64 plugged = 0;

	while (nr--)
		plugged += d->plugged[block++];
	return plugged;
}

static u16 device_plug(struct device *d, u64 block, u64 nr)
{
	if (count_plugged(d, block, nr))
		return VIRTIO_MEM_RESP_ERROR;
	if (d->nr_plugged + nr > d->requested)
		return VIRTIO_MEM_RESP_NACK;
	sparse_op(d, KVM_SPARSE_MEMORY_PLUG, block, nr, NULL);
	set_plugged(d, block, nr, true);
	return VIRTIO_MEM_RESP_ACK;
}

/* KVM first: the guest must not get the memory back while it is discarded. */
static u16 device_unplug(struct device *d, u64 block, u64 nr)
{
	if (count_plugged(d, block, nr) != nr)
		return VIRTIO_MEM_RESP_ERROR;
	sparse_op(d, KVM_SPARSE_MEMORY_UNPLUG, block, nr, NULL);
	discard(d, block, nr);
	set_plugged(d, block, nr, false);
	return VIRTIO_MEM_RESP_ACK;
}

static u16 device_unplug_all(struct device *d)
{
	sparse_op(d, KVM_SPARSE_MEMORY_UNPLUG, 0, NR_BLOCKS, NULL);
	discard(d, 0, NR_BLOCKS);
	memset(d->plugged, 0, sizeof(d->plugged));
	d->nr_plugged = 0;
	return VIRTIO_MEM_RESP_ACK;
}

static u16 device_state(struct device *d, u64 block, u64 nr)
{
	u64 plugged = count_plugged(d, block, nr);

	d->shared->resp.u.state.state = plugged == nr ? VIRTIO_MEM_STATE_PLUGGED :
					plugged ? VIRTIO_MEM_STATE_MIXED :
					VIRTIO_MEM_STATE_UNPLUGGED;
	return VIRTIO_MEM_RESP_ACK;
}

/* What the guest says is read once, for it may change it meanwhile. */
static u16 device_answer(struct device *d)
{
	struct virtio_mem_req req = d->shared->req;
	u64 addr = req.u.plug.addr, nr = req.u.plug.nb_blocks;
	u64 block = (addr - SLOT_GPA) / BLOCK;

	if (req.type == VIRTIO_MEM_REQ_UNPLUG_ALL)
		return device_unplug_all(d);
	if (addr < SLOT_GPA || addr % BLOCK || !nr || block >= NR_BLOCKS ||
	    nr > NR_BLOCKS - block)
		return VIRTIO_MEM_RESP_ERROR;
	switch (req.type) {
	case VIRTIO_MEM_REQ_PLUG:
		return device_plug(d, block, nr);
	case VIRTIO_MEM_REQ_UNPLUG:
		return device_unplug(d, block, nr);
	case VIRTIO_MEM_REQ_STATE:
		return device_state(d, block, nr);
	default:
		return VIRTIO_MEM_RESP_ERROR;
	}
}

static bool is_unplugged_exit(struct device *d, int ret, int error)
{
	struct kvm_run *run = d->vcpu->run;

	return ret == -1 && error == EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
	       run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_UNPLUGGED;
}

/* The guest carries out an order; false if it had to be stopped, for good. */
static bool run_order(struct device *d, enum order order)
{
	struct ucall uc;
	int ret, error;

	d->shared->order = order;
	for (;;) {
		ret = _vcpu_run(d->vcpu);
		error = errno;
		if (is_unplugged_exit(d, ret, error)) {
			d->stopped_at = d->vcpu->run->memory_fault.gpa - SLOT_GPA;
			return false;
		}
		TEST_ASSERT(!ret, "KVM_RUN: %s", strerror(error));
		expect_sync(d->vcpu);
		get_ucall(d->vcpu, &uc);
		if (uc.args[1] != REQUEST)
			return true;
		d->shared->resp.type = device_answer(d);
	}
}

static void resize(struct device *d, u64 blocks)
{
	d->requested = blocks;
	d->shared->requested = blocks;
	TEST_ASSERT(run_order(d, RESIZE), "%s: the guest touched %lx, which is not plugged",
		    d->name, (unsigned long)d->stopped_at);
	TEST_ASSERT_EQ(d->nr_plugged, blocks);
}

static void map_memory(struct device *d, bool memfd)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	d->memfd = -1;
	if (memfd) {
		d->memfd = kvm_memfd_alloc(DEVICE_SIZE, false);
		flags = MAP_SHARED;
	}
	d->mem = kvm_mmap(DEVICE_SIZE, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, d->memfd);
	madvise(d->mem, DEVICE_SIZE, MADV_NOHUGEPAGE);
}

static void open_device(struct device *d, const char *name, bool memfd, bool nested)
{
	gva_t pages, arg = 0;

	memset(d, 0, sizeof(*d));
	d->name = name;
	d->nested = nested;
	d->sparse = kvm_has_cap(KVM_CAP_SPARSE_MEMSLOTS);
	d->vm = __vm_create_with_one_vcpu(&d->vcpu, 1024, guest_code);
	pages = vm_alloc_pages(d->vm, 1);
	d->shared = addr_gva2hva(d->vm, pages);
	d->shared->random = seed;
	shared = (struct shared *)pages;
	sync_global_to_guest(d->vm, shared);
	virt_map_level(d->vm, SLOT_GVA, SLOT_GPA, DEVICE_SIZE, PG_LEVEL_1G);
	if (nested)
		arg = prepare_nested(d->vm, DEVICE_SIZE);
	vcpu_args_set(d->vcpu, 2, arg, pages);
	/* Before there is a region that it would populate. */
	pt_settle();
	map_memory(d, memfd);
	vm_set_user_memory_region2(d->vm, SLOT, d->sparse ? KVM_MEM_SPARSE : 0, SLOT_GPA,
				   DEVICE_SIZE, d->mem, 0, 0);
	run_vcpu(d->vcpu);
	run_vcpu(d->vcpu);
	/* What the driver and the VMM need themselves is there from here on. */
	resize(d, 1);
	resize(d, 0);
	pt_grace_period();
	d->vmpte = pt_vmpte_kb(0);
	d->tables = meminfo_kb("SecPageTables");
}

static void close_device(struct device *d)
{
	kvm_vm_free(d->vm);
	kvm_munmap(d->mem, DEVICE_SIZE);
	if (d->memfd >= 0)
		close(d->memfd);
}

/*
 * What is as it must be.
 */

/* Of a memfd: mincore() would look at each page of a hole. */
static u64 count_data(struct device *d, off_t at, off_t end)
{
	u64 pages = 0;
	off_t hole;

	while ((at = lseek(d->memfd, at, SEEK_DATA)) >= 0 && at < end) {
		hole = min(lseek(d->memfd, at, SEEK_HOLE), end);
		pages += (hole - at) / PAGE_SIZE;
		at = hole;
	}
	return pages;
}

/* Pages of memory that a block has. */
static u64 count_pages(struct device *d, u64 block)
{
	unsigned char there[BLOCK / PAGE_SIZE];
	u64 pages = 0;

	if (d->memfd >= 0)
		return count_data(d, block * BLOCK, (block + 1) * BLOCK);
	TEST_ASSERT(!mincore(d->mem + block * BLOCK, BLOCK, there), "mincore: %s",
		    strerror(errno));
	for (size_t i = 0; i < ARRAY_SIZE(there); i++)
		pages += there[i] & 1;
	return pages;
}

/* Blocks that are not plugged have no memory, and those that are have what was filled. */
static bool memory_is_right(struct device *d)
{
	for (u64 block = 0; block < NR_BLOCKS; block++) {
		u64 want = d->plugged[block] ? BLOCK / STRIDE : 0, pages = count_pages(d, block);

		if (pages == want)
			continue;
		ksft_print_msg("%s: block %lu has %lu pages, want %lu\n", d->name,
			       (unsigned long)block, (unsigned long)pages,
			       (unsigned long)want);
		return false;
	}
	return true;
}

static bool kvm_agrees(struct device *d)
{
	static u64 bitmap[NR_BLOCKS / 64];

	sparse_op(d, KVM_SPARSE_MEMORY_QUERY, 0, NR_BLOCKS, bitmap);
	for (u64 block = 0; d->sparse && block < NR_BLOCKS; block++) {
		if ((bitmap[block / 64] >> block % 64 & 1) == d->plugged[block])
			continue;
		ksft_print_msg("%s: for KVM block %lu is %splugged\n", d->name,
			       (unsigned long)block, d->plugged[block] ? "un" : "");
		return false;
	}
	return true;
}

/*
 * Tables that map the plugged blocks: one each, and one for each GiB that has any.  Where
 * KVM shadows tables of the guest, a GiB has two more: its entry of the guest's table is
 * clean when it is read first, which takes a read-only table of each level, and dirty from
 * then on.
 */
static long needed_kb(struct device *d)
{
	u64 tables = d->nr_plugged, each_gib = d->nested || !kvm_cpu_has_tdp() ? 3 : 1;

	for (u64 gib = 0; gib < NR_GIBS; gib++)
		tables += each_gib * !!count_plugged(d, gib * (GIB / BLOCK), GIB / BLOCK);
	return tables * (PAGE_SIZE / 1024);
}

static bool tables_are_right(struct device *d, const char *when)
{
	long have, most = needed_kb(d) + TABLES_SLACK_KB;

	pt_grace_period();
	have = meminfo_kb("SecPageTables") - d->tables;
	if (have <= most)
		return true;
	ksft_print_msg("%s: %s: KVM has %ld kB of page tables for %lu blocks, want at most %ld\n",
		       d->name, when, have, (unsigned long)d->nr_plugged, most);
	return false;
}

/*
 * The cases.
 */

/* Blocks at a step of the day: few at midnight, the peak at noon. */
static u64 day_blocks(int step)
{
	u64 hours = 2 * (step < nr_steps / 2 ? step : nr_steps - step);

	return PEAK_BLOCKS / 10 + (PEAK_BLOCKS - PEAK_BLOCKS / 10) * hours / nr_steps;
}

static bool test_day(struct device *d)
{
	bool ok = true;

	for (int step = 0; ok && step < nr_steps; step++) {
		resize(d, day_blocks(step));
		/* What changes though the size does not. */
		resize(d, d->nr_plugged - MAX_REQUEST);
		resize(d, d->nr_plugged + MAX_REQUEST);
		ok = memory_is_right(d) && kvm_agrees(d) && tables_are_right(d, "day");
	}
	return ok;
}

static bool test_nothing(struct device *d)
{
	long most = (NR_GIBS + 4) * (PAGE_SIZE / 1024), left;

	resize(d, 0);
	left = pt_vmpte_kb(0) - d->vmpte;
	if (left > most)
		ksft_print_msg("%s: the VMM has %ld kB of page tables more, want at most %ld\n",
			       d->name, left, most);
	return memory_is_right(d) && kvm_agrees(d) && tables_are_right(d, "nothing") &&
	       left <= most;
}

static bool refuses(struct device *d, const char *what, struct virtio_mem_req req, u16 answer)
{
	d->shared->req = req;
	TEST_ASSERT(run_order(d, ASK), "%s: stopped when it asked", d->name);
	if (d->shared->resp.type == answer)
		return true;
	ksft_print_msg("%s: %s: answer %u, want %u\n", d->name, what, d->shared->resp.type,
		       answer);
	return false;
}

static struct virtio_mem_req request(u16 type, u64 addr, u16 nr)
{
	return (struct virtio_mem_req) {
		.type = type, .u.plug = { .addr = addr, .nb_blocks = nr },
	};
}

/* The device has four blocks that are requested, and the driver has them. */
static bool test_nonsense(struct device *d)
{
	u64 block = 0, free = 0;
	bool ok;

	resize(d, MAX_REQUEST);
	while (!d->plugged[block])
		block++;
	while (d->plugged[free])
		free++;
	ok = refuses(d, "plugged already",
		     request(VIRTIO_MEM_REQ_PLUG, SLOT_GPA + block * BLOCK, 1),
		     VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "more than requested",
		      request(VIRTIO_MEM_REQ_PLUG, SLOT_GPA + free * BLOCK, 1),
		      VIRTIO_MEM_RESP_NACK);
	ok &= refuses(d, "unplugged already",
		      request(VIRTIO_MEM_REQ_UNPLUG, SLOT_GPA + free * BLOCK, 1),
		      VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "half a block", request(VIRTIO_MEM_REQ_PLUG, SLOT_GPA + BLOCK / 2, 1),
		      VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "below", request(VIRTIO_MEM_REQ_UNPLUG, 0, 1), VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "beyond the end",
		      request(VIRTIO_MEM_REQ_PLUG, SLOT_GPA + DEVICE_SIZE - BLOCK, 2),
		      VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "nothing", request(VIRTIO_MEM_REQ_PLUG, SLOT_GPA, 0),
		      VIRTIO_MEM_RESP_ERROR);
	ok &= refuses(d, "unknown", request(77, SLOT_GPA, 1), VIRTIO_MEM_RESP_ERROR);
	ok = ok && memory_is_right(d) && kvm_agrees(d);
	resize(d, 0);
	return ok;
}

/* Comes last: the guest may be stopped for good. */
static bool test_hostile(struct device *d)
{
	long free = free_kb();
	bool stopped;

	stopped = !run_order(d, SWEEP);
	free -= free_kb();
	ksft_print_msg("%s: a sweep of 64 GiB took %ld kB, the guest was %sstopped\n", d->name,
		       free, stopped ? "" : "not ");
	return stopped && memory_is_right(d) && tables_are_right(d, "hostile");
}

static void test_mode(const char *name, bool memfd, bool nested)
{
	static struct device d;

	open_device(&d, name, memfd, nested);
	ksft_test_result(test_day(&d), "%s: day\n", name);
	ksft_test_result(test_nothing(&d), "%s: nothing\n", name);
	ksft_test_result(test_nonsense(&d), "%s: nonsense\n", name);
	ksft_test_result(test_hostile(&d), "%s: hostile\n", name);
	close_device(&d);
}

static void parse(int argc, char **argv)
{
	int o;

	while ((o = getopt(argc, argv, "n:r:h")) != -1) {
		switch (o) {
		case 'n':
			nr_steps = atoi_positive("steps", optarg);
			break;
		case 'r':
			seed = atoi_positive("seed", optarg);
			break;
		default:
			printf("usage: %s [-n STEPS] [-r SEED]\n"
			       "  -n  steps of a day (default %d)\n"
			       "  -r  seed of everything random (default 1)\n", argv[0],
			       DEFAULT_STEPS);
			exit(o == 'h' ? 0 : 2);
		}
	}
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY2));
	ksft_print_header();
	ksft_set_plan(12);
	if (!kvm_has_cap(KVM_CAP_SPARSE_MEMSLOTS))
		ksft_print_msg("no sparse memslots here: nothing protects unplugged memory\n");
	test_mode("anon", false, false);
	test_mode("memfd", true, false);
	if (can_nest()) {
		test_mode("nested", false, true);
	} else {
		for (int i = 0; i < 4; i++)
			ksft_test_result_skip("nested: the machine cannot run guests of guests\n");
	}
	ksft_finished();
}
