#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# fetch.sh: fetch the base kernel's source package; print its path.
#
# The package, its version and its checksum are in tools/lab/base; the mirror is
# the one in the machine's own apt configuration (DEBIAN_MIRROR=URL overrides it),
# asked by a private apt whose state lives in the cache directory.  With the
# package in the cache no network is needed.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/base
. "$lab/base"
# shellcheck source=tools/lab/apt.sh
. "$lab/apt.sh"

apt=$cache/apt
instead="KERNEL_SRC=<dir> takes a Linux $SERIES.y tree of yours"
# When the pinned version has left the mirror: what was taken in its place.
newer=$cache/base/instead-of-$VERSION

deb_path() {
	echo "$cache/base/${PACKAGE}_$1.deb"
}

checksum_ok() {
	[ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$2" ]
}

announce_newer() {
	step "note: $PACKAGE $VERSION has left the mirror, using $1 in its place"
}

# Ends the script when the package is at hand, whole.
from_cache() {
	local version sum

	if checksum_ok "$(deb_path "$VERSION")" "$SHA256"; then
		deb_path "$VERSION"
		exit 0
	fi
	if [ -f "$newer" ] && read -r version sum <"$newer" &&
	   checksum_ok "$(deb_path "$version")" "$sum"; then
		announce_newer "$version"
		deb_path "$version"
		exit 0
	fi
}

read_index() {
	step "reading the index of $SUITE"
	apt-get -c "$apt/apt.conf" -q -o APT::Update::Error-Mode=any update \
		>"$log" 2>&1 </dev/null ||
		die "cannot read the index of $SUITE: $(archive_reason "$log" "$SUITE"); $instead"
}

# Sets want and want_sum: the pinned version, or else the newest of the series,
# whose checksum is in the signed index.
choose() {
	local versions

	versions=$(apt-cache -c "$apt/apt.conf" madison "$PACKAGE" | awk -F ' *[|] *' '{ print $2 }')
	[ -n "$versions" ] ||
		die "$SUITE on the machine's mirror has no $PACKAGE; $instead"
	want=$VERSION want_sum=$SHA256
	if grep -qxF "$VERSION" <<<"$versions"; then
		return 0
	fi
	want=$(grep -m1 "^${SERIES//./\\.}\\." <<<"$versions") ||
		die "$PACKAGE on the machine's mirror is not a $SERIES.y; $instead"
	want_sum=$(apt-cache -c "$apt/apt.conf" show "$PACKAGE=$want" |
		sed -n '0,/^SHA256: /s/^SHA256: //p')
	announce_newer "$want"
}

# Into a temporary directory, checked, then renamed into place.
download() {
	local tmp deb quiet=-q=0

	need_disk "$cache" 1
	tmp=$(mktemp -d "$cache/base/.download.XXXXXX")
	scratch+=("$tmp")
	if [ ! -t 2 ]; then quiet=-q; fi
	step "downloading $PACKAGE $want"
	(cd "$tmp" && apt-get -c "$apt/apt.conf" "$quiet" download "$PACKAGE=$want" \
		3>&2 2>"$log" >&3 </dev/null) || true
	deb=$(find "$tmp" -name '*.deb')
	[ -n "$deb" ] || die "cannot download $PACKAGE $want: $(archive_reason "$log" "$SUITE")"
	checksum_ok "$deb" "$want_sum" ||
		die "$PACKAGE $want has not the checksum $want_sum (see tools/lab/base): try again; if it stays, distrust the mirror"
	if [ "$want" != "$VERSION" ]; then
		echo "$want $want_sum" >"$newer"
	fi
	mv "$deb" "$(deb_path "$want")"
}

mkdir -p "$cache/base" 2>/dev/null || die "cannot create $cache/base: check permissions and free disk, or set XDG_CACHE_HOME"
# One download at a time, for all checkouts share the cache.
exec 8>"$cache/base/.lock"
flock 8
from_cache
need apt-get=apt /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
mirror=${DEBIAN_MIRROR:-$(machine_mirror)}
[ -n "$mirror" ] ||
	die "no Debian mirror in this machine's apt configuration: name one with DEBIAN_MIRROR=<url>, or $instead"
log=$(mktemp)
scratch+=("$log")
# What is installed is of no interest.
mkdir -p "$apt"
: >"$apt/status"
private_apt "$apt" "$apt/status" "$mirror" "$SUITE"
read_index
choose
download
deb_path "$want"
