#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""e2e.py: inside the kernel under test, run guests whose memory comes and goes.

  e2e.py --qemu DIR [--sparse-qemu DIR] --kernel BZIMAGE --initrd FILE
         [--hostile FILE] --out DIR SCENARIO...
  e2e.py --list

Starts, for each scenario, the QEMU of DIR with KVM and a small Linux guest whose
only program is agent.c; has the guest fill, check and free memory while QMP
resizes it; writes DIR/SCENARIO.json, or SCENARIO.failed.json when a check
failed, and the guest's console beside it.  Exit status 1 when a check failed.
The QEMU of patches/qemu is in the second DIR, and the guest of the scenario "hostile" is
hostile.c: only "sparse" and "hostile" want them.

Every step of a scenario records, in kB unless it says otherwise:

  rss, vmpte            VmRSS and VmPTE in /proc/PID/status of QEMU
  second_rss, _vmpte    the same of the vhost-user process
  sec_page_tables       SecPageTables in /proc/meminfo: KVM's own page tables
  page_tables           PageTables in /proc/meminfo, of all processes
  vmalloc_used, slab    VmallocUsed and Slab in /proc/meminfo, of the whole kernel:
                        memslot metadata is among it
  pt_reclaim            the counters of /proc/vmstat (number), where there are any
  settled               whether PageTables came to rest, for tables are freed by RCU

and what the step itself took (seconds, from the request by QMP until the device
had the size).
"""
import argparse
import ctypes
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
GIB = 1 << 30

# The guest: what it boots with, and the device, of which a little is plugged.
BOOT_MIB = 640
DEVICE_GIB = 64
PLUG_MIB = 768
CYCLES = 3
# What the guest fills of what is plugged; the buffer that is kept when memory
# goes must find room in the boot memory.
BULK_MIB = 640
KEPT_MIB = 32
IO_MIB = 96
# The balloon's guest has no device and more boot memory.
BALLOON_BOOT_MIB = 1024
BALLOON_MIB = 512
SCAN_MIB = 256
# What moves to another QEMU, through a file.
MOVED_MIB = 256
MOVED_BULK_MIB = 128
# What the hostile guest has of the device, in blocks, of which it keeps one.
HOSTILE_BLOCKS = 64
BLOCK_MIB = 2
# Where it lays 32 blocks of something else over the device, and what is behind.
COVER, BEHIND = 16, 48
# QEMU itself may take as much while a guest is stopped.
SLACK_KB = 1024
# PMD tables for the two places that a scan reads, which stay.
UPPER_KB = 8

SYS_PROCESS_MADVISE = 440
MADV_TRIM_TABLES = 26
KVM_CHECK_EXTENSION = 0xae03
KVM_CAP_SPARSE_MEMSLOTS = 252
PAGE = 4096
# Bits of an entry of /proc/PID/pagemap: the page is there, or swapped.
POPULATED = 3 << 62

# Seconds.  Generous, for two kernels may share the machine with other work.
BOOT_DEADLINE = 400
ANSWER_DEADLINE = 400
RESIZE_DEADLINE = 180
REPORT_DEADLINE = 120
SETTLE_DEADLINE = 15
# For as long as this a request that QEMU must refuse is watched.
REFUSAL_WATCH = 4

# Slots of the agent.
BOOT, KEPT, BULK, IO = range(4)

THP = "/sys/kernel/mm/transparent_hugepage/enabled"
EXITS = "/sys/kernel/debug/kvm/unplugged_exits"
COMPLAINT = re.compile(r"BUG:|WARNING:|Oops|general protection|[Kk]ernel panic|Bad page|bad pte")


class Failure(Exception):
    """The guest or its QEMU did not do what the scenario needs."""


def wait_for(what, probe, seconds, pause=0.05):
    """The first true value of probe(); Failure when the time is up."""
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(pause)


def connect(path, alive):
    """A connection to the socket that a process is about to make."""
    def probe():
        alive()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            return None
        return sock
    return wait_for(f"a connection to {os.path.basename(path)}", probe, BOOT_DEADLINE)


class Lines:
    """A socket that is read by lines, with a deadline for each."""

    def __init__(self, name, sock):
        self.name = name
        self.sock = sock
        self.file = sock.makefile("rb")
        self.sent = "connection"

    def send(self, text):
        self.sent = text
        self.sock.sendall(text.encode() + b"\n")

    def line(self, seconds):
        self.sock.settimeout(seconds)
        try:
            line = self.file.readline()
        except TimeoutError as late:
            raise Failure(f"{self.name}: no answer within {seconds} s to '{self.sent}'") from late
        if not line.endswith(b"\n"):
            raise EOFError
        return line.decode()


class Qmp(Lines):
    def __init__(self, sock):
        super().__init__("QEMU", sock)
        self.line(BOOT_DEADLINE)
        self.do("qmp_capabilities")

    def do(self, command, **arguments):
        """What the command returns; Failure when QEMU says that it cannot."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": given}))
        while True:
            answer = json.loads(self.line(ANSWER_DEADLINE))
            if "error" in answer:
                raise Failure(f"QMP {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def get(self, device, name):
        return self.do("qom-get", path=f"/machine/peripheral/{device}", property=name)

    def set(self, device, name, value):
        self.do("qom-set", path=f"/machine/peripheral/{device}", property=name, value=value)


class Agent(Lines):
    def ask(self, command):
        """The words of the guest's answer."""
        self.send(command)
        words = self.line(ANSWER_DEADLINE).split()
        if words[:1] != ["ok"]:
            raise Failure(f"the guest says of '{command}': {' '.join(words)}")
        return words[1:]

    def cat(self, path):
        size = int(self.ask(f"cat {path}")[0])
        return self.file.read(size).decode()


def fields(path, names):
    """The figures (kB) of a file of lines 'name: figure kB'."""
    found = {}
    with open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in names:
                found[name] = int(rest.split()[0])
    return found


def pt_reclaim():
    with open("/proc/vmstat", encoding="ascii") as lines:
        pairs = [line.split() for line in lines if line.startswith("pt_reclaim")]
    return {name: int(value) for name, value in pairs}


def kvm_block_size():
    """The size of a block of a sparse memslot, or 0 where KVM has none."""
    with open("/dev/kvm", "rb", buffering=0) as kvm:
        return fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_SPARSE_MEMSLOTS)


