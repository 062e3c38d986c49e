// SPDX-License-Identifier: GPL-2.0
/*
 * KUnit tests of sparse arrays: what is present, what that takes, and a model.
 */
#include <kunit/test.h>
#include <linux/kvm_host.h>
#include <linux/kvm_sparse_array.h>
#include <linux/mm.h>
#include <linux/prandom.h>

#define GIB_ELEMS	(1ul << (30 - PAGE_SHIFT))	/* 8 bytes for each page of 1 GiB */
#define CHUNK		(PAGE_SIZE / sizeof(u64))
#define DIR		(CHUNK * KVM_SPARSE_DIR_CHUNKS)

struct sparse_test {
	struct kvm_sparse_array array;
	struct kvm_mmu_memory_cache cache;
	u64 nr_pages;
};

static int sparse_test_init(struct kunit *test)
{
	struct sparse_test *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);

	if (!t)
		return -ENOMEM;
	t->cache.gfp_zero = __GFP_ZERO;
	test->priv = t;
	return kvm_sparse_array_init(&t->array, 4 * DIR, sizeof(u64));
}

/* What was counted is what is freed in the end, after every test. */
static void sparse_test_exit(struct kunit *test)
{
	struct sparse_test *t = test->priv;

	if (!t)
		return;
	KUNIT_EXPECT_EQ(test, t->nr_pages, kvm_sparse_array_destroy(&t->array));
	KUNIT_EXPECT_NULL(test, t->array.dirs);
	kvm_mmu_free_memory_cache(&t->cache);
	/* The module may go before a VM was ever made. */
	rcu_barrier();
}

static u64 *add(struct kunit *test, unsigned long index)
{
	struct sparse_test *t = test->priv;

	KUNIT_ASSERT_EQ(test, 0, __kvm_mmu_topup_memory_cache(&t->cache,
							      KVM_SPARSE_ARRAY_ADD_MAX,
							      KVM_SPARSE_ARRAY_ADD_MAX));
	return kvm_sparse_array_add(&t->array, index, &t->cache, &t->nr_pages);
}

static unsigned long trim(struct kunit *test, unsigned long index, unsigned long end)
{
	struct sparse_test *t = test->priv;
	unsigned long freed = kvm_sparse_array_trim(&t->array, index, end);

	t->nr_pages -= freed;
	return freed;
}

static void empty(struct kunit *test)
{
	struct sparse_test *t = test->priv;
	struct kvm_sparse_array none = {};

	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, 0));
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, 4 * DIR - 1));
	KUNIT_EXPECT_EQ(test, 4 * DIR, kvm_sparse_array_next(&t->array, 0, 4 * DIR));
	KUNIT_EXPECT_EQ(test, 17, kvm_sparse_array_next(&t->array, 3, 17));
	KUNIT_EXPECT_EQ(test, 0, trim(test, 0, 4 * DIR));

	/* One that was never made is as good. */
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&none, 5));
	KUNIT_EXPECT_EQ(test, 9, kvm_sparse_array_next(&none, 5, 9));
	KUNIT_EXPECT_EQ(test, 0, kvm_sparse_array_trim(&none, 5, 9));
	KUNIT_EXPECT_EQ(test, 0, kvm_sparse_array_destroy(&none));
}

static void pages_taken(struct kunit *test)
{
	struct sparse_test *t = test->priv;

	KUNIT_EXPECT_EQ(test, 0, *add(test, 5));
	KUNIT_EXPECT_EQ(test, 2, t->nr_pages);	/* a directory and a chunk */
	add(test, CHUNK - 1);
	KUNIT_EXPECT_EQ(test, 2, t->nr_pages);
	add(test, CHUNK);
	KUNIT_EXPECT_EQ(test, 3, t->nr_pages);
	add(test, DIR - 1);
	KUNIT_EXPECT_EQ(test, 4, t->nr_pages);
	add(test, 4 * DIR - 1);
	KUNIT_EXPECT_EQ(test, 6, t->nr_pages);
}

static void next_finds_chunks(struct kunit *test)
{
	struct sparse_test *t = test->priv;

	add(test, 2 * DIR + 3 * CHUNK + 7);
	KUNIT_EXPECT_EQ(test, 2 * DIR + 3 * CHUNK,
			kvm_sparse_array_next(&t->array, 0, 4 * DIR));
	KUNIT_EXPECT_EQ(test, 2 * DIR + 3 * CHUNK + 9,
			kvm_sparse_array_next(&t->array, 2 * DIR + 3 * CHUNK + 9, 4 * DIR));
	KUNIT_EXPECT_EQ(test, 4 * DIR,
			kvm_sparse_array_next(&t->array, 2 * DIR + 4 * CHUNK, 4 * DIR));
	/* What is behind the end is not looked at. */
	KUNIT_EXPECT_EQ(test, 2 * DIR + 1, kvm_sparse_array_next(&t->array, 0, 2 * DIR + 1));
	KUNIT_EXPECT_EQ(test, 2 * DIR + 3 * CHUNK,
			kvm_sparse_array_next(&t->array, 0, 2 * DIR + 3 * CHUNK));
}

static void trim_frees_zeros_alone(struct kunit *test)
{
	struct sparse_test *t = test->priv;
	u64 *elem = add(test, CHUNK - 1);

	*elem = 1;
	add(test, CHUNK);
	add(test, DIR);
	KUNIT_ASSERT_EQ(test, 5, t->nr_pages);

	/* A chunk of the first directory, and the second with its only one. */
	KUNIT_EXPECT_EQ(test, 3, trim(test, 0, 4 * DIR));
	KUNIT_EXPECT_PTR_EQ(test, elem, (u64 *)kvm_sparse_array_get(&t->array, CHUNK - 1));
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, CHUNK));
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, DIR));

	*elem = 0;
	KUNIT_EXPECT_EQ(test, 2, trim(test, 0, 1));
	KUNIT_EXPECT_EQ(test, 0, t->nr_pages);
}

