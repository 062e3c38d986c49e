// SPDX-License-Identifier: GPL-2.0
/*
 * Arrays as long as a memslot that have memory only where they are used.
 */
#include <linux/kmemleak.h>
#include <linux/kvm_host.h>
#include <linux/kvm_sparse_array.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

/* Its page's private number says how many of the chunks are there. */
struct kvm_sparse_dir {
	void __rcu *chunks[KVM_SPARSE_DIR_CHUNKS];
};

static_assert(sizeof(struct kvm_sparse_dir) == PAGE_SIZE);

#define DIR_SHIFT	ilog2(KVM_SPARSE_DIR_CHUNKS)

/*
 * What @pointer leads to stays: either it cannot change, for the caller holds the lock
 * that writers hold, or the caller is in an RCU read-side critical section.  Which lock
 * that is, is the caller's affair and asserted there.
 */
#define sparse_dereference(pointer)	rcu_dereference_check(pointer, 1)

/* The elements that a directory is for. */
static unsigned long dir_len(const struct kvm_sparse_array *array)
{
	return kvm_sparse_array_chunk_len(array) * KVM_SPARSE_DIR_CHUNKS;
}

static unsigned long dir_of(const struct kvm_sparse_array *array, unsigned long index)
{
	return index >> array->chunk_shift >> DIR_SHIFT;
}

static unsigned long chunk_of(const struct kvm_sparse_array *array, unsigned long index)
{
	return index >> array->chunk_shift & (KVM_SPARSE_DIR_CHUNKS - 1);
}

static void *elem_of(const struct kvm_sparse_array *array, void *chunk, unsigned long index)
{
	index &= kvm_sparse_array_chunk_len(array) - 1;
	return chunk + (index << (PAGE_SHIFT - array->chunk_shift));
}

static unsigned long nr_chunks(struct kvm_sparse_dir *dir)
{
	return page_private(virt_to_page(dir));
}

static void add_chunks(struct kvm_sparse_dir *dir, long nr)
{
	set_page_private(virt_to_page(dir), nr_chunks(dir) + nr);
}

static void free_page_rcu(struct rcu_head *head)
{
	__free_page(container_of(head, struct page, rcu_head));
}

/* Descriptors of rmaps may be found through chunks alone. */
static void *take_page(struct kvm_mmu_memory_cache *cache)
{
	void *page = kvm_mmu_memory_cache_alloc(cache);

	kmemleak_alloc(page, PAGE_SIZE, 1, GFP_ATOMIC);
	return page;
}

static void give_page(void *page)
{
	kmemleak_free(page);
	free_page((unsigned long)page);
}

static void release(void *page)
{
	kmemleak_free(page);
	call_rcu(&virt_to_page(page)->rcu_head, free_page_rcu);
}

/**
 * kvm_sparse_array_init - make an array in which nothing is present
 * @array: all zeros
 * @len: elements
 * @elem_size: bytes, a power of two and at most a page
 *
 * Context: may sleep.
 *
 * Return: 0, or -ENOMEM and @array as it was.
 */
int kvm_sparse_array_init(struct kvm_sparse_array *array, unsigned long len,
			  size_t elem_size)
{
	struct kvm_sparse_dir __rcu **dirs;
	unsigned long nr_dirs;

	if (WARN_ON_ONCE(!is_power_of_2(elem_size) || elem_size > PAGE_SIZE || !len))
		return -EINVAL;

	array->chunk_shift = PAGE_SHIFT - ilog2(elem_size);
	nr_dirs = dir_of(array, len - 1) + 1;
	dirs = kvcalloc(nr_dirs, sizeof(*dirs), GFP_KERNEL_ACCOUNT);
	if (!dirs)
		return -ENOMEM;

	array->dirs = dirs;
	/* Who sees that there are directories sees where. */
	smp_store_release(&array->nr_dirs, nr_dirs);
	return 0;
}

static unsigned long destroy_dir(struct kvm_sparse_dir *dir)
{
	unsigned long left = nr_chunks(dir), freed = left + 1;

	for (int i = 0; left; i++) {
		void *chunk = rcu_dereference_protected(dir->chunks[i], true);

		if (!chunk)
			continue;
		give_page(chunk);
		left--;
	}
	add_chunks(dir, 1 - (long)freed);
	give_page(dir);
	return freed;
}

/**
 * kvm_sparse_array_destroy - free an array and whatever is in it
 * @array: one that was made, or all zeros; all zeros afterwards
 *
 * Context: may sleep.  Nobody can reach the array any more, readers included.
 *
 * Return: pages of chunks and directories that were freed.
 */
unsigned long kvm_sparse_array_destroy(struct kvm_sparse_array *array)
{
	unsigned long freed = 0;

	for (unsigned long i = 0; i < array->nr_dirs; i++) {
		struct kvm_sparse_dir *dir = rcu_dereference_protected(array->dirs[i], true);

		if (dir)
			freed += destroy_dir(dir);
		cond_resched();
	}
	kvfree(array->dirs);
	memset(array, 0, sizeof(*array));
	return freed;
}

