// SPDX-License-Identifier: GPL-2.0
/*
 * Free the PTE tables that a discard empties while their VMA lives on.
 *
 * The caller zaps entries under the page table lock, asks here whether the
 * table is empty and has it unlinked; it then owns the table and hands it to
 * the mmu_gather, which flushes the paging-structure caches and frees it after
 * an RCU grace period.  Why nobody else can still write to it:
 * Documentation/mm/pt_reclaim.rst.
 */
#include <linux/bitops.h>
#include <linux/fs.h>
#include <linux/lockdep.h>
#include <linux/mmap_lock.h>
#include <linux/pgalloc.h>
#include <linux/unroll.h>

#include "internal.h"
#include "pt_hint.h"
#include "pt_reclaim.h"

/* Is any entry of a group in use? */
static inline bool pt_group_used(pte_t *group)
{
	int i;

	/* One base register for all loads, not two. */
	OPTIMIZER_HIDE_VAR(group);
	unrolled_count(8)
	for (i = 0; i < PT_HINT_GROUP; i++) {
		if (!pte_none(ptep_get(group + i)))
			return true;
	}
	return false;
}

/* Is any entry of the table in use? */
static bool pt_table_used(pte_t *table)
{
	unsigned int i;

	for (i = 0; i < PTRS_PER_PTE; i += PT_HINT_GROUP) {
		if (pt_group_used(table + i))
			return true;
	}
	return false;
}

/* The groups that are in use, as a hint word. */
static unsigned long pt_used_groups(pte_t *table)
{
	unsigned long used = 0;
	unsigned int i;

	for (i = 0; i < PTRS_PER_PTE >> PT_HINT_SHIFT; i++) {
		if (pt_group_used(table + (i << PT_HINT_SHIFT)))
			used |= BIT(i);
	}
	return used;
}

/*
 * The bounds of a VMA stand under its lock, the mmap lock, or the lock of its
 * file's mappings.  Only lockdep knows which of them are held by us.
 */
static void assert_bounds_stand(struct vm_area_struct *vma)
{
	struct file *file = vma->vm_file;

	if (!IS_ENABLED(CONFIG_LOCKDEP))
		return;
	if (file && lockdep_is_held(&file->f_mapping->i_mmap_rwsem))
		return;
	vma_assert_stabilised(vma);
}

/**
 * pt_private_to_vma - does a table map nothing but addresses of this VMA
 * @vma: the VMA
 * @addr: any address that the table maps
 *
 * A table whose range reaches into a neighbouring VMA may be in the hands of
 * somebody who holds that neighbour's lock and not ours: move_ptes() writes to
 * its destination table, and copy_pte_range() reads its source table, on the
 * strength of the write lock of their VMA alone.  VM_MIXEDMAP: Xen's grant
 * mappings remember where their entries are, and insert_pages() would report a
 * table that vanishes as an error.
 *
 * Context: @vma, its mm or its file's mappings locked, for reading at least.
 * Return: true when the table's whole range lies within @vma, and its entries
 * are the mm's to judge.
 */
bool pt_private_to_vma(struct vm_area_struct *vma, unsigned long addr)
{
	unsigned long start = addr & PMD_MASK;

	assert_bounds_stand(vma);
	return start >= vma->vm_start && vma->vm_end - start >= PMD_SIZE &&
	       !(vma->vm_flags & (VM_PFNMAP | VM_MIXEDMAP));
}

/*
 * Are all entries of the table none?
 *
 * Looks where the hint points to first, and forgets what it finds unfounded.
 * Every entry is read only when no hint is left: the table is about to be
 * freed then, or was populated by something that set no hint, and the hint is
 * made anew.  @ptl keeps entries from being populated meanwhile; page faults
 * change the hint without it, and losing such a change costs one full scan.
 */
static bool pt_table_unused(unsigned long *hintp, unsigned long hint,
			    pte_t *table)
{
	for (; hint; hint &= hint - 1) {
		if (pt_group_used(table + (__ffs(hint) << PT_HINT_SHIFT))) {
			WRITE_ONCE(*hintp, hint);
			return false;
		}
	}

	hint = pt_used_groups(table);
	WRITE_ONCE(*hintp, hint);
	return !hint;
}

