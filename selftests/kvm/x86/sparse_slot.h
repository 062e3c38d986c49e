/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of large, sparsely populated memslots have in common: where the slot
 * is, and guests that run a guest of their own.
 */
#ifndef SELFTEST_KVM_SPARSE_SLOT_H
#define SELFTEST_KVM_SPARSE_SLOT_H

#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "vmx.h"
#include "../../mm/pt_util.h"

#define GIB		(1024ull * 1024 * 1024)
#define BLOCK		(GIB / 512)		/* what one chunk of rmaps is for */
#define SLOT		10
#define SLOT_GPA	(4 * GIB)		/* above everything that the library maps */
#define SLOT_GVA	(1024 * GIB)

/* A line of /proc/meminfo, with what CPUs have counted and not added up yet. */
static inline long meminfo_kb(const char *name)
{
	char buf[8192];

	pt_write_file("/proc/sys/vm/stat_refresh", "1");
	TEST_ASSERT(pt_read_file("/proc/meminfo", buf, sizeof(buf)) > 0, "/proc/meminfo");
	return pt_field(buf, name);
}

/* kB of memory that are free, on the lists of CPUs as well, once what is on its way is. */
static inline long free_kb(void)
{
	size_t size = 1 << 20;
	const char *count;
	char *zones;
	long kb;

	pt_grace_period();
	kb = meminfo_kb("MemFree");
	zones = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	TEST_ASSERT(pt_read_file("/proc/zoneinfo", zones, size) > 0, "/proc/zoneinfo");
	count = zones;
	while ((count = strstr(count, "count:"))) {
		count += strlen("count:");
		kb += strtol(count, NULL, 10) * (long)(PAGE_SIZE / 1024);
	}
	kvm_munmap(zones, size);
	return kb;
}

/* A statistic of the VM, or -1 where the kernel has none of that name. */
static inline long vm_stat_or_none(struct kvm_vm *vm, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *descs;
	long value = -1;
	u64 data;
	int fd;

	fd = vm_get_stats_fd(vm);
	read_stats_header(fd, &header);
	descs = read_stats_descriptors(fd, &header);
	for (u32 i = 0; i < header.num_desc; i++) {
		struct kvm_stats_desc *desc = get_stats_descriptor(descs, i, &header);

		if (strcmp(desc->name, name))
			continue;
		read_stat_data(fd, &header, desc, &data, 1);
		value = data;
	}
	free(descs);
	close(fd);
	return value;
}

/* Is this machine emulated by QEMU's TCG? */
static inline bool is_emulated(void)
{
	u32 eax, text[3];

	if (!this_cpu_has(X86_FEATURE_HYPERVISOR))
		return false;
	cpuid(0x40000000, &eax, &text[0], &text[1], &text[2]);
	return !memcmp(text, "TCGTCGTCGTCG", sizeof(text));
}

/*
 * How many vCPUs of a VM may run at once: no more than there are CPUs, and, unless @most
 * says otherwise, one on an emulated machine.  With more than one there (QEMU 7.2 and
 * 10.0), guests shut down for no reason now and then, on a stock kernel as well, once a
 * guest's writes went astray, and once a CPU of the machine itself lost its GS base.
 */
static inline u32 vcpus_at_once(u32 wanted, u32 most)
{
	u32 cpus = sysconf(_SC_NPROCESSORS_ONLN);

	if (!most)
		most = is_emulated() ? 1 : cpus;
	return min(wanted, most);
}

/* A vCPU has left: by GUEST_SYNC(), or the test ends here and says why. */
static inline void expect_sync(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		return;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("vCPU %u left with exit reason %u (%s), suberror %u", vcpu->id,
			  vcpu->run->exit_reason, exit_reason_str(vcpu->run->exit_reason),
			  vcpu->run->exit_reason == KVM_EXIT_INTERNAL_ERROR ?
			  vcpu->run->internal.suberror : 0);
	}
}

/* Runs a vCPU until its next GUEST_SYNC(). */
static inline void run_vcpu(struct kvm_vcpu *vcpu)
{
	vcpu_run(vcpu);
	expect_sync(vcpu);
}

/* Does a slot of so many bytes fit below the end of the guest's addresses? */
static inline bool slot_fits(struct kvm_vm *vm, u64 size)
{
	return (SLOT_GPA + size) >> vm->page_shift <= vm->max_gfn;
}

static inline bool can_nest(void)
{
	return (kvm_cpu_has(X86_FEATURE_VMX) || kvm_cpu_has(X86_FEATURE_SVM)) &&
	       kvm_cpu_has_tdp();
}

/*
 * Lets the VM's vCPU run a guest that sees the same memory at the same addresses, the
 * first @size bytes of the slot included, in huge pages of 1 GiB.  Once all else is
 * mapped.  Returns what the guest hands to enter_l2() and resume_l2().
 */
static inline gva_t prepare_nested(struct kvm_vm *vm, u64 size)
{
	gva_t nested;

	vm_enable_tdp(vm);
	if (kvm_cpu_has(X86_FEATURE_VMX))
		vcpu_alloc_vmx(vm, &nested);
	else
		vcpu_alloc_svm(vm, &nested);
	tdp_identity_map_default_memslots(vm);
	if (size)
		tdp_identity_map_1g(vm, SLOT_GPA, size);
	return nested;
}

static inline void run_l2_svm(struct svm_test_data *svm)
{
	run_guest(svm->vmcb, svm->vmcb_gpa);
	GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
}

/* In the guest: run @code as a guest's until its vmcall(). */
static inline void enter_l2(void *nested, void *code)
{
	struct svm_test_data *svm = nested;

	if (!this_cpu_has(X86_FEATURE_VMX)) {
		generic_svm_setup(svm, code);
		run_l2_svm(svm);
		return;
	}
	GUEST_ASSERT(prepare_for_vmx_operation(nested));
	GUEST_ASSERT(load_vmcs(nested));
	prepare_vmcs(nested, code);
	GUEST_ASSERT(!vmlaunch());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
}

/* In the guest: go on behind the vmcall(), until the next. */
static inline void resume_l2(void *nested)
{
	struct svm_test_data *svm = nested;

	if (!this_cpu_has(X86_FEATURE_VMX)) {
		svm->vmcb->save.rip += 3;	/* the length of VMMCALL */
		run_l2_svm(svm);
		return;
	}
	vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) + vmreadz(VM_EXIT_INSTRUCTION_LEN));
	GUEST_ASSERT(!vmresume());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
}

/*
 * In the guest: GUEST_SYNC(0) at first, then GUEST_SYNC(1) and @work in turn, the work done
 * by a guest of its own if there is to be one.  @l2_code, which gets no arguments, begins
 * with vmcall(), and goes on with the work and vmcall() in turn.
 */
static inline void guest_loop(void *nested, void *l2_code, void (*work)(void *), void *arg)
{
	GUEST_SYNC(0);
	if (nested)
		enter_l2(nested, l2_code);
	for (;;) {
		GUEST_SYNC(1);
		if (nested)
			resume_l2(nested);
		else
			work(arg);
	}
}

#endif
