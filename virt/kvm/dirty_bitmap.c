// SPDX-License-Identifier: GPL-2.0
/*
 * Dirty bitmaps of memslots that have memory only where something was dirty.
 *
 * A bitmap is divided into chunks, of as many pages as a page has bits: 128 MiB where
 * pages have 4 KiB.  What is known of a chunk is in one word:
 *
 *   CLEAN         no page is dirty
 *   coarse bits   all pages are dirty of those ranges that have a bit, COARSE is set
 *   an address    of a page with a bit for each page, little-endian as in userspace
 *
 * Who changes what, and when:
 *
 *   CLEAN or coarse bits to an address
 *	Whoever marks a page dirty.  That is in any context: a vCPU's steal time is
 *	marked under the scheduler's runqueue lock.  So it takes what
 *	alloc_pages_nolock() has, and does not wait.
 *   CLEAN to coarse bits, or to more of them
 *	The same, where there was no memory.  Reporting more pages than are dirty
 *	costs time, reporting less loses data.
 *   coarse bits to CLEAN or to an address
 *	KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, under slots_lock.
 *
 * An address stays until the bitmap goes, so that bits there can be set without a lock,
 * and the bitmap goes when no reader of kvm->srcu can have the memslot any more.
 *
 * Userspace reads a page after it was told that it is dirty.  Who marks a page dirty
 * may have written to it just before: the write must be visible to whoever takes the
 * mark away.  Where that is a bit of a page, it is up to set_bit() and the atomic
 * operation that clears it; where it is a coarse bit, kvm_dirty_bitmap_set() has a
 * barrier between the write and the look at the word, and changing it is fully ordered.
 */
#include <linux/gfp.h>
#include <linux/kvm_dirty_ring.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "dirty_bitmap.h"
#include "kvm_mm.h"

#define CHUNK_PAGES	(PAGE_SIZE * BITS_PER_BYTE)
#define CHUNK_LONGS	(PAGE_SIZE / sizeof(long))

/* Coarse bits: so many ranges have one each, above a bit that no address has set. */
#define NR_RANGES	(BITS_PER_LONG / 2)
#define RANGE_PAGES	(CHUNK_PAGES / NR_RANGES)

#define CLEAN		0ul
#define COARSE		1ul
#define ALL_DIRTY	(GENMASK(NR_RANGES, 1) | COARSE)

/**
 * struct kvm_sparse_bitmap - which pages of a memslot are dirty
 * @scratch: bits of a chunk on their way from or to userspace; protected by slots_lock
 * @nr_chunks: of @chunks
 * @chunks: what is known of each
 */
struct kvm_sparse_bitmap {
	unsigned long *scratch;
	unsigned long nr_chunks;
	unsigned long chunks[] __counted_by(nr_chunks);
};

static bool is_coarse(unsigned long chunk)
{
	return chunk & COARSE;
}

static unsigned long coarse_bit(unsigned long page)
{
	return 2ul << page / RANGE_PAGES;
}

/* The bits of a chunk that has some, or NULL. */
static unsigned long *bits_of(unsigned long chunk)
{
	return is_coarse(chunk) ? NULL : (unsigned long *)chunk;
}

/* Pages of the memslot that chunk @i is for: all but the last are full. */
static unsigned long nr_pages_of(const struct kvm_memory_slot *memslot, unsigned long i)
{
	return min(memslot->npages - i * CHUNK_PAGES, CHUNK_PAGES);
}

/* Bytes of the bitmap that userspace has for chunk @i. */
static unsigned long nr_bytes_of(const struct kvm_memory_slot *memslot, unsigned long i)
{
	return ALIGN(nr_pages_of(memslot, i), BITS_PER_LONG) / BITS_PER_BYTE;
}

/* Clears bits from @nr on, of @nr_bytes. */
static void cut(void *bits, unsigned long nr, unsigned long nr_bytes)
{
	unsigned long byte = nr / BITS_PER_BYTE;
	u8 *to = bits;

	if (byte >= nr_bytes)
		return;
	to[byte] &= BIT(nr % BITS_PER_BYTE) - 1;
	memset(to + byte + 1, 0, nr_bytes - byte - 1);
}

