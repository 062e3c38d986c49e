// SPDX-License-Identifier: GPL-2.0
/*
 * Not to free the same page table over and over.
 *
 * A page table that was unlinked is memory in use until an RCU grace period is
 * over.  A process that populates and discards one page of a table in a loop would
 * have thousands of tables on their way out at any time, for the one that it has
 * had without page table reclaim, and meet the limit of its memory cgroup.
 *
 * So a discard frees the table of one slot, i.e. of one pmd entry, once in a grace
 * period.  As a table takes the next grace period to go, too, a process has twice as
 * many on their way out, at worst, as it would otherwise have in place, and a few.
 */
#include <linux/bitmap.h>
#include <linux/debugfs.h>
#include <linux/gfp.h>
#include <linux/init.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/mm_types.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>

#include "pt_reclaim.h"
#include "pt_reclaim_stat.h"

/* Tables in a grace period for which it does not matter which they are. */
#define PT_PACE_FREE	32

/* A bit for each slot, a page of them where pages are small. */
#define PT_PACE_SLOTS	32768

/* For tests, which may want tables to be freed as often as possible. */
static bool paced __read_mostly = true;

/* A grace period more: what was freed before the last one is gone, or soon will be. */
static void pt_pace_restart(struct mm_struct *mm, unsigned long gp)
{
	unsigned long *slots = READ_ONCE(mm->pt_pace.slots);

	WRITE_ONCE(mm->pt_pace.gp, gp);
	WRITE_ONCE(mm->pt_pace.nr, 0);
	WRITE_ONCE(mm->pt_pace.no_memory, false);
	if (!slots)
		return;
	/* Whoever sets a bit meanwhile may find it cleared. */
	data_race(memset(slots, 0, PT_PACE_SLOTS / BITS_PER_BYTE));
}

/* The bits of the slots, charged to the mm's memory cgroup; NULL without memory. */
static unsigned long *pt_pace_slots(struct mm_struct *mm)
{
	const gfp_t gfp = GFP_NOWAIT | __GFP_NOMEMALLOC | __GFP_ACCOUNT;
	unsigned long *slots = READ_ONCE(mm->pt_pace.slots), *first;
	struct mem_cgroup *memcg, *old;

	/* Each refusal counts as an event of the cgroup: one is enough. */
	if (slots || READ_ONCE(mm->pt_pace.no_memory))
		return slots;
	memcg = get_mem_cgroup_from_mm(mm);
	old = set_active_memcg(memcg);
	slots = bitmap_zalloc(PT_PACE_SLOTS, gfp);
	set_active_memcg(old);
	mem_cgroup_put(memcg);
	if (!slots) {
		WRITE_ONCE(mm->pt_pace.no_memory, true);
		return NULL;
	}
	first = cmpxchg(&mm->pt_pace.slots, NULL, slots);
	if (!first)
		return slots;
	bitmap_free(slots);
	return first;
}

/* No two slots of one 64 GiB have the same, nor have what is 64 GiB apart. */
static unsigned long pt_pace_bit(unsigned long addr)
{
	unsigned long slot = addr >> PMD_SHIFT;

	return (slot + slot / PT_PACE_SLOTS * 7919) % PT_PACE_SLOTS;
}

/*
 * Was the table of this slot freed since the last grace period began?  And it is
 * now, if not.  Several may ask at once, without a lock in common: then a table or two
 * is not counted.  Expedited grace periods do not count: anybody can have any number of
 * them, and what was freed does not go sooner for each.
 */
static bool pt_freed_lately(struct mm_struct *mm, unsigned long addr)
{
	unsigned int nr = READ_ONCE(mm->pt_pace.nr);
	struct rcu_gp_seq gp;
	unsigned long *slots;

	get_state_synchronize_rcu_full(&gp);
	if (READ_ONCE(mm->pt_pace.gp) != gp.norm) {
		pt_pace_restart(mm, gp.norm);
		nr = 0;
	}
	WRITE_ONCE(mm->pt_pace.nr, nr + 1);
	if (nr < PT_PACE_FREE)
		return false;
	slots = pt_pace_slots(mm);
	return !slots || test_and_set_bit(pt_pace_bit(addr), slots);
}

/**
 * pt_left_for_later - is an empty table to stay for the moment
 * @mm: the mm that it belongs to
 * @start: first address that the discard covers in the table's range, in bytes
 * @end: end of that, exclusive; never beyond the table's range
 * @source: who asks for it to go
 *
 * A table that stays is counted, and the background pass gets it, unless a discard
 * in it does before.  Discards of the whole range of a table always free it, as they
 * have done.
 *
 * Context: any but hard interrupts.
 * Return: true when it is to stay.
 */
bool pt_left_for_later(struct mm_struct *mm, unsigned long start,
		       unsigned long end, enum pt_reclaim_source source)
{
	if (end - start == PMD_SIZE || !READ_ONCE(paced) || !pt_freed_lately(mm, start))
		return false;
	pt_reclaim_mark(mm);
	pt_reclaim_skipped(mm, start, end, source, PT_SKIP_LATELY);
	return true;
}

/**
 * pt_pace_init - prepare a new mm
 * @mm: the mm, which may be the copy of another
 */
void pt_pace_init(struct mm_struct *mm)
{
	memset(&mm->pt_pace, 0, sizeof(mm->pt_pace));
}

/**
 * pt_pace_destroy - free what pt_left_for_later() has allocated for an mm
 * @mm: the mm, which has no users any more
 */
void pt_pace_destroy(struct mm_struct *mm)
{
	bitmap_free(mm->pt_pace.slots);
}

static int __init pt_pace_debugfs(void)
{
	debugfs_create_bool("pt_reclaim_paced", 0600, NULL, &paced);
	return 0;
}
late_initcall(pt_pace_debugfs);
