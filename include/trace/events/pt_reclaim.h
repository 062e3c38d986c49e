/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM pt_reclaim

#if !defined(_TRACE_PT_RECLAIM_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_PT_RECLAIM_H

#include <linux/mm_types.h>
#include <linux/pgtable.h>
#include <linux/pt_reclaim.h>
#include <linux/tracepoint.h>

TRACE_DEFINE_ENUM(PT_RECLAIM_DONTNEED);
TRACE_DEFINE_ENUM(PT_RECLAIM_UNMAP);
TRACE_DEFINE_ENUM(PT_RECLAIM_ADVICE);
TRACE_DEFINE_ENUM(PT_RECLAIM_GUARD);
TRACE_DEFINE_ENUM(PT_RECLAIM_MOVE);
TRACE_DEFINE_ENUM(PT_RECLAIM_MREMAP);
TRACE_DEFINE_ENUM(PT_RECLAIM_BACKGROUND);
TRACE_DEFINE_ENUM(PT_RECLAIM_BACKGROUND_ZERO);
TRACE_DEFINE_ENUM(PT_SKIP_IN_USE);
TRACE_DEFINE_ENUM(PT_SKIP_KEPT);
TRACE_DEFINE_ENUM(PT_SKIP_SHARED);
TRACE_DEFINE_ENUM(PT_SKIP_RACED);
TRACE_DEFINE_ENUM(PT_SKIP_LATELY);
TRACE_DEFINE_ENUM(PGTABLE_LEVEL_PTE);
TRACE_DEFINE_ENUM(PGTABLE_LEVEL_PMD);
TRACE_DEFINE_ENUM(PGTABLE_LEVEL_PUD);

#define show_pt_reclaim_source(source)			\
	__print_symbolic(source,			\
		{ PT_RECLAIM_DONTNEED,	"dontneed" },	\
		{ PT_RECLAIM_UNMAP,	"unmap" },	\
		{ PT_RECLAIM_ADVICE,	"advice" },	\
		{ PT_RECLAIM_GUARD,	"guard" },	\
		{ PT_RECLAIM_MOVE,	"move" },	\
		{ PT_RECLAIM_MREMAP,	"mremap" },	\
		{ PT_RECLAIM_BACKGROUND, "background" },	\
		{ PT_RECLAIM_BACKGROUND_ZERO, "background_zero" })

#define show_pt_reclaim_skip(reason)			\
	__print_symbolic(reason,			\
		{ PT_SKIP_IN_USE,	"in_use" },	\
		{ PT_SKIP_KEPT,		"kept" },	\
		{ PT_SKIP_SHARED,	"shared" },	\
		{ PT_SKIP_RACED,	"raced" },	\
		{ PT_SKIP_LATELY,	"lately" })

#define show_pt_reclaim_level(level)			\
	__print_symbolic(level,				\
		{ PGTABLE_LEVEL_PTE,	"pte" },	\
		{ PGTABLE_LEVEL_PMD,	"pmd" },	\
		{ PGTABLE_LEVEL_PUD,	"pud" })

/*
 * A table was unlinked from @mm; its page follows after an RCU grace period.
 * [start, end) is the part of a PTE table's range that the discard covered, and all
 * of the range of others.
 */
TRACE_EVENT(pt_reclaim_free,
	    TP_PROTO(struct mm_struct *mm, unsigned long start, unsigned long end,
		     enum pgtable_level level, enum pt_reclaim_source source),
	    TP_ARGS(mm, start, end, level, source),

	    TP_STRUCT__entry(__field(struct mm_struct *, mm)
			     __field(unsigned long, start)
			     __field(unsigned long, end)
			     __field(int, level)
			     __field(int, source)
	    ),

	    TP_fast_assign(__entry->mm = mm;
			   __entry->start = start;
			   __entry->end = end;
			   __entry->level = level;
			   __entry->source = source;
	    ),

	    TP_printk("mm=%p start=0x%lx end=0x%lx level=%s source=%s",
		      __entry->mm, __entry->start, __entry->end,
		      show_pt_reclaim_level(__entry->level),
		      show_pt_reclaim_source(__entry->source))
);

/* A table that the discard of [start, end) touched stays in @mm. */
TRACE_EVENT(pt_reclaim_skip,
	    TP_PROTO(struct mm_struct *mm, unsigned long start, unsigned long end,
		     enum pt_reclaim_source source, enum pt_reclaim_skip reason),
	    TP_ARGS(mm, start, end, source, reason),

	    TP_STRUCT__entry(__field(struct mm_struct *, mm)
			     __field(unsigned long, start)
			     __field(unsigned long, end)
			     __field(int, source)
			     __field(int, reason)
	    ),

	    TP_fast_assign(__entry->mm = mm;
			   __entry->start = start;
			   __entry->end = end;
			   __entry->source = source;
			   __entry->reason = reason;
	    ),

	    TP_printk("mm=%p start=0x%lx end=0x%lx source=%s reason=%s",
		      __entry->mm, __entry->start, __entry->end,
		      show_pt_reclaim_source(__entry->source),
		      show_pt_reclaim_skip(__entry->reason))
);

#endif /* _TRACE_PT_RECLAIM_H */

/* This part must be outside protection */
#include <trace/define_trace.h>
