// SPDX-License-Identifier: GPL-2.0
/*
 * Free the page tables of a range that describe nothing.
 *
 * For callers that emptied entries one by one and do not have the table at hand
 * any more, and for MADV_TRIM_TABLES and the background pass, which emptied none.
 * These also take tables that hold nothing but the shared zeropage: a read of
 * memory that was never written, by a dump or a migration, populates them.
 *
 * Why a table that holds zeropages may go: Documentation/mm/pt_reclaim.rst.
 */
#include <linux/mm.h>
#include <linux/cacheflush.h>
#include <linux/dax.h>
#include <linux/hugetlb.h>
#include <linux/mmu_notifier.h>
#include <linux/pagewalk.h>
#include <linux/pgalloc.h>
#include <linux/sched/signal.h>
#include <linux/userfaultfd_k.h>

#include <asm/tlb.h>
#include <asm/tlbflush.h>

#include "internal.h"
#include "pt_reclaim.h"

/* Empty tables after which the flush is not put off any longer. */
#define PT_TRIM_BATCH	8

/* A walk over part of one VMA. */
struct pt_trim {
	struct mmu_gather tlb;
	bool gathering;		/* @tlb is in use: most walks find no table */
	unsigned int unflushed;	/* Empty tables in it, which CPUs may still walk */
	enum pt_reclaim_source source;
	bool survey;		/* Nothing was emptied here: what stays is no news */
	bool zeroes;		/* Tables with nothing but zeropages, too */
	bool age;		/* but not those that were read since the last look */
	bool young;		/* One was */
};

/*
 * May zeropages of the VMA be forgotten?  mlock() promised that they are there,
 * userfaultfd would report them as missing, and what a driver or a file system
 * maps is theirs.
 */
static bool pt_zeroes_may_go(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma) && !userfaultfd_armed(vma) &&
	       !(vma->vm_flags & (VM_LOCKED | VM_SPECIAL));
}

/*
 * A zeropage that a read fault of untouched memory would bring back as it is.
 * KSM's zeropages are dirty and accounted for; the others carry what somebody
 * tracks.
 */
static bool pte_plain_zero(pte_t pte)
{
	return pte_present(pte) && is_zero_pfn(pte_pfn(pte)) &&
	       !pte_dirty(pte) && !pte_uffd(pte) && !pte_soft_dirty(pte);
}

static bool pt_only_zeroes(pte_t *table)
{
	int i;

	for (i = 0; i < PTRS_PER_PTE; i++) {
		pte_t pte = ptep_get(table + i);

		if (!pte_none(pte) && !pte_plain_zero(pte))
			return false;
	}
	return true;
}

/*
 * Was any of a table's zeropages read since the last time that this was asked, by a
 * process or through a secondary MMU?  The TLB is not flushed: what stays in it all
 * the time looks old, and costs the reader a fault.
 */
static bool pt_zeroes_young(struct vm_area_struct *vma, unsigned long addr,
			    pte_t *table)
{
	bool young = mmu_notifier_clear_young(vma->vm_mm, addr, addr + PMD_SIZE);
	int i;

	for (i = 0; i < PTRS_PER_PTE; i++, addr += PAGE_SIZE) {
		if (pte_present(ptep_get(table + i)) &&
		    ptep_test_and_clear_young(vma, addr, table + i))
			young = true;
	}
	return young;
}

/*
 * Lockless walkers may still see the table: leave nothing in it that pte_same()
 * could match.
 */
static void pt_clear_zeroes(struct mm_struct *mm, unsigned long addr,
			    pte_t *table)
{
	int i;

	for (i = 0; i < PTRS_PER_PTE; i++, addr += PAGE_SIZE) {
		if (!pte_none(ptep_get(table + i)))
			ptep_get_and_clear(mm, addr, table + i);
	}
}

/*
 * Have CPUs forget the tables that were unlinked.  Until then a CPU may look for a
 * page that was just faulted in, in the table that went: to be called before we
 * sleep.
 */
static void pt_trim_flush(struct pt_trim *trim, struct vm_area_struct *vma)
{
	if (!trim->gathering)
		return;
	tlb_end_vma(&trim->tlb, vma);
	tlb_finish_mmu(&trim->tlb);
	trim->gathering = false;
	trim->unflushed = 0;
}

/*
 * Unlink a table that was seen to hold nothing but zeropages, unless that has
 * changed.  @start is the first address that it maps.
 *
 * This takes mappings away and must not change what anybody reads: the TLB is
 * flushed before the locks are dropped, for the next write fault puts a page
 * where another CPU may still read the zeropage.
 */
