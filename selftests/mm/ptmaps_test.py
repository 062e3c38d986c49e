#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
#
# ptmaps_test.py [PTMAPS]: populate memory in patterns and compare what
# tools/mm/ptmaps says of this process with what must be.
#
# What the process has and does not need is compared before and after, exactly:
# what Python populates meanwhile is needed.

import ctypes
import json
import mmap
import os
import shutil
import sys

PAGE, TABLE, GIB = 4096, 2 << 20, 1 << 30
TABLES = 128            # PTE tables of a pattern
SIZE = TABLES * TABLE
SURVIVOR = 512 << 20    # offset of a page that keeps the PMD table of the area in use
MAP_NORESERVE, MADV_GUARD_INSTALL = 0x4000, 102

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

code = None             # of ptmaps


class Skip(Exception):
    """This kernel cannot do what the test wants."""


def advise(start, length, advice):
    if libc.madvise(start, length, advice):
        raise Skip(f"madvise {advice}: {os.strerror(ctypes.get_errno())}")


def write(address):
    ctypes.c_ubyte.from_address(address).value = 1


def each(length, step=TABLE):
    return range(0, length, step)


class Area:
    """1 GiB of its own, aligned, so that all of its PTE tables and its PMD table
    are known; one page in it is populated."""

    def __enter__(self):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.map = libc.mmap(None, 3 * GIB, 0, flags, -1, 0)
        self.start = (self.map // GIB + 1) * GIB
        libc.mprotect(self.start, GIB, mmap.PROT_READ | mmap.PROT_WRITE)
        libc.madvise(self.start, GIB, mmap.MADV_NOHUGEPAGE)
        write(self.start + SURVIVOR)
        return self

    def __exit__(self, *_):
        libc.munmap(self.map, 3 * GIB)


def run(*args):
    """Run ptmaps: its exit status, what it printed, and its errors."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    pid = os.fork()     # far quicker than a Python of its own on an emulated machine
    if not pid:
        sys.stdout, sys.stderr = open(out_end, "w"), open(err_end, "w")
        become_ptmaps(args)
    os.close(out_end)
    os.close(err_end)
    with open(out) as stdout, open(err) as stderr:
        printed, errors = stdout.read(), stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), printed, errors


def become_ptmaps(args):
    """In a child: be ptmaps with these arguments, and end."""
    sys.argv, status = [ptmaps, *args], 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            status = 1
            print(end.code, file=sys.stderr)
    except BaseException as error:
        status = 1
        print(repr(error), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def measure(area, *args):
    """What ptmaps says of the area (the sum of its mappings), and the tables that the
    process has and does not need."""
    process = json.loads(run("--pid", str(os.getpid()), "--json", *args)[1])["processes"][0]
    rows = [row for row in process["mappings"]
            if area.start <= row["start"] < area.start + GIB]
    keys = ("populated", "pte", "zero_only", "deposited", "pmd")
    spare = (process["vmpte"] - process["needed"] - process["hidden"]) // PAGE
    return {key: sum(row[key] or 0 for row in rows) for key in keys}, spare


def expect(area, spare, **figures):
    """None if the area has these figures, next to the page that is always there, and
    spare tables are left over; else what is wrong."""
    found, left = measure(area)
    wanted = {"populated": 0, "pte": 0, "zero_only": 0, "deposited": 0, "pmd": 0, **figures}
    for key in "pte", "pmd":
        wanted[key] += 1
    wanted["populated"] += PAGE
    if found != wanted or left != spare:
        return f"{found}, {left} tables left over; expected {wanted}, {spare}"
    return None


def test_populate(area, spare):
    """pages far apart, eight in each PTE table"""
    for offset in each(SIZE, TABLE // 8):
        write(area.start + offset)
    return expect(area, spare, populated=8 * TABLES * PAGE, pte=TABLES)


def test_discard(area, spare):
    """discarded by 1 MiB: the tables are left over, or with page table reclaim gone"""
    test_populate(area, spare)
    for offset in each(SIZE, TABLE // 2):
        advise(area.start + offset, TABLE // 2, mmap.MADV_DONTNEED)
    with open("/proc/vmstat") as vmstat:
        reclaim = "pt_reclaim_pte" in vmstat.read()
    return expect(area, spare + (0 if reclaim else TABLES))


def test_zeropage(area, spare):
    """tables with zeropages only, but for one"""
    for offset in each(SIZE):
        ctypes.c_ubyte.from_address(area.start + offset).value
    write(area.start + PAGE)
    return expect(area, spare, populated=(TABLES + 1) * PAGE, pte=1, zero_only=TABLES - 1)


def test_neighbours(area, spare):
    """a table that two mappings share counts once"""
    write(area.start)
    ctypes.c_ubyte.from_address(area.start + TABLE // 2).value
    libc.mprotect(area.start, TABLE // 2, mmap.PROT_READ)
    return expect(area, spare, populated=2 * PAGE, pte=1)


def test_guards(area, spare):
    """guards need their tables"""
    for offset in each(SIZE):
        advise(area.start + offset, PAGE, MADV_GUARD_INSTALL)
    return expect(area, spare, populated=TABLES * PAGE, pte=TABLES)


def test_huge(area, spare):
    """a huge page has a table set aside"""
    advise(area.start, 4 * TABLE, mmap.MADV_HUGEPAGE)
    for offset in each(4 * TABLE):
        write(area.start + offset)
    if measure(area)[0]["populated"] < 4 * TABLE:
        raise Skip("no huge pages to be had")
    return expect(area, spare, populated=4 * TABLE, deposited=4)


def test_no_scan(area, spare):
    """without PAGEMAP_SCAN, what is populated and needed is the same"""
    test_zeropage(area, spare)
    found, left = measure(area, "--no-scan")
    wanted = {"populated": (TABLES + 2) * PAGE, "pte": TABLES + 1, "zero_only": 0,
              "deposited": 0, "pmd": 1}
    return None if (found, left) == (wanted, spare) else f"{found}, {left}"


def test_sum(area, spare):
    """mappings add up to their process"""
    process = json.loads(run("--pid", str(os.getpid()), "--json")[1])["processes"][0]
    found = sum(row["needed"] or 0 for row in process["mappings"])
    return None if found == process["needed"] else f"{found}, {process['needed']}"


def test_errors(area, spare):
    """one line and the right exit status for each error"""
    for status, args in ((1, ("--pid", "0")), (1, ("--cgroup", "/nonexistent")), (2, ()),
                         (2, ("--pid", "x")), (2, ("--pid", "1", "--min", "x"))):
        ended, printed, errors = run(*args)
        if (ended, printed, errors.count("\n")) != (status, "", 1):
            return f"{args}: status {ended}, {printed!r}, {errors!r}"
    return None


def find():
    """The program: named on the command line, in this kernel tree, next to this one,
    or installed."""
    here = os.path.dirname(os.path.realpath(__file__))
    files = sys.argv[1:] + [os.path.join(here, "../../../mm/ptmaps"), os.path.join(here, "ptmaps")]
    return next(filter(os.path.exists, files), shutil.which("ptmaps"))


def load():
    """Compile ptmaps, and import what it imports, for all runs of it."""
    global code
    with open(ptmaps) as source:
        code = compile(source.read(), ptmaps, "exec")
    exec(code, {"__name__": "ptmaps"})


def main():
    print("TAP version 13")
    if not ptmaps or os.uname().machine != "x86_64":
        print("1..0 # SKIP no ptmaps, or not x86-64")
        return 4
    load()
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    print(f"1..{len(tests)}")
    failed = False
    for number, test in enumerate(tests, 1):
        skip = wrong = None
        try:
            with Area() as area:
                measure(area)   # what Python needs to do this is populated
                wrong = test(area, measure(area)[1])
        except Skip as reason:
            skip = f" # SKIP {reason}"
        if wrong:
            print(f"# {wrong}")
        print(f"{'not ok' if wrong else 'ok'} {number} {test.__doc__}{skip or ''}", flush=True)
        failed = failed or bool(wrong)
    return int(failed)


ptmaps = find()
if __name__ == "__main__":
    sys.exit(main())
