// SPDX-License-Identifier: GPL-2.0
/*
 * Free the PMD and PUD tables of a VMA that describe nothing while it lives on.
 *
 * Page faults, discards, page walks and rmap walks keep pointers into these tables
 * under locks for reading, and expect them to stay.  So whoever frees one holds each
 * of those locks for writing: the mmap lock, the VMA's, that of its file's mappings
 * and that of its anon_vma.  Which walker is excluded by which of them, and who is
 * left to the grace period, is in Documentation/mm/pt_upper.rst.
 *
 * Nobody is made to wait: all locks are tried, and what cannot be had now is left to
 * the background pass, which tries again.
 */
#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pgalloc.h>
#include <linux/rmap.h>
#include <linux/sched/signal.h>

#include <asm/tlb.h>

#include "internal.h"
#include "pt_reclaim.h"

/* Set in sysfs, see pt_background.c. */
bool pt_upper_on __read_mostly = true;

/* PMD tables that are freed under one hold of the locks: 512 loads each, and a flush. */
#define PT_UPPER_BATCH	32

/* A walk in search of empty PMD tables. */
struct pt_upper {
	unsigned long addr;	/* Where to go on */
	unsigned int seen;	/* Tables that were looked at under this hold of the lock */
	unsigned int nr;
	unsigned long found[PT_UPPER_BATCH];	/* First address of each table's range */
};

static bool pt_pmd_table_empty(pmd_t *table)
{
	int i;

	for (i = 0; i < PTRS_PER_PMD; i++) {
		if (!pmd_none(pmdp_get_lockless(table + i)))
			return false;
	}
	return true;
}

static bool pt_pud_table_empty(pud_t *table)
{
	int i;

	for (i = 0; i < PTRS_PER_PUD; i++) {
		if (!pud_none(pudp_get(table + i)))
			return false;
	}
	return true;
}

/*
 * Is a PMD table the mm's alone?  Processes that share a hugetlb file share them; another
 * one joins, or leaves, with the lock of the file's mappings held.
 */
static bool pt_pmd_table_shared(pmd_t *table)
{
#ifdef CONFIG_HUGETLB_PMD_PAGE_TABLE_SHARING
	return ptdesc_pmd_is_shared(virt_to_ptdesc(table));
#else
	return false;
#endif
}

/*
 * The entry that points to the PUD table of @addr, or NULL if there is no such table.
 * *@next is set to the end of what that was said of.
 */
static p4d_t *pt_p4d_of(struct mm_struct *mm, unsigned long addr, unsigned long *next)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;

	*next = ALIGN_DOWN(addr, PGDIR_SIZE) + PGDIR_SIZE;
	if (pgd_none(*pgd) || pgd_bad(*pgd))
		return NULL;
	p4d = p4d_offset(pgd, addr);
	*next = ALIGN_DOWN(addr, P4D_SIZE) + P4D_SIZE;
	if (p4d_none(*p4d) || p4d_bad(*p4d))
		return NULL;
	return p4d;
}

/* The same, for the entry of @addr in that PUD table, whatever it holds. */
static pud_t *pt_pud_of(struct mm_struct *mm, unsigned long addr, unsigned long *next)
{
	p4d_t *p4d = pt_p4d_of(mm, addr, next);

	if (!p4d)
		return NULL;
	*next = ALIGN_DOWN(addr, PUD_SIZE) + PUD_SIZE;
	return pud_offset(p4d, addr);
}

/*
 * Does @pud point to a PMD table that is empty?  @pud stays, by the lock that the caller
 * holds; a table that processes share (hugetlb) may go all the same, and takes a grace
 * period to be freed.
 */
static bool pt_pmd_table_seems_empty(pud_t *pud, unsigned long start)
{
	bool empty = false;
	pud_t pudval;

	rcu_read_lock();
	pudval = pudp_get(pud);
	if (!pud_none(pudval) && !pud_bad(pudval)) {
		pmd_t *table = pmd_offset_lockless(pud, pudval, start);

		empty = !pt_pmd_table_shared(table) && pt_pmd_table_empty(table);
	}
	rcu_read_unlock();
	return empty;
}