static bool pt_unlink_zeroes(struct vm_area_struct *vma, pmd_t *pmd,
			     unsigned long start, pmd_t *pmdval)
{
	struct mm_struct *mm = vma->vm_mm;
	struct mmu_notifier_range range;
	spinlock_t *pml, *ptl;
	bool only = false;
	pte_t *table;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_DISCARD, mm, start,
				start + PMD_SIZE);
	mmu_notifier_invalidate_range_start(&range);
	flush_cache_range(vma, start, start + PMD_SIZE);
	pml = pmd_lock(mm, pmd);
	table = pte_offset_map_rw_nolock(mm, pmd, start, pmdval, &ptl);
	if (!table)
		goto out;
	if (ptl != pml)
		spin_lock_nested(ptl, SINGLE_DEPTH_NESTING);

	only = pt_only_zeroes(table);
	if (only) {
		pt_clear_zeroes(mm, start, table);
		pmd_clear(pmd);
		flush_tlb_range(vma, start, start + PMD_SIZE);
	}

	if (ptl != pml)
		spin_unlock(ptl);
	pte_unmap(table);
out:
	spin_unlock(pml);
	mmu_notifier_invalidate_range_end(&range);
	return only;
}

/* The mmu_gather owns the table of @pmdval from here on. */
static void pt_trim_free(struct pt_trim *trim, struct vm_area_struct *vma,
			 pmd_t pmdval, unsigned long start)
{
	struct mmu_gather *tlb = &trim->tlb;

	if (!trim->gathering) {
		tlb_gather_mmu(tlb, vma->vm_mm);
		tlb_start_vma(tlb, vma);
		trim->gathering = true;
	}
	/* The flush steps by PMD_SIZE from the first address of a table. */
	pte_free_tlb(tlb, pmd_pgtable(pmdval), start);
	mm_dec_nr_ptes(vma->vm_mm);
}

/* Free the table at *@pmd if it may go; [@addr, @next) is what is asked for. */
static void pt_trim_table(struct pt_trim *trim, struct vm_area_struct *vma,
			  pmd_t *pmd, unsigned long addr, unsigned long next)
{
	enum pt_reclaim_skip reason = PT_SKIP_IN_USE;
	bool empty, zeroes = false, young = false, gone = false;
	const unsigned long start = addr & PMD_MASK;
	struct mm_struct *mm = vma->vm_mm;
	spinlock_t *ptl;	/* of the table, or of the huge page */
	pte_t *table;
	pmd_t pmdval;

	table = pte_offset_map_lock(mm, pmd, start, &ptl);
	if (!table)
		return;
	empty = pt_reclaim_check(vma, pmd, ptl, table, start, &reason);
	if (empty)
		gone = pt_unlink_empty(vma, pmd, ptl, trim->source, &pmdval);
	else if (trim->zeroes && pt_private_to_vma(vma, start))
		zeroes = pt_only_zeroes(table);
	if (zeroes && trim->age)
		young = pt_zeroes_young(vma, start, table);
	pte_unmap_unlock(table, ptl);

	if (young) {
		trim->young = true;
	} else if (zeroes) {
		if (trim->unflushed)
			pt_trim_flush(trim, vma);
		gone = pt_unlink_zeroes(vma, pmd, start, &pmdval);
	} else if (empty && !gone) {
		gone = pt_unlink_if_empty(vma, pmd, start, trim->source, &pmdval);
	}
	if (!gone) {
		if (empty || (zeroes && !young))
			reason = PT_SKIP_RACED;
		if (!trim->survey || reason == PT_SKIP_RACED)
			pt_reclaim_skipped(mm, addr, next, trim->source, reason);
		return;
	}

	pt_trim_free(trim, vma, pmdval, start);
	pt_reclaim_freed(mm, addr, next, trim->source);
	pt_upper_emptied(mm, pmd, start);
	/* What held zeropages was flushed when it was unlinked. */
	if (zeroes)
		count_vm_event(PT_RECLAIM_ZERO);
	else
		trim->unflushed++;
}

#ifdef CONFIG_TRANSPARENT_HUGEPAGE

static bool pmd_plain_zero(pmd_t pmd)
{
	return is_huge_zero_pmd(pmd) && !pmd_uffd(pmd) && !pmd_soft_dirty(pmd);
}

static bool pt_huge_zero_young(struct vm_area_struct *vma, pmd_t *pmd,
			       unsigned long start)
{
	spinlock_t *ptl = pmd_trans_huge_lock(pmd, vma);
	bool young;

	if (!ptl)
		return true;
	young = pmdp_test_and_clear_young(vma, start, pmd);
	if (mmu_notifier_clear_young(vma->vm_mm, start, start + PMD_SIZE))
		young = true;
	spin_unlock(ptl);
	return young;
}