static void trim_keeps_to_the_range(struct kunit *test)
{
	struct sparse_test *t = test->priv;

	for (unsigned long i = 0; i < 4; i++)
		add(test, i * CHUNK);
	/* Elements of chunks 1 and 2, which go as a whole. */
	KUNIT_EXPECT_EQ(test, 2, trim(test, 2 * CHUNK - 1, 2 * CHUNK + 1));
	KUNIT_EXPECT_NOT_NULL(test, kvm_sparse_array_get(&t->array, 0));
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, CHUNK));
	KUNIT_EXPECT_NULL(test, kvm_sparse_array_get(&t->array, 2 * CHUNK));
	KUNIT_EXPECT_NOT_NULL(test, kvm_sparse_array_get(&t->array, 3 * CHUNK));
}

static void copies_see_the_same(struct kunit *test)
{
	struct sparse_test *t = test->priv;
	struct kvm_sparse_array copy = t->array;

	*add(test, 3 * DIR) = 42;
	KUNIT_ASSERT_NOT_NULL(test, kvm_sparse_array_get(&copy, 3 * DIR));
	KUNIT_EXPECT_EQ(test, 42, *(u64 *)kvm_sparse_array_get(&copy, 3 * DIR));
}

static void small_elements(struct kunit *test)
{
	struct sparse_test *t = test->priv;
	struct kvm_sparse_array counts = {};
	u16 *first, *second;
	u64 nr_pages = 0;

	KUNIT_ASSERT_EQ(test, 0, kvm_sparse_array_init(&counts, GIB_ELEMS, sizeof(u16)));
	KUNIT_EXPECT_EQ(test, PAGE_SIZE / 2, kvm_sparse_array_chunk_len(&counts));
	KUNIT_ASSERT_EQ(test, 0, __kvm_mmu_topup_memory_cache(&t->cache,
							      KVM_SPARSE_ARRAY_ADD_MAX,
							      KVM_SPARSE_ARRAY_ADD_MAX));
	first = kvm_sparse_array_add(&counts, 4 * CHUNK - 2, &t->cache, &nr_pages);
	second = kvm_sparse_array_add(&counts, 4 * CHUNK - 1, &t->cache, &nr_pages);
	KUNIT_EXPECT_PTR_EQ(test, first + 1, second);
	KUNIT_EXPECT_EQ(test, 2, nr_pages);
	KUNIT_EXPECT_EQ(test, 2, kvm_sparse_array_destroy(&counts));
}

#define MODEL_LEN	(2 * DIR)
#define MODEL_POOL	64	/* indices that change, so that all go back to zero */
#define MODEL_STEPS	20000

static unsigned long pool_index(int i)
{
	/* Odd steps: neighbours in a chunk, chunks in a row, and both directories. */
	return (i % 2 * DIR + i / 8 * CHUNK + i * 61 % CHUNK) % MODEL_LEN;
}

static void model_agrees(struct kunit *test, const u64 *model)
{
	struct sparse_test *t = test->priv;

	for (int i = 0; i < MODEL_POOL; i++) {
		u64 *elem = kvm_sparse_array_get(&t->array, pool_index(i));

		KUNIT_ASSERT_EQ(test, model[i], elem ? *elem : 0);
		if (elem)
			KUNIT_ASSERT_EQ(test, pool_index(i),
					kvm_sparse_array_next(&t->array, pool_index(i),
							      MODEL_LEN));
	}
}

static void against_a_model(struct kunit *test)
{
	u64 *model = kunit_kcalloc(test, MODEL_POOL, sizeof(*model), GFP_KERNEL);
	struct sparse_test *t = test->priv;
	struct rnd_state rnd;

	KUNIT_ASSERT_NOT_NULL(test, model);
	prandom_seed_state(&rnd, 1);
	for (int step = 0; step < MODEL_STEPS; step++) {
		int i = prandom_u32_state(&rnd) % MODEL_POOL;
		unsigned long from = prandom_u32_state(&rnd) % MODEL_LEN;

		/* More zeros than other numbers. */
		model[i] = prandom_u32_state(&rnd) % 3 ? 0 : step;
		*add(test, pool_index(i)) = model[i];
		if (step % 16)
			continue;
		trim(test, from, min(from + DIR, MODEL_LEN));
		model_agrees(test, model);
		cond_resched();
	}
	for (int i = 0; i < MODEL_POOL; i++)
		*add(test, pool_index(i)) = 0;
	trim(test, 0, MODEL_LEN);
	KUNIT_EXPECT_EQ(test, 0, t->nr_pages);
	KUNIT_EXPECT_EQ(test, MODEL_LEN, kvm_sparse_array_next(&t->array, 0, MODEL_LEN));
}

static struct kunit_case sparse_cases[] = {
	KUNIT_CASE(empty),
	KUNIT_CASE(pages_taken),
	KUNIT_CASE(next_finds_chunks),
	KUNIT_CASE(trim_frees_zeros_alone),
	KUNIT_CASE(trim_keeps_to_the_range),
	KUNIT_CASE(copies_see_the_same),
	KUNIT_CASE(small_elements),
	KUNIT_CASE_SLOW(against_a_model),
	{}
};

static struct kunit_suite sparse_suite = {
	.name = "kvm_sparse_array",
	.init = sparse_test_init,
	.exit = sparse_test_exit,
	.test_cases = sparse_cases,
};

kunit_test_suite(sparse_suite);