def unplugged_exits():
    """How often vCPUs have left for unplugged memory; None where KVM does not know it."""
    if not os.path.exists(EXITS):
        return None
    with open(EXITS, encoding="ascii") as file:
        return int(file.read())


def settle():
    """Wait until page tables that RCU is to free are gone; whether they came to rest."""
    def sample():
        return fields("/proc/meminfo", ("PageTables", "SecPageTables"))

    end = time.monotonic() + SETTLE_DEADLINE
    last, same = sample(), 0
    while same < 3:
        if time.monotonic() > end:
            return False
        time.sleep(0.4)
        now = sample()
        last, same = now, same + 1 if now == last else 0
    return True


def figures(qemu, second):
    settled = settle()
    own = fields(f"/proc/{qemu}/status", ("VmRSS", "VmPTE"))
    host = fields("/proc/meminfo", ("PageTables", "SecPageTables", "VmallocUsed", "Slab"))
    found = {"rss": own["VmRSS"], "vmpte": own["VmPTE"],
             "sec_page_tables": host["SecPageTables"], "page_tables": host["PageTables"],
             "vmalloc_used": host["VmallocUsed"], "slab": host["Slab"],
             "pt_reclaim": pt_reclaim(), "settled": settled}
    if second:
        own = fields(f"/proc/{second}/status", ("VmRSS", "VmPTE"))
        found["second_rss"], found["second_vmpte"] = own["VmRSS"], own["VmPTE"]
    return found


class Process:
    """A program in the background whose error output is kept for its obituary."""

    def __init__(self, name, argv, dir_):
        self.name = name
        self.errors = os.path.join(dir_, f"{name}.err")
        with open(self.errors, "wb") as err:
            self.popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=err, stderr=err)
        self.pid = self.popen.pid

    def alive(self):
        if self.popen.poll() is not None:
            with open(self.errors, encoding="utf-8", errors="replace") as err:
                last = err.read().strip().splitlines()[-1:]
            raise Failure(f"{self.name} ended ({self.popen.returncode}): {' '.join(last)}")

    def said(self, what):
        """The lines of its error output that have this."""
        with open(self.errors, encoding="utf-8", errors="replace") as err:
            return [line.strip() for line in err if what in line]

    def end(self):
        self.popen.kill()
        self.popen.wait()


