# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# A private apt, for packages of a suite that the machine does not use: sourced
# by the scripts that fetch such packages, after lib.sh.  The mirror is the one in
# the machine's own configuration; nothing below /etc/apt or /var/lib/apt is
# touched, and no root is needed.

# The first source of the machine's apt that serves Debian's main archive.  apt
# itself reads its configuration, in all of its forms; cdrom and security
# sources carry no backports.
machine_mirror() {
	# shellcheck disable=SC2016  # apt expands these
	apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
		'Identifier: Packages' 2>/dev/null |
	awk '
	$1 ~ /^cdrom:/ || $1 ~ /security/ || $2 ~ /security/ || $3 != "main" { next }
	{ sub(/-(updates|backports|backports-sloppy|proposed-updates)$/, "", $2) }
	found || ($2 !~ /^(bullseye|bookworm|trixie|forky|duke|sid|(old)*stable|testing|unstable)$/ &&
		  $1 !~ /\/debian\/?$/) { next }
	{ print $1; found = 1 }'
}

# private_apt DIR STATUS MIRROR SUITE...: write DIR/apt.conf, of an apt that knows
# one mirror, and of the packages that are installed what the file STATUS says.
# The machine's settings (proxies above all) stay in force; its hooks do not, for
# some of them delete the machine's package cache.
private_apt() {
	local dir=$1 status=$2 mirror=$3 suite

	shift 3
	mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/empty"
	for suite; do
		printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
			"$mirror" "$suite"
	done >"$dir/sources.list"
	cat >"$dir/apt.conf" <<-END
	Dir::Etc::SourceList "$dir/sources.list";
	Dir::Etc::SourceParts "$dir/empty";
	Dir::Etc::Preferences "/dev/null";
	Dir::Etc::PreferencesParts "$dir/empty";
	Dir::State::Lists "$dir/lists";
	Dir::State::Status "$status";
	Dir::Cache "$dir";
	Dir::Cache::Archives "$dir/archives";
	#clear APT::Update::Pre-Invoke;
	#clear APT::Update::Post-Invoke;
	#clear APT::Update::Post-Invoke-Success;
	#clear DPkg::Post-Invoke;
	Acquire::Languages "none";
	Acquire::Retries "2";
	APT::Sandbox::User "root";
	END
}

# archive_reason LOG SUITE: the cause in one line, without the names of hosts.
archive_reason() {
	if grep -q 'does not have a Release file\|404  *Not Found' "$1"; then
		echo "the machine's Debian mirror does not serve the suite $2"
	elif grep -q 'NO_PUBKEY\|is not signed\|signatures were invalid' "$1"; then
		echo "the signature of $2 cannot be checked, upgrade debian-archive-keyring"
	else
		apt_reason "$1"
	fi
}
