/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How the TDP MMU frees the shadow pages that a discard emptied, for spin.
 *
 * model.sh runs this as it is, which must find no error, and with each of the
 * broken variants, which must find one.  "SP" is a shadow page, i.e. a page table.
 *
 * What there is
 * =============
 *
 *   root (level 3)      one SPTE of it is modelled; never unlinked
 *     D (level 2)       covers all GFNs, 0 to 2
 *       P0 (level 1)    GFNs 0 and 1
 *       P1 (level 1)    GFN 2
 *
 * discard()   discards, and unmaps that are none, from mmu_lock until mm has freed
 *             the pages: kvm_mmu_notifier_invalidate_range_start(),
 *             kvm_handle_hva_range(), kvm_tdp_mmu_unmap_gfn_range(),
 *             tdp_mmu_discard_range() or tdp_mmu_zap_leafs(),
 *             kvm_mmu_notifier_invalidate_range_end()
 * fault()     page faults of a vCPU: kvm_tdp_mmu_page_fault(), kvm_tdp_mmu_map()
 * lockless()  software walks that hold the RCU read lock and nothing else:
 *             fast_page_fault(), kvm_tdp_mmu_age_gfn_range(),
 *             kvm_tdp_mmu_get_walk()
 * vcpu()      another vCPU, as a hardware walker: vcpu_enter_guest(), and what the
 *             MMU may do in guest mode
 * memory()    tdp_mmu_free_sp_rcu_callback(), and the page allocator with its other
 *             users
 *
 * What is asserted
 * ================
 *
 *   !hw_reused    the hardware does not read an SP that was reused
 *   !sw_reused    nor does a lockless walk
 *   !dangling     nor do the discard and the page fault
 *   !hw_freed     the hardware does not use a translation to guest memory that a
 *                 discard freed, once invalidate_range_start() has returned
 *   !bug_pfn      a fault does not find a leaf SPTE for other memory than its own
 *                 (tdp_mmu_map_handle_target_level(), __handle_changed_spte())
 *   !has_child    an SP that is unlinked has no child (tdp_mmu_discard_sp())
 *   !unflushed    the RCU callback finds that there was a flush since the SP was
 *                 unlinked (tdp_mmu_assert_flushed()); with -DPROVE_MMU
 *   !leaked       in the end each SP is linked or was freed
 *
 * and by spin itself that nobody waits forever, a callback of RCU among others.
 *
 * A page is reused in the step in which it is freed, see free_sp(): to read what was
 * freed, but not yet reused, is an error as well.
 *
 * What is left out, and why that hides nothing
 * ============================================
 *
 * - Memory ordering: statements take effect one after the other, for all at once.
 *   The flush depends on it, and both sides have a full barrier between the write
 *   and the read that matter: kvm_make_all_cpus_request() between SPTE and
 *   vcpu->mode, vcpu_enter_guest() between vcpu->mode and the requests.  RCU is
 *   modelled by what it guarantees.
 * - The hardware's caches hold one entry here.  A wrong read is the last of a chain,
 *   the root's SPTE, an SPTE of level 2, a leaf SPTE, of which each is read through
 *   the one before, at any time after it; reads of the hardware change nothing (but
 *   see A/D bits), so what else is cached has no effect.  Nothing is evicted: that
 *   makes stale entries fewer.  The same goes for lockless walks, which may go back
 *   to an SP that they read before.
 * - Hardware and lockless walks may be searched one without the other (-DNO_LOCKLESS,
 *   -DNO_VCPU).  Neither does anything that the other sees, except to make a flush
 *   or a grace period take longer.
 * - A walk of the hardware that is under way when the vCPU leaves guest mode ends
 *   there.  What it has read before is a cached entry here, which stays.
 * - SPTEs, levels, roots and vCPUs are few.  But there are SPs with leafs and SPs
 *   with SPs, SPs that the range covers and such that reach out of it, and parents
 *   that become empty.  One vCPU is flushed like another; each root has SPs of its
 *   own, and an RCU section of its own.
 * - Faults that race with each other, huge pages, recovery of NX huge pages, invalid
 *   roots: as they were before the series.  All of that holds mmu_lock, hence does not
 *   run at the same time as a discard; where it unlinks SPs it flushes for itself.
 * - vCPUs have pages in stock for their SPs (mmu_topup_memory_caches()), i.e. take
 *   them earlier than here.  There are three pages, so that an SP may be linked anew
 *   while its predecessor waits for RCU; a fault that finds no page gives up.
 * - A fault looks at the sequence count and at the pfn when it takes mmu_lock.  One
 *   that did so earlier either does the same or nothing, provided that
 *   is_page_fault_stale() works.  That it does is what -DLATE_FAULT=1 is for.
 * - A/D bits: the hardware writes to an SPTE that it reads.  The read fails first.
 * - Dirty and access tracking, NX, accounting: no SP lives longer or shorter by it.
 * - MMIO SPTEs: are non-present here, as to is_shadow_present_pte().
 * - That mmu_lock disables preemption, or on PREEMPT_RT is a read-side critical
 *   section: to RCU as it is now that means that no grace period ends while it is
 *   held.  The kernel's comments do not rely on it, nor does the model, unless
 *   -DLOCK_IS_RCU.
 *
 * Broken variants, -D
 * ===================
 *
 *   NO_FLUSH              unlinking an SP wants no flush, only zapping a leaf does
 *   NO_FLUSH_PROVED       the same with PROVE_MMU, for tdp_mmu_assert_flushed()
 *   PARENT_NO_FLUSH       ... so for an SP of level 2 only
 *   FLUSH_AFTER_UNLOCK    the flush comes after rcu_read_unlock()
 *   FLUSH_FIRST           the flush comes before the SP is unlinked
 *   FLUSH_BEFORE_PATH     ... before tdp_mmu_discard_path(), i.e. not after it
 *   YIELD_WITHOUT_FLUSH   the flush stays pending when the walk yields
 *   YIELD_FLUSH_LATE      the walk yields with a flush, after rcu_read_unlock()
 *   YIELD_KEEPS_TABLE     the walk goes on where it was, and not from the root
 *   NO_RCU                the SP is freed right after the flush
 *   CALL_RCU_FIRST        call_rcu() comes before the SP is unlinked
 *   LOST_CALLBACK         an SP without present SPTEs is not handed to call_rcu()
 *   NO_EMPTY_CHECK        tdp_mmu_discard_path() does not look if a parent is empty
 *   NO_RETURN_FLUSH       kvm_handle_hva_range() does not flush
 *   NO_STALE_CHECK        a fault goes without is_page_fault_stale()
 *   PLAIN_STORE           fast_page_fault() without compare-and-exchange
 *   LATE_MODE             vcpu_enter_guest() sets vcpu->mode after it has looked
 *                         for requests
 */