/*
 * The VMA that [@start, @end) belongs to, or NULL if that is not one alone: the locks
 * are those of one VMA.  Parts of the range may be unmapped.
 */
static struct vm_area_struct *pt_only_vma(struct mm_struct *mm, unsigned long start,
					  unsigned long end)
{
	struct vm_area_struct *vma = find_vma(mm, start), *next;

	if (!vma || vma->vm_start >= end)
		return NULL;
	if (vma->vm_end >= end)
		return vma;
	next = find_vma(mm, vma->vm_end);
	return next && next->vm_start < end ? NULL : vma;
}

/* Drivers work on their areas' tables by rules of their own; as for PTE tables. */
static bool pt_upper_may_go(struct vm_area_struct *vma)
{
	return !vma_is_dax(vma) && !(vma->vm_flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO));
}

/* Is it time to let go of the lock?  Not before there was progress. */
static bool pt_upper_pause(struct mm_struct *mm, const struct pt_upper *upper)
{
	return upper->nr == PT_UPPER_BATCH ||
	       (upper->seen && mmap_lock_is_contended(mm));
}

/* Look for empty PMD tables of a VMA from ->addr on, but not beyond @end. */
static void pt_upper_find_in(struct vm_area_struct *vma, unsigned long end,
			     struct pt_upper *upper)
{
	struct mm_struct *mm = vma->vm_mm;
	unsigned long next;
	pud_t *pud;

	for (; upper->addr < end && !pt_upper_pause(mm, upper); upper->addr = next) {
		const unsigned long start = ALIGN_DOWN(upper->addr, PUD_SIZE);

		pud = pt_pud_of(mm, upper->addr, &next);
		if (pud && pt_pmd_table_seems_empty(pud, start) &&
		    pt_only_vma(mm, start, start + PUD_SIZE) == vma)
			upper->found[upper->nr++] = start;
		upper->seen++;
		cond_resched();
	}
}

/* Goes on from ->addr, until there is enough to do, or to @end. */
static void pt_upper_find(struct mm_struct *mm, unsigned long end, struct pt_upper *upper)
{
	VMA_ITERATOR(vmi, mm, upper->addr);
	struct vm_area_struct *vma;

	mmap_assert_locked(mm);
	upper->nr = 0;
	upper->seen = 0;
	for_each_vma_range(vmi, vma, end) {
		if (!pt_upper_may_go(vma))
			continue;
		upper->addr = max(upper->addr, vma->vm_start);
		pt_upper_find_in(vma, min(end, vma->vm_end), upper);
		if (upper->addr < min(end, vma->vm_end))
			return;
	}
	upper->addr = end;
}

/* The locks of those who find the VMA by a page. */
static bool pt_rmap_trylock(struct vm_area_struct *vma)
{
	struct address_space *mapping = vma->vm_file ? vma->vm_file->f_mapping : NULL;

	if (mapping && !i_mmap_trylock_write(mapping))
		return false;
	if (!vma->anon_vma || anon_vma_trylock_write(vma->anon_vma))
		return true;
	if (mapping)
		i_mmap_unlock_write(mapping);
	return false;
}

/* All locks under which somebody may have a pointer into a table of the VMA's own. */
static bool pt_upper_trylock(struct vm_area_struct *vma)
{
	if (!vma_start_write_trylock(vma))
		return false;
	if (!is_vm_hugetlb_page(vma))
		return pt_rmap_trylock(vma);
	if (!hugetlb_vma_trylock_write(vma))
		return false;
	if (pt_rmap_trylock(vma))
		return true;
	hugetlb_vma_unlock_write(vma);
	return false;
}

