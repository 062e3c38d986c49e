# SPDX-License-Identifier: GPL-2.0
#
# Every target is one script of tools/lab; `make help` lists them.

lab := tools/lab

# What the user writes goes to the scripts as it is: a $ in CMD= is the shell's,
# not make's.
override CMD := $(value CMD)
override APPEND := $(value APPEND)
override QEMU_OPTS := $(value QEMU_OPTS)
export CMD APPEND QEMU_OPTS


.PHONY: help run test eval eval-compare e2e vm build series check bisect arches tree tree-save clean distclean

help:
	@echo 'make run            build stock and patched, run the workload in both: a table'
	@echo 'make test           build the debug kernel, run our tests and stock ones in it'
	@echo 'make eval           measure everything in both kernels: build/report (QUICK=1: less)'
	@echo 'make eval-compare OLD=a.json NEW=b.json   two results of make eval: what got worse'
	@echo 'make e2e            run real guests with virtio-mem and balloons on both kernels'
	@echo 'make vm CMD=...     run a command in a kernel; without CMD, a shell'
	@echo 'make build          build a kernel'
	@echo 'make series         compose the postable series: build/series'
	@echo 'make check          series, checkpatch, W=1, sparse, kernel-doc, models, linters'
	@echo 'make bisect         that every patch builds by itself (FROM=, TO=: its numbers)'
	@echo 'make arches         that the patched tree builds for other architectures'
	@echo 'make tree           build/edit: the patched tree under quilt, to edit a hook'
	@echo 'make tree-save      take new files that were edited there back'
	@echo 'make clean          remove build/'
	@echo 'make distclean      also what all checkouts share: downloads, ccache, what the'
	@echo '                    stock kernel gave in make test'
	@echo
	@echo 'KERNEL=         stock, patched, debug or stock-debug; default: patched,'
	@echo '                for make test: debug'
	@echo 'KERNEL_SRC=     a Linux 7.3.y tree of yours (git or not), only read, in place of'
	@echo '                the download; with KERNEL_FORCE=1 another version is tried'
	@echo 'FRESH=1         measure, or run the stock tests, again in place of what was kept'
	@echo 'SCENARIO=       for make e2e: words of the scenarios that are wanted'
	@echo 'ARCHES=         for make arches: of arm64 riscv64 s390x powerpc64le i386'
	@echo 'DEBIAN_MIRROR=  a URL, in place of the mirror that apt is configured with'
	@echo 'For make vm: CMD= a command for bash; MEM= guest memory (4G); CPUS= virtual CPUs'
	@echo '(2); ICOUNT=1 time counts guest instructions, one CPU; APPEND= kernel'
	@echo 'parameters; QEMU_OPTS= options for QEMU'

run:
	@$(lab)/run.sh

test:
	@$(lab)/test.sh

eval:
	@$(lab)/eval.sh

eval-compare:
	@/usr/bin/python3 $(lab)/eval_compare.py $(OLD) $(NEW)

e2e:
	@$(lab)/e2e.sh

vm:
	@$(lab)/vm.sh

build:
	@$(lab)/build.sh "$${KERNEL:-patched}"

series:
	@$(lab)/series.sh

check:
	@$(lab)/check.sh

bisect:
	@$(lab)/bisect.sh

arches:
	@$(lab)/arches.sh

tree:
	@$(lab)/tree.sh edit

tree-save:
	@$(lab)/tree.sh save

clean:
	@rm -rf build

distclean: clean
	@rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/linux-sparse-guest"
