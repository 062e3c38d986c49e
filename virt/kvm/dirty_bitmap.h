/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Dirty bitmaps of memslots, of both kinds: sparse, on architectures whose bits nobody
 * but common code touches, and flat.
 */
#ifndef __KVM_DIRTY_BITMAP_H__
#define __KVM_DIRTY_BITMAP_H__

#include <linux/bitmap.h>
#include <linux/kvm_host.h>
#include <linux/vmalloc.h>

#ifdef CONFIG_KVM_GENERIC_DIRTYLOG_READ_PROTECT

int kvm_alloc_dirty_bitmap(struct kvm_memory_slot *memslot, bool all_dirty);
void kvm_destroy_dirty_bitmap(struct kvm_memory_slot *memslot);
void kvm_dirty_bitmap_set(const struct kvm_memory_slot *memslot, unsigned long rel_gfn);
int kvm_get_dirty_log_protect(struct kvm *kvm, struct kvm_dirty_log *log);
int kvm_clear_dirty_log_protect(struct kvm *kvm, struct kvm_clear_dirty_log *log);

#else

/*
 * Allocation size is twice as large as the actual dirty bitmap size.
 * See kvm_vm_ioctl_get_dirty_log() why this is needed.
 */
static inline int kvm_alloc_dirty_bitmap(struct kvm_memory_slot *memslot, bool all_dirty)
{
	unsigned long dirty_bytes = kvm_dirty_bitmap_bytes(memslot);

	memslot->dirty_bitmap = __vcalloc(2, dirty_bytes, GFP_KERNEL_ACCOUNT);
	if (!memslot->dirty_bitmap)
		return -ENOMEM;

	if (all_dirty)
		bitmap_set(memslot->dirty_bitmap, 0, memslot->npages);
	return 0;
}

static inline void kvm_destroy_dirty_bitmap(struct kvm_memory_slot *memslot)
{
	vfree(memslot->dirty_bitmap);
	memslot->dirty_bitmap = NULL;
}

static inline void kvm_dirty_bitmap_set(const struct kvm_memory_slot *memslot,
					unsigned long rel_gfn)
{
	set_bit_le(rel_gfn, memslot->dirty_bitmap);
}

#endif /* CONFIG_KVM_GENERIC_DIRTYLOG_READ_PROTECT */

#endif /* __KVM_DIRTY_BITMAP_H__ */
