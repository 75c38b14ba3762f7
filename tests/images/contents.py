"""What the layers of the test images hold, from this machine's own packages."""

import os
import re
import stat
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def output(*cmd, **kw):
    return subprocess.run(cmd, check=True, stdout=subprocess.PIPE, **kw).stdout.decode()


def shared_objects(binary):
    """The files a dynamic binary needs, by the names it knows them under."""
    try:
        text = output("ldd", binary, stderr=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        return []
    return sorted(set(re.findall(r"(/\S+) \(0x", text)))


def fetch_busybox(work):
    """Debian's dynamic busybox, the one thing that is downloaded, kept in `work`.

    The shell of busybox-static runs its own applets without looking at the file
    system, so that hiding /bin/ls from it (critest's MaskedPaths) has no effect.
    """
    kept = os.path.join(work, "busybox-deb", "bin", "busybox")
    if os.path.exists(kept):
        return kept
    down = os.path.join(work, "busybox-dl")
    os.makedirs(down, exist_ok=True)
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "busybox"]
    if subprocess.run(download, cwd=down, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["apt-get", "update", "-qq"])
        subprocess.run(download, cwd=down, check=True)
    deb = [d for d in os.listdir(down) if d.startswith("busybox_")][0]
    output("dpkg-deb", "-x", os.path.join(down, deb), os.path.join(work, "busybox-deb"))
    return kept


def compile_c(work, name):
    out = os.path.join(work, name)
    output("cc", "-O2", "-static", "-s", "-o", out, os.path.join(HERE, "src", name + ".c"))
    return out


PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
sync:x:4:100:sync:/bin:/bin/sync
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
wheel:x:10:root
mail:x:8:
www-data:x:33:
operator:x:37:
users:x:100:
nogroup:x:65534:
"""
# Two applets Debian's busybox lacks and critest calls, and one it has that
# falls back to unprivileged ICMP sockets: the suite drops NET_RAW and expects
# ping to be refused, as it was when the original image was made.
PING = """#!/bin/sh
caps=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
if [ $(( 0x$caps >> 13 & 1 )) = 0 ]; then
    for host; do :; done
    echo "PING $host ($host): 56 data bytes"
    echo "ping: permission denied (are you root?)" >&2
    exit 1
fi
exec /bin/busybox ping "$@"
"""
PGREP = """#!/bin/sh
found=1
for p in /proc/[0-9]*; do
    read -r comm 2>/dev/null < "$p/comm" || continue
    if [ "$comm" = "$1" ]; then echo "${p#/proc/}"; found=0; fi
done
exit $found
"""
IPCS = """#!/bin/sh
echo "------ Shared Memory Segments --------"
cat /proc/sysvipc/shm
"""


def layer_busybox(busybox):
    def fill(a):
        for d in ("dev", "etc", "home", "root", "usr/bin", "usr/sbin", "var/spool/mail", "var/www"):
            a.dir(d)
        a.dir("tmp", 0o1777)
        a.dir("var/tmp", 0o1777)
        a.file("bin/busybox", busybox, 0o755)
        for applet in output(busybox, "--list").split():
            if applet not in ("busybox", "ipcs", "pgrep", "ping"):
                # hard links, as in the usual busybox images: a mount over one
                # of the names must not hide the others
                a.hardlink("bin/" + applet, "bin/busybox")
        a.data("bin/ping", PING, 0o755)
        a.data("bin/pgrep", PGREP, 0o755)
        a.data("bin/ipcs", IPCS, 0o755)
        for so in shared_objects(busybox):
            a.file(so, so, 0o755)
        a.data("etc/passwd", PASSWD)
        a.data("etc/group", GROUP)
        a.data("etc/shadow", "root:*:10933:0:99999:7:::\n", 0o640)
        a.data("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
        a.data("etc/hostname", "busybox\n")
    return fill


def layer_file(name, content):
    return lambda a: a.data(name, content)


def layer_nginx(busybox, port):
    nginx = "/usr/sbin/nginx"
    if not os.path.exists(nginx):
        sys.exit("missing tool: nginx (package nginx-light)")
    have = set(shared_objects(busybox))
    conf = """user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr warn;
