// SPDX-License-Identifier: GPL-2.0
/*
 * KVM reports the pages of a large memslot that were written, at the cost of those.
 *
 * A vCPU, and KVM on its behalf, write to pages of a slot of 64 GiB and some: at the
 * edges of what has bits of its own (128 MiB), at its end, which is in the middle of a
 * word, and anywhere else.  A model of the dirty bitmap is kept by the side.
 *
 *   model     after each of many random steps (write; get; clear one word, a range over
 *             an edge, all of a chunk, everything; get and clear nonsense) what is
 *             reported is what the model has, bit by bit; with KVM_GET_DIRTY_LOG
 *             clearing, with KVM_CLEAR_DIRTY_LOG, and with all dirty at first; for slots
 *             of a few pages, of just that range, and of a page more, too
 *   race      vCPUs write, and KVM does, while dirty pages are copied elsewhere and
 *             logging is switched off and on; whenever they pause, the copy is as the slot
 *   memory    logging in a slot of 256 GiB takes 2 % of what two bits per page are
 *   memcg     there is no memory for more bits: no page is left out, those around it may
 *             be reported, and logging goes on as before when there is memory again
 *
 * KVM may report all of 4 MiB where it has no memory for bits, or cannot get at it just
 * then.  The model and memcg tests take that for right, the first in a few cases.
 */
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>

#include "test_util.h"
#include "kselftest.h"
#include "cgroup_util.h"
#include "sparse_slot.h"

#define PAGE		4096ul
#define CHUNK		(128 << 20)		/* bytes that a page of bits is for */
#define CHUNK_WORDS	512ul
#define RANGE_WORDS	16ul			/* of the 4 MiB that may be dirty as a whole */
#define NR_CHUNKS	512
/* Ends in the middle of a chunk, and of a word of bits. */
#define SIZE		(NR_CHUNKS * (u64)CHUNK + CHUNK / 2 + 3 * PAGE)
#define MAPPED		(65 * GIB)		/* by the guest's page tables */
#define MAX_WRITES	NR_CHUNKS
#define MAX_VCPUS	2
/* A slot in which there is time to switch logging off and on many times. */
#define RACE_CHUNKS	32
#define RACE_SIZE	((RACE_CHUNKS + 1) * (u64)CHUNK)
#define NR_STEPS	45
/* Ranges in all steps of a model that may be reported as a whole. */
#define MAX_COARSE	4

/* Seconds of the race, for each way to get at the log. */
static int run_seconds = 3;
static u32 max_vcpus;

enum log_mode { GET, CLEAR, ALL_AT_FIRST, NR_MODES };

static const char * const mode_names[] = { "get", "get and clear", "all dirty at first" };

struct shared {
	u64 nr, round;
	u64 at[MAX_WRITES];	/* bytes from the start of the slot; lowest bit: KVM writes */
	/* What vCPUs are to do: write while it is even; the last they complied with. */
	u64 turn, done[MAX_VCPUS], nr_vcpus;
	bool stop;
};

#define BY_KVM	1ul

struct device {
	enum log_mode mode;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	u32 nr_vcpus;
	struct shared *shared;
	char *mem;
	u64 size, nr_pages, nr_words;
	int nr_coarse;		/* ranges that were reported as a whole so far */
	u64 *model;		/* what is dirty */
	u64 *got;		/* what was reported */
};

/* KVM writes the time of day to where the register points, when that is written. */
static void guest_write(u64 at, u64 round)
{
	if (at & BY_KVM)
		wrmsr(MSR_KVM_WALL_CLOCK_NEW, SLOT_GPA + (at & -PAGE));
	else
		WRITE_ONCE(*(u64 *)(SLOT_GVA + at), round);
}

static void guest_code(struct shared *s, u64 vcpu __always_unused)
{
	GUEST_SYNC(0);
	for (;;) {
		s->round++;
		for (u64 i = 0; i < READ_ONCE(s->nr); i++)
			guest_write(s->at[i], s->round);
		GUEST_SYNC(1);
	}
}

/*
 * Where KVM counts the time for which a vCPU does not run: from where it is put off.  In
 * a chunk where nothing else is written.
 */
#define STEAL_AT(vcpu)	(RACE_CHUNKS * (u64)CHUNK + (vcpu) * PAGE)