#ifdef NO_FLUSH_PROVED
#define NO_FLUSH
#define PROVE_MMU
#endif

/* Unmaps, one after another, and how many at the same time do so. */
#ifndef UNMAPS
#define UNMAPS		2
#endif
#ifndef DISCARDS
#define DISCARDS	1
#endif
#ifndef LATE_FAULT
#define LATE_FAULT	0
#endif

/* With -DPROBE (and -DPRINTF for the compiler) the search says what it gets to. */
#ifdef PROBE
#define reached(n)	printf("reached %d\n", n)
#else
#define reached(n)	skip
#endif
#define READ_UNLINKED	1	/* the hardware reads an SP that is unlinked */
#define READ_FROZEN	2	/* ... and that had a leaf before */
#define WALK_UNLINKED	3	/* a lockless walk reads an SP that is unlinked */
#define WALK_LOSES	4	/* ... and its compare-and-exchange fails */
#define STALE_CACHE	5	/* an SP is reused that is cached, outside guest mode */
#define FREED_IN_YIELD	6	/* an SP is freed while the discard yields */
#define REUSED_AS_SP	7	/* what was an SP is one again */
#define FAULT_IN_YIELD	8	/* a fault maps something while the discard yields */
#define STALE_FAULT	9	/* a fault comes too late */
#define HEAD_GOES	10	/* an SP goes that reaches out of the range */
#define PARENT_GOES	11	/* a parent goes that became empty */
#define EMPTY_GOES	12	/* an SP goes, and no leaf was zapped */
#define ALL_GONE	13	/* in the end nothing is left but the root */

