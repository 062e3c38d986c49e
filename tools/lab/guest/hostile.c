// SPDX-License-Identifier: GPL-2.0
/*
 * hostile: a guest that does with a virtio-mem device what it likes.
 *
 * It needs no kernel: `make e2e` gives it to QEMU's -kernel as a PVH program.  It plugs and
 * unplugs blocks, and touches them, plugged or not, as it is told over the first serial
 * port, having said "ready".  A command is one line, and so is its answer, "ok" and results
 * or "error" and a reason; numbers are hexadecimal:
 *
 *	device			address, size of a block, size of the device
 *	plug BLOCK COUNT	ask the device for blocks; the response's type, 0 for ACK
 *	unplug BLOCK COUNT	give them back
 *	touch BLOCK COUNT	write to each page of the blocks
 *	read BLOCK COUNT	read the first word of each page; how many were not zero
 *	race BLOCK COUNT	the second CPU writes to each page over and over, without
 *				an end, while blocks are given back; the response's type
 *	cover BLOCK		lay 64 MiB of something else over the device from a block
 *				on: the chipset's window to PCI configuration space
 *	mem			nothing: for those who expect agent.c
 *
 * The device is driven through the window in its PCI configuration space, for which no
 * BAR has to be mapped.  Memory up to 512 GiB is mapped by pages of 1 GiB.
 * How it is compiled: make_hostile() in tools/lab/e2e.sh.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE			4096ULL
#define MAPPED			(512ULL << 30)

#define VIRTIO_MEM		0x10581af4
#define CAP_VENDOR		9
#define CAP_COMMON		1
#define CAP_NOTIFY		2
#define CAP_DEVICE		4
#define CAP_WINDOW		5
#define NR_CAPS			6

/* struct virtio_pci_common_cfg */
#define FEATURE_SELECT		8
#define FEATURES		12
#define STATUS			20
#define QUEUE_SELECT		22
#define QUEUE_SIZE		24
#define QUEUE_ENABLE		28
#define QUEUE_NOTIFY		30
#define QUEUE_DESC		32
#define QUEUE_AVAIL		40
#define QUEUE_USED		48

/* struct virtio_mem_config */
#define BLOCK_SIZE		0
#define ADDRESS			16
#define REGION_SIZE		24

#define UNPLUGGED_INACCESSIBLE	(1 << 1)
#define VERSION_1		(1 << 0)	/* of the upper 32 features */
#define QUEUE_ENTRIES		4
#define REQ_PLUG		0
#define REQ_UNPLUG		1

/* Of the host bridge of q35, whose window can be 64 MiB that begin at 32 MiB. */
#define HOST_BRIDGE		0x80000000
#define PCIEXBAR		0x60
#define PCIEXBAR_ENABLE		1
#define PCIEXBAR_64M		(2 << 1)
#define PCIEXBAR_ALIGN		(32ULL << 20)

#define APIC_ICR_LOW		0xfee00300
#define APIC_ICR_HIGH		0xfee00310
#define TRAMPOLINE		0x8000

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

struct request {
	uint16_t type, pad[3];
	uint64_t address;
	uint16_t blocks, pad2[3];
};

static struct {
	struct descriptor descriptors[QUEUE_ENTRIES];
	struct {
		uint16_t flags, index, ring[QUEUE_ENTRIES], event;
	} available;
	struct {
		uint16_t flags;
		volatile uint16_t index;
		struct {
			uint32_t id, length;
		} ring[QUEUE_ENTRIES];
		uint16_t event;
	} used __attribute__((aligned(4)));
} queue __attribute__((aligned(PAGE)));

/* The device, and its capabilities: where they are in configuration space. */
static uint32_t device;
static uint8_t caps[NR_CAPS];
static uint64_t base, block_size, region_size;

/* What the second CPU writes to. */
static volatile uint64_t race_from, race_to;

void run(void);
void run_second(void);

/*
 * 32 bits and no paging when it starts, for the first CPU; 16 bits for the second, which
 * executes a copy at TRAMPOLINE.  Both come to long mode.
 */
