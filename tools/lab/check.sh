#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# check.sh: everything that can be said about the series without running it.
#
# One line for each check, "ok" or "FAIL" with the findings below it; the last
# line is "N passed, N failed".  Exit status 1 if any failed.  The products are
# in build/check, which makes the second run faster.
. "$(dirname "$0")/lib.sh"

work=$build/check
passed=0
failed=0

# verdict NAME FINDINGS-FILE: a check passes if it found nothing.
verdict() {
	if [ -s "$2" ]; then
		failed=$((failed + 1))
		echo "FAIL $1"
		sed 's/^/     /' "$2"
	else
		passed=$((passed + 1))
		echo "ok   $1"
	fi
}

need git=git /usr/bin/python3=python3 patch=patch perl=perl gcc=gcc make=make flex=flex \
	bison=bison bc=bc ccache=ccache sparse=sparse shellcheck=shellcheck spin=spin \
	pyflakes3=pyflakes3 /usr/include/libelf.h=libelf-dev \
	/usr/include/openssl/ssl.h=libssl-dev /usr/include/stdio.h=libc6-dev \
	/usr/include/numa.h=libnuma-dev /usr/include/sys/capability.h=libcap-dev
mkdir -p "$work" 2>/dev/null || die "cannot create $work"
lock check
found=$work/findings
patched=$build/src/patched
export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR=$top CCACHE_NOHASHDIR=1
cd "$top"
git rev-parse --git-dir >/dev/null 2>&1 || die "make check wants a git checkout, to know which files are the project's"

# The project's files whose name matches one of the patterns.
files() {
	git ls-files -co --exclude-standard -- "$@" | while IFS= read -r file; do
		[ ! -f "$file" ] || echo "$file"
	done
}

check_series() {
	"$lab/series.sh" 2>"$found.log" || { cat "$found.log"; return; }
	[ -s "$build/series/series.mbox" ] || echo "build/series/series.mbox is missing"
}

# MAINTAINERS comes with the series, but not in each patch.  spdxcheck.py wants
# the kernel's history, so checkpatch is told that there is no git; check_spdx
# does its work.
check_patch() {
	GIT_DIR=/nonexistent perl "$patched/scripts/checkpatch.pl" --root="$patched" --strict --terse \
		--no-summary --show-types --ignore=FILE_PATH_CHANGES "$1" 2>&1 |
		grep -v '^total: 0 errors, 0 warnings, 0 checks' || true
}