/* SPTEs; TABLE + page is a pointer to an SP. */
#define NONPRESENT	0	/* SHADOW_NONPRESENT_VALUE */
#define FROZEN		1	/* FROZEN_SPTE */
#define TABLE		2
#define LEAF		(TABLE + PAGES)	/* maps guest memory */
#define DEAD		(LEAF + 1)	/* maps what was guest memory until a discard freed it */
#define ALIEN		(LEAF + 2)	/* not KVM's; looks like a leaf */
#define is_table(s)	((s) >= TABLE && (s) < LEAF)
#define is_leaf(s)	((s) >= LEAF)
#define page_of(s)	((s) - TABLE)

/* Whose a page is. */
#define FREE		0	/* the page allocator's, or somebody else's */
#define USED		1	/* the TDP MMU's */
#define WAITS		2	/* RCU's, since call_rcu() */

#define PAGES		3
byte root;			/* the one SPTE of the root */
byte spte[2 * PAGES];
#define SPTE(p, i)	spte[(p) * 2 + (i)]
#define D		page_of(root)
#define P(i)		page_of(SPTE(D, i))
#define has_p(i)	(is_table(root) && is_table(SPTE(D, i)))
#define is_empty(p)	(SPTE(p, 0) <= FROZEN && SPTE(p, 1) <= FROZEN)

byte owner[PAGES];

byte readers;			/* mmu_lock */
bool writer;

byte in_rcu;			/* who is in a read-side critical section, as bits */
byte gp[PAGES];			/* whom the grace period of a page waits for */
#define RCU_LOCKLESS	1
#define RCU_FAULT	2
#define RCU_DISCARD	4	/* and 8, with two discards at the same time */

byte in_progress, inv_start, inv_end;	/* kvm->mmu_invalidate_*; see fault_seq */
byte window[3];			/* unmaps of a GFN between the return of start() and end() */

bool guest_mode;		/* vcpu->mode is IN_GUEST_MODE */
bool flush_req;			/* KVM_REQ_TLB_FLUSH */

/*
 * What the hardware has cached, or a lockless walk has read: a pointer to an SP of
 * that level, for a range that begins with that GFN, or a leaf; and if the page was
 * reused since it was read.
 */
byte hw_level, hw_sp, hw_gfn, hw_leaf;
bool hw_reused;
byte sw_level, sw_sp, sw_gfn, sw_leaf;
bool sw_reused;

/* What a fault brings along: the SPTE to be, and if mmu_invalidate_seq is another. */
byte fault_gfn, fault_spte;
bool fault_seq;

byte discards = DISCARDS;	/* processes that run */
byte workers;

/* What assertions are about, for spin to name it. */
bool dangling, bug_pfn, has_child, hw_freed, leaked;

#ifdef PROVE_MMU
bool unflushed;
bool sp_unflushed[PAGES];	/* sp->flushes_at_unlink is the current count */
#endif
#ifdef PROBE
byte yielding;			/* discards that do */
bool was_sp[PAGES];
bool had_sp;
#endif

/*
 * A grace period waits for those who are in a read-side critical section when it
 * starts, and for no one else.  The real one waits for some who come later, too.
 */
inline rcu_read_lock(who) { in_rcu = in_rcu | (who) }