/**
 * pt_reclaim_check - may a table go whose zapped range has no neighbours
 * @vma: the VMA being zapped
 * @pmd: the pmd entry that points to the table
 * @ptl: the table's lock
 * @table: the table's first entry
 * @start: an address that was zapped, in bytes
 * @reason: PT_SKIP_IN_USE, changed if something else speaks against freeing
 *
 * The lowest hint comes before everything else: it is right for most tables
 * that stay.
 *
 * Context: @ptl held; @vma, its mm or its file's mappings locked, for reading at
 * least.
 * Return: true when the table is empty and @vma's alone.
 */
bool pt_reclaim_check(struct vm_area_struct *vma, pmd_t *pmd, spinlock_t *ptl,
		      pte_t *table, unsigned long start,
		      enum pt_reclaim_skip *reason)
{
	unsigned long *hintp = pt_hint_of(ptl, pmdp_get(pmd));
	unsigned long hint = READ_ONCE(*hintp);

	lockdep_assert_held(ptl);

	if (hint && pt_group_used(table + (__ffs(hint) << PT_HINT_SHIFT)))
		return false;
	if (!pt_private_to_vma(vma, start)) {
		*reason = PT_SKIP_SHARED;
		return false;
	}
	/* The lowest hint, if there was one, is known to be unfounded. */
	return pt_table_unused(hintp, hint & (hint - 1), table);
}

/**
 * pt_looks_empty - are all entries of a PTE table none
 * @mm: the mm that it belongs to
 * @pmd: the pmd entry that points to it
 * @addr: any address that it maps
 *
 * The lowest hint answers for most tables that are in use, and without the lock.
 * That a table is empty takes the page table lock to say, for an entry may be none
 * for a moment while reclaim or migration replaces it.  Afterwards nothing keeps
 * the answer from changing but what the caller holds.
 *
 * Context: @mm's mmap lock, or the lock of the VMA at @addr, held; takes the page
 * table lock.
 * Return: true when there is no table, or none of its entries is in use; false for
 * a huge page, and for a table that was replaced meanwhile.
 */
bool pt_looks_empty(struct mm_struct *mm, pmd_t *pmd, unsigned long addr)
{
	unsigned long hint;
	spinlock_t *ptl;	/* of @table */
	pte_t *table;
	pmd_t pmdval;
	bool used;

	table = pte_offset_map_rw_nolock(mm, pmd, addr & PMD_MASK, &pmdval, &ptl);
	if (!table)
		return pmd_none(pmdp_get_lockless(pmd));
	hint = READ_ONCE(*pt_hint_of(ptl, pmdval));
	used = hint && pt_group_used(table + (__ffs(hint) << PT_HINT_SHIFT));
	if (!used) {
		spin_lock(ptl);
		used = pt_table_used(table) || !pmd_same(pmdval, pmdp_get_lockless(pmd));
		spin_unlock(ptl);
	}
	pte_unmap(table);
	return !used;
}

/**
 * pt_seems_used - is a PTE table likely to be in use
 * @ptl: the table's lock
 * @pmdval: value of the pmd entry that points to it
 * @pte: any entry of the table
 *
 * For callers who emptied entries: most of the time the answer is yes, and they
 * need not ask for the table.  Looks where the hint points to, and forgets what it
 * finds unfounded, as pt_reclaim_check() does.
 *
 * Context: the caller keeps the table from being freed: by holding @ptl or by
 * the RCU read lock of pte_offset_map() and friends.
 * Return: true when an entry in use was seen.  False is no answer.
 */
bool pt_seems_used(spinlock_t *ptl, pmd_t pmdval, pte_t *pte)
{
	pte_t *table = PTR_ALIGN_DOWN(pte, PTRS_PER_PTE * sizeof(pte_t));
	unsigned long *hintp = pt_hint_of(ptl, pmdval);
	unsigned long hint;

	for (hint = READ_ONCE(*hintp); hint; hint &= hint - 1) {
		if (pt_group_used(table + (__ffs(hint) << PT_HINT_SHIFT))) {
			WRITE_ONCE(*hintp, hint);
			return true;
		}
	}
	return false;
}

