/* Tries system calls that a container should not have, and says what the kernel answers: "name errno", 0 for success.
 * The arguments are wrong wherever the call would do anything, so that only a filter can answer EPERM or ENOSYS.
 * With the argument "wait" it does nothing until it is killed. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void tell(const char *name, long result)
{
	printf("%s %d\n", name, result < 0 ? errno : 0);
	fflush(stdout);
}

static void family(const char *name, long number)
{
	long fd = syscall(SYS_socket, number, SOCK_SEQPACKET, 0);

	tell(name, fd);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	if (argc > 1 && strcmp(argv[1], "wait") == 0)
		for (;;)
			pause();
	family("AF_ALG", 38);
	family("AF_ALG+2^32", (1L << 32) + 38);
	family("AF_VSOCK", 40);
	family("AF_UNIX", AF_UNIX);
	tell("io_uring_setup", syscall(SYS_io_uring_setup, 0, 0));
	tell("io_uring_enter", syscall(SYS_io_uring_enter, -1, 0, 0, 0, 0, 0));
	tell("io_uring_register", syscall(SYS_io_uring_register, -1, 0, 0, 0));
	tell("keyctl", syscall(SYS_keyctl, 9999, 0, 0, 0, 0));
	tell("add_key", syscall(SYS_add_key, 0, 0, 0, 0, 0));
	tell("request_key", syscall(SYS_request_key, 0, 0, 0, 0));
	tell("clone3", syscall(SYS_clone3, 0, 0));
	/* Not both at once: EINVAL without a filter. */
	tell("clone NEWUSER", syscall(SYS_clone, CLONE_NEWUSER | CLONE_FS, 0, 0, 0, 0));
	tell("unshare", syscall(SYS_unshare, 1));
	tell("setns", syscall(SYS_setns, -1, 0));
	tell("userfaultfd", syscall(SYS_userfaultfd, 0x7fffffff));
	tell("quotactl", syscall(SYS_quotactl, 0x7fff0000, 0, 0, 0));
	tell("personality", syscall(SYS_personality, 0x0040000));
	tell("mkdir", mkdir("/tmp/refused", 0700));
	tell("kill 0", kill(getpid(), 0));
	tell("kill CONT", kill(getpid(), SIGCONT));
	tell("ptrace", ptrace(PTRACE_PEEKDATA, 0x3fffffff, 0, 0));
	return 0;
}