inline rcu_read_unlock(who)
{
	in_rcu = in_rcu & ~(who);
	gp[0] = gp[0] & in_rcu;
	gp[1] = gp[1] & in_rcu;
	gp[2] = gp[2] & in_rcu
}

inline call_rcu(p)
{
	d_step {
		owner[p] = WAITS;
		gp[p] = in_rcu
	}
}

/*
 * kvm_flush_remote_tlbs(), kvm_make_all_cpus_request(): who is in guest mode is
 * kicked out and waited for.  That vcpu() can leave at any time stands for the IPI.
 */
inline kvm_flush_remote_tlbs()
{
	flush_req = true;
	!guest_mode || !flush_req
}

/*
 * discard(): the walk under one root.  What is local there is used here: start, end,
 * flush (tdp_mmu_discard.flush), freed (.nr_freed); me is its bit in in_rcu.
 *
 * mmu_lock is held for write, so steps in which nobody else takes part are one.
 */

inline tdp_mmu_flush_unlinked()
{
	kvm_flush_remote_tlbs();
	d_step {
		flush = false;
#ifdef PROVE_MMU
		sp_unflushed[0] = false;
		sp_unflushed[1] = false;
		sp_unflushed[2] = false;
#endif
#ifdef NO_RCU
		/* In this variant the discard itself is all that a page waits for. */
		gp[0] = 0;
		gp[1] = 0;
		gp[2] = 0;
#endif
	}
}

inline flush_if_needed()
{
	if
	:: flush -> tdp_mmu_flush_unlinked()
	:: else
	fi
}

inline discard_rcu_unlock()
{
#ifndef LOCK_IS_RCU
	d_step { rcu_read_unlock(me) }
#else
	skip
#endif
}

inline write_unlock()
{
#ifdef LOCK_IS_RCU
	rcu_read_unlock(me);
#endif
	writer = false
}

/*
 * tdp_mmu_iter_cond_resched().  The walk restarts from the root: D and P() are read
 * again wherever they are used.  It yields more often than the kernel's, which makes
 * progress between two yields.
 */
inline cond_resched()
{
	if
	:: skip
	:: skip;
#if !defined(YIELD_WITHOUT_FLUSH) && !defined(YIELD_FLUSH_LATE)
		flush_if_needed();
#endif
		discard_rcu_unlock();
#ifdef YIELD_FLUSH_LATE
		flush_if_needed();
#endif
		d_step {
#ifdef PROBE
			yielding++;
#endif
			write_unlock()
		}
		atomic {
			!writer && !readers;
			writer = true;
			rcu_read_lock(me);
#ifdef PROBE
			yielding--
#endif
		}
	fi
}

/* handle_removed_pt(), for one SPTE. */
inline freeze(p, k)
{
	if
	:: is_leaf(SPTE(p, k)) ->
		d_step {
			SPTE(p, k) = FROZEN;
			zapped = true;
#ifdef NO_FLUSH
			flush = true
#endif
		}
	:: else
	fi
}

/*
 * tdp_mmu_discard_sp(), tdp_mmu_set_spte(), handle_removed_pt(): unlink the SP, zap
 * what it maps, hand it to RCU.
 */
inline tdp_mmu_discard_sp(level, parent)
{
	d_step {
		page = page_of(parent);
		dangling = (owner[page] != USED);
		assert(!dangling);
		has_child = (is_table(SPTE(page, 0)) || is_table(SPTE(page, 1)));
		assert(!has_child)
	}
#ifdef FLUSH_FIRST
	tdp_mmu_flush_unlinked();
#endif
#ifdef CALL_RCU_FIRST
	call_rcu(page);
#endif
	d_step {
		parent = NONPRESENT;
		freed = true;
#ifdef PROVE_MMU
		sp_unflushed[page] = true;
#endif
#if !defined(NO_FLUSH) && !defined(FLUSH_FIRST)
#ifdef PARENT_NO_FLUSH
		flush = flush || level == 1
#else
		flush = true
#endif
#endif
	}
	freeze(page, 0);
	freeze(page, 1);
	if
	:: !zapped -> reached(EMPTY_GOES)
	:: else
	fi;
#if defined(LOST_CALLBACK)
	if
	:: zapped -> call_rcu(page)
	:: else
	fi;
#elif defined(NO_RCU)
	d_step {
		owner[page] = WAITS;
		gp[page] = me
	}
#elif !defined(CALL_RCU_FIRST)
	call_rcu(page);
#endif
	d_step {
		page = 0;
		zapped = false
	}
}

