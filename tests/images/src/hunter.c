/* A container that lies in wait for processes that the runtime brings into its PID namespace.
 *
 *   hunter DIRECTORY WAY SECRET DEVICE NEEDLE...
 *
 * Until DIRECTORY/stop is there, every new process is caught in the given WAY (watch, stop, kill, trace) and looked through:
 * root, cwd, namespaces, cgroups, mounts, descriptors, capabilities, environment, memory. What is not this container's own is
 * written to DIRECTORY/found, one line each; SECRET is a file of the node, DEVICE the number of the filesystem where the
 * node's /dev/null lies (0: it is this container's too). DIRECTORY/count has how many were caught, and how
 * many of those before they had executed a program.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static FILE *found;
static char own_cgroup[4096], own_caps[64];

static void tell(int pid, const char *what, const char *detail)
{
	/* One line, whatever the detail is. */
	fprintf(found, "%s: %.*s (process %d)\n", what, (int)strcspn(detail, "\n"), detail, pid);
	fflush(found);
}

static long whole(const char *path, char *buffer, long size)
{
	int fd = open(path, O_RDONLY | O_NONBLOCK);
	long length = 0, count;
	if (fd < 0)
		return -1;
	while (length < size - 1 && (count = read(fd, buffer + length, size - 1 - length)) > 0)
		length += count;
	close(fd);
	buffer[length] = 0;
	return length;
}

static void caps_of(const char *status, char *caps)
{
	const char *line = strstr(status, "CapPrm:");
	snprintf(caps, 64, "%.24s", line ? line + 8 : "?");
	caps[strcspn(caps, "\n")] = 0;
}

static int is_maker(int pid)
{
	char path[64], exe[256];
	snprintf(path, sizeof path, "/proc/%d/exe", pid);
	long length = readlink(path, exe, sizeof exe - 1);
	exe[length < 0 ? 0 : length] = 0;
	return strstr(exe, "memfd:") != NULL || strstr(exe, "berth") != NULL;
}

static void namespaces(int pid)
{
	static const char *kinds[] = { "mnt", "net", "ipc", "uts", "pid", "cgroup", "user" };
	for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		char path[64], theirs[64] = "", ours[64] = "";
		snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, kinds[i]);
		if (readlink(path, theirs, sizeof theirs - 1) < 0)
			continue;
		snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
		readlink(path, ours, sizeof ours - 1);
		/* Another container of the pod may have its own of these. */
		if (strcmp(theirs, ours) && strcmp(kinds[i], "mnt") && strcmp(kinds[i], "cgroup"))
			tell(pid, "namespace of the node", kinds[i]);
	}
}

static void files(int pid, const char *secret)
{
	static char text[1 << 20], path[8192];
	static const char *doors[] = { "root", "cwd", "cwd/..", "root/proc/1/root" };
	for (unsigned i = 0; i < sizeof doors / sizeof *doors; i++) {
		snprintf(path, sizeof path, "/proc/%d/%s%s", pid, doors[i], secret);
		int fd = open(path, O_RDWR);
		if (fd >= 0) {
			tell(pid, "a file of the node is open", doors[i]);
			close(fd);
		}
	}
	snprintf(path, sizeof path, "/proc/%d/mountinfo", pid);
	if (whole(path, text, sizeof text) > 0 && strstr(text, "/berth-test-"))
		for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
			if (strstr(line, " / / ") && strstr(line, "berth-test-") && !strstr(line, "overlay"))
				tell(pid, "a mount of the node", line);
	for (unsigned i = 0; i < 2; i++) {
		static const char *tables[] = { "net/unix", "net/tcp" };
		snprintf(path, sizeof path, "/proc/%d/%s", pid, tables[i]);
		if (whole(path, text, sizeof text) > 0 && strstr(text, "cri.sock"))
			tell(pid, "sockets of the node", tables[i]);
	}
}

static void rights(int pid)
{
	static char path[64], text[16384], caps[64];
	snprintf(path, sizeof path, "/proc/%d/status", pid);
	if (whole(path, text, sizeof text) > 0) {
		caps_of(text, caps);
		/* Hexadecimal numbers: none may have a bit that this container has not. */
		if (strtoull(caps, NULL, 16) & ~strtoull(own_caps, NULL, 16))
			tell(pid, "capabilities", caps);
	}
	snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
	if (whole(path, text, sizeof text) > 0 && strstr(text, "/../../.."))
		tell(pid, "cgroup of the node", text);
}

static unsigned long device;

static void descriptors(int pid, int maker)
{
	char path[300], target[512];
	snprintf(path, sizeof path, "/proc/%d/fd", pid);
	DIR *directory = opendir(path);
	struct dirent *entry;
	while (directory && (entry = readdir(directory))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/proc/%d/fd/%s", pid, entry->d_name);
		long length = readlink(path, target, sizeof target - 1);
		if (length < 0)
			continue;
		target[length] = 0;
		struct stat status;
		if (!strcmp(target, "/dev/null") && !stat(path, &status) && status.st_dev == device)
			tell(pid, "the node's /dev/null", entry->d_name);
		/* It may have executed since, and opened what it likes. */
		if (maker && atoi(entry->d_name) > 2 && is_maker(pid))
			tell(pid, "a descriptor", target);
		if (strstr(target, "socket:") || strstr(target, "pidfd") || strstr(target, "memfd:"))
			tell(pid, "a descriptor of the runtime", target);
	}
	if (directory)
		closedir(directory);
	int pidfd = syscall(SYS_pidfd_open, pid, 0);
	for (int number = 3; pidfd >= 0 && maker && number < 64; number++) {
		int taken = syscall(438 /* pidfd_getfd */, pidfd, number, 0);
		if (taken >= 0 && !is_maker(pid)) {
			close(taken);
			break;
		}
		if (taken >= 0) {
			snprintf(path, sizeof path, "/proc/self/fd/%d", taken);
			long length = readlink(path, target, sizeof target - 1);
			target[length < 0 ? 0 : length] = 0;
			tell(pid, "a descriptor was taken", target);
			close(taken);
		}
	}
	if (pidfd >= 0)
		close(pidfd);
}