/* Sets the bits of the first @nr_pages to what coarse bits say, and no others. */
static void expand(unsigned long coarse, unsigned long nr_pages, unsigned long *bits)
{
	const unsigned long range_bytes = RANGE_PAGES / BITS_PER_BYTE;

	for (unsigned long i = 0; i < NR_RANGES; i++)
		memset((u8 *)bits + i * range_bytes, coarse & 2ul << i ? 0xff : 0, range_bytes);
	cut(bits, nr_pages, PAGE_SIZE);
}

/**
 * kvm_alloc_dirty_bitmap - make a memslot's dirty bitmap
 * @memslot: of @memslot->npages pages; ->dirty_bitmap is set
 * @all_dirty: whether all of its pages are to be dirty, rather than none
 *
 * Context: may sleep.  Others do not know of @memslot yet.
 *
 * Return: 0, or -ENOMEM and ->dirty_bitmap as it was.
 */
int kvm_alloc_dirty_bitmap(struct kvm_memory_slot *memslot, bool all_dirty)
{
	unsigned long nr_chunks = DIV_ROUND_UP(memslot->npages, CHUNK_PAGES);
	struct kvm_sparse_bitmap *bitmap;

	bitmap = kvzalloc_flex(*bitmap, chunks, nr_chunks, GFP_KERNEL_ACCOUNT);
	if (!bitmap)
		return -ENOMEM;

	bitmap->scratch = (unsigned long *)__get_free_page(GFP_KERNEL_ACCOUNT);
	if (!bitmap->scratch) {
		kvfree(bitmap);
		return -ENOMEM;
	}

	bitmap->nr_chunks = nr_chunks;
	for (unsigned long i = 0; all_dirty && i < nr_chunks; i++)
		bitmap->chunks[i] = ALL_DIRTY;
	memslot->dirty_bitmap = bitmap;
	return 0;
}

/**
 * kvm_destroy_dirty_bitmap - free a memslot's dirty bitmap, if it has one
 * @memslot: its ->dirty_bitmap is NULL afterwards
 *
 * Context: may sleep.  Nobody can reach the bitmap any more.
 */
void kvm_destroy_dirty_bitmap(struct kvm_memory_slot *memslot)
{
	struct kvm_sparse_bitmap *bitmap = memslot->dirty_bitmap;

	if (!bitmap)
		return;

	for (unsigned long i = 0; i < bitmap->nr_chunks; i++) {
		free_page((unsigned long)bits_of(bitmap->chunks[i]));
		cond_resched();
	}
	free_page((unsigned long)bitmap->scratch);
	kvfree(bitmap);
	memslot->dirty_bitmap = NULL;
}

/*
 * A page of zeros for bits, or NULL.  In any context, but with PREEMPT_RT, where what is
 * tried may be a sleeping lock: to release it takes the runqueue's, which may be held.
 */
static unsigned long *take_page(void)
{
	struct page *page;

	if (IS_ENABLED(CONFIG_PREEMPT_RT) && irqs_disabled())
		return NULL;

	page = alloc_pages_nolock(__GFP_ACCOUNT, NUMA_NO_NODE, 0);
	return page ? page_address(page) : NULL;
}

/*
 * Marks page @page of a chunk dirty, of which no bits are there: with bits, or with a
 * coarse one.  False: somebody else changed the chunk.
 */
static bool set_without_bits(unsigned long *chunk, unsigned long old, unsigned long nr_pages,
			     unsigned long page)
{
	unsigned long *bits = take_page();

	if (!bits)
		return cmpxchg(chunk, old, old | coarse_bit(page) | COARSE) == old;

	expand(old, nr_pages, bits);
	set_bit_le(page, bits);
	if (cmpxchg(chunk, old, (unsigned long)bits) == old)
		return true;

	free_pages_nolock(virt_to_page(bits), 0);
	return false;
}

