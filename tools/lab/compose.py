#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""compose.py: put the hook patches and the new files together.

  compose.py stage  --base TREE --out DIR   touched files as they are patched
  compose.py series --base TREE --out DIR   the postable series, one mbox
  compose.py list                           repo path and kernel path of each
                                            new file, tab separated

TREE is an unpatched kernel tree; it is only read.  A patch of patches/series
is a mail header (From:, Subject:), a commit message and a diff.  "New-files:"
lines of the message name the whole files of this repository that arrive with
the patch; they are stripped from what is posted.

Exit status: 0; 1 with one line that names the patch and the file at fault.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PATCHES = Path(os.environ.get("PATCHES", TOP / "patches"))
# Where what lands in a kernel stands; Documentation/project is about this repository.
LANDING = ("mm", "include", "virt", "arch", "Documentation", "selftests",
           "tools/mm", "lib")
# The commits of the composed series carry this date, so that composing twice
# gives the same bytes: the release of the base.
DATE = "2026-11-20T12:00:00+0000"


class Bad(Exception):
    """One line for the user."""


def kernel_path(repo_path):
    """Where a file of this repository lands in the kernel."""
    if repo_path.startswith("selftests/"):
        return "tools/testing/" + repo_path
    return repo_path


class Patch:
    """A hook patch: header, message, new files, diff, touched kernel files."""

    def __init__(self, name):
        self.name = name
        text = (PATCHES / name).read_text()
        head, sep, body = text.partition("\n\n")
        cut = re.search(r"^(---$|--- a/|--- /dev/null|diff )", body, re.M)
        self.diff = body[cut.start():] if cut else ""
        message = body[:cut.start()] if cut else body
        self.new_files = " ".join(re.findall(r"^New-files:(.*)$", message, re.M)).split()
        self.message = re.sub(r"^New-files:.*\n", "", message, flags=re.M).strip()
        fields = dict(re.findall(r"^(From|Subject): (.*(?:\n[ \t].*)*)", head, re.M))
        if not sep or set(fields) != {"From", "Subject"}:
            raise Bad(f"patches/{name}: wants From: and Subject: lines, then an empty one")
        self.author = fields["From"]
        self.subject = re.sub(r"\s*\n\s*", " ", fields["Subject"])
        self.touched = re.findall(r"^--- a/(\S+)", self.diff, re.M)


def read_series():
    names = [line.split("#")[0].strip()
             for line in (PATCHES / "series").read_text().splitlines()]
    patches = [Patch(name) for name in names if name]
    check_new_files(patches)
    return patches


def landing_files():
    """Every file of the repository that lands in a kernel as a whole."""
    out = subprocess.run(["git", "-C", TOP, "ls-files", "-co", "--exclude-standard",
                          "--", *LANDING, "MAINTAINERS", ":!Documentation/project"],
                         capture_output=True, text=True, check=True).stdout
    return [name for name in out.split() if (TOP / name).exists()]


def check_new_files(patches):
    owner = {}
    for patch in patches:
        for name in patch.new_files:
            if not (TOP / name).is_file():
                raise Bad(f"patches/{patch.name}: New-files names {name}, which does not exist")
            if name in owner:
                raise Bad(f"{name} arrives with two patches: {owner[name]} and {patch.name}")
            owner[name] = patch.name
    if PATCHES == TOP / "patches":
        for name in landing_files():
            if name not in owner:
                raise Bad(f"{name} lands in the kernel but no patch has it in New-files")


def insert_maintainers(target):
    """Merge our fragment at its alphabetical place."""
    fragment = (TOP / "MAINTAINERS").read_text().strip() + "\n\n"
    text = target.read_text()
    start = text.index("\n3C59X")
    for entry in re.finditer(r"\n\n(?=([^\t\n]+)\n[A-Z]:\t)", text[start:]):
        if entry.group(1) > fragment:
            at = start + entry.end()
            target.write_text(text[:at] + fragment + text[at:])
            return
    raise Bad("MAINTAINERS of the base: no place found for our entry")