static void memory(int pid, char **needles)
{
	static char path[64], maps[1 << 18], part[1 << 16];
	snprintf(path, sizeof path, "/proc/%d/environ", pid);
	long length = whole(path, maps, sizeof maps);
	for (char **needle = needles; length > 0 && *needle; needle++)
		if (memmem(maps, length, *needle, strlen(*needle)))
			tell(pid, "in its environment", *needle);
	snprintf(path, sizeof path, "/proc/%d/maps", pid);
	if (whole(path, maps, sizeof maps) <= 0)
		return;
	snprintf(path, sizeof path, "/proc/%d/mem", pid);
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		return;
	for (char *line = strtok(maps, "\n"); line; line = strtok(NULL, "\n")) {
		unsigned long start, end;
		char rights[8];
		if (sscanf(line, "%lx-%lx %7s", &start, &end, rights) != 3 || rights[1] != 'w')
			continue;
		for (unsigned long at = start; at < end; at += sizeof part - 256) {
			unsigned long count = end - at < sizeof part ? end - at : sizeof part;
			ssize_t got = pread(fd, part, count, at);
			for (char **needle = needles; got > 0 && *needle; needle++)
				if (memmem(part, got, *needle, strlen(*needle)))
					tell(pid, "in its memory", *needle);
			if (got <= 0)
				break;
		}
	}
	close(fd);
}


/* One new process. */
static int caught(int pid, const char *way, const char *secret, char **needles)
{
	int traced = 0;
	if (!strcmp(way, "stop") || !strcmp(way, "kill"))
		kill(pid, SIGSTOP);
	if (!strcmp(way, "trace"))
		traced = ptrace(0x4206 /* PTRACE_SEIZE */, pid, 0, 0) == 0 && ptrace(0x4207 /* PTRACE_INTERRUPT */, pid, 0, 0) == 0;
	int maker = is_maker(pid);
	files(pid, secret);
	namespaces(pid);
	rights(pid);
	descriptors(pid, maker);
	memory(pid, needles);
	if (!strcmp(way, "kill"))
		kill(pid, SIGKILL);
	for (int tries = 0; !strcmp(way, "stop") && maker && tries < 200 && is_maker(pid); tries++)
		usleep(1000);
	if (!strcmp(way, "stop") && !is_maker(pid))
		kill(pid, SIGCONT);
	/* What has executed is the container's own: it may go on. What has not is held, so that the runtime must notice. */
	for (int tries = 0; traced && maker && tries < 200 && is_maker(pid); tries++)
		usleep(1000);
	return maker;
}

/* Processes that are traced and have executed go on, or end; a tracer's zombies are nobody else's. */
static void release(void)
{
	int status, pid;
	while ((pid = waitpid(-1, &status, __WALL | WNOHANG)) > 0)
		if (WIFSTOPPED(status) && !is_maker(pid))
			ptrace(PTRACE_DETACH, pid, 0, 0);
}

int main(int argc, char **argv)
{
	char path[512], text[16384];
	if (argc < 6)
		return 2;
	const char *way = argv[2];
	device = strtoul(argv[4], NULL, 10);
	snprintf(path, sizeof path, "%s/found", argv[1]);
	found = fopen(path, "a");
	whole("/proc/self/status", text, sizeof text);
	caps_of(text, own_caps);
	whole("/proc/self/cgroup", own_cgroup, sizeof own_cgroup);
	snprintf(path, sizeof path, "%s/stop", argv[1]);
	int last = getpid(), count = 0, early = 0;
	struct timespec looked, now;
	clock_gettime(CLOCK_MONOTONIC, &looked);
	snprintf(text, sizeof text, "%s/ready", argv[1]);
	close(open(text, O_CREAT | O_WRONLY, 0600));
	for (;;) {
		release();
		for (int pid = last + 1; pid < last + 6; pid++)
			if (kill(pid, 0) == 0) {
				last = pid;
				count++;
				early += caught(pid, way, argv[3], argv + 5);
				break;
			}
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec != looked.tv_sec || now.tv_nsec - looked.tv_nsec > 20000000) {
			looked = now;
			/* Numbers that were used without being seen. */
			DIR *proc = opendir("/proc");
			struct dirent *entry;
			while (proc && (entry = readdir(proc)))
				if (atoi(entry->d_name) > last && atoi(entry->d_name) != getpid()) {
					count++;
					last = atoi(entry->d_name);
					early += caught(last, way, argv[3], argv + 5);
				}
			if (proc)
				closedir(proc);
			if (whole("/proc/loadavg", text, sizeof text) > 0) {
				int newest = atoi(strrchr(text, ' ') + 1);
				if (newest > last)
					last = newest;
			}
			if (access(path, F_OK) == 0)
				break;
		}
	}
	snprintf(path, sizeof path, "%s/count", argv[1]);
	FILE *counts = fopen(path, "w");
	fprintf(counts, "%d %d\n", count, early);
	fclose(counts);
	fclose(found);
	return 0;
}
