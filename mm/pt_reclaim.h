/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _MM_PT_RECLAIM_H
#define _MM_PT_RECLAIM_H

#include <linux/mm.h>
#include <linux/pagewalk.h>
#include <linux/pt_reclaim.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <xen/xen.h>

#include "pt_reclaim_stat.h"

/**
 * pt_reclaim_unmap_source - may unmapping a file's range free tables of a VMA
 * @vma: a VMA that maps the file
 *
 * Drivers populate VM_PFNMAP and VM_MIXEDMAP areas by functions that report a
 * table that vanishes between allocation and use as an error.  A Xen PV guest
 * walks all of its page tables when an mm is made and torn down, with no lock that
 * keeps PTE tables, and tells the hypervisor which pages are tables.
 *
 * Return: for &zap_details.reclaim_pt.
 */
static inline enum pt_reclaim_source
pt_reclaim_unmap_source(const struct vm_area_struct *vma)
{
	if (xen_pv_domain() || (vma->vm_flags & (VM_PFNMAP | VM_MIXEDMAP)))
		return PT_RECLAIM_OFF;
	return PT_RECLAIM_UNMAP;
}

/**
 * pt_reclaim_chunk_end - where to pause in a long range
 * @addr: where we are, in bytes
 * @end: end of the range, exclusive
 *
 * After a GiB or less, where a table ends: the mmap lock is dropped there if others
 * wait for it.
 *
 * Return: an address beyond @addr and not beyond @end.
 */
static inline unsigned long pt_reclaim_chunk_end(unsigned long addr,
						 unsigned long end)
{
	unsigned long next = ALIGN_DOWN(addr, SZ_1G) + SZ_1G;

	return next - 1 < end - 1 ? next : end;
}

#ifdef CONFIG_PT_RECLAIM

bool pt_private_to_vma(struct vm_area_struct *vma, unsigned long addr);
bool pt_reclaim_check(struct vm_area_struct *vma, pmd_t *pmd, spinlock_t *ptl,
		      pte_t *table, unsigned long start,
		      enum pt_reclaim_skip *reason);
bool pt_looks_empty(struct mm_struct *mm, pmd_t *pmd, unsigned long addr);
bool pt_seems_used(spinlock_t *ptl, pmd_t pmdval, pte_t *pte);
bool pt_unlink_empty(struct vm_area_struct *vma, pmd_t *pmd, spinlock_t *ptl,
		     enum pt_reclaim_source source, pmd_t *pmdval);
bool pt_unlink_if_empty(struct vm_area_struct *vma, pmd_t *pmd, unsigned long addr,
			enum pt_reclaim_source source, pmd_t *pmdval);
int pt_reclaim_range(struct vm_area_struct *vma, unsigned long start,
		     unsigned long end, enum pt_reclaim_source source,
		     enum page_walk_lock walk_lock);
void pt_reclaim_mark(struct mm_struct *mm);
void pt_reclaim_mark_zeroes(struct mm_struct *mm);
bool __cold pt_left_for_later(struct mm_struct *mm, unsigned long start,
			      unsigned long end, enum pt_reclaim_source source);

/**
 * pt_reclaim_possible - may a table go, now that part of it was zapped
 * @vma: the VMA being zapped
 * @pmd: the pmd entry that points to the table
 * @ptl: the table's lock
 * @pte: any entry of the table
 * @start: first address that was zapped, in bytes
 * @end: end of that, exclusive, within the range of the table
 * @source: who asks for the table
 *
 * The two neighbours of the zapped range come first: where pages are dense,
 * they answer for the whole table, and a discard that frees nothing should pay
 * for nothing.
 *
 * Context: @ptl held; @vma, its mm or its file's mappings locked, for reading at
 * least; every entry for [@start, @end) was seen to be none.
 * Return: true when the table is empty and @vma's alone.  A table that stays is
 * counted.
 */
static inline bool pt_reclaim_possible(struct vm_area_struct *vma, pmd_t *pmd,
				       spinlock_t *ptl, pte_t *pte,
				       unsigned long start, unsigned long end,
				       enum pt_reclaim_source source)
{
	/* Tables are aligned to their size: the MMU indexes them so. */
	pte_t *table = PTR_ALIGN_DOWN(pte, PTRS_PER_PTE * sizeof(pte_t));
	enum pt_reclaim_skip reason = PT_SKIP_IN_USE;