#define in_range(g)	(start <= (g) && (g) < end)
#define covers(k)	((k) == 0 && start == 0 && end >= 2 || (k) == 1 && end == 3)
#define overlaps(k)	((k) == 0 && start < 2 || (k) == 1 && end == 3)

/* tdp_mmu_iter_set_spte() of a leaf. */
inline zap_leaf(g)
{
	if
	:: in_range(g) ->
		cond_resched();
		d_step {
			if
			:: has_p((g) / 2) ->
				dangling = (owner[D] != USED || owner[P((g) / 2)] != USED);
				assert(!dangling);
				if
				:: is_leaf(SPTE(P((g) / 2), (g) % 2)) ->
					SPTE(P((g) / 2), (g) % 2) = NONPRESENT;
					flush = true
				:: else
				fi
			:: else
			fi
		}
	:: else
	fi
}

/* tdp_mmu_discard_leafs(), for what is below SPTE k of D. */
inline tdp_mmu_discard_leafs(k)
{
	if
	:: overlaps(k) ->
#ifdef YIELD_KEEPS_TABLE
		table = root;
#endif
		cond_resched();
#ifdef YIELD_KEEPS_TABLE
		d_step {
			dangling = (is_table(table) && owner[page_of(table)] != USED);
			assert(!dangling);
			table = 0
		}
#endif
		if
		:: has_p(k) && covers(k) -> tdp_mmu_discard_sp(1, SPTE(D, k))
		:: has_p(k) && !covers(k) ->
			zap_leaf((k) * 2);
			zap_leaf((k) * 2 + 1)
		:: else
		fi
	:: else
	fi
}

/* tdp_mmu_discard_level(), for the one level that there is. */
inline tdp_mmu_discard_level()
{
	if
	:: start == 0 && end == 3 ->
		cond_resched();
		if
		:: is_table(root) && is_empty(D) ->
			reached(PARENT_GOES);
			tdp_mmu_discard_sp(2, root)
		:: else
		fi
	:: else
	fi
}

/* tdp_mmu_discard_path() of a GFN that is below SPTE k of D. */
inline tdp_mmu_discard_path(k)
{
	if
	:: has_p(k) && is_empty(P(k)) ->
		reached(HEAD_GOES);
		tdp_mmu_discard_sp(1, SPTE(D, k))
	:: else
	fi;
	if
#ifdef NO_EMPTY_CHECK
	:: is_table(root) && !is_table(SPTE(D, k)) ->
#else
	:: is_table(root) && is_empty(D) ->
#endif
		tdp_mmu_discard_sp(2, root)
	:: else
	fi
}

inline tdp_mmu_discard_range()
{
	tdp_mmu_discard_leafs(0);
	tdp_mmu_discard_leafs(1);
	tdp_mmu_discard_level();
#ifdef FLUSH_BEFORE_PATH
	flush_if_needed();
#endif
	tdp_mmu_discard_path(start / 2);
	tdp_mmu_discard_path((end - 1) / 2);
#ifdef FLUSH_BEFORE_PATH
	flush = false;
#endif
#ifdef FLUSH_AFTER_UNLOCK
	discard_rcu_unlock();
#endif
	if
	:: freed && flush -> tdp_mmu_flush_unlinked()
	:: else
	fi;
#ifndef FLUSH_AFTER_UNLOCK
	discard_rcu_unlock();
#endif
	freed = false
}