def memory(id_, mib, shared):
    kind = "memory-backend-memfd,share=on" if shared else "memory-backend-ram"
    return ["-object", f"{kind},id={id_},size={mib}M,reserve=off"]


class Run:
    """One scenario: its guest, what was recorded and what was checked."""

    def __init__(self, args, name, what):
        self.args = args
        self.name = name
        self.what = what
        self.steps = []
        self.checks = []
        self.notes = {}
        self.sums = {}
        self.processes = []
        self.second = None
        self.shared = False
        self.program = f"{args.qemu}/qemu-system-x86_64"
        self.dir = tempfile.mkdtemp(prefix="e2e-")
        self.console = os.path.join(args.out, f"{name}.console")

    # What is recorded.

    def say(self, text):
        print(f"{self.name}: {text}", flush=True)

    def check(self, what, passed, why=""):
        self.checks.append({"what": what, "passed": bool(passed), "why": "" if passed else why})
        if not passed:
            self.say(f"FAILED: {what}: {why}")

    def step(self, name, stopped=False, **more):
        for process in self.processes:
            process.alive()
        if not stopped:
            self.agent.ask("mem")
            status = self.qmp.do("query-status")["status"]
            if status != "running":
                raise Failure(f"the guest is {status}")
        found = figures(self.qemu.pid, self.second and self.second.pid)
        self.steps.append({"step": name, **found, **more})
        extra = "".join(f", {key} {value}" for key, value in more.items())
        second = f", second VmPTE {found['second_vmpte']}" if self.second else ""
        self.say(f"{name}: RSS {found['rss']} VmPTE {found['vmpte']} SecPageTables"
                 f" {found['sec_page_tables']} kB{second}{extra}")

    # The guest.

    def start(self, name, argv):
        process = Process(name, argv, self.dir)
        self.processes.append(process)
        return process

    def start_disk(self):
        """A vhost-user process, which maps the guest's memory, and its disk."""
        image, sock = os.path.join(self.dir, "disk"), os.path.join(self.dir, "vhost")
        with open(image, "wb") as disk:
            disk.truncate(2 * IO_MIB * MIB)
        self.second = self.start("qemu-storage-daemon", [
            f"{self.args.qemu}/qemu-storage-daemon",
            "--blockdev", f"file,node-name=disk,filename={image}",
            "--export", f"vhost-user-blk,id=export,node-name=disk,writable=on,"
                        f"addr.type=unix,addr.path={sock}"])
        wait_for("the vhost-user socket", lambda: self.second.alive() or os.path.exists(sock), 60)
        return ["-chardev", f"socket,id=vhost,path={sock}",
                "-device", "vhost-user-blk-pci,chardev=vhost"]

    def start_qemu(self, options, boot_mib=BOOT_MIB, shared=False, dump="on"):
        """QEMU, and connections to it and to what its guest has for the character device."""
        qmp, port = os.path.join(self.dir, "qmp"), os.path.join(self.dir, "port")
        self.shared = shared
        self.qemu = self.start("qemu", [
            self.program, "-accel", "kvm", "-cpu", "host",
            # The kernel has no KVM_IOAPIC: nobody else here wants KVM's whole irqchip.
            "-machine", f"q35,kernel-irqchip=split,memory-backend=boot,dump-guest-core={dump}",
            "-m", f"{boot_mib}M,maxmem={DEVICE_GIB + 4}G,slots=1",
            *memory("boot", boot_mib, shared), "-nodefaults", "-display", "none",
            "-qmp", f"unix:{qmp},server=on,wait=off",
            "-chardev", f"socket,id=port,path={port},server=on,wait=off", *options])
        self.qmp = Qmp(connect(qmp, self.qemu.alive))
        self.agent = Agent("guest", connect(port, self.qemu.alive))

    def linux(self):
        return ["-smp", "1", "-no-reboot", "-serial", f"file:{self.console}",
                "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,nr=1",
                "-kernel", self.args.kernel, "-initrd", self.args.initrd,
                "-append", "console=ttyS0 panic=-1 memhp_default_state=online_movable"]

    def device(self, properties="", shared=False):
        return [*memory("pool", DEVICE_GIB * 1024, shared),
                "-device", f"virtio-mem-pci,id=vmem,memdev=pool,requested-size=0{properties}"]

    def boot(self, options, boot_mib=BOOT_MIB, shared=False, dump="on"):
        began = time.monotonic()
        self.start_qemu([*self.linux(), *options], boot_mib, shared, dump)
        self.agent.ask("mem")
        self.fill(BOOT, KEPT_MIB)
        self.step("booted", seconds=round(time.monotonic() - began, 2))

    def boot_virtio_mem(self, extra=(), shared=False, dump="on", device=""):
        self.boot([*self.device(device, shared), *extra], shared=shared, dump=dump)
        self.address = self.qmp.do("query-memory-devices")[0]["data"]["memaddr"]

    def patched_qemu(self):
        self.program = f"{self.args.sparse_qemu}/qemu-system-x86_64"

    def end(self):
        for process in reversed(self.processes):
            process.end()
        self.processes = []

    # What the guest does.

    def fill(self, slot, mib):
        """Map (the first time) and fill a buffer, differently each time."""
        seed = len(self.steps) * 16 + slot + 1
        self.sums[slot] = self.agent.ask(f"fill {slot} {mib} {seed}")[0]

    def drop(self, slot):
        self.agent.ask(f"drop {slot}")
        del self.sums[slot]

    def intact(self, when):
        """Checks every buffer that there is."""
        names = {BOOT: "boot", KEPT: "kept", BULK: "bulk", IO: "io"}
        wrong = [names[slot] for slot, was in self.sums.items()
                 if self.agent.ask(f"sum {slot}")[0] != was]
        self.check(f"data intact {when}", not wrong, f"other contents in: {', '.join(wrong)}")

    # What the host does.

    def size(self):
        return self.qmp.get("vmem", "size")

    def request(self, mib):
        self.qmp.set("vmem", "requested-size", mib * MIB)

    def reached(self, mib):
        """Wait until the device has the size; the seconds since now."""
        began = time.monotonic()
        wait_for(f"a size of {mib} MiB", lambda: self.size() == mib * MIB, RESIZE_DEADLINE, 0.02)
        seconds = round(time.monotonic() - began, 2)
        self.say(f"{mib} MiB plugged after {seconds} s")
        return seconds

    def resize(self, mib):
        self.request(mib)
        return self.reached(mib)


