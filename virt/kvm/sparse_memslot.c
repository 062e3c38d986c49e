// SPDX-License-Identifier: GPL-2.0
/*
 * Memslots of which userspace says block by block what is plugged.
 *
 * Who may hold what, and why nobody gets at a block once it is unplugged, is told in
 * Documentation/virt/kvm/sparse-memslots.rst.
 */
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/uaccess.h>

#include <trace/events/kvm.h>

#include "kvm_mm.h"

/* Pages that a word of the bitmap that userspace gets is about. */
#define WORD_PAGES	(BITS_PER_LONG_LONG * KVM_SPARSE_BLOCK_PAGES)

static unsigned long slot_blocks(const struct kvm_memory_slot *slot)
{
	return slot->npages / KVM_SPARSE_BLOCK_PAGES;
}

/**
 * kvm_check_sparse_memslot - can a memslot be as userspace wants it?
 * @mem: what userspace wants
 *
 * A block belongs to one slot, and can be mapped by one entry of a page table: sparse
 * slots begin and end where blocks do.
 *
 * Return: 0, or -EINVAL.
 */
int kvm_check_sparse_memslot(const struct kvm_userspace_memory_region2 *mem)
{
	if (!(mem->flags & KVM_MEM_SPARSE))
		return 0;
	if (!IS_ALIGNED(mem->guest_phys_addr, KVM_SPARSE_BLOCK_SIZE) ||
	    !IS_ALIGNED(mem->memory_size, KVM_SPARSE_BLOCK_SIZE))
		return -EINVAL;
	return 0;
}

/**
 * kvm_init_sparse_memslot - give a new memslot its bitmap: nothing is plugged
 * @slot: the slot, which nobody knows yet
 *
 * Takes a bit for 2 MiB, 64 KiB for 1 TiB, charged to the caller.  No-op for a slot that
 * isn't sparse.
 *
 * Return: 0, or -ENOMEM.
 */
int kvm_init_sparse_memslot(struct kvm_memory_slot *slot)
{
	if (!kvm_slot_is_sparse(slot))
		return 0;
	slot->plugged = kvcalloc(BITS_TO_LONGS(slot_blocks(slot)), sizeof(long),
				 GFP_KERNEL_ACCOUNT);
	return slot->plugged ? 0 : -ENOMEM;
}

/**
 * kvm_destroy_sparse_memslot - free the bitmap of a memslot
 * @slot: the slot, which nobody can reach any more
 */
void kvm_destroy_sparse_memslot(struct kvm_memory_slot *slot)
{
	kvfree(slot->plugged);
	slot->plugged = NULL;
}

/* Does one address space have memory at all of these pages? */
static bool slots_cover_range(struct kvm_memslots *slots, gfn_t start, gfn_t end)
{
	struct kvm_memslot_iter iter;

	kvm_for_each_memslot_in_gfn_range(&iter, slots, start, end) {
		if (iter.slot->base_gfn > start)
			return false;
		start = iter.slot->base_gfn + iter.slot->npages;
	}
	return start >= end;
}

/*
 * A range that userspace names has to be all memory, in one address space at least, and
 * what it is in has to be sparse, in each: else the guest would get at it by another way.
 */
static int check_range(struct kvm *kvm, gfn_t start, gfn_t end)
{
	struct kvm_memslot_iter iter;
	struct kvm_memslots *slots;
	bool covered = false;
	int i;

	lockdep_assert_held(&kvm->slots_lock);

	for (i = 0; i < kvm_arch_nr_memslot_as_ids(kvm); i++) {
		slots = __kvm_memslots(kvm, i);
		kvm_for_each_memslot_in_gfn_range(&iter, slots, start, end) {
			if (!kvm_slot_is_sparse(iter.slot))
				return -EINVAL;
		}
		covered |= slots_cover_range(slots, start, end);
	}
	return covered ? 0 : -ENOENT;
}

/* Readers look at bits meanwhile, so that words change in one piece. */
static bool change_bits(unsigned long *map, unsigned long first, unsigned long behind,
			bool set)
{
	unsigned long mask, word, changed = 0;
	unsigned long *p = map + BIT_WORD(first);

	for (; first < behind; first = ALIGN_DOWN(first, BITS_PER_LONG) + BITS_PER_LONG, p++) {
		mask = BITMAP_FIRST_WORD_MASK(first);
		if (behind - ALIGN_DOWN(first, BITS_PER_LONG) < BITS_PER_LONG)
			mask &= BITMAP_LAST_WORD_MASK(behind);
		word = set ? *p | mask : *p & ~mask;
		changed |= word ^ *p;
		WRITE_ONCE(*p, word);
	}
	return changed;
}

typedef bool (*slot_range_fn)(struct kvm *kvm, struct kvm_gfn_range *range);

/*
 * Calls @fn for the part of the range that is in a memslot, for each that there is in any
 * address space.  Returns whether any of the calls did.
 */
static bool do_slot_ranges(struct kvm *kvm, gfn_t start, gfn_t end, slot_range_fn fn)
{
	struct kvm_gfn_range range = {
		.may_block = true,
		.discard = true,
		.attr_filter = KVM_FILTER_PRIVATE | KVM_FILTER_SHARED,
	};
	struct kvm_memslot_iter iter;
	bool ret = false;
	int i;

	lockdep_assert_held(&kvm->slots_lock);

	for (i = 0; i < kvm_arch_nr_memslot_as_ids(kvm); i++) {
		kvm_for_each_memslot_in_gfn_range(&iter, __kvm_memslots(kvm, i), start, end) {
			range.slot = iter.slot;
			range.start = max(start, range.slot->base_gfn);
			range.end = min(end, range.slot->base_gfn + range.slot->npages);
			ret |= fn(kvm, &range);
			cond_resched();
		}
	}
	return ret;
}

