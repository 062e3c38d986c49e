/* SPDX-License-Identifier: GPL-2.0 */
/*
 * userfaultfd for the tests and benchmarks of page table reclaim.
 */
#ifndef _PT_UFFD_H
#define _PT_UFFD_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/**
 * pt_uffd - open a userfaultfd
 * @features: UFFD_FEATURE_* that it must have
 *
 * Return: its file descriptor; -1 with errno where it is not to be had.
 */
static inline int pt_uffd(unsigned long long features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (uffd >= 0 && ioctl(uffd, UFFDIO_API, &api)) {
		close(uffd);
		uffd = -1;
	}
	return uffd;
}

/**
 * pt_uffd_register - register a range with a userfaultfd
 * @uffd: the userfaultfd
 * @start: of the range, a multiple of a page
 * @len: of it, in bytes, likewise
 * @mode: UFFDIO_REGISTER_MODE_*
 *
 * Return: true if it is; errno tells otherwise.
 */
static inline bool pt_uffd_register(int uffd, void *start, size_t len, unsigned long long mode)
{
	struct uffdio_register reg = {
		.range = { (unsigned long)start, len },
		.mode = mode,
	};

	return !ioctl(uffd, UFFDIO_REGISTER, &reg);
}

/**
 * pt_uffd_for - open a userfaultfd for a range
 * @start: of the range, a multiple of a page
 * @len: of it, in bytes, likewise
 * @features: UFFD_FEATURE_* that it must have
 * @mode: UFFDIO_REGISTER_MODE_*
 *
 * Return: its file descriptor; -1 with errno where it is not to be had.
 */
static inline int pt_uffd_for(void *start, size_t len, unsigned long long features,
			      unsigned long long mode)
{
	int uffd = pt_uffd(features);

	if (uffd >= 0 && !pt_uffd_register(uffd, start, len, mode)) {
		close(uffd);
		uffd = -1;
	}
	return uffd;
}

#endif /* _PT_UFFD_H */
