/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How blocks of sparse memslots are unplugged, for spin; see
 * Documentation/virt/kvm/sparse-memslots.rst.
 *
 * model.sh runs this as it is, which must find no error, and with each of the broken
 * variants, which must find one.
 *
 * unplug()    KVM_SPARSE_MEMORY of block 0, unplug and plug, again and again
 * fault()     page faults of a vCPU, on both blocks: kvm_follow_pfn(), then
 *             kvm_tdp_mmu_map() or its like, which may map both blocks by one SPTE
 * hardware()  another vCPU in guest mode: reads SPTEs, keeps what it read, uses it
 * access()    kvm_write_guest() and the like, through a gfn_to_hva_cache as well
 * refresh(), use()   a gfn_to_pfn_cache
 *
 * What is asserted
 * ================
 *
 *   !hw_reached   the hardware does not access block 0 once it is unplugged, until it is
 *                 plugged again
 *   !kvm_reached  nor does KVM
 *   !is_mmio      a fault does not take memory that has a memslot for MMIO
 *
 * What is left out
 * ================
 *
 * - Memory ordering: the grace period orders what both sides do, on both sides.
 * - How TLBs are flushed and how page tables are freed: tdp_free.pml has that.
 * - The host's page tables: what is mapped there is invalidated as ever.
 * - Indirect shadow pages, and what is written at the address of a cache (steal time):
 *   look where fault() and access() look.
 *
 * Broken variants, -D
 * ===================
 *
 *   NO_GRACE_PERIOD     unplugging does not wait
 *   ZAP_FIRST           it waits when the SPTEs are zapped
 *   CACHE_FIRST         it waits when the gfn_to_pfn_cache is invalid
 *   NO_ZAP_FLUSH        TLBs are not flushed
 *   LOOK_OUTSIDE        a fault looks before its critical section
 *   LOOK_TWICE          a fault looks again, and takes what is unplugged for MMIO
 *   NO_LEVEL_CLAMP      a SPTE for both blocks needs only that of the fault plugged
 *   NO_CACHE_LOOK       a gfn_to_hva_cache is used without looking
 */

#ifndef ROUNDS
#define ROUNDS	2
#endif

/* With -DPROBE (and -DPRINTF for the compiler) the search says what it gets to. */
#ifdef PROBE
#define reached(n)	printf("reached %d\n", n)
#else
#define reached(n)	skip
#endif
#define FAULT_EXITS	1	/* a fault finds the block unplugged */
#define MAPS_BOTH	2	/* a fault maps both blocks by one SPTE */
#define ZAPS_BOTH	3	/* unplugging zaps such a one */
#define WAITS		4	/* unplugging waits for somebody */
#define IS_CACHED	5	/* the hardware has the block cached when it is zapped */
#define CACHE_GOES	6	/* unplugging finds the gfn_to_pfn_cache valid */
#define ACCESS_FAILS	7	/* KVM finds the block unplugged */

bool plugged[2] = true;
bool spte[2], both;		/* SPTEs for a block, and one for both */
bool tlb[2];
bool gpc_valid;
bool mmu_lock;

bool gone;			/* block 0 has been unplugged */
bool hw_reached, kvm_reached, is_mmio;

byte in_srcu, gp;		/* who is in a critical section; for whom is waited */
#define FAULT	1
#define ACCESS	2
#define REFRESH	4

inline srcu_lock(who)
{
	in_srcu = in_srcu | who
}

inline srcu_unlock(who)
{
	atomic {
		in_srcu = in_srcu & (255 - who);
		gp = gp & (255 - who)
	}
}

inline synchronize_srcu()
{
	gp = in_srcu;
	if
	:: gp -> reached(WAITS)
	:: else
	fi;
	gp == 0
}

inline lock_mmu()
{
	atomic { !mmu_lock -> mmu_lock = true }
}

inline map(b)
{
	lock_mmu();
	if
#ifdef NO_LEVEL_CLAMP
	:: both = true
#else
	:: atomic { plugged[0] && plugged[1] -> both = true; reached(MAPS_BOTH) }
#endif
	:: spte[b] = true
	fi;
	mmu_lock = false
}

active proctype fault()
{
	bool look;
	byte b;

again:
	if
	:: b = 0
	:: b = 1
	fi;
#ifdef LOOK_OUTSIDE
	look = plugged[b];
	srcu_lock(FAULT);
#else
	srcu_lock(FAULT);
	look = plugged[b];
#endif
	if
	:: !look -> reached(FAULT_EXITS)
	:: else ->
#ifdef LOOK_TWICE
		is_mmio = !plugged[b];
		assert(!is_mmio);
#endif
		map(b)
	fi;
	srcu_unlock(FAULT);
	goto again
}

active proctype hardware()
{
	byte b;

again:
	if
	:: b = 0
	:: b = 1
	fi;
	if
	/* Flushing waits for a walk that is under way. */
	:: atomic { spte[b] || both -> tlb[b] = true }
	:: atomic { tlb[b] -> hw_reached = gone && b == 0; assert(!hw_reached) }
	:: skip
	fi;
	goto again
}

active proctype access()
{
	bool cached;

again:
	srcu_lock(ACCESS);
	if
#ifdef NO_CACHE_LOOK
	:: cached -> goto use
#endif
	:: plugged[0] ->
#ifdef NO_CACHE_LOOK
use:
#endif
		cached = true;
		atomic { kvm_reached = gone; assert(!kvm_reached) }
	:: !plugged[0] -> reached(ACCESS_FAILS)
	fi;
	srcu_unlock(ACCESS);
	goto again
}

active proctype refresh()
{
	bool look;

again:
	srcu_lock(REFRESH);
	look = plugged[0];
	if
	:: look -> gpc_valid = true
	:: else
	fi;
	srcu_unlock(REFRESH);
	goto again
}

/* With gpc->lock held, for which whoever makes it invalid waits. */
active proctype use()
{
again:
	atomic { gpc_valid -> kvm_reached = gone; assert(!kvm_reached) }
	goto again
}

inline zap()
{
	lock_mmu();
	spte[0] = false;
	if
	:: both -> both = false; reached(ZAPS_BOTH)
	:: else
	fi;
	if
	:: tlb[0] -> reached(IS_CACHED)
	:: else
	fi;
#ifndef NO_ZAP_FLUSH
	atomic { tlb[0] = false; tlb[1] = false };
#endif
	mmu_lock = false
}

inline invalidate_cache()
{
	if
	:: gpc_valid -> gpc_valid = false; reached(CACHE_GOES)
	:: else
	fi
}

active proctype unplug()
{
	byte round;

	do
	:: round < ROUNDS ->
		plugged[0] = false;
#ifdef ZAP_FIRST
		zap();
#endif
#ifdef CACHE_FIRST
		invalidate_cache();
#endif
#ifndef NO_GRACE_PERIOD
		synchronize_srcu();
#endif
#ifndef CACHE_FIRST
		invalidate_cache();
#endif
#ifndef ZAP_FIRST
		zap();
#endif
		gone = true;
		gone = false;
		plugged[0] = true;
		round++
	:: else -> break
	od
}