asm(".pushsection .note.pvh, \"a\", @note\n"
    "	.long 4, 8, 18\n"		/* XEN_ELFNOTE_PHYS32_ENTRY */
    "	.asciz \"Xen\"\n"
    "	.quad start\n"
    ".popsection\n"
    ".pushsection .bss\n"
    "	.balign 4096\n"
    "pml4:	.skip 4096\n"
    "pdpt:	.skip 4096\n"
    "	.skip 16384\n"
    "stack:	.skip 16384\n"
    "stack2:\n"
    ".popsection\n"
    ".pushsection .data\n"
    "	.balign 8\n"
    "gdt:	.quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000000ffff\n"
    "gdt_end:\n"
    ".global gdt_pointer\n"
    "gdt_pointer: .word gdt_end - gdt - 1\n"
    "	.long gdt\n"
    ".popsection\n"
    ".text\n"
    ".code32\n"
    ".global start\n"
    "start:	cli\n"
    "	movl $pdpt + 3, pml4\n"
    "	xorl %ecx, %ecx\n"
    "1:	movl %ecx, %eax\n"
    "	shll $30, %eax\n"
    "	orl $0x83, %eax\n"
    "	movl %eax, pdpt(, %ecx, 8)\n"
    "	movl %ecx, %eax\n"
    "	shrl $2, %eax\n"
    "	movl %eax, pdpt + 4(, %ecx, 8)\n"
    "	incl %ecx\n"
    "	cmpl $512, %ecx\n"
    "	jne 1b\n"
    "	movl $stack, %esp\n"
    "	movl $run, %ebx\n"
    "	jmp enter\n"
    "start2: movw $16, %ax\n"
    "	movw %ax, %ds\n"
    "	movw %ax, %es\n"
    "	movw %ax, %ss\n"
    "	movl $stack2, %esp\n"
    "	movl $run_second, %ebx\n"
    "enter:	movl $pml4, %eax\n"
    "	movl %eax, %cr3\n"
    "	movl %cr4, %eax\n"
    "	orl $0x20, %eax\n"		/* PAE */
    "	movl %eax, %cr4\n"
    "	movl $0xc0000080, %ecx\n"	/* EFER.LME */
    "	rdmsr\n"
    "	orl $0x100, %eax\n"
    "	wrmsr\n"
    "	movl %cr0, %eax\n"
    "	orl $0x80000001, %eax\n"
    "	movl %eax, %cr0\n"
    "	lgdt gdt_pointer\n"
    "	ljmp $8, $long_mode\n"
    ".code64\n"
    "long_mode: movl $16, %eax\n"
    "	movl %eax, %ds\n"
    "	movl %eax, %es\n"
    "	movl %eax, %ss\n"
    "	movl %ebx, %eax\n"
    "	call *%rax\n"
    "2:	hlt\n"
    "	jmp 2b\n"
    ".code16\n"
    ".global trampoline, trampoline_end\n"
    "trampoline: cli\n"
    "	xorw %ax, %ax\n"
    "	movw %ax, %ds\n"
    "	lgdtl 0x8000 + trampoline_gdt - trampoline\n"
    "	movl %cr0, %eax\n"
    "	orl $1, %eax\n"
    "	movl %eax, %cr0\n"
    "	ljmpl $24, $start2\n"
    "trampoline_gdt: .skip 6\n"		/* the same as gdt_pointer, within reach */
    "trampoline_end:\n"
    ".code64\n");

extern const uint8_t trampoline[], trampoline_end[], gdt_pointer[];

