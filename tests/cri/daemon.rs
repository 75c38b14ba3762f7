//! A daemon of the test's own: its directories, its configuration, its end, and the check that nothing is left.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::scratch::Scratch;

const PROGRAM: &str = env!("CARGO_BIN_EXE_berth");
const MONITOR: &str = env!("CARGO_BIN_EXE_berth-monitor");

/// Tells daemons of one test process apart.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Both services over one connection.
pub(crate) struct Clients {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
}

/// A running daemon. Ended by [`Daemon::stop`], or killed where a test fails.
pub(crate) struct Daemon {
    /// Monitors and pods of a test that failed end with them.
    cgroups: Scratch,
    directory: tempfile::TempDir,
    child: Child,
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test starts the program as a user would"
)]
fn command(program: &str) -> Command {
    Command::new(program)
}

/// Waits for a level.
pub(crate) fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !reached() {
        assert!(Instant::now() < end, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Daemon {
    /// Starts a daemon with further lines of configuration; it answers when this returns.
    pub(crate) fn start(lines: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("{}-{number}", std::process::id());
        let cgroup = format!("/berth-test-{unique}");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut config = format!(
            "socket = {:?}\nroot = {:?}\nstate = {:?}\nregistry_config_path = {:?}\n\
             nri_socket = {:?}\nmonitor = {MONITOR:?}\ncgroup_root = {cgroup:?}\n\
             bridge = \"bt{unique}\"\nlog_level = \"debug\"\n",
            at("berth.sock"),
            at("root"),
            at("state"),
            at("certs.d"),
            at("nri.sock"),
        );
        for line in lines {
            config.push_str(line);
            config.push('\n');
        }
        write(&directory.path().join("config.toml"), config.as_bytes());
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let child = command(PROGRAM)
            .args(["serve", "--config", &at("config.toml")])
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self {
            cgroups: Scratch::named(&cgroup),
            directory,
            child,
        };
        let socket = daemon.path("berth.sock");
        eventually(&format!("the daemon answers\n{}", daemon.log()), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        daemon
    }

    /// A path in the daemon's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// What becomes of another daemon with the same configuration.
    pub(crate) fn second(&self) -> Output {
        command(PROGRAM)
            .args(["serve", "--config"])
            .arg(self.path("config.toml"))
            .output()
            .unwrap()
    }

    /// A connection.
    pub(crate) async fn channel(&self) -> Channel {
        let socket = self.path("berth.sock");
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // What HTTP/2 begins with, and Go's gRPC keeps: the client library takes 2 MiB unread by itself.
        Endpoint::from_static("http://localhost")
            .initial_stream_window_size(65_535)
            .connect_with_connector(connector)
            .await
            .unwrap()
    }

    /// Clients.
    pub(crate) async fn clients(&self) -> Clients {
        let channel = self.channel().await;
        Clients {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        }
    }

    /// Runs the command line against this daemon.
    pub(crate) fn berth(&self, arguments: &[&str]) -> Command {
        let mut command = command(PROGRAM);
        command
            .arg("--address")
            .arg(self.path("berth.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Imports an archive with `berth image import -`: stdout, or else stderr.
    pub(crate) fn import(&self, archive: &[u8]) -> Result<String, String> {
        let mut child = self
            .berth(&["image", "import", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // A daemon that refuses early closes the pipe.
        let _whole = child.stdin.take().unwrap().write_all(archive).is_ok();
        let output = child.wait_with_output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// From now on this registry (host:port) is asked over plain HTTP.
    pub(crate) fn trust_http(&self, registry: &str) {
        let directory = self.path("certs.d").join(registry);
        std::fs::create_dir_all(&directory).unwrap();
        let text = format!("server = \"http://{registry}\"\n");
        write(&directory.join("hosts.toml"), text.as_bytes());
    }

    /// Ends the daemon gracefully and looks for what is left of it: processes, cgroups, mounts, files.
    pub(crate) fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
        let own = self.directory.path().display().to_string();
        eventually("no process of the daemon is left", || {
            processes_with(&own).is_empty()
        });
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&own), "{mounts}");
        let left = self.cgroups.directories();
        assert!(left.is_empty(), "cgroups are left: {left:?}");
        assert!(!self.path("berth.sock").exists());
        for directory in ["state/pods", "root/pods", "root/containers"] {
            let left: Vec<_> = std::fs::read_dir(self.path(directory))
                .map(|entries| entries.flatten().map(|one| one.path()).collect())
                .unwrap_or_default();
            assert!(left.is_empty(), "{left:?}");
        }
        let log = self.log();
        assert!(!log.contains("panic"), "{log}");
    }
}

impl Drop for Daemon {
    /// A test that failed: the daemon must not outlive it, nor its pods.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _killed = self.child.kill().is_ok();
            let _reaped = self.child.wait().is_ok();
            let mut err = std::io::stderr();
            let _told = writeln!(err, "the daemon said:\n{}", self.log()).is_ok();
        }
    }
}

/// Processes that have the text in their command line.
fn processes_with(text: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let own = std::process::id().to_string();
    entries
        .filter_map(|one| {
            let name = one.file_name().into_string().ok()?;
            name.parse::<u32>().ok()?;
            let mut line = String::new();
            let mut file = std::fs::File::open(one.path().join("cmdline")).ok()?;
            file.read_to_string(&mut line).ok()?;
            (name != own && line.contains(text)).then_some(name)
        })
        .collect()
}

fn write(path: &Path, bytes: &[u8]) {
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(bytes).unwrap();
}