static bool plug_range(struct kvm *kvm, struct kvm_gfn_range *range)
{
	return change_bits(range->slot->plugged, kvm_slot_block(range->slot, range->start),
			   kvm_slot_block(range->slot, range->end - 1) + 1, true);
}

static bool unplug_range(struct kvm *kvm, struct kvm_gfn_range *range)
{
	return change_bits(range->slot->plugged, kvm_slot_block(range->slot, range->start),
			   kvm_slot_block(range->slot, range->end - 1) + 1, false);
}

/* Nobody maps or caches anything of the range from here on: take away what there is. */
static bool zap_range(struct kvm *kvm, struct kvm_gfn_range *range)
{
	unsigned long hva = __gfn_to_hva_memslot(range->slot, range->start);

	gfn_to_pfn_cache_invalidate_start(kvm, hva, hva + ((range->end - range->start)
							   << PAGE_SHIFT));
	kvm_arch_unplug_gfn_range(kvm, range);
	return true;
}

static void unplug_memory(struct kvm *kvm, gfn_t start, gfn_t end)
{
	if (!do_slot_ranges(kvm, start, end, unplug_range))
		return;
	/*
	 * A page fault that saw the block plugged installs its mapping, a cache is filled,
	 * a copy from or to the guest is made, all in the critical section in which they
	 * looked: when this returns, they are over, and their successors see it unplugged.
	 */
	synchronize_srcu_expedited(&kvm->srcu);
	do_slot_ranges(kvm, start, end, zap_range);
	kvm_arch_guest_memory_reclaimed(kvm);
}

/* Of the blocks from @gfn on, those that a vCPU can access in whatever mode. */
static u64 plugged_word(struct kvm *kvm, gfn_t gfn, gfn_t end)
{
	struct kvm_memslot_iter iter;
	u64 word = 0, unplugged = 0;
	gfn_t block;
	int i;

	end = min(end, gfn + WORD_PAGES);
	for (i = 0; i < kvm_arch_nr_memslot_as_ids(kvm); i++) {
		kvm_for_each_memslot_in_gfn_range(&iter, __kvm_memslots(kvm, i), gfn, end) {
			gfn_t first = max(gfn, iter.slot->base_gfn);
			gfn_t behind = min(end, iter.slot->base_gfn + iter.slot->npages);

			for (block = first; block < behind; block += KVM_SPARSE_BLOCK_PAGES) {
				u64 bit = BIT_ULL((block - gfn) / KVM_SPARSE_BLOCK_PAGES);

				if (kvm_gfn_is_unplugged(iter.slot, block))
					unplugged |= bit;
				else
					word |= bit;
			}
		}
	}
	return word & ~unplugged;
}

static int query_memory(struct kvm *kvm, gfn_t start, gfn_t end, u64 __user *bitmap)
{
	for (; start < end; start += WORD_PAGES, bitmap++) {
		if (put_user(plugged_word(kvm, start, end), bitmap))
			return -EFAULT;
		cond_resched();
	}
	return 0;
}

static int check_args(const struct kvm_sparse_memory *args)
{
	int i;

	if (args->op != KVM_SPARSE_MEMORY_PLUG && args->op != KVM_SPARSE_MEMORY_UNPLUG &&
	    args->op != KVM_SPARSE_MEMORY_QUERY)
		return -EINVAL;
	if (args->flags || (args->bitmap && args->op != KVM_SPARSE_MEMORY_QUERY))
		return -EINVAL;
	for (i = 0; i < ARRAY_SIZE(args->reserved); i++) {
		if (args->reserved[i])
			return -EINVAL;
	}
	if (!args->size || args->gpa + args->size < args->gpa ||
	    !IS_ALIGNED(args->gpa | args->size, KVM_SPARSE_BLOCK_SIZE))
		return -EINVAL;
	return 0;
}

/**
 * kvm_vm_ioctl_sparse_memory - KVM_SPARSE_MEMORY: plug or unplug blocks, or ask
 * @kvm: the VM
 * @args: what userspace wants, copied from it
 *
 * When blocks have been unplugged, no vCPU can access them, KVM does not on behalf of
 * any, and nothing is kept for them.  All blocks change, or, if there is an error, none.
 *
 * Context: May sleep.  Takes slots_lock.
 * Return: 0, -EINVAL for arguments that make no sense or memslots that are not sparse,
 * -ENOENT if not all of the range is memory, -EFAULT if the bitmap cannot be written.
 */
int kvm_vm_ioctl_sparse_memory(struct kvm *kvm, const struct kvm_sparse_memory *args)
{
	gfn_t start = gpa_to_gfn(args->gpa);
	gfn_t end = gpa_to_gfn(args->gpa + args->size);
	int r;

	r = check_args(args);
	if (r)
		return r;

	guard(mutex)(&kvm->slots_lock);
	r = check_range(kvm, start, end);
	if (r)
		return r;
	switch (args->op) {
	case KVM_SPARSE_MEMORY_PLUG:
		do_slot_ranges(kvm, start, end, plug_range);
		break;
	case KVM_SPARSE_MEMORY_UNPLUG:
		unplug_memory(kvm, start, end);
		break;
	default:
		return query_memory(kvm, start, end, u64_to_user_ptr(args->bitmap));
	}
	trace_kvm_sparse_memory(args->op, start, end);
	return 0;
}
