/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _LINUX_PT_RECLAIM_H
#define _LINUX_PT_RECLAIM_H

struct mm_struct;

/*
 * Page table reclaim: giving back the page tables that a discard empties while
 * their VMA lives on.  See Documentation/mm/pt_reclaim.rst.
 */

/**
 * enum pt_reclaim_source - what asks for empty tables to be freed
 * @PT_RECLAIM_OFF: nobody; tables stay until munmap() or exit
 * @PT_RECLAIM_DONTNEED: MADV_DONTNEED or MADV_DONTNEED_LOCKED, of the caller's
 *	own mm or through process_madvise()
 * @PT_RECLAIM_UNMAP: a range of a file was unmapped from all processes: hole
 *	punch, MADV_REMOVE, truncation, invalidation
 * @PT_RECLAIM_ADVICE: MADV_TRIM_TABLES, of the caller's own mm or through
 *	process_madvise()
 * @PT_RECLAIM_GUARD: MADV_GUARD_REMOVE
 * @PT_RECLAIM_MOVE: UFFDIO_MOVE
 * @PT_RECLAIM_MREMAP: mremap() that keeps the old VMA, MREMAP_DONTUNMAP
 * @PT_RECLAIM_BACKGROUND: nobody; reclaim or others emptied them a while ago
 * @PT_RECLAIM_BACKGROUND_ZERO: the same, with zeropages that nobody reads
 *
 * The values show in the pt_reclaim tracepoints.
 */
enum pt_reclaim_source {
	PT_RECLAIM_OFF,
	PT_RECLAIM_DONTNEED,
	PT_RECLAIM_UNMAP,
	PT_RECLAIM_ADVICE,
	PT_RECLAIM_GUARD,
	PT_RECLAIM_MOVE,
	PT_RECLAIM_MREMAP,
	PT_RECLAIM_BACKGROUND,
	PT_RECLAIM_BACKGROUND_ZERO,
};

/**
 * enum pt_reclaim_skip - why a table that was asked for stays
 * @PT_SKIP_IN_USE: an entry outside the discarded range is in use
 * @PT_SKIP_KEPT: the discard itself left an entry behind: a guard, a uffd-wp
 *	marker, a page that it may not zap
 * @PT_SKIP_SHARED: the range of the table reaches beyond the VMA, or its
 *	entries are not the mm's to judge (VM_MIXEDMAP)
 * @PT_SKIP_RACED: refilled, freed or replaced by somebody else while the page
 *	table lock was dropped, or may be wanted by a writer who moves its entries
 * @PT_SKIP_LATELY: one was freed in its place in this RCU grace period
 *
 * In the order of the PT_RECLAIM_SKIP_* events.
 */
enum pt_reclaim_skip {
	PT_SKIP_IN_USE,
	PT_SKIP_KEPT,
	PT_SKIP_SHARED,
	PT_SKIP_RACED,
	PT_SKIP_LATELY,
};

#ifdef CONFIG_PT_RECLAIM
void pt_pace_init(struct mm_struct *mm);
void pt_pace_destroy(struct mm_struct *mm);
#else
static inline void pt_pace_init(struct mm_struct *mm)
{
}

static inline void pt_pace_destroy(struct mm_struct *mm)
{
}
#endif

#endif /* _LINUX_PT_RECLAIM_H */
