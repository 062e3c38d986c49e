/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _MM_PT_RECLAIM_STAT_H
#define _MM_PT_RECLAIM_STAT_H

#include <linux/pt_reclaim.h>
#include <linux/vmstat.h>
#include <trace/events/pt_reclaim.h>

#ifdef CONFIG_PT_RECLAIM

static_assert(PT_RECLAIM_SKIP_LATELY - PT_RECLAIM_SKIP_IN_USE ==
	      PT_SKIP_LATELY - PT_SKIP_IN_USE);

/**
 * pt_reclaim_freed - count and trace a PTE table that was unlinked
 * @mm: the mm it belonged to
 * @start: first address that the discard covered in the table's range
 * @end: end of that, exclusive; never beyond the table's range
 * @source: who asked for it
 *
 * Context: any; takes no lock.
 */
static inline void pt_reclaim_freed(struct mm_struct *mm, unsigned long start,
				    unsigned long end,
				    enum pt_reclaim_source source)
{
	count_vm_event(PT_RECLAIM_PTE);
	if (end - start < PMD_SIZE)
		count_vm_event(PT_RECLAIM_PARTIAL);
	trace_pt_reclaim_free(mm, start, end, PGTABLE_LEVEL_PTE, source);
}

#ifdef CONFIG_PT_RECLAIM_UPPER
/**
 * pt_reclaim_freed_pmd - count and trace a PMD table that was unlinked
 * @mm: the mm it belonged to
 * @start: first address of its range
 * @source: who asked for it
 *
 * Context: any; takes no lock.
 */
static inline void pt_reclaim_freed_pmd(struct mm_struct *mm, unsigned long start,
					enum pt_reclaim_source source)
{
	count_vm_event(PT_RECLAIM_PMD);
	trace_pt_reclaim_free(mm, start, start + PUD_SIZE, PGTABLE_LEVEL_PMD, source);
}

/**
 * pt_reclaim_freed_pud - count and trace a PUD table that was unlinked
 * @mm: the mm it belonged to
 * @start: first address of its range
 * @source: who asked for it
 *
 * Context: any; takes no lock.
 */
static inline void pt_reclaim_freed_pud(struct mm_struct *mm, unsigned long start,
					enum pt_reclaim_source source)
{
	count_vm_event(PT_RECLAIM_PUD);
	trace_pt_reclaim_free(mm, start, start + P4D_SIZE, PGTABLE_LEVEL_PUD, source);
}
#endif

/**
 * pt_reclaim_skipped - count and trace a table that stays
 * @mm: the mm it belongs to
 * @start: first address that the discard covered in the table's range
 * @end: end of that, exclusive; never beyond the table's range
 * @source: who asked for it to go
 * @reason: why it stays
 *
 * Context: any; takes no lock.
 */
static inline void pt_reclaim_skipped(struct mm_struct *mm, unsigned long start,
				      unsigned long end,
				      enum pt_reclaim_source source,
				      enum pt_reclaim_skip reason)
{
	count_vm_event(PT_RECLAIM_SKIP_IN_USE + reason);
	trace_pt_reclaim_skip(mm, start, end, source, reason);
}

#else /* CONFIG_PT_RECLAIM */

static inline void pt_reclaim_freed(struct mm_struct *mm, unsigned long start,
				    unsigned long end,
				    enum pt_reclaim_source source)
{
}

static inline void pt_reclaim_skipped(struct mm_struct *mm, unsigned long start,
				      unsigned long end,
				      enum pt_reclaim_source source,
				      enum pt_reclaim_skip reason)
{
}

#endif /* CONFIG_PT_RECLAIM */
#endif /* _MM_PT_RECLAIM_STAT_H */