/**
 * kvm_dirty_bitmap_set - mark a page dirty
 * @memslot: with a dirty bitmap
 * @rel_gfn: the page, relative to the memslot's first
 *
 * Pages around it, RANGE_PAGES of them, may be reported dirty, too, where there is no
 * memory to tell.
 *
 * Context: any but NMI.  @memslot stays, for kvm->srcu or slots_lock is held.
 */
void kvm_dirty_bitmap_set(const struct kvm_memory_slot *memslot, unsigned long rel_gfn)
{
	unsigned long i = rel_gfn / CHUNK_PAGES, page = rel_gfn % CHUNK_PAGES;
	unsigned long *p = &memslot->dirty_bitmap->chunks[i], chunk;

	do {
		chunk = READ_ONCE(*p);
		if (bits_of(chunk)) {
			set_bit_le(page, bits_of(chunk));
			return;
		}
		if (chunk & coarse_bit(page)) {
			/* Pairs with cmpxchg() by those who take the bit away. */
			smp_mb();
			if (READ_ONCE(*p) == chunk)
				return;
			continue;
		}
		if (set_without_bits(p, chunk, nr_pages_of(memslot, i), page))
			return;
	} while (true);
}

/*
 * Has the next write be noticed to each page that @mask, word @word of the bits of chunk
 * @i, has.  Yields.  TLBs are to be flushed before userspace reads the pages: @flush.
 */
static void protect(struct kvm *kvm, struct kvm_memory_slot *memslot, unsigned long i,
		    unsigned long word, unsigned long mask, bool *flush)
{
	kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, memslot,
						i * CHUNK_PAGES + word * BITS_PER_LONG, mask);
	*flush = true;
	KVM_MMU_RESCHED(kvm);
}

/* A page for bits of a chunk of which there are none: waits, but not for others to die. */
static unsigned long *wait_for_page(void)
{
	return (unsigned long *)get_zeroed_page(GFP_KERNEL_ACCOUNT | __GFP_NORETRY |
						__GFP_NOWARN);
}

/*
 * Has a chunk with coarse bits, which are returned in @coarse, be clean: with a page for
 * bits if there is one, lest there is no memory the next time, either.  Returns bits that
 * somebody else put there; then @coarse is left alone.
 */
static unsigned long *put_bits(unsigned long *chunk, unsigned long *coarse)
{
	unsigned long *bits = wait_for_page(), old;

	do {
		old = READ_ONCE(*chunk);
		if (bits_of(old)) {
			free_page((unsigned long)bits);
			return bits_of(old);
		}
	} while (cmpxchg(chunk, old, (unsigned long)bits) != old);

	*coarse = old;
	return NULL;
}

/*
 * Moves what is dirty of chunk @i to the scratch page, and has next writes be noticed.
 * Returns false, and leaves the scratch page alone, if nothing was.
 */
static bool take_chunk(struct kvm *kvm, struct kvm_memory_slot *memslot, unsigned long i,
		       bool *flush)
{
	struct kvm_sparse_bitmap *bitmap = memslot->dirty_bitmap;
	unsigned long nr_longs = nr_bytes_of(memslot, i) / sizeof(long);
	unsigned long *bits = bits_of(READ_ONCE(bitmap->chunks[i]));
	unsigned long *to = bitmap->scratch, coarse = CLEAN;

	/*
	 * What is marked from now on is for the next time, no matter that the pages of
	 * coarse bits are not yet protected: they are reported now.
	 */
	if (!bits)
		bits = put_bits(&bitmap->chunks[i], &coarse);
	if (coarse)
		expand(coarse, nr_pages_of(memslot, i), to);
	else if (!bits || bitmap_empty(bits, CHUNK_PAGES))
		return false;

	KVM_MMU_LOCK(kvm);
	for (unsigned long word = 0; word < nr_longs; word++) {
		if (!coarse)
			to[word] = READ_ONCE(bits[word]) ? xchg(&bits[word], 0) : 0;
		if (to[word])
			protect(kvm, memslot, i, word, to[word], flush);
	}
	KVM_MMU_UNLOCK(kvm);
	return true;
}