/* The vCPUs write to the same chunks, not to the same pages: each value is of use. */
static void guest_code_race(struct shared *s, u64 vcpu)
{
	u64 round = 0;

	wrmsr(MSR_KVM_STEAL_TIME, (SLOT_GPA + STEAL_AT(vcpu)) | 1);
	GUEST_SYNC(0);
	while (!READ_ONCE(s->stop)) {
		u64 turn = READ_ONCE(s->turn);

		if (turn % 2 == 0) {
			round++;
			for (u64 i = vcpu; i < MAX_WRITES && READ_ONCE(s->turn) == turn;
			     i += s->nr_vcpus)
				guest_write(s->at[i], round);
		}
		/* All writes before are there when this is seen. */
		__atomic_store_n(&s->done[vcpu], turn, __ATOMIC_RELEASE);
	}
	wrmsr(MSR_KVM_STEAL_TIME, 0);
	GUEST_SYNC(1);
}

static void enter_guest(struct device *d)
{
	for (u32 i = 0; i < d->nr_vcpus; i++)
		run_vcpu(d->vcpus[i]);
}

static void set_slot(struct device *d, u32 flags)
{
	vm_set_user_memory_region(d->vm, SLOT, flags, SLOT_GPA, d->size, d->mem);
}

static void *reserve(u64 size)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));
	madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