/* The memory at a GFN is not the guest's any more, whoever still has its address. */
inline mm_frees(g)
{
	if
	:: in_range(g) ->
		if
		:: fault_spte == LEAF && fault_gfn == g -> fault_spte = DEAD
		:: else
		fi;
		if
		:: hw_leaf == LEAF && hw_gfn == g -> hw_leaf = DEAD
		:: else
		fi;
		if
		:: sw_leaf == LEAF && sw_gfn == g -> sw_leaf = DEAD
		:: else
		fi;
		if
		:: has_p((g) / 2) && SPTE(P((g) / 2), (g) % 2) == LEAF ->
			SPTE(P((g) / 2), (g) % 2) = DEAD
		:: else
		fi
	:: else
	fi
}

proctype discard(byte me)
{
	byte start, end, n, page, table;
	bool flush, freed, zapped, is_discard;

	do
	:: n < UNMAPS ->
		atomic {
			n++;
			if	/* at least a whole SP */
			:: is_discard = true; start = 0; end = 2
			:: is_discard = true; start = 0; end = 3
			:: is_discard = true; start = 1; end = 3
			:: is_discard = true; start = 2; end = 3
			/* less than that, or none: tdp_mmu_may_discard() */
			:: start = 0; end = 1
			:: start = 2; end = 3
			fi
		}

		/* kvm_handle_hva_range(), kvm_mmu_invalidate_start(), ..._range_add() */
		atomic {
			!writer && !readers;
			writer = true;
			in_progress++;
			if
			:: in_progress == 1 -> inv_start = start; inv_end = end
			:: else ->
				inv_start = (start < inv_start -> start : inv_start);
				inv_end = (end > inv_end -> end : inv_end)
			fi;
			rcu_read_lock(me)
		}

		if
		:: is_discard -> tdp_mmu_discard_range()
		:: else ->
			/* tdp_mmu_zap_leafs() */
			zap_leaf(start);
			discard_rcu_unlock()
		fi;

#ifndef NO_RETURN_FLUSH
		if
		:: flush -> kvm_flush_remote_tlbs()
		:: else
		fi;
#endif
		/* start() returns, mm frees the pages, and calls end(). */
		d_step {
			flush = false;
			window[0] = window[0] + in_range(0);
			window[1] = window[1] + in_range(1);
			window[2] = window[2] + in_range(2);
			write_unlock()
		}
		d_step {
			mm_frees(0);
			mm_frees(1);
			mm_frees(2)
		}
		atomic {
			!writer && !readers;
			in_progress--;
			if
			:: !in_progress -> inv_start = 0; inv_end = 0
			:: else
			fi;
			if
			:: fault_spte -> fault_seq = true
			:: else
			fi;
			window[0] = window[0] - in_range(0);
			window[1] = window[1] - in_range(1);
			window[2] = window[2] - in_range(2);
			start = 0;
			end = 0;
			is_discard = false
		}
	:: else -> break
	od;
	discards--
}

/* tdp_mmu_alloc_sp(), tdp_mmu_init_child_sp(), tdp_mmu_link_sp(), if not there. */
inline link_sp(entry)
{
	atomic {
		if
		:: entry == NONPRESENT ->
			/* All free pages are alike, so take the first. */
			if
			:: owner[0] == FREE -> page = 0
			:: owner[0] != FREE && owner[1] == FREE -> page = 1
			:: owner[0] != FREE && owner[1] != FREE && owner[2] == FREE -> page = 2
			:: else -> goto out
			fi;
#ifdef PROBE
			if
			:: was_sp[page] -> reached(REUSED_AS_SP)
			:: else
			fi;
			had_sp = true;
#endif
			owner[page] = USED;
			SPTE(page, 0) = NONPRESENT;
			SPTE(page, 1) = NONPRESENT;
			entry = TABLE + page;
			page = 0
		:: else ->
			dangling = (owner[page_of(entry)] != USED);
			assert(!dangling)
		fi
	}
}