# What the series changes or brings, of files that one config compiles.
sources() {
	(cd "$1" && while read -r file; do
		case $file in
		tools/*|Documentation/*|*.h|*.mod.c) ;;
		*.c) [ ! -e "$file" ] || echo "$file" ;;
		esac
	done <"$build/src/patched.files" | sort)
}

# The kernel wants a sparse that knows __typeof_unqual__; the release of Debian
# 12 does not.  For the same warnings in two trees __typeof__ does as well.
sparse_command() {
	local alias=-D__typeof_unqual__=__typeof__

	if [ "$(sh "$patched/scripts/checker-valid.sh" sparse -m64)" = 1 ]; then
		echo sparse
	else
		echo "sparse $alias"
	fi
}

kmake() {
	local tree=$1

	shift
	make -s -C "$build/src/$tree" O="$work/$tree" CC="ccache gcc" -j"$(nproc)" "$@"
}

prepare() {
	mkdir -p "$work/$1"
	kmake "$1" KCONFIG_ALLCONFIG="$lab/config/base.config" allnoconfig &&
		kmake "$1" prepare
}

# warnings TREE: what gcc's W=1 and sparse say, less line numbers and paths.
# Objects are removed first, for what is up to date warns of nothing.
warnings() {
	local tree=$1 objects

	objects=$(sources "$build/src/$tree" | sed 's/\.c$/.o/')
	prepare "$tree" >"$work/$tree.log" 2>&1 || {
		echo "make prepare fails in the $tree tree: $work/$tree.log" >&2
		return
	}
	(cd "$work/$tree" && echo "$objects" | xargs rm -f)
	# shellcheck disable=SC2086  # one word for each object
	kmake "$tree" W=1 C=2 CHECK="$(sparse_command)" -k $objects >"$work/$tree.log" 2>&1 ||
		echo "the $tree tree does not compile: $(grep -m1 -E 'error:|\*\*\*' "$work/$tree.log")" >&2
	# make goes on without a checker that it does not like.
	grep 'not available or not up to date' "$work/$tree.log" >&2 || true
	grep -E '(warning|error): ' "$work/$tree.log" |
		sed -E "s,^.*/src/$tree/|^\.\./,,; s/:[0-9]+(:[0-9]+)?:/:/" | sort || true
}

check_warnings() {
	warnings stock >"$work/stock.warnings"
	warnings patched >"$work/patched.warnings"
	[ -n "$(sources "$patched")" ] || echo "no source file of the series was found"
	comm -13 "$work/stock.warnings" "$work/patched.warnings"
}

# Only what is reported in our file: the kernel's harness has its own habits.
check_selftest() {
	local file=${1#selftests/} system=("$patched/tools/include/uapi")

	case $file in
	kvm/*) system=("$patched"/tools/{include,arch/x86/include} \
		"$work/patched/usr/include" kvm/include kvm/include/x86 \
		cgroup/lib/include) ;;
	esac
	cd "$patched/tools/testing/selftests"
	gcc -std=gnu11 -O2 -Wall -Wextra -D_GNU_SOURCE= -DCONFIG_64BIT -I "$patched" -I . \
		"${system[@]/#/-isystem}" -c -o /dev/null "$file" 2>"$work/gcc.log" ||
		{ grep -m5 'error:' "$work/gcc.log" || tail -n 5 "$work/gcc.log"; }
	grep -E "^$file:.*warning:" "$work/gcc.log" || true
	cd "$top"
}

check_kernel_doc() {
	"$patched/scripts/kernel-doc" -none -Wall "$@" 2>&1 | grep -v '^$' || true
}

# What only this machine can mean, and what apt alone may know.
check_text() {
	local hosts patterns

	# shellcheck disable=SC2016  # apt expands it
	hosts=$(apt-get indextargets --format '$(SITE)' 2>/dev/null |
		sed -nE 's,^[a-z+]+://([^/:]+).*,\1,p' | sort -u)
	patterns=$(printf '%s\n' "$top/" "$HOME/." "$hosts" | grep .)
	files | xargs -d '\n' grep -nIF "$patterns" -- || true
	files ':!patches' ':!COPYING' | xargs -d '\n' grep -nIE '[[:blank:]]+$' -- || true
}

# A licence that the kernel knows, named in the first lines of every file that
# can carry a comment.
check_spdx() {
	local file licence

	# The kernel's documents of its ABI have a format of their own, without.
	files ':!patches' ':!COPYING' ':!MAINTAINERS' ':!Documentation/ABI' | while IFS= read -r file; do
		licence=$(sed -n '1,5s/.*SPDX-License-Identifier: *\([^ *]*\).*/\1/p' "$file")
		if [ -z "$licence" ]; then
			echo "$file: no SPDX-License-Identifier"
		elif [ ! -e "$patched/LICENSES/preferred/${licence%-o*}" ]; then
			echo "$file: the kernel has no LICENSES/preferred/$licence"
		fi
	done
}

check_shell() {
	# Every script is its own; the sourced files are found from the top.
	{ files '*.sh' '.ci/run'; files tools/lab | xargs -d '\n' grep -lIE '^#!.*\b(ba)?sh\b' --; } |
		sort -u | xargs -d '\n' shellcheck -x -P "$lab" -P "$top" || true
}

check_python() {
	{ files '*.py'; files tools | xargs -d '\n' grep -lI '^#!.*python3' --; } |
		sort -u | xargs -d '\n' pyflakes3 || true
}

# What the model says, a line for each search.
model() {
	"$lab/model/model.sh" >"$work/model" 2>&1 || grep -q '^FAIL - ' "$work/model" ||
		echo "FAIL - all of it: the model was not searched" >>"$work/model"
	grep -vE '^== ' "$work/model"
}

check_model() {
	case $1 in
	'ok - '*) ;;
	*) echo "$1" ;;
	esac
}

# run NAME FUNCTION ARG…
run() {
	local name=$1

	shift
	"$@" >"$found" 2>&1 || echo "the check itself failed (status $?)" >>"$found"
	verdict "$name" "$found"
}

"$lab/tree.sh" patched
run "series composes, git am gives the composed tree" check_series
for patch in "$build"/series/0[0-9][0-9][0-9]-*.patch; do
	[ "${patch##*/}" = 0000-cover-letter.patch ] ||
		run "checkpatch --strict: ${patch##*/}" check_patch "$patch"
done
run "no new warnings: W=1, sparse" check_warnings
run "headers for userspace" kmake patched headers
while IFS= read -r file; do
	run "compiles with -Wall -Wextra: $file" check_selftest "$file"
done < <(files 'selftests/*.c')
mapfile -t documented < <(files 'mm/*.[ch]' 'include/*.h' 'virt/*.[ch]' 'arch/*.[ch]' 'lib/*.[ch]')
run "kernel-doc" check_kernel_doc "${documented[@]}"
while IFS= read -r line; do
	searched=${line#* - }
	run "model: ${searched%%:*}" check_model "$line"
done < <(model)
run "SPDX lines" check_spdx
run "shellcheck" check_shell
run "pyflakes" check_python
run "no names of this machine or its mirrors, no trailing blanks" check_text
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