def apply_diff(patch, out):
    """No fuzz, as in git am: context that changed wants a look."""
    run = subprocess.run(["patch", "-p1", "-f", "-N", "-F0", "--no-backup-if-mismatch",
                          "-r", "-", "-d", out],
                         input=patch.diff, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
    if not run.returncode:
        return
    where = "?"
    for line in run.stdout.splitlines():
        if line.startswith("patching file "):
            where = line.removeprefix("patching file ")
        elif "FAILED" in line or "malformed" in line or "previously applied" in line:
            raise Bad(f"patches/{patch.name} does not apply to {where}: {line}")
    raise Bad(f"patches/{patch.name} does not apply: {run.stdout.strip()}")


def apply_patch(patch, base, out):
    """Copy what the patch touches from base unless it is there, then apply."""
    for name in patch.touched + ["MAINTAINERS"] * ("MAINTAINERS" in patch.new_files):
        if not (out / name).exists() and (base / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(base / name, out / name)
    for name in patch.touched:
        if not (out / name).exists():
            raise Bad(f"patches/{patch.name} does not apply: this kernel has no {name}")
    if patch.touched:
        apply_diff(patch, out)
    for name in patch.new_files:
        if name == "MAINTAINERS":
            insert_maintainers(out / name)
            continue
        target = out / kernel_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, target)


def stage(base, out):
    for patch in read_series():
        apply_patch(patch, base, out)


def git(out, *args, **kwargs):
    env = dict(os.environ, GIT_AUTHOR_DATE=DATE, GIT_COMMITTER_DATE=DATE,
               GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL=os.devnull, **kwargs.pop("env", {}))
    return subprocess.run(["git", "-C", out, *args], check=True, env=env,
                          capture_output=True, text=True, **kwargs).stdout


def split_author(author):
    match = re.fullmatch(r"(.*?)\s*<(.*)>", author)
    if not match:
        raise Bad(f"no 'Name <address>': {author}")
    return match.groups()


def series(base, out):
    patches = read_series()
    repo = out / "git"
    repo.mkdir(parents=True)
    git(repo, "init", "-q")
    name, mail = split_author(patches[0].author)
    git(repo, "config", "user.name", name)
    git(repo, "config", "user.email", mail)
    for touched in sorted({t for p in patches for t in p.touched} | {"MAINTAINERS"}):
        if (base / touched).exists():
            (repo / touched).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(base / touched, repo / touched)
    git(repo, "add", "-Af")
    git(repo, "commit", "-qm", "base")
    first = git(repo, "rev-parse", "HEAD").strip()
    for patch in patches:
        apply_patch(patch, base, repo)
        git(repo, "add", "-Af")
        name, mail = split_author(patch.author)
        git(repo, "commit", "-q", "-F", "-", "--author", f"{name} <{mail}>",
            input=f"{patch.subject}\n\n{patch.message}\n")
    git(repo, "format-patch", "-q", "--cover-letter", "--thread=shallow",
        "--signature=", "-o", str(out.resolve()), first)
    write_cover(out / "0000-cover-letter.patch")
    mails = sorted(out.glob("[0-9]*.patch"))
    for mail_file in mails:
        settle_header(mail_file, git(repo, "rev-parse", "--short=12", "HEAD").strip())
    # git am stops at a mail without a diff; b4 wants the cover letter.
    for box, content in ("thread.mbox", mails), ("series.mbox", mails[1:]):
        (out / box).write_text("".join(m.read_text() + "\n" for m in content))
    verify(base, out, repo, first)
    for mail_file in mails:
        print(mail_file.name)


def settle_header(path, head):
    """Headers on one line each, since b4 0.12 fails on a folded From; message
    ids with the last commit for the time, so that composing twice gives the
    same bytes."""
    header, sep, body = path.read_text().partition("\n\n")
    header = re.sub(r"\n[ \t]+", " ", header)
    header = re.sub(r"^((?:Message-I[Dd]|In-Reply-To|References): <\w+\.)\d+(\.git\.)",
                    rf"\g<1>{head}\2", header, flags=re.M)
    path.write_text(header + sep + body)


def write_cover(path):
    subject, _, body = (PATCHES / "cover-letter").read_text().partition("\n")
    text = path.read_text()
    text = text.replace("*** SUBJECT HERE ***", subject)
    path.write_text(text.replace("*** BLURB HERE ***", body.strip()))


def verify(base, out, repo, first):
    """What git am makes of the mbox is what was composed."""
    head = git(repo, "rev-parse", "HEAD^{tree}").strip()
    git(repo, "checkout", "-q", "-b", "verify", first)
    git(repo, "am", "-q", str((out / "series.mbox").resolve()))
    if git(repo, "rev-parse", "HEAD^{tree}").strip() != head:
        raise Bad("git am of the composed mbox gives another tree than was composed")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("stage", "series", "list"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "list":
        for patch in read_series():
            for name in patch.new_files:
                print(name, kernel_path(name), sep="\t")
        return
    if not args.base or not args.out:
        parser.error("--base and --out are needed")
    {"stage": stage, "series": series}[args.command](args.base, args.out)


if __name__ == "__main__":
    try:
        main()
    except Bad as bad:
        sys.exit(f"error: {bad}")
    except subprocess.CalledProcessError as bad:
        sys.exit(f"error: {' '.join(map(str, bad.cmd[:4]))}…: {bad.stderr.strip()}")