# Parts of scenarios.

def check_iomem(run, plugged_mib):
    """The virtio-mem developer guide: a parent named for the device, and children
    'System RAM (virtio_mem)' that kdump tools leave alone when offline."""
    sizes, parent, outside = [], None, 0
    for line in run.agent.cat("/proc/iomem").splitlines():
        span, _, name = line.partition(" : ")
        low, high = (int(end, 16) for end in span.split("-"))
        if re.fullmatch(r"virtio\d+", name) and low == run.address:
            parent = high
        if name == "System RAM (virtio_mem)":
            sizes.append(high + 1 - low)
            outside += parent is None or not run.address <= low < high <= parent
    run.notes.setdefault("iomem_mib", {})[str(plugged_mib)] = sum(sizes) // MIB
    run.check(f"/proc/iomem shows {plugged_mib} MiB of 'System RAM (virtio_mem)' in the device",
              sum(sizes) == plugged_mib * MIB and not outside,
              f"it shows {sum(sizes) // MIB} MiB, {outside} of {len(sizes)} outside")


def check_place(run):
    above, pages = (int(word) for word in run.agent.ask(f"where {KEPT} {run.address:x}"))
    run.notes["kept_pages_plugged"] = f"{above} of {pages}"
    run.check("the kept buffer is in plugged memory", above > pages * 0.9,
              f"{above} of its {pages} pages are")


def through_disk(run):
    """What the second process is for: it reads and writes the plugged memory."""
    run.fill(IO, IO_MIB)
    run.agent.ask(f"write {IO} /dev/vda")
    written = run.sums[IO]
    run.agent.ask(f"fill {IO} {IO_MIB} 99")
    back = run.agent.ask(f"read {IO} /dev/vda")[0]
    run.check("the disk gives back what was written", back == written, "other contents")


