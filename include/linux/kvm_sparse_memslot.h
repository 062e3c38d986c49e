/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __LINUX_KVM_SPARSE_MEMSLOT_H
#define __LINUX_KVM_SPARSE_MEMSLOT_H

/*
 * Memslots with KVM_MEM_SPARSE: a bit for each block says whether it is plugged.
 * Included by kvm_host.h, which has struct kvm_memory_slot; see
 * Documentation/virt/kvm/sparse-memslots.rst.
 *
 * The bits change under slots_lock.  Who looks at them is in a read-side critical
 * section of kvm->srcu, and, having seen a block plugged, uses its memory in the same
 * critical section alone: unplugging waits for those.
 */
#include <linux/bitops.h>
#include <linux/nospec.h>
#include <linux/sizes.h>

#define KVM_SPARSE_BLOCK_SIZE	SZ_2M			/* uAPI: KVM_CAP_SPARSE_MEMSLOTS */
#define KVM_SPARSE_BLOCK_PAGES	(KVM_SPARSE_BLOCK_SIZE >> PAGE_SHIFT)

#ifdef CONFIG_KVM_SPARSE_MEMSLOT

static inline bool kvm_slot_is_sparse(const struct kvm_memory_slot *slot)
{
	return slot->flags & KVM_MEM_SPARSE;
}

/**
 * kvm_slot_block - the number of the block that a page belongs to
 * @slot: a sparse memslot
 * @gfn: a page of it
 *
 * Return: the block's index in the slot, and in its bitmap.
 */
static inline unsigned long kvm_slot_block(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return (gfn - slot->base_gfn) / KVM_SPARSE_BLOCK_PAGES;
}

/**
 * kvm_gfn_is_unplugged - may nobody access this page?
 * @slot: the memslot that has the page
 * @gfn: the page
 *
 * Context: kvm->srcu, or slots_lock.
 * Return: true in a block of a sparse slot that is not plugged.
 */
static inline bool kvm_gfn_is_unplugged(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	unsigned long block;

	if (likely(!kvm_slot_is_sparse(slot)))
		return false;
	/* The guest chooses the GFN: see __gfn_to_hva_memslot(). */
	block = array_index_nospec(kvm_slot_block(slot, gfn),
				   slot->npages / KVM_SPARSE_BLOCK_PAGES);
	return !test_bit(block, slot->plugged);
}

/**
 * kvm_gfn_range_is_plugged - may all of these pages be accessed?
 * @slot: the memslot that has the pages
 * @start: the first page
 * @end: behind the last page
 *
 * Context: kvm->srcu, or slots_lock.
 * Return: false if a part of the range is unplugged.
 */
static inline bool kvm_gfn_range_is_plugged(const struct kvm_memory_slot *slot,
					    gfn_t start, gfn_t end)
{
	unsigned long behind;

	if (likely(!kvm_slot_is_sparse(slot)))
		return true;
	behind = kvm_slot_block(slot, end - 1) + 1;
	return find_next_zero_bit(slot->plugged, behind, kvm_slot_block(slot, start)) == behind;
}

/**
 * kvm_gfn_end_of_access - how far memory is accessible in one piece, at the least
 * @slot: the memslot that has the page
 * @gfn: a page that is not unplugged
 *
 * Return: the page behind the block, or, if the slot isn't sparse, behind the slot.
 */
static inline gfn_t kvm_gfn_end_of_access(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	if (likely(!kvm_slot_is_sparse(slot)))
		return slot->base_gfn + slot->npages;
	return slot->base_gfn + (kvm_slot_block(slot, gfn) + 1) * KVM_SPARSE_BLOCK_PAGES;
}

int kvm_check_sparse_memslot(const struct kvm_userspace_memory_region2 *mem);
int kvm_init_sparse_memslot(struct kvm_memory_slot *slot);
void kvm_destroy_sparse_memslot(struct kvm_memory_slot *slot);
int kvm_vm_ioctl_sparse_memory(struct kvm *kvm, const struct kvm_sparse_memory *args);
void kvm_arch_unplug_gfn_range(struct kvm *kvm, struct kvm_gfn_range *range);

static inline void kvm_inherit_sparse_memslot(struct kvm_memory_slot *slot,
					      const struct kvm_memory_slot *from)
{
	slot->plugged = from->plugged;
}

#else

static inline bool kvm_slot_is_sparse(const struct kvm_memory_slot *slot)
{
	return false;
}

static inline bool kvm_gfn_is_unplugged(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return false;
}

static inline bool kvm_gfn_range_is_plugged(const struct kvm_memory_slot *slot,
					    gfn_t start, gfn_t end)
{
	return true;
}

static inline gfn_t kvm_gfn_end_of_access(const struct kvm_memory_slot *slot, gfn_t gfn)
{
	return slot->base_gfn + slot->npages;
}

static inline int kvm_check_sparse_memslot(const struct kvm_userspace_memory_region2 *mem)
{
	return 0;
}

static inline int kvm_init_sparse_memslot(struct kvm_memory_slot *slot)
{
	return 0;
}

static inline void kvm_destroy_sparse_memslot(struct kvm_memory_slot *slot)
{
}

static inline void kvm_inherit_sparse_memslot(struct kvm_memory_slot *slot,
					      const struct kvm_memory_slot *from)
{
}

#endif /* CONFIG_KVM_SPARSE_MEMSLOT */

#endif