proctype fault()
{
	byte page, old;

	do
	:: atomic { discards && (!writer || LATE_FAULT) ->
		/* kvm_mmu_faultin_pfn() */
		if
		:: fault_gfn = 0
		:: fault_gfn = 1
		:: fault_gfn = 2
		fi;
		fault_spte = LEAF;
#if LATE_FAULT
		skip }
		atomic { !writer ->
#endif
		/* kvm_tdp_mmu_page_fault(), is_page_fault_stale(), mmu_invalidate_retry_gfn() */
		readers++;
#ifndef NO_STALE_CHECK
		if
		:: fault_seq || (in_progress && inv_start <= fault_gfn &&
				 fault_gfn < inv_end) ->
			reached(STALE_FAULT);
			goto out
		:: else
		fi;
#endif
		rcu_read_lock(RCU_FAULT) }

		/* kvm_tdp_mmu_map() */
		link_sp(root);
		link_sp(SPTE(D, fault_gfn / 2));
		/* tdp_mmu_map_handle_target_level() */
		atomic {
			old = SPTE(P(fault_gfn / 2), fault_gfn % 2);
			bug_pfn = (old && old != fault_spte);
			assert(!bug_pfn);
			old = 0;
#ifdef PROBE
			if
			:: yielding -> reached(FAULT_IN_YIELD)
			:: else
			fi;
#endif
			SPTE(P(fault_gfn / 2), fault_gfn % 2) = fault_spte
		}
out:		atomic {
			rcu_read_unlock(RCU_FAULT);
			readers--;
			fault_gfn = 0;
			fault_spte = 0;
			fault_seq = false
		}
	:: !discards -> break
	od;
	workers--
}

/* Each read is a step; what is read has to be an SPTE for as long as RCU says so. */
proctype lockless()
{
	byte k, s;

	do
	:: atomic { discards && is_table(root) ->
		rcu_read_lock(RCU_LOCKLESS);
		sw_level = 2;
		sw_sp = D }

		do
		:: atomic { sw_level ->
			assert(!sw_reused);
			if
			:: owner[sw_sp] == WAITS -> reached(WALK_UNLINKED)
			:: else
			fi;
			if
			:: k = 0
			:: k = 1
			fi;
			s = SPTE(sw_sp, k);
			if
			:: sw_level == 2 && is_table(s) ->
				sw_level = 1;
				sw_gfn = k * 2;
				sw_sp = page_of(s);
				k = 0
			:: sw_level == 1 && is_leaf(s) && !sw_leaf ->
				sw_gfn = sw_gfn + k;
				sw_leaf = s;
				k = 0
			:: else -> k = 0
			fi;
			s = 0 }
		/* fast_pf_fix_direct_spte(), kvm_tdp_mmu_age_spte(): of a bit that is not here */
		:: atomic { sw_leaf ->
			assert(!sw_reused);
#ifdef PLAIN_STORE
			SPTE(sw_sp, sw_gfn % 2) = sw_leaf;
#else
			if
			:: SPTE(sw_sp, sw_gfn % 2) != sw_leaf -> reached(WALK_LOSES)
			:: else
			fi;
#endif
			break }
		:: break
		od;

		atomic {
			rcu_read_unlock(RCU_LOCKLESS);
			sw_level = 0;
			sw_sp = 0;
			sw_gfn = 0;
			sw_leaf = 0;
			sw_reused = false
		}
	:: !discards -> break
	od;
	workers--
}

inline hw_forget()
{
	hw_level = 0;
	hw_sp = 0;
	hw_gfn = 0;
	hw_leaf = 0;
	hw_reused = false
}

