// SPDX-License-Identifier: GPL-2.0
/*
 * Free page tables that nobody could free when they became empty.
 *
 * Reclaim unmaps pages through the rmap, under the page table lock and nothing
 * that would let it free the table.  It marks the mm.  Once a period, this goes
 * through the processes, and trims those that were marked before the last pass.
 *
 * No list of mms, and so nothing to take an mm from when it goes: the flags are
 * in the mm, and the mm is found by way of its process.
 */
#include <linux/init.h>
#include <linux/jiffies.h>
#include <linux/kobject.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/mutex.h>
#include <linux/oom.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/sysfs.h>
#include <linux/workqueue.h>

#include "internal.h"
#include "pt_reclaim.h"

/* A fault that finds its new table gone starts over: it gets a second at least. */
#define PT_PERIOD_MIN_MS	1000
#define PT_PERIOD_MAX_MS	(24 * 3600 * 1000)

static bool background_on __read_mostly = true;
static bool zeropages_on __read_mostly;
static unsigned int period_ms __read_mostly = 10000;

/* Serialises the control files. */
static DEFINE_MUTEX(control_lock);

/* Freezable: what flushes a TLB may have to wake a device. */
static struct workqueue_struct *pt_wq;

static void pt_background_work(struct work_struct *work);
static DECLARE_DELAYED_WORK(pt_work, pt_background_work);

/* A pass, which takes several work items if it is long.  Theirs alone. */
static struct {
	int nr;			/* of the process to look at next */
	int old;		/* 0 or 1: marks that the pass before left */
	bool again;		/* another pass is wanted */
} pass = { .nr = 1 };

/* Was a mark made since the pass began, or since the last one ended? */
static bool marked;

static void pt_background_later(void)
{
	if (READ_ONCE(background_on) && pt_wq)
		queue_delayed_work(pt_wq, &pt_work,
				   msecs_to_jiffies(READ_ONCE(period_ms)));
}

/* A pass that is under way may have been past the mm: then there has to be another. */
static void pt_background_wanted(void)
{
	if (!READ_ONCE(marked))
		WRITE_ONCE(marked, true);
	if (!delayed_work_pending(&pt_work))
		pt_background_later();
}

/**
 * pt_reclaim_mark - say that tables of an mm may have become empty
 * @mm: the mm
 *
 * That a pass is wanted is looked at each time: an mm that no process shows yet, or a
 * switch that was thrown, may have kept a mark from being seen.
 *
 * Context: any but hard interrupts; takes no lock that is held around page table
 * locks.
 */
void pt_reclaim_mark(struct mm_struct *mm)
{
	if (!mm_flags_test(MMF_PT_EMPTIED, mm))
		mm_flags_set(MMF_PT_EMPTIED, mm);
	pt_background_wanted();
}

#ifdef CONFIG_PT_RECLAIM_UPPER
/**
 * pt_upper_mark - say that PMD or PUD tables of an mm may have become empty
 * @mm: the mm
 *
 * The next pass looks for them: no table comes back so soon that waiting for another
 * pass would pay.
 *
 * Context: as for pt_reclaim_mark().
 */
void pt_upper_mark(struct mm_struct *mm)
{
	/* Pairs with the one in pt_upper_unmark(). */
	smp_mb();
	if (!mm_flags_test(MMF_PT_UPPER, mm))
		mm_flags_set(MMF_PT_UPPER, mm);
	if (READ_ONCE(pt_upper_on))
		pt_background_wanted();
}
#endif

/**
 * pt_reclaim_mark_zeroes - say that tables of an mm may have got zeropages only
 * @mm: the mm
 *
 * Of interest only if these are to be freed at all.
 *
 * Context: as for pt_reclaim_mark().
 */
void pt_reclaim_mark_zeroes(struct mm_struct *mm)
{
	if (READ_ONCE(zeropages_on))
		pt_reclaim_mark(mm);
}

/*
 * The mm of a process, with a reference, if its tables are to be looked at now, and
 * whether PTE tables are meant, too.  A mark that is new only ages: who unmaps a page
 * that is wanted again sees it faulted in again soon.  Processes may share an mm, hence
 * a flag for each of two passes: what this one leaves is nothing that it acts on.
 */
