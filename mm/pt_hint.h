/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _MM_PT_HINT_H
#define _MM_PT_HINT_H

#include <linux/bits.h>
#include <linux/log2.h>
#include <linux/mm_types.h>
#include <linux/pgtable.h>

/*
 * Where the entries of a PTE table are likely to be in use.
 *
 * ptdesc->pt_used_hint has one bit for every PT_HINT_GROUP neighbouring
 * entries.  Whoever populates an entry sets the bit; a discard that looks at
 * the group and finds nothing clears it.  So every group that a discard looks
 * at in vain was paid for by a populated entry, and the discard that frees
 * nothing costs a constant on average, however its caller places pages.
 *
 * It is a hint in both directions: what populates many entries at once (fork,
 * the split of a huge page, fault-around, large folios, guards, the first fault
 * in a new table) sets one bit or none, and so do userfaultfd markers, device
 * memory and drivers' pages; and plain stores may lose a bit.  Nobody
 * decides that an entry is in use, or that a table is empty, without reading
 * entries under the page table lock.
 */
#define PT_HINT_SHIFT	(ilog2(PTRS_PER_PTE) > ilog2(BITS_PER_LONG) ? \
			 ilog2(PTRS_PER_PTE) - ilog2(BITS_PER_LONG) : 0)
#define PT_HINT_GROUP	BIT(PT_HINT_SHIFT)

#ifdef CONFIG_PT_RECLAIM

/**
 * pt_hint_of - the hint word of a PTE table
 * @ptl: the table's lock
 * @pmdval: value of the pmd entry that points to the table
 *
 * With the lock in the ptdesc, which is next to always, that is one constant
 * offset; page faults are the ones who count.
 *
 * Context: the caller keeps the table from being freed: by holding @ptl or by
 * the RCU read lock of pte_offset_map() and friends.
 * Return: the word; access it with READ_ONCE() and WRITE_ONCE().
 */
static inline unsigned long *pt_hint_of(spinlock_t *ptl, pmd_t pmdval)
{
#if defined(CONFIG_SPLIT_PTE_PTLOCKS) && !ALLOC_SPLIT_PTLOCKS
	return &container_of(ptl, struct ptdesc, ptl)->pt_used_hint;
#else
	return &page_ptdesc(pmd_page(pmdval))->pt_used_hint;
#endif
}

/**
 * pt_hint_set - note that an entry is being populated
 * @ptl: the table's lock
 * @pmdval: value of the pmd entry that points to the table
 * @addr: address that the entry maps, in bytes
 *
 * A plain store, without a test first: it hits the cache line of @ptl, which
 * every caller writes to anyway (unless the lock is too large for a ptdesc:
 * lockdep, PREEMPT_RT).
 *
 * Context: as for pt_hint_of().
 */
static inline void pt_hint_set(spinlock_t *ptl, pmd_t pmdval,
			       unsigned long addr)
{
	unsigned long *hintp = pt_hint_of(ptl, pmdval);
	unsigned int bit = pte_index(addr) >> PT_HINT_SHIFT;

	WRITE_ONCE(*hintp, READ_ONCE(*hintp) | BIT(bit));
}

/**
 * pt_hint_set_range - note that entries of a range may have been populated
 * @ptl: the table's lock
 * @pmdval: value of the pmd entry that points to the table
 * @start: address that the first of them maps, in bytes
 * @end: end of the range, exclusive, within the range of the table
 *
 * For those who have looked at every entry of the range anyway: that pays for
 * groups that turn out to have none.
 *
 * Context: as for pt_hint_of().
 */
static inline void pt_hint_set_range(spinlock_t *ptl, pmd_t pmdval,
				     unsigned long start, unsigned long end)
{
	unsigned long *hintp = pt_hint_of(ptl, pmdval);
	unsigned int first = pte_index(start) >> PT_HINT_SHIFT;
	unsigned int last = pte_index(end - 1) >> PT_HINT_SHIFT;

	WRITE_ONCE(*hintp, READ_ONCE(*hintp) | GENMASK(last, first));
}

#else /* CONFIG_PT_RECLAIM */

static inline void pt_hint_set_range(spinlock_t *ptl, pmd_t pmdval,
				     unsigned long start, unsigned long end)
{
}

static inline void pt_hint_set(spinlock_t *ptl, pmd_t pmdval,
			       unsigned long addr)
{
}

#endif /* CONFIG_PT_RECLAIM */
#endif /* _MM_PT_HINT_H */