/* The VMA's own lock goes with the mmap lock. */
static void pt_upper_unlock(struct vm_area_struct *vma)
{
	if (vma->anon_vma)
		anon_vma_unlock_write(vma->anon_vma);
	if (vma->vm_file)
		i_mmap_unlock_write(vma->vm_file->f_mapping);
	if (is_vm_hugetlb_page(vma))
		hugetlb_vma_unlock_write(vma);
}

static void pt_upper_assert_locked(struct vm_area_struct *vma)
{
	mmap_assert_write_locked(vma->vm_mm);
	vma_assert_write_locked(vma);
	if (is_vm_hugetlb_page(vma))
		hugetlb_vma_assert_locked(vma);
	if (vma->vm_file)
		i_mmap_assert_write_locked(vma->vm_file->f_mapping);
	if (vma->anon_vma)
		lockdep_assert_held_write(&vma->anon_vma->root->rwsem);
}

/* A table that was deposited for a huge page would be lost with the PMD table. */
static void pt_assert_no_deposit(struct mm_struct *mm, pmd_t *table)
{
#if defined(CONFIG_TRANSPARENT_HUGEPAGE) && defined(CONFIG_SPLIT_PMD_PTLOCKS)
	VM_WARN_ON_ONCE(pmd_huge_pte(mm, table));
#endif
}

/* Free the PMD table of the span at @start; false if it is in use, or gone. */
static bool pt_free_pmd_table(struct mmu_gather *tlb, struct vm_area_struct *vma,
			      unsigned long start, enum pt_reclaim_source source)
{
	struct mm_struct *mm = vma->vm_mm;
	unsigned long next;
	spinlock_t *ptl;	/* of the PUD table */
	pmd_t *table;
	pud_t *pud;

	pt_upper_assert_locked(vma);
	pud = pt_pud_of(mm, start, &next);
	if (!pud || pud_none(*pud) || pud_bad(*pud))
		return false;
	table = pmd_offset(pud, start);
	if (!pt_pmd_table_empty(table) || pt_pmd_table_shared(table))
		return false;
	pt_assert_no_deposit(mm, table);
	ptl = pud_lock(mm, pud);
	pud_clear(pud);
	spin_unlock(ptl);
	pmd_free_tlb(tlb, table, start);
	mm_dec_nr_pmds(mm);
	pt_reclaim_freed_pmd(mm, start, source);
	return true;
}

/* And the PUD table above it, if that has become empty, and is the VMA's alone. */
static void pt_free_pud_table(struct mmu_gather *tlb, struct vm_area_struct *vma,
			      unsigned long addr, enum pt_reclaim_source source)
{
	const unsigned long start = ALIGN_DOWN(addr, P4D_SIZE);
	struct mm_struct *mm = vma->vm_mm;
	unsigned long next;
	pud_t *table;
	p4d_t *p4d;

	pt_upper_assert_locked(vma);
	p4d = pt_p4d_of(mm, start, &next);
	if (!p4d || mm_pud_folded(mm))
		return;
	table = pud_offset(p4d, start);
	if (!pt_pud_table_empty(table) ||
	    pt_only_vma(mm, start, start + P4D_SIZE) != vma)
		return;
	spin_lock(&mm->page_table_lock);
	p4d_clear(p4d);
	spin_unlock(&mm->page_table_lock);
	pud_free_tlb(tlb, table, start);
	mm_dec_nr_puds(mm);
	pt_reclaim_freed_pud(mm, start, source);
}

/*
 * Free those tables from the @i-th found on that are @vma's; returns the first that
 * is not.  What was found is looked at again: the locks were dropped since.
 */
static unsigned int pt_upper_free_of(struct vm_area_struct *vma,
				     const struct pt_upper *upper, unsigned int i,
				     enum pt_reclaim_source source)
{
	struct mm_struct *mm = vma->vm_mm;
	struct mmu_gather tlb;
	unsigned long start;