events { worker_connections 256; }
http {
    types { text/html html; }
    access_log /dev/stdout;
    server {
        listen %d;
        location / { root /usr/share/nginx/html; index index.html; }
    }
}
""" % port

    def fill(a):
        a.file("usr/sbin/nginx", nginx, 0o755)
        for so in shared_objects(nginx):
            if so not in have:
                a.file(so, so, 0o755)
        a.data("etc/nginx/nginx.conf", conf)
        a.data("usr/share/nginx/html/index.html",
               "<!DOCTYPE html><title>Welcome to nginx!</title><h1>Welcome to nginx!</h1>\n")
        a.dir("run")
        a.symlink("var/run", "/run")
        for d in ("body", "fastcgi", "proxy", "scgi", "uwsgi"):
            a.dir("var/lib/nginx/" + d, 0o700, 33, 33)
        a.dir("var/log/nginx")
    return fill


HTTPD = """#!/bin/sh
echo "httpd -D FOREGROUND: serving /usr/local/apache2/htdocs on port 80"
exec /bin/busybox httpd -f -p 80 -h /usr/local/apache2/htdocs
"""


def layer_httpd(a):
    a.data("usr/local/apache2/htdocs/index.html", "<html><body><h1>It works!</h1></body></html>\n")
    a.data("usr/local/bin/httpd-foreground", HTTPD, 0o755)


def layer_groups(a):
    a.data("etc/passwd", PASSWD + "default-user:x:1000:1000:Linux User,,,:/home/default-user:/bin/sh\n")
    a.data("etc/group", GROUP + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    a.dir("home/default-user", 0o2755, 1000, 1000)


def layer_open(a):
    """A user whose own lines everybody may rewrite."""
    a.data("etc/passwd", PASSWD + "app:x:1000:1001::/home/app:/bin/sh\n", 0o666)
    a.data("etc/group", GROUP + "apps:x:1001:\nextra:x:50:app\n", 0o666)
    a.dir("home/app", 0o755, 1000, 1001)


def layer_link(name, to):
    return lambda a: a.symlink(name, to)


# The pull benchmark's image: real trees, each up to so many MiB unpacked.
BIG = [
    ("distribution libraries", ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"], 220),
    ("language runtime", ["/usr/lib/python3.11", "/usr/lib/python3", "/usr/lib/python3.13"], 100),
    ("many small files", ["/usr/lib/google-cloud-sdk/lib", "/usr/share/perl", "/usr/share/locale"], 160),
    ("scripts and tools", ["/usr/lib/node_modules", "/usr/lib/git-core", "/usr/lib/gcc", "/usr/share/vim"], 100),
    ("large objects", ["/usr/lib/llvm-14", "/usr/lib/jvm", "/usr/bin"], 110),
    ("documents", ["/usr/share/doc"], 20),
]


def layer_trees(dirs, limit_mib):
    def fill(a):
        left = limit_mib << 20
        seen = {}
        for top in dirs:
            if not os.path.isdir(top):
                continue
            for base, subdirs, names in os.walk(top):
                subdirs.sort()
                for name in sorted(names + [d for d in subdirs if os.path.islink(os.path.join(base, d))]):
                    path = os.path.join(base, name)
                    st = os.lstat(path)
                    if stat.S_ISLNK(st.st_mode):
                        a.symlink(path, os.readlink(path))
                    elif stat.S_ISREG(st.st_mode) and st.st_size <= left and st.st_size < 48 << 20:
                        key = (st.st_dev, st.st_ino)
                        if st.st_nlink > 1 and key in seen:
                            a.hardlink(path, seen[key])
                            continue
                        try:
                            a.file(path, path)
                        except PermissionError:
                            continue
                        seen[key] = path
                        left -= st.st_size
                if left < 1 << 20:
                    return
    return fill