static struct mm_struct *pt_due_mm(struct task_struct *process, bool *aged)
{
	const int old = pass.old ? MMF_PT_AGED_1 : MMF_PT_AGED_0;
	const int new = pass.old ? MMF_PT_AGED_0 : MMF_PT_AGED_1;
	struct task_struct *task;
	struct mm_struct *mm;

	if (process->flags & PF_KTHREAD)
		return NULL;
	task = find_lock_task_mm(process);
	if (!task)
		return NULL;

	mm = task->mm;
	*aged = mm_flags_test(old, mm) && mm_flags_test_and_clear(old, mm);
	if (mm_flags_test(MMF_PT_EMPTIED, mm) &&
	    mm_flags_test_and_clear(MMF_PT_EMPTIED, mm)) {
		mm_flags_set(new, mm);
		pass.again = true;
	}
	if ((!*aged && !pt_upper_marked(mm)) || !mmget_not_zero(mm))
		mm = NULL;
	task_unlock(task);
	return mm;
}

/* The next such mm of this pass. */
static struct mm_struct *pt_next_mm(bool *aged)
{
	struct task_struct *process;
	struct mm_struct *mm;
	struct pid *pid;

	do {
		mm = NULL;
		rcu_read_lock();
		pid = find_ge_pid(pass.nr, &init_pid_ns);
		if (pid) {
			pass.nr = pid_nr(pid) + 1;
			process = pid_task(pid, PIDTYPE_TGID);
			if (process)
				mm = pt_due_mm(process, aged);
		}
		rcu_read_unlock();
		cond_resched();
	} while (pid && !mm);
	return mm;
}

/* Is the process gone, but for the reference that we have, or the switch off? */
static bool pt_stop(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users) <= 1 || !READ_ONCE(background_on);
}

/* Trim from @addr on, until somebody waits for the lock; how far it got. */
static unsigned long pt_trim_some(struct mm_struct *mm, unsigned long addr,
				  bool *left)
{
	const enum pt_reclaim_source source = READ_ONCE(zeropages_on) ?
		PT_RECLAIM_BACKGROUND_ZERO : PT_RECLAIM_BACKGROUND;
	struct vm_area_struct *vma;
	unsigned long next;

	mmap_assert_locked(mm);
	do {
		vma = find_vma(mm, addr);
		if (!vma)
			return ULONG_MAX;
		addr = max(addr, vma->vm_start);
		/* Chunks end where tables do, for each is to be seen once. */
		next = pt_reclaim_chunk_end(addr, vma->vm_end);
		if (pt_reclaim_range(vma, addr, next, source, PGWALK_RDLOCK))
			*left = true;
		addr = next;
		cond_resched();
	} while (!mmap_lock_is_contended(mm) && !pt_stop(mm));
	return addr;
}

/*
 * Trim an mm.  Whoever has the mmap lock for writing now is left in peace until
 * the next pass; whoever comes later gets it, and then it is our turn again.
 * Returns true when something is left for the next pass.
 */
static bool pt_background_mm(struct mm_struct *mm)
{
	unsigned long addr = 0;
	bool left = false;

	if (!mmap_read_trylock(mm))
		return true;
	for (;;) {
		addr = pt_trim_some(mm, addr, &left);
		mmap_read_unlock(mm);
		if (addr == ULONG_MAX || pt_stop(mm))
			return left;
		mmap_read_lock(mm);
	}
}

static void pt_background_work(struct work_struct *work)
{
	const int new = pass.old ? MMF_PT_AGED_0 : MMF_PT_AGED_1;
	const unsigned long start = jiffies;
	struct mm_struct *mm;
	bool aged;

	if (pass.nr == 1)
		WRITE_ONCE(marked, false);
	while (READ_ONCE(background_on) && (mm = pt_next_mm(&aged))) {
		if (aged && pt_background_mm(mm)) {
			mm_flags_set(new, mm);
			pass.again = true;
		}
		if (pt_upper_marked(mm)) {
			pt_upper_unmark(mm);
			pt_upper_trim(mm, 0, mm->task_size, PT_RECLAIM_BACKGROUND);
		}
		/* If it was the last one, others need not wait for the rest. */
		mmput_async(mm);
		/* The freezer waits for a work item, not for a pass. */
		if (time_after(jiffies, start + HZ)) {
			/* A mark may have queued it for the next period. */
			mod_delayed_work(pt_wq, &pt_work, 1);
			return;
		}
	}
	pass.nr = 1;
	pass.old = !pass.old;
	if (pass.again || READ_ONCE(marked))
		pt_background_later();
	pass.again = false;
}