/* Tells userspace what is dirty of chunk @i, and leaves it dirty. */
static bool report_chunk(const struct kvm_memory_slot *memslot, unsigned long i,
			 void __user *to)
{
	unsigned long chunk = READ_ONCE(memslot->dirty_bitmap->chunks[i]);
	unsigned long *bits = bits_of(chunk);

	if (!bits) {
		bits = memslot->dirty_bitmap->scratch;
		expand(chunk, nr_pages_of(memslot, i), bits);
	}
	return !copy_to_user(to, bits, nr_bytes_of(memslot, i));
}

/* Reports and takes what is dirty of chunk @i. */
static bool report_and_take_chunk(struct kvm *kvm, struct kvm_memory_slot *memslot,
				  unsigned long i, void __user *to, bool *flush)
{
	if (!take_chunk(kvm, memslot, i, flush))
		return !clear_user(to, nr_bytes_of(memslot, i));

	return !copy_to_user(to, memslot->dirty_bitmap->scratch, nr_bytes_of(memslot, i));
}

/* The number of chunks from @i on, at least one, that are clean. */
static unsigned long nr_clean(const struct kvm_sparse_bitmap *bitmap, unsigned long i)
{
	unsigned long end = i + 1;

	while (end < bitmap->nr_chunks && READ_ONCE(bitmap->chunks[end]) == CLEAN)
		end++;
	return end - i;
}

/*
 * A memslot with a dirty bitmap, by what userspace calls it, or an error.  @first_page is
 * where in it userspace wants to begin.
 */
static struct kvm_memory_slot *find_memslot(struct kvm *kvm, u32 slot, u64 first_page)
{
	struct kvm_memory_slot *memslot;
	int as_id = slot >> 16, id = (u16)slot;

	lockdep_assert_held(&kvm->slots_lock);

	/* Dirty ring tracking may be exclusive to dirty log tracking */
	if (!kvm_use_dirty_bitmap(kvm))
		return ERR_PTR(-ENXIO);

	if (as_id >= kvm_arch_nr_memslot_as_ids(kvm) || id >= KVM_USER_MEM_SLOTS)
		return ERR_PTR(-EINVAL);

	if (first_page & 63)
		return ERR_PTR(-EINVAL);

	memslot = id_to_memslot(__kvm_memslots(kvm, as_id), id);
	if (!memslot || !memslot->dirty_bitmap)
		return ERR_PTR(-ENOENT);
	return memslot;
}

/**
 * kvm_get_dirty_log_protect - tell userspace which pages are dirty
 * @kvm: the VM
 * @log: which memslot, and the user's bitmap
 *
 * Unless userspace does so itself (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), also marks the
 * pages clean and has the next writes to them be noticed.  vCPUs write meanwhile.  For
 * each chunk in turn,
 *
 *    1. take a snapshot of the bits, and clear them,
 *    2. write protect the pages,
 *    3. copy the snapshot to userspace;
 *
 * and when that is done for all, at the latest, flush TLBs.  Until then a vCPU may write
 * to a page by what its TLB has.  That page is reported, and not read before this returns.
 *
 * Context: slots_lock is held, which is what keeps two of these, and
 * kvm_clear_dirty_log_protect(), apart.  Takes mmu_lock for a chunk at a time at most.
 *
 * Return: 0, -ENXIO if this VM has no dirty bitmaps, -EINVAL if there can be no such
 * memslot, -ENOENT if there is none or it has none, -EFAULT if userspace's memory cannot
 * be written; then bits may be lost.
 */
