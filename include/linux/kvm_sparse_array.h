/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __LINUX_KVM_SPARSE_ARRAY_H
#define __LINUX_KVM_SPARSE_ARRAY_H

#include <linux/kvm_types.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>

/*
 * An array as long as a memslot, with memory only for the parts of it in use:
 * what KVM keeps for each page of a slot, most of which has no page behind it.
 *
 * The elements live in chunks of one page, the chunks hang off directories of one
 * page, and those off a table that is as long as the array needs and never changes.
 * What has no chunk reads as zeros.  So the owner may be copied by value, which is
 * what happens to a memslot's arch data when only its flags change.
 *
 * Chunks and directories come and go under the lock that writers of elements hold
 * (KVM: mmu_lock, for writing).  Readers hold the same lock in any mode or are in an
 * RCU read-side critical section: what they see may be out of the array by then,
 * but stays readable, and has held zeros since before it was taken out.
 */
struct kvm_sparse_dir;

struct kvm_sparse_array {
	struct kvm_sparse_dir __rcu **dirs;
	unsigned long nr_dirs;
	unsigned int chunk_shift;	/* log2 of the elements in a chunk */
};

/* Pages that kvm_sparse_array_add() takes at most: a directory and a chunk. */
#define KVM_SPARSE_ARRAY_ADD_MAX	2

/* Pointers to chunks in a directory. */
#define KVM_SPARSE_DIR_CHUNKS		(PAGE_SIZE / sizeof(void *))

/**
 * kvm_sparse_array_chunk_len - how many elements come and go together
 * @array: the array
 *
 * Return: elements; a power of two.
 */
static inline unsigned long
kvm_sparse_array_chunk_len(const struct kvm_sparse_array *array)
{
	return 1ul << array->chunk_shift;
}

int kvm_sparse_array_init(struct kvm_sparse_array *array, unsigned long len,
			  size_t elem_size);
unsigned long kvm_sparse_array_destroy(struct kvm_sparse_array *array);
void *kvm_sparse_array_get(const struct kvm_sparse_array *array, unsigned long index);
void *kvm_sparse_array_add(const struct kvm_sparse_array *array, unsigned long index,
			   struct kvm_mmu_memory_cache *cache, u64 *nr_pages);
unsigned long kvm_sparse_array_next(const struct kvm_sparse_array *array,
				    unsigned long index, unsigned long end);
unsigned long kvm_sparse_array_trim(const struct kvm_sparse_array *array,
				    unsigned long index, unsigned long end);

#endif