def cycle(run, n, disk=False):
    seconds = run.resize(PLUG_MIB)
    run.fill(KEPT, KEPT_MIB)
    if n == 1:
        check_iomem(run, PLUG_MIB)
        check_place(run)
    bulk = BULK_MIB
    if disk:
        bulk -= IO_MIB
        through_disk(run)
    run.fill(BULK, bulk)
    run.step(f"filled {n}", plug_seconds=seconds)
    run.intact(f"after fill {n}")
    for slot in set(run.sums) & {BULK, IO}:
        run.drop(slot)
    seconds = run.resize(PLUG_MIB // 2)
    run.intact(f"after half of unplug {n}")
    run.step(f"half {n}", unplug_seconds=seconds)
    seconds = run.resize(0)
    run.intact(f"after unplug {n}")
    run.drop(KEPT)
    run.step(f"unplugged {n}", unplug_seconds=seconds)
    if n == 1:
        check_iomem(run, 0)


def device_vmas(pid):
    """[(start, flags)] of the mappings as large as the device, from smaps."""
    found, span = [], None
    with open(f"/proc/{pid}/smaps", encoding="ascii") as lines:
        for line in lines:
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if match:
                span = [int(end, 16) for end in match.groups()]
            elif line.startswith("VmFlags:") and span[1] - span[0] >= DEVICE_GIB * GIB:
                found.append((span[0], line.split()[1:]))
    return found


def trim(pid, start, size):
    """Have the process give back page tables that hold no data, as a manager does.

    A call covers less than 2 GiB.  False where the kernel has no such advice.
    """
    class Iovec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]

    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for address in range(start, start + size, GIB):
            part = Iovec(address, min(GIB, start + size - address))
            if libc.syscall(SYS_PROCESS_MADVISE, pidfd, ctypes.byref(part), ctypes.c_size_t(1),
                            MADV_TRIM_TABLES, 0) < 0:
                error = ctypes.get_errno()
                if error == errno.EINVAL:
                    return False
                raise Failure(f"MADV_TRIM_TABLES: {os.strerror(error)}")
    finally:
        os.close(pidfd)
    return True