int kvm_get_dirty_log_protect(struct kvm *kvm, struct kvm_dirty_log *log)
{
	struct kvm_memory_slot *memslot = find_memslot(kvm, log->slot, 0);
	bool manual = READ_ONCE(kvm->manual_dirty_log_protect);
	struct kvm_sparse_bitmap *bitmap;
	bool flush = false, ok = true;
	unsigned long i, nr;

	if (IS_ERR(memslot))
		return PTR_ERR(memslot);

	kvm_arch_sync_dirty_log(kvm, memslot);

	/* What was marked with mmu_lock held is seen, also where nothing seems to be. */
	if (!manual) {
		KVM_MMU_LOCK(kvm);
		KVM_MMU_UNLOCK(kvm);
	}

	bitmap = memslot->dirty_bitmap;
	for (i = 0; ok && i < bitmap->nr_chunks; i += nr) {
		void __user *to = log->dirty_bitmap + i * PAGE_SIZE;

		nr = 1;
		if (READ_ONCE(bitmap->chunks[i]) == CLEAN) {
			nr = nr_clean(bitmap, i);
			ok = !clear_user(to, (nr - 1) * PAGE_SIZE +
					 nr_bytes_of(memslot, i + nr - 1));
		} else if (manual) {
			ok = report_chunk(memslot, i, to);
		} else {
			ok = report_and_take_chunk(kvm, memslot, i, to, &flush);
		}
		cond_resched();
	}

	if (flush)
		kvm_flush_remote_tlbs_memslot(kvm, memslot);
	return ok ? 0 : -EFAULT;
}

/* Are the first @nr bits set? */
static bool has_all(const u8 *bits, unsigned long nr)
{
	const u8 last = BIT(nr % BITS_PER_BYTE) - 1;

	return !memchr_inv(bits, 0xff, nr / BITS_PER_BYTE) &&
	       (!last || (bits[nr / BITS_PER_BYTE] & last) == last);
}

/*
 * Coarse bits of the ranges of chunk @i that userspace has, in the scratch page, every
 * page of; and of those that are behind the end of the memslot.  The scratch page is for
 * words @from to @to, not including it.
 */
static unsigned long whole_ranges(const struct kvm_memory_slot *memslot, unsigned long i,
				  unsigned long from, unsigned long to)
{
	const u8 *bits = (const u8 *)memslot->dirty_bitmap->scratch;
	unsigned long first_bit = from * BITS_PER_LONG, whole = 0;

	for (unsigned long range = 0; range < NR_RANGES; range++) {
		unsigned long first = range * RANGE_PAGES;
		unsigned long end = min(first + RANGE_PAGES, nr_pages_of(memslot, i));

		if (first >= end ||
		    (first >= first_bit && end <= to * BITS_PER_LONG &&
		     has_all(bits + (first - first_bit) / BITS_PER_BYTE, end - first)))
			whole |= 2ul << range;
	}
	return whole;
}

/*
 * Takes the coarse bits that @whole has from a chunk, and returns those that were there.
 * If somebody put bits there instead, these are returned in @bits.
 */
static unsigned long take_ranges(unsigned long *chunk, unsigned long whole,
				 unsigned long **bits)
{
	unsigned long old, new;

	do {
		old = READ_ONCE(*chunk);
		*bits = bits_of(old);
		if (*bits)
			return 0;
		new = old & ~whole;
		if (new == COARSE)
			new = CLEAN;
	} while (cmpxchg(chunk, old, new) != old);

	return old & whole;
}

/* Gives chunk @i bits in place of coarse ones, and returns them; NULL: no memory. */
static unsigned long *refine_chunk(struct kvm_memory_slot *memslot, unsigned long i)
{
	unsigned long *p = &memslot->dirty_bitmap->chunks[i], *bits = wait_for_page(), old;

	if (!bits)
		return NULL;

	/* Others add coarse bits, or have found memory meanwhile. */
	do {
		old = READ_ONCE(*p);
		if (bits_of(old)) {
			free_page((unsigned long)bits);
			return bits_of(old);
		}
		expand(old, nr_pages_of(memslot, i), bits);
	} while (cmpxchg(p, old, (unsigned long)bits) != old);

	return bits;
}

/*
 * Clears those bits of chunk @i, from word @from to @to, not including it, that the
 * scratch page has, and has the next writes to these pages be noticed; no others.
 */