/*
 * Does somebody hold the VMA's lock for writing?  Sees the locks of those whose
 * changes to the table are seen: they take its lock after the VMA's.
 */
static bool pt_vma_write_locked(struct vm_area_struct *vma)
{
#ifdef CONFIG_PER_VMA_LOCK
	return READ_ONCE(vma->vm_lock_seq) == READ_ONCE(vma->vm_mm->mm_lock_seq.sequence);
#else
	return rwsem_is_locked(&vma->vm_mm->mmap_lock);
#endif
}

/*
 * May tables of the VMA go, as far as its other users are concerned?  Who unmaps a
 * file holds no lock of the mm, and so does not exclude mremap(), which moves the
 * entries of a table away, and moves them back if it has no memory for a table at the
 * other end: it could as little have it here, and would lose private pages.
 */
static bool pt_may_unlink(struct vm_area_struct *vma, enum pt_reclaim_source source)
{
	return source != PT_RECLAIM_UNMAP || !pt_vma_write_locked(vma);
}

/**
 * pt_unlink_empty - unlink a PTE table that is known to be empty
 * @vma: the VMA that it is private to
 * @pmd: the pmd entry that points to it
 * @ptl: its page table lock
 * @source: who asks for it to go
 * @pmdval: set to the value that @pmd had, for pmd_pgtable()
 *
 * The pmd lock comes before @ptl in the lock order, so it is only tried.
 *
 * Context: @ptl held without a break since the entries were seen to be none; @vma
 * locked as @source has it, see pt_private_to_vma().
 * Return: true when the table is unlinked and the caller's to free, false when
 * the pmd lock was busy, or a writer has @vma: pt_unlink_if_empty() is for that.
 */
bool pt_unlink_empty(struct vm_area_struct *vma, pmd_t *pmd, spinlock_t *ptl,
		     enum pt_reclaim_source source, pmd_t *pmdval)
{
	struct mm_struct *mm = vma->vm_mm;
	spinlock_t *pml = pmd_lockptr(mm, pmd);

	lockdep_assert_held(ptl);
	if (!pt_may_unlink(vma, source))
		return false;
	if (ptl != pml && !spin_trylock(pml))
		return false;
	/* Nobody unlinks or moves a table whose lock is held by another. */
	VM_WARN_ON_ONCE(pte_lockptr(mm, pmd) != ptl);
	*pmdval = pmdp_get(pmd);
	pmd_clear(pmd);
	if (ptl != pml)
		spin_unlock(pml);
	return true;
}

/**
 * pt_unlink_if_empty - unlink a PTE table unless it is in use
 * @vma: the VMA that it is private to
 * @pmd: the pmd entry that may point to it
 * @addr: any address that the table maps
 * @source: who asks for it to go
 * @pmdval: set to the value that @pmd had, for pmd_pgtable()
 *
 * For a table whose lock was dropped since it was seen to be empty: it may
 * have been refilled, freed, or replaced by another or by a huge page, so
 * everything is looked at again under both locks.  That includes the entries
 * below @addr.
 *
 * Context: @vma, its mm or its file's mappings locked, for reading at least, so that
 * the pmd table stays; takes the pmd lock and the page table lock.
 * Return: true when a table is unlinked and the caller's to free.
 */
bool pt_unlink_if_empty(struct vm_area_struct *vma, pmd_t *pmd, unsigned long addr,
			enum pt_reclaim_source source, pmd_t *pmdval)
{
	struct mm_struct *mm = vma->vm_mm;
	spinlock_t *pml, *ptl;
	bool empty = false;
	pte_t *table;

	pml = pmd_lock(mm, pmd);
	table = pte_offset_map_rw_nolock(mm, pmd, addr & PMD_MASK, pmdval, &ptl);
	if (!table)
		goto out;
	if (ptl != pml)
		spin_lock_nested(ptl, SINGLE_DEPTH_NESTING);

	empty = !pt_table_used(table) && pt_may_unlink(vma, source);
	if (empty)
		pmd_clear(pmd);

	if (ptl != pml)
		spin_unlock(ptl);
	pte_unmap(table);
out:
	spin_unlock(pml);
	return empty;
}
