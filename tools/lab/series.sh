#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# series.sh: compose the postable series from patches/ and the new files.
#
# build/series/NNNN-*.patch  cover letter and patches, for git send-email
# build/series/series.mbox   the patches: git am, b4 shazam -m
# build/series/thread.mbox   the same with the cover letter: b4 am -m
#
# That git am makes exactly the composed tree of series.mbox has been tried when
# this returns.  KERNEL_SRC=DIR composes against this tree.
. "$(dirname "$0")/lib.sh"

need git=git /usr/bin/python3=python3 patch=patch
"$lab/tree.sh" stock
lock series
part=$build/series.part
rm -rf "$part"
scratch+=("$part")
/usr/bin/python3 "$lab/compose.py" series --base "$build/src/stock" --out "$part" >/dev/null
rm -rf "$part/git" "$build/series"
mv "$part" "$build/series"
step "build/series has $(($(find "$build/series" -name '0*.patch' | wc -l) - 1)) patches and the cover letter; git am build/series/series.mbox"