	if ((start & ~PMD_MASK) &&
	    !pte_none(ptep_get(table + pte_index(start) - 1)))
		goto skip;
	if ((end & ~PMD_MASK) && !pte_none(ptep_get(table + pte_index(end))))
		goto skip;
	if (end - start == PMD_SIZE)
		return true;
	if (pt_reclaim_check(vma, pmd, ptl, table, start, &reason))
		return true;
skip:
	pt_reclaim_skipped(vma->vm_mm, start, end, source, reason);
	return false;
}

#ifdef CONFIG_PT_RECLAIM_UPPER

extern bool pt_upper_on;

void pt_upper_mark(struct mm_struct *mm);
void __cold pt_upper_emptied(struct mm_struct *mm, pmd_t *pmd, unsigned long addr);
void pt_upper_trim(struct mm_struct *mm, unsigned long start, unsigned long end,
		   enum pt_reclaim_source source);

/* Does the mm have a mark that is to be acted on? */
static inline bool pt_upper_marked(struct mm_struct *mm)
{
	return mm_flags_test(MMF_PT_UPPER, mm) && READ_ONCE(pt_upper_on);
}

static inline void pt_upper_unmark(struct mm_struct *mm)
{
	mm_flags_clear(MMF_PT_UPPER, mm);
	/*
	 * Pairs with the one in pt_upper_mark(): either we see what was emptied, or who
	 * emptied it sees that the mark is gone.
	 */
	smp_mb__after_atomic();
}

#endif /* CONFIG_PT_RECLAIM_UPPER */

#else /* CONFIG_PT_RECLAIM */

static inline bool pt_reclaim_possible(struct vm_area_struct *vma, pmd_t *pmd,
				       spinlock_t *ptl, pte_t *pte,
				       unsigned long start, unsigned long end,
				       enum pt_reclaim_source source)
{
	return false;
}

static inline bool pt_looks_empty(struct mm_struct *mm, pmd_t *pmd,
				  unsigned long addr)
{
	return false;
}

static inline bool pt_seems_used(spinlock_t *ptl, pmd_t pmdval, pte_t *pte)
{
	return true;
}

static inline bool pt_unlink_empty(struct vm_area_struct *vma, pmd_t *pmd,
				   spinlock_t *ptl,
				   enum pt_reclaim_source source, pmd_t *pmdval)
{
	return false;
}

static inline bool pt_unlink_if_empty(struct vm_area_struct *vma, pmd_t *pmd,
				      unsigned long addr,
				      enum pt_reclaim_source source,
				      pmd_t *pmdval)
{
	return false;
}

static inline int pt_reclaim_range(struct vm_area_struct *vma,
				   unsigned long start, unsigned long end,
				   enum pt_reclaim_source source,
				   enum page_walk_lock walk_lock)
{
	return 0;
}

static inline void pt_reclaim_mark(struct mm_struct *mm)
{
}

static inline void pt_reclaim_mark_zeroes(struct mm_struct *mm)
{
}

static inline bool pt_left_for_later(struct mm_struct *mm, unsigned long start,
				     unsigned long end,
				     enum pt_reclaim_source source)
{
	return false;
}

#endif /* CONFIG_PT_RECLAIM */

#ifndef CONFIG_PT_RECLAIM_UPPER

static inline void pt_upper_mark(struct mm_struct *mm)
{
}

static inline void pt_upper_emptied(struct mm_struct *mm, pmd_t *pmd, unsigned long addr)
{
}

static inline bool pt_upper_marked(struct mm_struct *mm)
{
	return false;
}

static inline void pt_upper_unmark(struct mm_struct *mm)
{
}

static inline void pt_upper_trim(struct mm_struct *mm, unsigned long start,
				 unsigned long end, enum pt_reclaim_source source)
{
}

#endif /* CONFIG_PT_RECLAIM_UPPER */
#endif /* _MM_PT_RECLAIM_H */