/* The huge zeropage has a table in deposit: free that, and forget the page. */
static void pt_trim_huge_zero(struct pt_trim *trim, struct vm_area_struct *vma,
			      pmd_t *pmd, unsigned long addr,
			      unsigned long next)
{
	const unsigned long start = addr & PMD_MASK;
	struct mm_struct *mm = vma->vm_mm;
	struct mmu_notifier_range range;
	pgtable_t table = NULL;
	spinlock_t *ptl;	/* of the table, or of the huge page */

	if (!trim->zeroes || !pmd_plain_zero(pmdp_get_lockless(pmd)))
		return;
	if (trim->age && pt_huge_zero_young(vma, pmd, start)) {
		trim->young = true;
		return;
	}
	if (trim->unflushed)
		pt_trim_flush(trim, vma);
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_DISCARD, mm, start,
				start + PMD_SIZE);
	mmu_notifier_invalidate_range_start(&range);
	ptl = pmd_trans_huge_lock(pmd, vma);
	if (ptl) {
		if (pmd_plain_zero(pmdp_get(pmd))) {
			/* Flushed under the lock, see pt_unlink_zeroes(). */
			pmdp_huge_clear_flush(vma, start, pmd);
			table = pgtable_trans_huge_withdraw(mm, pmd);
		}
		spin_unlock(ptl);
	}
	mmu_notifier_invalidate_range_end(&range);
	if (!table)
		return;

	/* It was in no page table walk's way: no grace period, no flush. */
	pte_free(mm, table);
	mm_dec_nr_ptes(mm);
	pt_reclaim_freed(mm, addr, next, trim->source);
	pt_upper_emptied(mm, pmd, start);
	count_vm_event(PT_RECLAIM_ZERO);
}

#else

static void pt_trim_huge_zero(struct pt_trim *trim, struct vm_area_struct *vma,
			      pmd_t *pmd, unsigned long addr,
			      unsigned long next)
{
}

#endif

static int pt_trim_pmd(pmd_t *pmd, unsigned long addr, unsigned long next,
		       struct mm_walk *walk)
{
	struct pt_trim *trim = walk->private;

	/* Otherwise huge pages would be split to look at their entries. */
	walk->action = ACTION_CONTINUE;
	if (pmd_trans_huge(pmdp_get_lockless(pmd)))
		pt_trim_huge_zero(trim, walk->vma, pmd, addr, next);
	else
		pt_trim_table(trim, walk->vma, pmd, addr, next);
	if (trim->unflushed >= PT_TRIM_BATCH || need_resched())
		pt_trim_flush(trim, walk->vma);
	if (fatal_signal_pending(current))
		return -EINTR;
	cond_resched();
	return 0;
}

/**
 * pt_reclaim_range - free the PTE tables of a range that are empty
 * @vma: the VMA
 * @start: first address of the range, in bytes, within @vma
 * @end: end of the range, exclusive, at most the end of @vma
 * @source: who asks; PT_RECLAIM_ADVICE and PT_RECLAIM_BACKGROUND_ZERO also get
 *	back tables that hold nothing but zeropages, the latter if these were not
 *	read of late
 * @walk_lock: what the caller holds
 *
 * A table is looked at if any of its range is in the range, and freed if all of
 * its range is in @vma.  No contents change.
 *
 * Context: @vma's lock or the mmap lock held, at least for reading, and told by
 * @walk_lock; may sleep.
 * Return: 0, -EINTR when a fatal signal cut the walk short, or 1 when
 * PT_RECLAIM_BACKGROUND_ZERO left a table for next time.
 */
int pt_reclaim_range(struct vm_area_struct *vma, unsigned long start,
		     unsigned long end, enum pt_reclaim_source source,
		     enum page_walk_lock walk_lock)
{
	const struct mm_walk_ops ops = {
		.pmd_entry = pt_trim_pmd,
		.walk_lock = walk_lock,
	};
	struct pt_trim trim = {
		.source = source,
		.survey = source == PT_RECLAIM_ADVICE ||
			  source == PT_RECLAIM_BACKGROUND ||
			  source == PT_RECLAIM_BACKGROUND_ZERO,
		.zeroes = (source == PT_RECLAIM_ADVICE ||
			   source == PT_RECLAIM_BACKGROUND_ZERO) &&
			  pt_zeroes_may_go(vma),
		.age = source == PT_RECLAIM_BACKGROUND_ZERO,
	};
	int err;

	/* A walk would split the huge pages of DAX. */
	if (is_vm_hugetlb_page(vma) || vma_is_dax(vma) ||
	    (vma->vm_flags & (VM_PFNMAP | VM_MIXEDMAP)))
		return 0;

	err = walk_page_range_vma(vma, start, end, &ops, &trim);
	pt_trim_flush(&trim, vma);
	return err ?: trim.young;
}