def scan(run):
    """Read unplugged memory as gcore does: what was plugged once, and what never was."""
    vmas = device_vmas(run.qemu.pid)
    if len(vmas) != 1:
        raise Failure(f"{len(vmas)} mappings are as large as the device")
    start, flags = vmas[0]
    run.notes["vm_flags"] = " ".join(flags)
    run.notes["dontdump"] = "dd" in flags
    dirty = 0
    with open(f"/proc/{run.qemu.pid}/mem", "rb", buffering=0) as mem:
        for offset in (0, DEVICE_GIB * GIB // 2):
            for mib in range(SCAN_MIB):
                block = os.pread(mem.fileno(), MIB, start + offset + mib * MIB)
                dirty += block.count(0) != MIB
    run.check("unplugged memory reads as zeroes", dirty == 0, f"{dirty} MiB had other contents")
    before = run.steps[-1]["vmpte"]
    run.step("scanned", scanned_mib=2 * SCAN_MIB)
    supported = trim(run.qemu.pid, start, DEVICE_GIB * GIB)
    run.step("trimmed", supported=supported)
    # Memory that is shared has no zeropage: the scan filled its holes with pages.
    if supported and not run.shared:
        left = run.steps[-1]["vmpte"] - before
        run.check("the tables of the scan were given back", left <= UPPER_KB,
                  f"{left} kB more than before the scan")


def set_thp(mode):
    with open(THP, "w", encoding="ascii") as file:
        file.write(mode)


# The scenarios.  Their first line is what the table prints of them.

def ram(run):
    """virtio-mem, anonymous memory, THP off"""
    run.boot_virtio_mem()
    for n in range(1, CYCLES + 1):
        cycle(run, n)
    scan(run)


def thp(run):
    """virtio-mem, anonymous memory, THP on"""
    set_thp("always")
    run.boot_virtio_mem(dump="off")
    for n in range(1, CYCLES + 1):
        cycle(run, n)
    scan(run)


def memfd(run):
    """virtio-mem, shared memfd, vhost-user disk"""
    run.boot_virtio_mem(extra=run.start_disk(), shared=True)
    for n in range(1, CYCLES + 1):
        cycle(run, n, disk=True)
    scan(run)


def reporting(run):
    """virtio-balloon, free page reporting"""
    run.boot(["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"],
             boot_mib=BALLOON_BOOT_MIB)
    for n in range(1, CYCLES + 1):
        run.fill(BULK, BULK_MIB)
        run.step(f"filled {n}")
        run.intact(f"after fill {n}")
        full = run.steps[-1]["rss"]
        run.drop(BULK)
        began = time.monotonic()
        wait_for("the guest's free memory", lambda: fields(f"/proc/{run.qemu.pid}/status", (
            "VmRSS",))["VmRSS"] < full - BULK_MIB * 1024 * 0.9, REPORT_DEADLINE)
        run.intact(f"after report {n}")
        run.step(f"reported {n}", seconds=round(time.monotonic() - began, 2))


def balloon(run):
    """virtio-balloon, inflated by pages"""
    run.boot(["-device", "virtio-balloon-pci,id=balloon"], boot_mib=BALLOON_BOOT_MIB)

    def resize(mib):
        run.qmp.do("balloon", value=mib * MIB)
        began = time.monotonic()
        wait_for(f"a balloon that leaves {mib} MiB",
                 lambda: run.qmp.do("query-balloon")["actual"] == mib * MIB, RESIZE_DEADLINE, 0.02)
        return round(time.monotonic() - began, 2)

    for n in range(1, CYCLES + 1):
        run.fill(BULK, BULK_MIB)
        run.step(f"filled {n}")
        run.intact(f"after fill {n}")
        run.drop(BULK)
        seconds = resize(BALLOON_BOOT_MIB - BALLOON_MIB)
        run.intact(f"after inflation {n}")
        run.step(f"inflated {n}", seconds=seconds)
        if n < CYCLES:
            resize(BALLOON_BOOT_MIB)


def dirty(run):
    """virtio-mem, THP off, dirty logging"""
    run.boot_virtio_mem()
    target = os.path.join(run.dir, "migration")
    run.qmp.do("migrate-set-parameters", max_bandwidth=MIB)

    def status():
        return run.qmp.do("query-migrate").get("status")

    for n in range(1, CYCLES + 1):
        run.resize(PLUG_MIB)
        run.fill(KEPT, KEPT_MIB)
        run.fill(BULK, BULK_MIB)
        run.step(f"filled {n}")
        run.qmp.do("migrate", uri=f"file:{target}")
        wait_for("an active migration", lambda: status() == "active", 60)
        run.fill(BULK, BULK_MIB)
        run.intact(f"in migration {n}")
        run.step(f"migrating {n}")
        run.drop(BULK)
        check_refusal(run, n)
        run.qmp.do("migrate_cancel")
        wait_for("the end of the migration", lambda: status() == "cancelled", 60)
        # Of itself the guest tries again after 50 s; another request makes it look.
        run.request(2)
        seconds = run.resize(0)
        run.intact(f"after unplug {n}")
        run.drop(KEPT)
        run.step(f"unplugged {n}", unplug_seconds_after_cancel=seconds)


def check_refusal(run, n):
    """QEMU lets no virtio-mem device change its size while it migrates: a request
    is accepted, and what the guest tries to do about it refused."""
    run.request(0)
    end = time.monotonic() + REFUSAL_WATCH
    while time.monotonic() < end and run.size() == PLUG_MIB * MIB:
        time.sleep(0.1)
    run.notes[f"mib_in_migration_{n}"] = run.size() // MIB
    run.check(f"no unplug in migration {n}", run.size() == PLUG_MIB * MIB,
              f"the device has {run.size() // MIB} MiB")


def memslots(run):
    """virtio-mem, THP off, dynamic memslots"""
    run.boot_virtio_mem(device=",dynamic-memslots=on")
    for n in range(1, CYCLES + 1):
        cycle(run, n)


def sparse(run):
    """virtio-mem, THP off, sparse memslot"""
    run.patched_qemu()
    properties = sparse_memslots()
    run.boot_virtio_mem(device=properties)
    check_sparse(run)
    for n in range(1, CYCLES + 1):
        cycle(run, n)
    move(run, properties)


def sparse_memslots():
    """The property that has QEMU insist on a sparse memslot, or find that KVM has none."""
    return ",sparse-memslots=" + ("on" if kvm_block_size() else "auto")


def check_sparse(run):
    want = "on" if kvm_block_size() else "off"
    found = run.qmp.get("vmem", "sparse-memslots")
    run.notes["sparse"] = found == "on"
    run.check(f"sparse memslots are {want}", found == want, f"they are {found}")


def move(run, properties):
    """Another QEMU takes over the guest, its plugged blocks among it."""
    target = os.path.join(run.dir, "migration")
    run.resize(MOVED_MIB)
    run.fill(KEPT, KEPT_MIB)
    run.fill(BULK, MOVED_BULK_MIB)
    run.qmp.do("migrate-set-parameters", max_bandwidth=GIB)
    run.qmp.do("migrate", uri=f"file:{target}")

    def ended():
        status = run.qmp.do("query-migrate").get("status")
        return status if status in ("completed", "failed", "cancelled") else None

    status = wait_for("the end of the migration", ended, RESIZE_DEADLINE)
    run.check("the guest was migrated", status == "completed", status)
    run.end()
    run.start_qemu([*run.linux(), *run.device(properties), "-incoming", f"file:{target}"])
    wait_for("the guest's return", lambda: run.qmp.do("query-status")["running"], BOOT_DEADLINE)
    os.unlink(target)
    run.step("moved")
    run.intact("after the move")
    run.drop(BULK)
    run.resize(0)
    run.intact("after unplug behind the move")
    run.drop(KEPT)
    run.step("emptied")


# How the hostile guest's memory is kept: what the table calls it, whether by the QEMU of
# patches/qemu, which is told what sparse_memslots() says as well, properties of the device.
KEEPERS = (("one memslot", False, ""),
           ("dynamic memslots", False, ",dynamic-memslots=on"),
           ("sparse memslot", True, ""))


def hostile(run):
    """a guest that touches what it has unplugged"""
    run.notes["hostile"] = []
    for title, own, properties in KEEPERS:
        if own:
            run.patched_qemu()
            properties += sparse_memslots()
        provoke(run, title, own and kvm_block_size() > 0, properties)
        run.end()


def hostile_guest(run):
    """Wait for it, give it blocks, have it fill them."""
    line = run.agent.line(BOOT_DEADLINE)
    if line != "ready\n":
        raise Failure(f"the guest says {line.strip()}")
    run.request(HOSTILE_BLOCKS * BLOCK_MIB)
    told(run, f"plug 0 {HOSTILE_BLOCKS:x}", "0")
    told(run, f"touch 0 {HOSTILE_BLOCKS:x}")
    told(run, f"read 0 {HOSTILE_BLOCKS:x}", f"{HOSTILE_BLOCKS * BLOCK_MIB * MIB // PAGE:x}")


def told(run, command, *want):
    found = run.agent.ask(command)
    if found != list(want):
        raise Failure(f"the guest says of '{command}': {' '.join(found)}")


def populated(pid, mib):
    """How many pages there are in the first part of the device."""
    (start, _), = device_vmas(pid)
    count = mib * MIB // PAGE
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), count * 8, start // PAGE * 8)
    return sum(entry & POPULATED != 0 for entry in memoryview(entries).cast("Q"))