/* Populated, so that no limit on memory can be in the way of it. */
static void *new_bitmap(struct device *d)
{
	void *bitmap = mmap(NULL, d->nr_words * 8, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	TEST_ASSERT(bitmap != MAP_FAILED, "mmap: %s", strerror(errno));
	return bitmap;
}

static void open_device(struct device *d, enum log_mode mode, u64 size, u32 nr_vcpus, void *code)
{
	static const u64 caps[] = {
		[CLEAR] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
		[ALL_AT_FIRST] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
	};
	gva_t pages;

	*d = (struct device){ .mode = mode, .size = size, .nr_vcpus = nr_vcpus };
	d->nr_pages = size / PAGE;
	d->nr_words = (d->nr_pages + 63) / 64;
	d->vm = vm_create_with_vcpus(nr_vcpus, code, d->vcpus);
	if (mode != GET)
		vm_enable_cap(d->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, caps[mode]);
	TEST_REQUIRE(slot_fits(d->vm, max_t(u64, size, MAPPED)));
	pages = vm_alloc_pages(d->vm, sizeof(struct shared) / PAGE + 1);
	d->shared = addr_gva2hva(d->vm, pages);
	virt_map_level(d->vm, SLOT_GVA, SLOT_GPA, MAPPED, PG_LEVEL_1G);
	for (u32 i = 0; i < nr_vcpus; i++)
		vcpu_args_set(d->vcpus[i], 2, pages, (u64)i);
	d->mem = reserve(size);
	d->model = new_bitmap(d);
	d->got = new_bitmap(d);
	set_slot(d, 0);
}

static void close_device(struct device *d)
{
	kvm_vm_free(d->vm);
	munmap(d->mem, d->size);
	munmap(d->model, d->nr_words * 8);
	munmap(d->got, d->nr_words * 8);
}

static bool has_page(const u64 *bitmap, u64 page)
{
	return bitmap[page / 64] >> page % 64 & 1;
}

static void set_pages(u64 *bitmap, u64 first, u64 nr)
{
	for (u64 page = first; page < first + nr; page++)
		bitmap[page / 64] |= 1ull << page % 64;
}

static void switch_on(struct device *d)
{
	set_slot(d, KVM_MEM_LOG_DIRTY_PAGES);
	memset(d->model, 0, d->nr_words * 8);
	if (d->mode == ALL_AT_FIRST)
		set_pages(d->model, 0, d->nr_pages);
}

/* Most of them are where something begins or ends. */
static u64 random_page(struct device *d)
{
	u64 chunk = random() % (d->size / CHUNK + 1) * (CHUNK / PAGE), page;

	switch (random() % 8) {
	case 0:
		page = d->nr_pages - 1;
		break;
	case 1:
		page = chunk;
		break;
	case 2:
		page = chunk ? chunk - 1 : 0;
		break;
	case 3:
		page = chunk + 63 + random() % 2;
		break;
	default:
		page = chunk + random() % (CHUNK / PAGE);
	}
	return page < d->nr_pages ? page : d->nr_pages - 1;
}

static void write_some(struct device *d)
{
	struct shared *s = d->shared;

	s->nr = random() % 64;
	for (u64 i = 0; i < s->nr; i++) {
		u64 page = random_page(d);

		s->at[i] = page * PAGE | (random() % 4 ? 0 : BY_KVM);
		set_pages(d->model, page, 1);
	}
	enter_guest(d);
}

/* Is the range that this word belongs to reported as a whole?  Then it is the model's. */
static bool is_coarse(struct device *d, u64 word)
{
	u64 first = word / RANGE_WORDS * RANGE_WORDS;
	u64 first_page = first * 64, nr = min_t(u64, RANGE_WORDS * 64, d->nr_pages - first_page);

	for (u64 page = first_page; page < first_page + nr; page++) {
		if (!has_page(d->got, page))
			return false;
	}
	set_pages(d->model, first_page, nr);
	d->nr_coarse++;
	return d->got[word] == d->model[word];
}

/* Takes the log; are its bits those of the model? */
static bool is_as_modelled(struct device *d, const char *what)
{
	/* What is not written to is seen. */
	memset(d->got, 0x5a, d->nr_words * 8);
	kvm_vm_get_dirty_log(d->vm, SLOT, d->got);
	for (u64 i = 0; i < d->nr_words; i++) {
		if (d->got[i] == d->model[i] || is_coarse(d, i))
			continue;
		ksft_print_msg("%s: after %s: word %lu is %llx, want %llx\n", mode_names[d->mode],
			       what, (unsigned long)i, (unsigned long long)d->got[i],
			       (unsigned long long)d->model[i]);
		return false;
	}
	if (d->mode == GET)
		memset(d->model, 0, d->nr_words * 8);
	return true;
}

static bool check_log(struct device *d, const char *what)
{
	bool ok = is_as_modelled(d, what);

	/* With PREEMPT_RT, there is no memory for bits where interrupts are off. */
	if (ok && d->nr_coarse > MAX_COARSE && access("/sys/kernel/realtime", F_OK)) {
		ksft_print_msg("%s: after %s: %d ranges were reported as a whole\n",
			       mode_names[d->mode], what, d->nr_coarse);
		ok = false;
	}
	return ok;
}

/* Clears what @d->got has of these words; the last may be cut by the slot's end. */
static void clear_words(struct device *d, u64 first, u64 nr)
{
	u64 nr_pages = min_t(u64, nr * 64, d->nr_pages - first * 64);

	kvm_vm_clear_dirty_log(d->vm, SLOT, d->got + first, first * 64, nr_pages);
	for (u64 i = first; i < first + nr; i++)
		d->model[i] &= ~d->got[i];
}

static const char *clear_some(struct device *d)
{
	u64 chunk = random() % (d->size / CHUNK + 1) * CHUNK_WORDS, first, nr;

	if (chunk >= d->nr_words)
		chunk = 0;

	switch (random() % 6) {
	case 0:		/* as a VMM does: all that was reported */
		clear_words(d, 0, d->nr_words);
		return "all reported are cleared";
	case 1:
		memset(d->got, 0xff, d->nr_words * 8);
		clear_words(d, 0, d->nr_words);
		return "all are cleared";
	case 2:		/* the last of them is a half */
		nr = min_t(u64, CHUNK_WORDS, d->nr_words - chunk);
		memset(d->got + chunk, 0xff, nr * 8);
		clear_words(d, chunk, nr);
		return "all of a chunk are cleared";
	case 3:
		first = chunk > 3 ? chunk - 3 : 0;
		nr = min_t(u64, 7, d->nr_words - first);
		for (u64 i = first; i < first + nr; i++)
			d->got[i] = random() | (u64)random() << 33;
		clear_words(d, first, nr);
		return "some over an edge are cleared";
	case 4:
		memset(d->got, 0, d->nr_words * 8);
		clear_words(d, 0, d->nr_words);
		return "none are cleared";
	default:
		first = random() % d->nr_words;
		d->got[first] = random();
		clear_words(d, first, 1);
		return "some of a word are cleared";
	}
}

static int try_clear(struct device *d, u32 slot, u64 first, u32 nr, void *bits)
{
	struct kvm_clear_dirty_log args = {
		.slot = slot, .first_page = first, .num_pages = nr, .dirty_bitmap = bits,
	};

	return __vm_ioctl(d->vm, KVM_CLEAR_DIRTY_LOG, &args) ? errno : 0;
}

static int try_get(struct device *d, u32 slot, void *bits)
{
	struct kvm_dirty_log args = { .slot = slot, .dirty_bitmap = bits };

	return __vm_ioctl(d->vm, KVM_GET_DIRTY_LOG, &args) ? errno : 0;
}

/* What must be refused is, and changes nothing. */
static bool nonsense(struct device *d)
{
	void *bad = (void *)(1ull << 63);
	bool ok = true;

	memset(d->got, 0xff, d->nr_words * 8);
	ok = ok && try_get(d, SLOT + 1, d->got) == ENOENT;
	ok = ok && try_get(d, 0xffffffff, d->got) == EINVAL;
	if (d->mode != GET)
		ok = ok && try_get(d, SLOT, bad) == EFAULT;
	ok = ok && try_clear(d, SLOT + 1, 0, 64, d->got) == ENOENT;
	ok = ok && try_clear(d, SLOT + 1, 1, 64, d->got) == EINVAL;
	ok = ok && try_clear(d, 0xffffffff, 0, 64, d->got) == EINVAL;
	ok = ok && try_clear(d, SLOT, 1 + random() % 63, 64, d->got) == EINVAL;
	if (d->nr_pages > 64)
		ok = ok && try_clear(d, SLOT, 0, 1 + random() % 63, d->got) == EINVAL;
	ok = ok && try_clear(d, SLOT, -64ull, 128, d->got) == EINVAL;
	ok = ok && try_clear(d, SLOT, (d->nr_pages & -64) + 64, 64, d->got) == EINVAL;
	ok = ok && try_clear(d, SLOT, d->nr_pages & -64, (u32)-64, d->got) == EINVAL;
	ok = ok && try_clear(d, SLOT, random() % d->nr_words * 64, 0, bad) == 0;
	return ok;
}

static bool follows_model(enum log_mode mode, u64 size, int nr_steps)
{
	const char *what = "switched on";
	struct device d;
	bool ok;

	open_device(&d, mode, size, 1, guest_code);
	enter_guest(&d);
	switch_on(&d);
	ok = check_log(&d, what);
	for (int step = 0; ok && step < nr_steps; step++) {
		write_some(&d);
		ok = check_log(&d, "writes");
		if (ok && mode != GET && random() % 2) {
			what = clear_some(&d);
			ok = check_log(&d, what);
		}
		if (ok && random() % 4 == 0) {
			ok = nonsense(&d);
			if (!ok)
				ksft_print_msg("%s: nonsense was not refused\n", mode_names[mode]);
			ok = ok && check_log(&d, "nonsense");
		}
		/* What was dirty is forgotten. */
		if (ok && random() % 16 == 0) {
			set_slot(&d, 0);
			switch_on(&d);
		}
	}
	close_device(&d);
	if (!ok)
		ksft_print_msg("%s: the slot had %llu pages\n", mode_names[mode],
			       (unsigned long long)(size / PAGE));
	return ok;
}

static void test_model(enum log_mode mode)
{
	bool ok = follows_model(mode, SIZE, NR_STEPS) &&
		  follows_model(mode, 3 * PAGE, NR_STEPS / 3) &&
		  follows_model(mode, CHUNK, NR_STEPS / 3) &&
		  follows_model(mode, CHUNK + PAGE, NR_STEPS / 3);

	ksft_test_result(ok, "model: %s\n", mode_names[mode]);
}

static void *vcpu_thread(void *vcpu)
{
	run_vcpu(vcpu);
	return NULL;
}

/* The pages that are ever written: by vCPUs, and where their time is counted. */
static u64 nth_page(struct device *d, u64 i)
{
	return (i < MAX_WRITES ? d->shared->at[i] & -PAGE : STEAL_AT(i - MAX_WRITES)) / PAGE;
}

#define NR_WRITTEN	(MAX_WRITES + MAX_VCPUS)

static void copy_pages(struct device *d, char *copy, bool all)
{
	for (u64 i = 0; i < NR_WRITTEN; i++) {
		u64 page = nth_page(d, i);

		if (all || has_page(d->got, page))
			memcpy(copy + page * PAGE, d->mem + page * PAGE, PAGE);
	}
}

/* In pieces, most of which begin and end in the middle of a chunk. */
static void clear_in_pieces(struct device *d)
{
	u64 nr;

	for (u64 word = 0; word < d->nr_words; word += nr) {
		nr = min_t(u64, 1 + random() % (3 * CHUNK_WORDS), d->nr_words - word);
		clear_words(d, word, nr);
	}
}

/* Takes the log, and copies what is dirty. */
static void copy_dirty(struct device *d, char *copy)
{
	kvm_vm_get_dirty_log(d->vm, SLOT, d->got);
	if (d->mode != GET && random() % 2)
		kvm_vm_clear_dirty_log(d->vm, SLOT, d->got, 0, d->nr_pages);
	else if (d->mode != GET)
		clear_in_pieces(d);
	copy_pages(d, copy, false);
}

static bool is_copied(struct device *d, const char *copy, u64 nr)
{
	for (u64 i = 0; i < nr; i++) {
		u64 page = nth_page(d, i);

		if (!memcmp(copy + page * PAGE, d->mem + page * PAGE, PAGE))
			continue;
		ksft_print_msg("%s: page %lu was not reported\n", mode_names[d->mode],
			       (unsigned long)page);
		return false;
	}
	return true;
}

/* Have the vCPUs write, or pause, and wait until they do. */
static void next_turn(struct device *d)
{
	u64 turn = d->shared->turn + 1;

	__atomic_store_n(&d->shared->turn, turn, __ATOMIC_RELEASE);
	for (u32 i = 0; turn % 2 && i < d->nr_vcpus; i++) {
		while (__atomic_load_n(&d->shared->done[i], __ATOMIC_ACQUIRE) != turn)
			sched_yield();
	}
}

/* All bits are lost, so all is copied, unless all is dirty at first. */
static void switch_on_again(struct device *d, char *copy)
{
	set_slot(d, 0);
	set_slot(d, KVM_MEM_LOG_DIRTY_PAGES);
	if (d->mode != ALL_AT_FIRST)
		copy_pages(d, copy, true);
}

static void test_race(enum log_mode mode)
{
	u32 nr_vcpus = vcpus_at_once(MAX_VCPUS, max_vcpus);
	unsigned long rounds = 0, pauses = 0;
	pthread_t threads[MAX_VCPUS];
	char *copy = reserve(RACE_SIZE);
	unsigned long long end;
	struct device d;
	bool ok = true;

	open_device(&d, mode, RACE_SIZE, nr_vcpus, guest_code_race);
	d.shared->nr = MAX_WRITES;
	d.shared->nr_vcpus = nr_vcpus;
	/* 16 in a chunk, half of them by either vCPU. */
	for (u64 i = 0; i < MAX_WRITES; i++)
		d.shared->at[i] = (i / 16 * CHUNK + i % 16 * 97 * PAGE) | (i % 16 < 2 ? BY_KVM : 0);
	enter_guest(&d);
	for (u32 i = 0; i < nr_vcpus; i++)
		TEST_ASSERT(!pthread_create(&threads[i], NULL, vcpu_thread, d.vcpus[i]),
			    "pthread_create");
	end = pt_now_ns() + run_seconds * 1000000000ull;
	while (ok && (pt_now_ns() < end || !pauses)) {
		switch_on_again(&d, copy);
		for (int i = random() % 4; i >= 0; i--, rounds++)
			copy_dirty(&d, copy);
		next_turn(&d);
		copy_dirty(&d, copy);
		ok = is_copied(&d, copy, MAX_WRITES);
		next_turn(&d);
		pauses++;
	}
	WRITE_ONCE(d.shared->stop, true);
	for (u32 i = 0; i < nr_vcpus; i++)
		pthread_join(threads[i], NULL);
	copy_dirty(&d, copy);
	ok = ok && is_copied(&d, copy, NR_WRITTEN);
	/* Not even a page that is reported when nothing is written any more. */
	kvm_vm_get_dirty_log(d.vm, SLOT, d.got);
	for (u64 i = 0; ok && i < d.nr_words; i++)
		ok = !d.got[i];
	ksft_print_msg("race: %s: %lu times, %lu pauses\n", mode_names[mode], rounds, pauses);
	close_device(&d);
	munmap(copy, RACE_SIZE);
	ksft_test_result(ok, "race: %s\n", mode_names[mode]);
}

static int compare_longs(const void *a, const void *b)
{
	return (*(const long *)a > *(const long *)b) - (*(const long *)a < *(const long *)b);
}

/* What logging takes, kB: the median of some tries, for free lists go up and down. */
static long logging_kb(struct device *d)
{
	/* To clear all of a slot takes its time. */
	int tries = d->mode == ALL_AT_FIRST ? 1 : 3;
	long took[3];

	for (int i = 0; i < tries; i++) {
		long before = free_kb();

		set_slot(d, KVM_MEM_LOG_DIRTY_PAGES);
		enter_guest(d);
		kvm_vm_get_dirty_log(d->vm, SLOT, d->got);
		if (d->mode != GET)
			kvm_vm_clear_dirty_log(d->vm, SLOT, d->got, 0, d->size / PAGE);
		enter_guest(d);
		took[i] = before - free_kb();
		set_slot(d, 0);
	}
	qsort(took, tries, sizeof(took[0]), compare_longs);
	return took[tries / 2];
}

/* A GiB of 256 is dirty: 8 chunks have bits. */
static void test_memory(enum log_mode mode)
{
	/* And twice the 63 pages that a CPU's list takes from the free ones at a time. */
	long limit_kb = 256 * GIB / PAGE / 8 * 2 / 1024 * 2 / 100 + 2 * 252, took;
	struct device d;

	open_device(&d, mode, 256 * GIB, 1, guest_code);
	enter_guest(&d);
	d.shared->nr = MAX_WRITES;
	for (u64 i = 0; i < MAX_WRITES; i++)
		d.shared->at[i] = i * (GIB / MAX_WRITES);
	enter_guest(&d);
	took = logging_kb(&d);
	close_device(&d);
	ksft_print_msg("memory: %s: %ld kB were taken, the limit is %ld\n", mode_names[mode], took,
		       limit_kb);
	ksft_test_result(took < limit_kb, "memory: %s\n", mode_names[mode]);
}

static bool find_cgroup_root(char *root)
{
	if (!cg_find_unified_root(root, PATH_MAX, NULL))
		return true;
	/* For this process alone. */
	return !unshare(CLONE_NEWNS) && !mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	       !mount("none", "/sys/fs/cgroup", "cgroup2", 0, NULL) &&
	       !cg_find_unified_root(root, PATH_MAX, NULL);
}

/* Where pages of the kernel's are not charged, no limit is in their way. */
static bool kernel_is_charged(void)
{
	char text[4096];

	return pt_read_file("/proc/cmdline", text, sizeof(text)) > 0 && !strstr(text, "nokmem");
}

/* Where this process is now, an absolute path. */
static bool find_home(const char *root, char *home)
{
	char text[PATH_MAX], *path;

	if (pt_read_file("/proc/self/cgroup", text, sizeof(text)) <= 0)
		return false;
	path = strstr(text, "0::");
	if (!path)
		return false;
	path[strcspn(path, "\n")] = 0;
	return snprintf(home, PATH_MAX, "%s%s", root, path + 3) < PATH_MAX;
}

/* The process, and with it what KVM takes for it, in a cgroup of its own. */
static char *enter_cgroup(char *home)
{
	char root[PATH_MAX], name[32], *group;

	if (!kernel_is_charged() || !find_cgroup_root(root) || !find_home(root, home))
		return NULL;
	cg_write(root, "cgroup.subtree_control", "+memory");
	snprintf(name, sizeof(name), "sparse_dirty_test.%d", getpid());
	group = cg_name(root, name);
	if (group && !cg_create(group)) {
		if (cg_read_long(group, "memory.current") >= 0 && !cg_enter_current(group)) {
			cg_write(group, "memory.swap.max", "0");
			return group;
		}
		rmdir(group);
	}
	free(group);
	return NULL;
}

static void leave_cgroup(char *group, const char *home)
{
	/* What is in it would be killed: this process. */
	if (!cg_enter_current(home))
		cg_destroy(group);
	else
		ksft_print_msg("cannot return to %s: %s stays\n", home, group);
	free(group);
}

static void write_to_all_chunks(struct device *d)
{
	for (u64 i = 0; i < MAX_WRITES; i++) {
		d->shared->at[i] = i * CHUNK + i % 7 * PAGE;
		set_pages(d->model, i * (CHUNK / PAGE) + i % 7, 1);
	}
	d->shared->nr = MAX_WRITES;
	enter_guest(d);
}

/* The group's limit: so much more than it has now, or none. */
static void set_limit(const char *group, int fd, long more)
{
	char text[32] = "max";

	if (more)
		snprintf(text, sizeof(text), "%ld", cg_read_long(group, "memory.current") + more);
	TEST_ASSERT(write(fd, text, strlen(text)) > 0, "memory.max: %s", strerror(errno));
}

/*
 * 512 pages of bits would be 2 MiB.  What had no memory is reported as a whole, and it
 * takes none to clear it.
 */
static bool follows_without_memory(struct device *d, const char *group)
{
	int limit = cg_open(group, "memory.max", O_WRONLY), nr;
	bool ok;

	enter_guest(d);
	/* Have all there is but the bits. */
	write_to_all_chunks(d);
	switch_on(d);
	kvm_vm_get_dirty_log(d->vm, SLOT, d->got);
	memset(d->model, 0, d->nr_words * 8);
	set_limit(group, limit, 512 << 10);
	write_to_all_chunks(d);
	ok = is_as_modelled(d, "no memory");
	nr = d->nr_coarse;
	if (ok && d->mode != GET) {
		clear_words(d, 0, d->nr_words);
		ok = is_as_modelled(d, "all reported are cleared without memory");
	}
	/* To print takes memory, too. */
	set_limit(group, limit, 0);
	close(limit);
	ksft_print_msg("memcg: %s: %d ranges of %d were reported as a whole\n",
		       mode_names[d->mode], nr, NR_CHUNKS);
	if (nr < NR_CHUNKS / 4) {
		ksft_print_msg("memcg: the limit was none\n");
		ok = false;
	}
	/* All of that was taken, and what is written is noticed again. */
	d->nr_coarse = 0;
	ok = ok && check_log(d, "nothing");
	write_to_all_chunks(d);
	return ok && check_log(d, "memory again");
}

static void test_memcg(enum log_mode mode)
{
	char home[PATH_MAX], *group = enter_cgroup(home);
	struct device d;
	bool ok;

	if (!group) {
		ksft_test_result_skip("memcg: %s: no memory cgroup can be made\n",
				      mode_names[mode]);
		return;
	}
	/* Charges of a CPU come in batches: have but one CPU. */
	pin_self_to_any_cpu();
	open_device(&d, mode, SIZE, 1, guest_code);
	ok = follows_without_memory(&d, group);
	close_device(&d);
	leave_cgroup(group, home);
	ksft_test_result(ok, "memcg: %s\n", mode_names[mode]);
}

static void help(FILE *to)
{
	fprintf(to, "usage: sparse_dirty_test [-s SECONDS] [-r SEED] [-v VCPUS]\n"
		"  -s  of each race of vCPUs with who takes the log (default %d)\n"
		"  -r  of what is random (default 1)\n"
		"  -v  at most, also on an emulated machine (default there: 1; see vcpus_at_once())\n",
		run_seconds);
}

int main(int argc, char **argv)
{
	int o, seed = 1;

	while ((o = getopt(argc, argv, "s:r:v:h")) != -1) {
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
		default:
			help(o == 'h' ? stdout : stderr);
			return o == 'h' ? 0 : 2;
		}
	}
	srandom(seed);
	TEST_REQUIRE(open("/dev/kvm", O_RDWR) >= 0);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_GBPAGES));
	ksft_print_header();
	ksft_set_plan(3 * NR_MODES + 2);
	for (enum log_mode mode = GET; mode < NR_MODES; mode++)
		test_model(mode);
	for (enum log_mode mode = GET; mode < NR_MODES; mode++)
		test_race(mode);
	for (enum log_mode mode = GET; mode < NR_MODES; mode++)
		test_memory(mode);
	/* All dirty at first, there is nothing that has no memory. */
	test_memcg(GET);
	test_memcg(CLEAR);
	ksft_finished();
}