	tlb_gather_mmu(&tlb, mm);
	tlb_change_page_size(&tlb, PAGE_SIZE);
	do {
		start = upper->found[i++];
		if (pt_free_pmd_table(&tlb, vma, start, source))
			pt_free_pud_table(&tlb, vma, start, source);
	} while (i < upper->nr &&
		 pt_only_vma(mm, upper->found[i], upper->found[i] + PUD_SIZE) == vma);
	/*
	 * CPUs must have forgotten the tables before anybody can have others in their
	 * place: a page that is faulted in there would not be seen by all.
	 */
	tlb_finish_mmu(&tlb);
	return i;
}

/* Free what was found, if it still may go; returns false if a lock was not to be had. */
static bool pt_upper_free(struct mm_struct *mm, const struct pt_upper *upper,
			  enum pt_reclaim_source source)
{
	struct vm_area_struct *vma;
	unsigned int i = 0;
	bool all = true;

	mmap_assert_write_locked(mm);
	while (i < upper->nr) {
		vma = pt_only_vma(mm, upper->found[i], upper->found[i] + PUD_SIZE);
		if (!vma || !pt_upper_may_go(vma)) {
			i++;
		} else if (!pt_upper_trylock(vma)) {
			all = false;
			i++;
		} else {
			i = pt_upper_free_of(vma, upper, i, source);
			pt_upper_unlock(vma);
		}
	}
	return all;
}

/**
 * pt_upper_emptied - say that a pmd entry was cleared for good
 * @mm: the mm
 * @pmd: the entry
 * @addr: any address that it is for
 *
 * If its neighbours are none as well, others may be, and the background pass is told to
 * look at the PMD table: not here, where all of it is too much to read.
 *
 * Not inlined, for the sake of those who zap and free no table.
 *
 * Context: whatever keeps the PMD table: the mmap lock, the VMA's or an rmap lock, for
 * reading at least.
 */
void pt_upper_emptied(struct mm_struct *mm, pmd_t *pmd, unsigned long addr)
{
	const unsigned long i = pmd_index(addr);

	if ((i == 0 || pmd_none(pmdp_get_lockless(pmd - 1))) &&
	    (i == PTRS_PER_PMD - 1 || pmd_none(pmdp_get_lockless(pmd + 1))))
		pt_upper_mark(mm);
}

/* Does the caller want to end, or is it the last who keeps the mm from doing so? */
static bool pt_upper_stop(struct mm_struct *mm, enum pt_reclaim_source source)
{
	if (source == PT_RECLAIM_BACKGROUND)
		return atomic_read(&mm->mm_users) <= 1 || !READ_ONCE(pt_upper_on);
	return fatal_signal_pending(current);
}

/**
 * pt_upper_trim - free the PMD and PUD tables of a range that are empty
 * @mm: the mm
 * @start: first address of the range, in bytes
 * @end: end of the range, exclusive
 * @source: who asks for it
 *
 * A table is looked at if any of its range is in the range, and freed if no other VMA
 * has a part in it.  Locks for writing are not waited for; the background pass is told of
 * what had to be left for that.
 *
 * Context: no lock of the mm held; a reference on it is.  May sleep.
 */
void pt_upper_trim(struct mm_struct *mm, unsigned long start, unsigned long end,
		   enum pt_reclaim_source source)
{
	struct pt_upper upper = { .addr = start };
	bool all = true;

	if (!READ_ONCE(pt_upper_on) || mm_pmd_folded(mm))
		return;
	while (upper.addr < end && !pt_upper_stop(mm, source)) {
		/* Who has it now is left in peace; who comes later had his turn. */
		if (upper.addr == start ? !mmap_read_trylock(mm) :
					  mmap_read_lock_killable(mm)) {
			all = false;
			break;
		}
		pt_upper_find(mm, end, &upper);
		mmap_read_unlock(mm);
		cond_resched();
		if (!upper.nr)
			continue;
		if (!mmap_write_trylock(mm)) {
			all = false;
			continue;
		}
		all &= pt_upper_free(mm, &upper, source);
		mmap_write_unlock(mm);
	}
	if (!all)
		pt_upper_mark(mm);
}