def provoke(run, title, guarded, properties):
    """Have the guest touch what it has given back; the last of its blocks it keeps."""
    given = HOSTILE_BLOCKS - 1
    run.start_qemu(["-smp", "2", "-serial", "chardev:port", "-kernel", run.args.hostile,
                    *run.device(properties)])
    hostile_guest(run)
    run.step(f"given, {title}")
    told(run, f"unplug 0 {given:x}", "0")
    run.step(f"taken, {title}")
    there = populated(run.qemu.pid, given * BLOCK_MIB)
    run.check(f"{title}: nothing is left of what was unplugged", not there, f"{there} pages are")
    exits = unplugged_exits()
    if guarded:
        check_stop(run, title, f"touch 0 {given:x}")
    else:
        told(run, f"touch 0 {given:x}")
    run.step(f"touched, {title}", stopped=guarded)
    there = populated(run.qemu.pid, given * BLOCK_MIB)
    steps = run.steps[-3:]
    exits = None if exits is None else unplugged_exits() - exits
    run.notes["hostile"].append({
        "memslots": title, "stopped": guarded, "pages": there, "unplugged_exits": exits,
        "rss": [step["rss"] for step in steps]})
    if guarded:
        more = steps[2]["rss"] - steps[1]["rss"]
        run.check(f"{title}: the host allocated nothing", not there and more < SLACK_KB,
                  f"{there} pages, RSS {more} kB more")
        run.check(f"{title}: KVM has counted the exit", exits == 1, f"it counted {exits}")
        restart(run)
        run.check(f"{title}: the guest runs again after a reset", True)
        cut(run, title)
        restart(run)
        race(run, title)