static void clear_chunk(struct kvm *kvm, struct kvm_memory_slot *memslot, unsigned long i,
			unsigned long from, unsigned long to, bool *flush)
{
	struct kvm_sparse_bitmap *bitmap = memslot->dirty_bitmap;
	unsigned long *p = &bitmap->chunks[i], chunk = READ_ONCE(*p);
	unsigned long *masks = bitmap->scratch, *bits = bits_of(chunk);
	unsigned long whole, taken = 0;

	/* Userspace may have bits behind the end of the memslot. */
	cut(masks, nr_pages_of(memslot, i) - from * BITS_PER_LONG, (to - from) * sizeof(long));

	/*
	 * Coarse bits of which a part is to be cleared become bits.  If there is no
	 * memory for that, such ranges stay dirty and will be reported once more.
	 */
	if (!bits) {
		whole = whole_ranges(memslot, i, from, to);
		if (chunk & ~whole & ~COARSE)
			bits = refine_chunk(memslot, i);
		if (!bits)
			taken = take_ranges(p, whole, &bits);
	}

	KVM_MMU_LOCK(kvm);
	for (unsigned long word = from; word < to; word++) {
		unsigned long mask = *masks++;

		if (!mask)
			continue;
		/* What is really cleared. */
		if (bits)
			mask &= atomic_long_fetch_andnot(mask, (atomic_long_t *)&bits[word]);
		else if (!(taken & coarse_bit(word * BITS_PER_LONG)))
			mask = 0;
		if (mask)
			protect(kvm, memslot, i, word, mask, flush);
	}
	KVM_MMU_UNLOCK(kvm);
}

/**
 * kvm_clear_dirty_log_protect - mark pages clean
 * @kvm: the VM
 * @log: which pages of which memslot, and a bitmap of those that are meant
 *
 * Marks pages clean and has the next writes to them be noticed, a chunk at a time.  What
 * is clean costs nothing, not even a look at the user's bits.  A page may stay dirty for
 * lack of memory.
 *
 * Context: as kvm_get_dirty_log_protect().
 *
 * Return: 0; -ENXIO, -ENOENT as kvm_get_dirty_log_protect(); -EINVAL in the same case,
 * and if the range is not one of the memslot, or not of multiples of 64 pages; -EFAULT if
 * those of userspace's bits cannot be read that are for what is not clean.  Then a part of
 * the range may have been done: to do it again does no harm.
 */
int kvm_clear_dirty_log_protect(struct kvm *kvm, struct kvm_clear_dirty_log *log)
{
	struct kvm_memory_slot *memslot = find_memslot(kvm, log->slot, log->first_page);
	struct kvm_sparse_bitmap *bitmap;
	unsigned long word, end, next;
	bool flush = false;
	int r = 0;

	if (IS_ERR(memslot))
		return PTR_ERR(memslot);

	if (log->first_page > memslot->npages ||
	    log->num_pages > memslot->npages - log->first_page ||
	    (log->num_pages < memslot->npages - log->first_page && (log->num_pages & 63)))
		return -EINVAL;

	kvm_arch_sync_dirty_log(kvm, memslot);

	bitmap = memslot->dirty_bitmap;
	word = log->first_page / BITS_PER_LONG;
	end = word + DIV_ROUND_UP(log->num_pages, BITS_PER_LONG);
	for (; !r && word < end; word = next) {
		unsigned long i = word / CHUNK_LONGS;
		unsigned long from = word - i * CHUNK_LONGS;
		void __user *bits = log->dirty_bitmap +
				    (word - log->first_page / BITS_PER_LONG) * sizeof(long);

		next = min(end, (i + 1) * CHUNK_LONGS);
		if (READ_ONCE(bitmap->chunks[i]) == CLEAN)
			continue;
		if (copy_from_user(bitmap->scratch, bits, (next - word) * sizeof(long)))
			r = -EFAULT;
		else if (!bitmap_empty(bitmap->scratch, (next - word) * BITS_PER_LONG))
			clear_chunk(kvm, memslot, i, from, from + next - word, &flush);
		cond_resched();
	}

	if (flush)
		kvm_flush_remote_tlbs_memslot(kvm, memslot);
	return r;
}