proctype vcpu()
{
	byte s;

outside:
	/* vcpu_enter_guest() */
	do
	:: atomic { flush_req ->
		/* kvm_vcpu_flush_tlb_all(): paging-structure caches, too */
		flush_req = false;
		hw_forget() }
#ifdef LATE_MODE
	:: !flush_req ->
		guest_mode = true;
		break
#else
	:: discards ->
		guest_mode = true;
		/* smp_mb__after_srcu_read_unlock(), kvm_vcpu_exit_request() */
		if
		:: flush_req -> guest_mode = false
		:: else -> break
		fi
#endif
	:: !discards -> goto gone
	od;

	/*
	 * Guest mode.  The hardware may use what it has cached, cache what it reads,
	 * and start again from the root, whose address it knows.
	 */
	do
	:: atomic { is_table(root) ->
		hw_forget();
		hw_level = 2;
		hw_sp = D }
	:: atomic { hw_level ->
		assert(!hw_reused);
		if
		:: owner[hw_sp] == WAITS -> reached(READ_UNLINKED)
		:: else
		fi;
		if
		:: s = 0
		:: s = 1
		fi;
		if
		:: SPTE(hw_sp, s) == FROZEN -> reached(READ_FROZEN)
		:: hw_level == 2 && is_table(SPTE(hw_sp, s)) ->
			hw_level = 1;
			hw_gfn = s * 2;
			hw_sp = page_of(SPTE(hw_sp, s))
		:: hw_level == 1 && is_leaf(SPTE(hw_sp, s)) ->
			hw_level = 0;
			hw_gfn = hw_gfn + s;
			hw_leaf = SPTE(hw_sp, s);
			hw_sp = 0
		:: else
		fi;
		s = 0 }
	:: d_step { hw_leaf ->
		hw_freed = (hw_leaf == DEAD || window[hw_gfn]);
		assert(!hw_freed) }
	:: guest_mode = false;
		goto outside
	od;
gone:
	workers--
}

/*
 * tdp_mmu_free_sp_rcu_callback(), and then the page is somebody else's, who writes to
 * it, and gives it back in the same step: that he keeps it for a while is as if no
 * fault wanted it.  If he gets it later than here, nobody reads it in between, as
 * that is taken for an error.
 */
inline free_sp(p)
{
#ifdef PROVE_MMU
	unflushed = sp_unflushed[p];
	assert(!unflushed);
#endif
#ifdef PROBE
	if
	:: yielding -> reached(FREED_IN_YIELD)
	:: else
	fi;
	was_sp[p] = true;
#endif
	owner[p] = FREE;
	SPTE(p, 0) = ALIEN;
	SPTE(p, 1) = ALIEN;
	if
	:: hw_level && hw_sp == p -> reached(STALE_CACHE); hw_reused = true
	:: else
	fi;
	if
	:: sw_level && sw_sp == p -> sw_reused = true
	:: else
	fi
}

#define leaks(p)	(owner[p] == USED && root != TABLE + p &&		\
			 !(is_table(root) &&					\
			   (SPTE(D, 0) == TABLE + p || SPTE(D, 1) == TABLE + p)))

init {
	atomic {
		run discard(RCU_DISCARD);
#if DISCARDS > 1
		run discard(2 * RCU_DISCARD);
#endif
		workers++;
		run fault();
#ifndef NO_LOCKLESS
		workers++;
		run lockless();
#endif
#ifndef NO_VCPU
		workers++;
		run vcpu()
#endif
	}
	do
	:: atomic { owner[0] == WAITS && !gp[0] -> free_sp(0) }
	:: atomic { owner[1] == WAITS && !gp[1] -> free_sp(1) }
	:: atomic { owner[2] == WAITS && !gp[2] -> free_sp(2) }
	:: !discards && !workers && owner[0] != WAITS && owner[1] != WAITS &&
		owner[2] != WAITS -> break
	od;
	atomic {
		leaked = (leaks(0) || leaks(1) || leaks(2));
		assert(!leaked)
	}
#ifdef PROBE
	if
	:: !root && had_sp -> reached(ALL_GONE)
	:: else
	fi
#endif
}