/**
 * kvm_sparse_array_get - look at an element
 * @array: the array; may be all zeros
 * @index: of the element; less than the array's length
 *
 * Context: under the lock of writers in any mode, or rcu_read_lock().
 *
 * Return: the element, or NULL where nothing is present, which stands for zero.
 */
void *kvm_sparse_array_get(const struct kvm_sparse_array *array, unsigned long index)
{
	unsigned long i = dir_of(array, index);
	struct kvm_sparse_dir *dir;
	void *chunk;

	if (i >= array->nr_dirs)
		return NULL;
	dir = sparse_dereference(array->dirs[i]);
	if (!dir)
		return NULL;
	chunk = sparse_dereference(dir->chunks[chunk_of(array, index)]);
	return chunk ? elem_of(array, chunk, index) : NULL;
}

/**
 * kvm_sparse_array_add - get at an element to change it
 * @array: the array
 * @index: of the element; less than the array's length
 * @cache: of zeroed pages, KVM_SPARSE_ARRAY_ADD_MAX of them
 * @nr_pages: raised by the number of pages that were taken
 *
 * Context: under the lock of writers.
 *
 * Return: the element; zero if it was not present.
 */
void *kvm_sparse_array_add(const struct kvm_sparse_array *array, unsigned long index,
			   struct kvm_mmu_memory_cache *cache, u64 *nr_pages)
{
	unsigned long i = dir_of(array, index), j = chunk_of(array, index);
	struct kvm_sparse_dir *dir;
	void *chunk;

	dir = sparse_dereference(array->dirs[i]);
	if (!dir) {
		dir = take_page(cache);
		set_page_private(virt_to_page(dir), 0);
		rcu_assign_pointer(array->dirs[i], dir);
		++*nr_pages;
	}
	chunk = sparse_dereference(dir->chunks[j]);
	if (!chunk) {
		chunk = take_page(cache);
		add_chunks(dir, 1);
		rcu_assign_pointer(dir->chunks[j], chunk);
		++*nr_pages;
	}
	return elem_of(array, chunk, index);
}

/**
 * kvm_sparse_array_next - skip what is not present
 * @array: the array; may be all zeros
 * @index: of an element
 * @end: index behind the last element of interest
 *
 * Context: as kvm_sparse_array_get().
 *
 * Return: the least index from @index on that is present, or @end.
 */
unsigned long kvm_sparse_array_next(const struct kvm_sparse_array *array,
				    unsigned long index, unsigned long end)
{
	unsigned long last = min(end, array->nr_dirs * dir_len(array));

	while (index < last) {
		struct kvm_sparse_dir *dir = sparse_dereference(array->dirs[dir_of(array, index)]);
		unsigned long step;

		if (!dir)
			step = dir_len(array);
		else if (!rcu_access_pointer(dir->chunks[chunk_of(array, index)]))
			step = kvm_sparse_array_chunk_len(array);
		else
			return index;
		index = round_down(index, step) + step;
	}
	return end;
}

/* Takes chunks @from to @to, not including it, out of @dir where all is zero. */
static unsigned long trim_dir(struct kvm_sparse_dir *dir, unsigned long from,
			      unsigned long to)
{
	unsigned long freed = 0;

	for (unsigned long i = from; i < to && nr_chunks(dir); i++) {
		void *chunk = sparse_dereference(dir->chunks[i]);

		if (!chunk || memchr_inv(chunk, 0, PAGE_SIZE))
			continue;
		RCU_INIT_POINTER(dir->chunks[i], NULL);
		add_chunks(dir, -1);
		release(chunk);
		freed++;
	}
	return freed;
}

/**
 * kvm_sparse_array_trim - free what has been set back to zero
 * @array: the array; may be all zeros
 * @index: of the first element
 * @end: index behind the last element
 *
 * Chunks that the range covers in part go as well, if all of them is zero, and so do
 * directories.  Takes the time to look at all that is present in the range; callers
 * that must yield trim a few chunks at a time.
 *
 * Context: under the lock of writers.
 *
 * Return: pages that were freed, after a grace period.
 */
unsigned long kvm_sparse_array_trim(const struct kvm_sparse_array *array,
				    unsigned long index, unsigned long end)
{
	unsigned long freed = 0, next;

	end = min(end, array->nr_dirs * dir_len(array));
	for (; index < end; index = next) {
		unsigned long i = dir_of(array, index);
		struct kvm_sparse_dir *dir = sparse_dereference(array->dirs[i]);

		next = min(end, (i + 1) * dir_len(array));
		if (!dir)
			continue;
		freed += trim_dir(dir, chunk_of(array, index), chunk_of(array, next - 1) + 1);
		if (nr_chunks(dir))
			continue;
		RCU_INIT_POINTER(array->dirs[i], NULL);
		release(dir);
		freed++;
	}
	return freed;
}
