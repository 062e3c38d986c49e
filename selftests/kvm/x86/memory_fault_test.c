// SPDX-License-Identifier: GPL-2.0
/*
 * A guest access to a memslot whose memory cannot be had leaves to userspace with
 * KVM_EXIT_MEMORY_FAULT, which names the page, as KVM_CAP_MEMORY_FAULT_INFO says.
 */
#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "kselftest.h"
#include "processor.h"

#define SLOT		10
#define SLOT_GPA	(4ull << 30)
#define SLOT_GVA	BIT_ULL(40)
#define SLOT_PAGES	512
#define FAULT_PAGE	123

static void guest_read(void)
{
	READ_ONCE(*(u64 *)(SLOT_GVA + FAULT_PAGE * PAGE_SIZE));
	GUEST_DONE();
}

static void guest_write(void)
{
	WRITE_ONCE(*(u64 *)(SLOT_GVA + FAULT_PAGE * PAGE_SIZE), 1);
	GUEST_DONE();
}

static void map_memory(void *at)
{
	TEST_ASSERT(mmap(at, SLOT_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_FIXED |
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == at, "mmap: %s", strerror(errno));
}

static void unmap_memory(void *mem)
{
	kvm_munmap(mem, SLOT_PAGES * PAGE_SIZE);
}

static void forbid_memory(void *mem)
{
	TEST_ASSERT(!mprotect(mem, SLOT_PAGES * PAGE_SIZE, PROT_NONE), "mprotect");
}

static void forbid_writes(void *mem)
{
	TEST_ASSERT(!mprotect(mem, SLOT_PAGES * PAGE_SIZE, PROT_READ), "mprotect");
}

static bool exits_with_fault(struct kvm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	int ret, error;

	ret = _vcpu_run(vcpu);
	error = errno;
	if (ret != -1 || error != EFAULT) {
		ksft_print_msg("KVM_RUN returned %d, errno %d, want EFAULT\n", ret, error);
		return false;
	}
	if (run->exit_reason != KVM_EXIT_MEMORY_FAULT) {
		ksft_print_msg("exit reason %u, want KVM_EXIT_MEMORY_FAULT\n", run->exit_reason);
		return false;
	}
	if (run->memory_fault.gpa != SLOT_GPA + FAULT_PAGE * PAGE_SIZE ||
	    run->memory_fault.size != PAGE_SIZE || run->memory_fault.flags) {
		ksft_print_msg("gpa %llx size %llx flags %llx\n", run->memory_fault.gpa,
			       run->memory_fault.size, run->memory_fault.flags);
		return false;
	}
	return true;
}

static void run_test(const char *name, void (*guest)(void), void (*take_away)(void *mem))
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	bool ok;
	void *mem;

	vm = vm_create_with_one_vcpu(&vcpu, guest);
	mem = kvm_mmap(SLOT_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1);
	vm_set_user_memory_region(vm, SLOT, 0, SLOT_GPA, SLOT_PAGES * PAGE_SIZE, mem);
	virt_map(vm, SLOT_GVA, SLOT_GPA, SLOT_PAGES);
	take_away(mem);
	ok = exits_with_fault(vcpu);
	/* The fault is the same as often as it's taken, and can be resolved. */
	ok = ok && exits_with_fault(vcpu);
	map_memory(mem);
	vcpu_run(vcpu);
	TEST_ASSERT_EQ(get_ucall(vcpu, NULL), UCALL_DONE);
	kvm_vm_free(vm);
	kvm_munmap(mem, SLOT_PAGES * PAGE_SIZE);
	ksft_test_result(ok, "%s\n", name);
}

int main(void)
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_MEMORY_FAULT_INFO));

	ksft_print_header();
	ksft_set_plan(5);
	run_test("read, no VMA", guest_read, unmap_memory);
	run_test("write, no VMA", guest_write, unmap_memory);
	run_test("read, PROT_NONE", guest_read, forbid_memory);
	run_test("write, PROT_NONE", guest_write, forbid_memory);
	run_test("write, PROT_READ", guest_write, forbid_writes);
	ksft_finished();
}