static void outb(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static void outl(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static uint8_t inb(uint16_t port)
{
	uint8_t value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static uint32_t inl(uint16_t port)
{
	uint32_t value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static uint32_t config_read(uint32_t where)
{
	outl(0xcf8, device | (where & ~3U));
	return inl(0xcfc) >> (where & 3) * 8;
}

static void config_write(uint32_t where, uint32_t value)
{
	outl(0xcf8, device | where);
	outl(0xcfc, value);
}

/* Have the window show @length bytes of what a capability is about, from @where. */
static void point(int cap, uint32_t where, uint32_t length)
{
	outl(0xcf8, device | (caps[CAP_WINDOW] + 4));
	outb(0xcfc, config_read(caps[cap] + 4));
	config_write(caps[CAP_WINDOW] + 8, config_read(caps[cap] + 8) + where);
	config_write(caps[CAP_WINDOW] + 12, length);
}

static uint32_t get(int cap, uint32_t where, uint32_t length)
{
	point(cap, where, length);
	return config_read(caps[CAP_WINDOW] + 16);
}

static void set(int cap, uint32_t where, uint32_t length, uint32_t value)
{
	point(cap, where, length);
	config_write(caps[CAP_WINDOW] + 16, value);
}

static uint64_t get64(int cap, uint32_t where)
{
	return get(cap, where, 4) | (uint64_t)get(cap, where + 4, 4) << 32;
}

static void set64(int cap, uint32_t where, const void *address)
{
	set(cap, where, 4, (uintptr_t)address);
	set(cap, where + 4, 4, (uintptr_t)address >> 32);
}

static bool find_device(void)
{
	uint8_t cap;

	for (device = 0x80000000; device < 0x80010000; device += 0x100) {
		if (config_read(0) == VIRTIO_MEM)
			break;
	}
	if (device == 0x80010000)
		return false;
	config_write(4, (config_read(4) & 0xffff) | 6);	/* memory, bus master */
	for (cap = config_read(0x34); cap; cap = config_read(cap + 1)) {
		uint8_t type = config_read(cap + 3);

		if ((config_read(cap) & 0xff) == CAP_VENDOR && type < NR_CAPS)
			caps[type] = cap;
	}
	return true;
}

static void start_device(void)
{
	set(CAP_COMMON, STATUS, 1, 0);
	set(CAP_COMMON, STATUS, 1, 1 | 2);
	set(CAP_COMMON, FEATURE_SELECT, 4, 0);
	set(CAP_COMMON, FEATURES, 4, UNPLUGGED_INACCESSIBLE);
	set(CAP_COMMON, FEATURE_SELECT, 4, 1);
	set(CAP_COMMON, FEATURES, 4, VERSION_1);
	set(CAP_COMMON, STATUS, 1, 1 | 2 | 8);
	set(CAP_COMMON, QUEUE_SELECT, 2, 0);
	set(CAP_COMMON, QUEUE_SIZE, 2, QUEUE_ENTRIES);
	set64(CAP_COMMON, QUEUE_DESC, queue.descriptors);
	set64(CAP_COMMON, QUEUE_AVAIL, &queue.available);
	set64(CAP_COMMON, QUEUE_USED, &queue.used);
	set(CAP_COMMON, QUEUE_ENABLE, 2, 1);
	set(CAP_COMMON, STATUS, 1, 1 | 2 | 8 | 4);
	base = get64(CAP_DEVICE, ADDRESS);
	block_size = get64(CAP_DEVICE, BLOCK_SIZE);
	region_size = get64(CAP_DEVICE, REGION_SIZE);
}

/* The type of the device's response. */
static uint16_t request(uint16_t type, uint64_t block, uint64_t count)
{
	static struct request request;
	static volatile uint16_t response[8];
	uint16_t seen = queue.used.index;
	uint32_t multiplier = config_read(caps[CAP_NOTIFY] + 16);

	request.type = type;
	request.address = base + block * block_size;
	request.blocks = count;
	queue.descriptors[0] = (struct descriptor){ (uintptr_t)&request, sizeof(request), 1, 1 };
	queue.descriptors[1] = (struct descriptor){ (uintptr_t)response, sizeof(response), 2, 0 };
	queue.available.ring[queue.available.index % QUEUE_ENTRIES] = 0;
	asm volatile("mfence" : : : "memory");
	queue.available.index++;
	asm volatile("mfence" : : : "memory");
	set(CAP_NOTIFY, get(CAP_COMMON, QUEUE_NOTIFY, 2) * multiplier, 2, 0);
	while (queue.used.index == seen)
		asm volatile("pause" : : : "memory");
	return response[0];
}

static void touch(uint64_t block, uint64_t count)
{
	uint64_t at = base + block * block_size, end = at + count * block_size;

	for (; at < end; at += PAGE)
		*(volatile uint64_t *)at = at;
}

static uint64_t nonzero(uint64_t block, uint64_t count)
{
	uint64_t at = base + block * block_size, end = at + count * block_size, found = 0;

	for (; at < end; at += PAGE)
		found += *(volatile uint64_t *)at != 0;
	return found;
}

/* The second CPU. */
void run_second(void)
{
	uint64_t at;

	for (;;) {
		for (at = race_from; at < race_to; at += PAGE)
			*(volatile uint64_t *)at = at;
	}
}

static void start_second(void)
{
	static bool started;
	uint8_t *to = (uint8_t *)TRAMPOLINE;
	size_t i, size = trampoline_end - trampoline;

	if (started)
		return;
	started = true;
	for (i = 0; i < size; i++)
		to[i] = trampoline[i];
	for (i = 0; i < 6; i++)
		to[size - 6 + i] = gdt_pointer[i];
	*(volatile uint32_t *)APIC_ICR_HIGH = 1 << 24;
	*(volatile uint32_t *)APIC_ICR_LOW = 0x4500;		/* INIT */
	for (i = 0; i < 10000; i++)
		inb(0x80);
	*(volatile uint32_t *)APIC_ICR_HIGH = 1 << 24;
	*(volatile uint32_t *)APIC_ICR_LOW = 0x4600 | TRAMPOLINE >> 12;
}

static uint16_t race(uint64_t block, uint64_t count)
{
	volatile uint64_t *last;

	race_from = base + block * block_size;
	race_to = race_from + count * block_size;
	/* It has been everywhere when it has written to the last page. */
	last = (uint64_t *)(race_to - PAGE);
	*last = 0;
	start_second();
	while (!*last)
		asm volatile("pause" : : : "memory");
	return request(REQ_UNPLUG, block, count);
}

static bool cover(uint64_t block)
{
	uint64_t at = base + block * block_size;

	if (at % PCIEXBAR_ALIGN)
		return false;
	outl(0xcf8, HOST_BRIDGE | (PCIEXBAR + 4));
	outl(0xcfc, at >> 32);
	outl(0xcf8, HOST_BRIDGE | PCIEXBAR);
	outl(0xcfc, at | PCIEXBAR_64M | PCIEXBAR_ENABLE);
	return true;
}

static void put(char c)
{
	while (!(inb(0x3fd) & 0x20))
		;
	outb(0x3f8, c);
}

static void say(const char *text)
{
	while (*text)
		put(*text++);
}

static void say_number(uint64_t value)
{
	int shift;

	put(' ');
	for (shift = 60; shift && !(value >> shift); shift -= 4)
		;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

static char next_char(void)
{
	while (!(inb(0x3fd) & 1))
		asm volatile("pause" : : : "memory");
	return inb(0x3f8);
}

static bool is(const char *line, const char *verb)
{
	while (*verb && *line == *verb)
		line++, verb++;
	return !*verb && (*line == ' ' || !*line);
}

/* The next number of the line, behind what has been read. */
static uint64_t number(const char **line)
{
	uint64_t value = 0;

	while (**line && **line != ' ')
		(*line)++;
	while (**line == ' ')
		(*line)++;
	for (; **line && **line != ' '; (*line)++)
		value = value << 4 | (**line <= '9' ? **line - '0' : (**line | 32) - 'a' + 10);
	return value;
}

static void obey(const char *line)
{
	const char *rest = line;
	uint64_t block = number(&rest), count = number(&rest);

	if (block > region_size / block_size || count > region_size / block_size - block) {
		say("error no such block\n");
	} else if (is(line, "mem")) {
		say("ok\n");
	} else if (is(line, "device")) {
		say("ok");
		say_number(base);
		say_number(block_size);
		say_number(region_size);
		say("\n");
	} else if (is(line, "plug") || is(line, "unplug")) {
		uint16_t type = request(is(line, "plug") ? REQ_PLUG : REQ_UNPLUG, block, count);

		say("ok");
		say_number(type);
		say("\n");
	} else if (is(line, "touch")) {
		touch(block, count);
		say("ok\n");
	} else if (is(line, "read")) {
		uint64_t found = nonzero(block, count);

		say("ok");
		say_number(found);
		say("\n");
	} else if (is(line, "race")) {
		uint16_t type = race(block, count);

		say("ok");
		say_number(type);
		say("\n");
	} else if (is(line, "cover")) {
		say(cover(block) ? "ok\n" : "error not aligned\n");
	} else {
		say("error no such command\n");
	}
}

/* The first CPU. */
void run(void)
{
	static char line[64];
	size_t used = 0;
	char c;

	if (!find_device()) {
		say("error no virtio-mem device\n");
		return;
	}
	start_device();
	if (base + region_size > MAPPED) {
		say("error the device is too far up\n");
		return;
	}
	say("ready\n");
	for (;;) {
		c = next_char();
		if (c != '\n') {
			if (used < sizeof(line) - 1)
				line[used++] = c;
			continue;
		}
		line[used] = '\0';
		used = 0;
		obey(line);
	}
}