def check_stop(run, title, command):
    """The command makes QEMU stop the guest, and say in a line why."""
    def stopped():
        status = run.qmp.do("query-status")["status"]
        return None if status == "running" else status

    verb = command.split()[0]
    before = len(run.qemu.said("unplugged memory"))
    run.agent.send(command)
    status = wait_for("a stop", stopped, RESIZE_DEADLINE)
    run.check(f"{title}: the guest is stopped ({verb})", status == "internal-error", status)
    said = run.qemu.said("unplugged memory")[before:]
    run.check(f"{title}: QEMU says why ({verb})", len(said) == 1, f"it says it {len(said)} times")
    for line in said:
        run.say(line)


def restart(run):
    """A guest that was stopped can be reset."""
    run.qmp.do("system_reset")
    run.qmp.do("cont")
    hostile_guest(run)


def cut(run, title):
    """What the guest lays over the device cuts its memslot in two: what is plugged stays
    so in both, and nothing else can be had."""
    blocks = HOSTILE_BLOCKS - BEHIND
    told(run, f"cover {COVER:x}")
    for first, count in ((0, COVER), (BEHIND, blocks)):
        told(run, f"read {first:x} {count:x}", f"{count * BLOCK_MIB * MIB // PAGE:x}")
    told(run, f"unplug {BEHIND:x} {blocks:x}", "0")
    before = populated(run.qemu.pid, HOSTILE_BLOCKS * BLOCK_MIB)
    check_stop(run, f"{title}, cut", f"touch {BEHIND:x} {blocks:x}")
    more = populated(run.qemu.pid, HOSTILE_BLOCKS * BLOCK_MIB) - before
    run.check(f"{title}, cut: the host allocated nothing", not more, f"{more} pages")


def race(run, title):
    """One CPU writes to blocks while another gives them back: if their memory were
    discarded before KVM knows, some would return."""
    check_stop(run, title, f"race 0 {HOSTILE_BLOCKS:x}")
    there = populated(run.qemu.pid, HOSTILE_BLOCKS * BLOCK_MIB)
    run.check(f"{title}: nothing came back while it was unplugged", not there,
              f"{there} pages did")
    run.step(f"raced, {title}", stopped=True)


SCENARIOS = {function.__name__: function for function in (
    ram, thp, memfd, reporting, balloon, dirty, memslots, sparse, hostile)}


def why_silent(run, trouble):
    """A connection broke or had no answer: the last words of whose process it was."""
    time.sleep(1)
    try:
        for process in run.processes:
            process.alive()
    except Failure as obituary:
        return str(obituary)
    return f"a connection broke: {trouble or type(trouble).__name__}"


def check_console(run):
    if not os.path.exists(run.console):
        return
    with open(run.console, encoding="utf-8", errors="replace") as lines:
        found = next((line.strip() for line in lines if COMPLAINT.search(line)), "")
    run.check("the guest's kernel had nothing to complain of", not found, found)


def drive(args, name):
    """Run one scenario; whether all is well."""
    function = SCENARIOS[name]
    run = Run(args, name, function.__doc__)
    began = time.monotonic()
    set_thp("never")
    try:
        function(run)
        run.check("finished", True)
    except (Failure, EOFError, OSError) as trouble:
        why = str(trouble) if isinstance(trouble, Failure) else why_silent(run, trouble)
        after = run.steps[-1]["step"] if run.steps else "the start"
        run.check("finished", False, f"after '{after}': {why}")
    finally:
        run.end()
    check_console(run)
    passed = all(check["passed"] for check in run.checks)
    result = {"scenario": name, "what": run.what, "passed": passed,
              "seconds": round(time.monotonic() - began, 1), "checks": run.checks,
              "notes": run.notes, "steps": run.steps}
    path = os.path.join(args.out, f"{name}.json" if passed else f"{name}.failed.json")
    with open(path + ".new", "w", encoding="utf-8") as out:
        json.dump(result, out, indent=1)
        out.write("\n")
    os.rename(path + ".new", path)
    run.say(f"{'done' if passed else 'FAILED'} in {result['seconds']} s")
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("qemu", "kernel", "initrd", "out"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("sparse-qemu", "hostile"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--list", action="version", version="\n".join(SCENARIOS),
                        help="print the names of the scenarios")
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    args = parser.parse_args()
    if not os.path.exists("/dev/kvm"):
        sys.exit("error: no /dev/kvm in the kernel under test: its CPU must have AMD's SVM,"
                 " as TCG's has and as nested virtualisation on AMD gives")
    passed = [drive(args, name) for name in args.scenarios]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