static ssize_t show_bool(const bool *value, char *buf)
{
	return sysfs_emit(buf, "%d\n", READ_ONCE(*value));
}

static int parse_bool(bool *value, const char *buf)
{
	bool on;
	int err;

	err = kstrtobool(buf, &on);
	if (!err)
		WRITE_ONCE(*value, on);
	return err;
}

static ssize_t background_show(struct kobject *kobj, struct kobj_attribute *attr,
			       char *buf)
{
	return show_bool(&background_on, buf);
}

static ssize_t background_store(struct kobject *kobj, struct kobj_attribute *attr,
				const char *buf, size_t count)
{
	int err;

	mutex_lock(&control_lock);
	err = parse_bool(&background_on, buf);
	/* There may be marks that were made meanwhile. */
	if (!err && background_on)
		pt_background_later();
	else if (!err)
		cancel_delayed_work_sync(&pt_work);
	mutex_unlock(&control_lock);
	return err ?: count;
}

static struct kobj_attribute background_attr = __ATTR_RW(background);

static ssize_t zeropages_show(struct kobject *kobj, struct kobj_attribute *attr,
			      char *buf)
{
	return show_bool(&zeropages_on, buf);
}

static ssize_t zeropages_store(struct kobject *kobj, struct kobj_attribute *attr,
			       const char *buf, size_t count)
{
	return parse_bool(&zeropages_on, buf) ?: count;
}

static struct kobj_attribute zeropages_attr = __ATTR_RW(zeropages);

#ifdef CONFIG_PT_RECLAIM_UPPER
static ssize_t upper_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return show_bool(&pt_upper_on, buf);
}

static ssize_t upper_store(struct kobject *kobj, struct kobj_attribute *attr,
			   const char *buf, size_t count)
{
	int err = parse_bool(&pt_upper_on, buf);

	/* For the marks that were made meanwhile. */
	if (!err && READ_ONCE(pt_upper_on))
		pt_background_later();
	return err ?: count;
}

static struct kobj_attribute upper_attr = __ATTR_RW(upper);
#endif

static ssize_t period_ms_show(struct kobject *kobj, struct kobj_attribute *attr,
			      char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(period_ms));
}

static ssize_t period_ms_store(struct kobject *kobj, struct kobj_attribute *attr,
			       const char *buf, size_t count)
{
	unsigned int ms;
	int err;

	err = kstrtouint(buf, 0, &ms);
	if (err)
		return err;
	if (ms < PT_PERIOD_MIN_MS || ms > PT_PERIOD_MAX_MS)
		return -EINVAL;
	mutex_lock(&control_lock);
	WRITE_ONCE(period_ms, ms);
	/* A pass that waits already shall not wait for the old period. */
	if (READ_ONCE(background_on))
		mod_delayed_work(pt_wq, &pt_work, msecs_to_jiffies(ms));
	mutex_unlock(&control_lock);
	return count;
}

static struct kobj_attribute period_ms_attr = __ATTR_RW(period_ms);

static struct attribute *pt_reclaim_attrs[] = {
	&background_attr.attr,
	&period_ms_attr.attr,
	&zeropages_attr.attr,
#ifdef CONFIG_PT_RECLAIM_UPPER
	&upper_attr.attr,
#endif
	NULL,
};

static const struct attribute_group pt_reclaim_group = {
	.attrs = pt_reclaim_attrs,
};

static int __init pt_background_init(void)
{
	struct kobject *kobj;
	int err;

	pt_wq = alloc_workqueue("pt_reclaim", WQ_UNBOUND | WQ_FREEZABLE, 1);
	if (!pt_wq)
		return -ENOMEM;
	kobj = kobject_create_and_add("pt_reclaim", mm_kobj);
	if (!kobj)
		return -ENOMEM;
	err = sysfs_create_group(kobj, &pt_reclaim_group);
	if (err)
		kobject_put(kobj);
	return err;
}
subsys_initcall(pt_background_init);
