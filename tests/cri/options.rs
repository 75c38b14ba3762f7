//! Options of mounts (`Mount.mount_options`, API 0.37): on the mount in the kernel, beside read-only, on an image too, in a
//! user namespace too; in the status, and told as a feature.

use std::os::unix::fs::PermissionsExt as _;

use k8s_cri::v1;
use tonic::Code;

use crate::daemon::{Clients, Daemon};
use crate::{IMAGE, archive, container_config, newer, pod_config, refused, run_pod, start};

/// The options that the kernel shows of a container's mounts.
struct Shown(String);

impl Shown {
    async fn of(to: &mut Clients, id: &str) -> Self {
        let request = v1::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let status = to.runtime.container_status(request).await.unwrap();
        let info = &status.into_inner().info["info"];
        let info: serde_json::Value = serde_json::from_str(info).unwrap();
        Self(std::fs::read_to_string(format!("/proc/{}/mountinfo", info["pid"])).unwrap())
    }

    fn has(&self, path: &str, wanted: &[&str], unwanted: &[&str]) {
        let lines = self.0.lines();
        let line = lines
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields[4] == path)
            .expect(path);
        let found: Vec<&str> = line[5].split(',').collect();
        let is = |option: &&&str| found.iter().any(|one| one == *option);
        assert_eq!(wanted.iter().find(|o| !is(o)), None, "{path}: {found:?}");
        assert_eq!(unwanted.iter().find(|o| is(o)), None, "{path}: {found:?}");
    }
}

fn mount(daemon: &Daemon, path: &str, readonly: bool, options: &[&str]) -> newer::Mount {
    let source = daemon.path("source");
    std::fs::create_dir_all(&source).unwrap();
    newer::Mount {
        container_path: path.to_owned(),
        host_path: source.to_string_lossy().into_owned(),
        readonly,
        mount_options: options.iter().map(ToString::to_string).collect(),
        ..newer::Mount::default()
    }
}

fn of_image(daemon: &Daemon, path: &str, options: &[&str]) -> newer::Mount {
    newer::Mount {
        host_path: String::new(),
        image: Some(newer::Image {
            image: IMAGE.to_owned(),
        }),
        ..mount(daemon, path, true, options)
    }
}

async fn remove(to: &mut Clients, pod: String) {
    let remove = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    to.runtime.remove_pod_sandbox(remove).await.unwrap();
}

#[tokio::test]
async fn on_the_mount_and_in_the_status() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    assert!(newer::features(daemon.channel().await).await.mount_options);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let pod = run_pod(&mut to, pod_config(&daemon, "options"))
        .await
        .unwrap();
    let mounts = vec![
        mount(&daemon, "/plain", false, &[]),
        mount(
            &daemon,
            "/some",
            false,
            &["noexec", "nodev", "nosuid", "noatime"],
        ),
        mount(&daemon, "/ro", true, &["noexec"]),
        of_image(&daemon, "/image", &["noexec", "nosuid"]),
    ];
    let config = container_config("options");
    let id = newer::create(daemon.channel().await, &pod, &config, mounts.clone())
        .await
        .unwrap();
    start(&mut to, &id).await.unwrap();
    let told = newer::mounts(daemon.channel().await, &id).await;
    let options = |mounts: &[newer::Mount]| -> Vec<(String, Vec<String>)> {
        let pairs = mounts.iter();
        pairs
            .map(|one| (one.container_path.clone(), one.mount_options.clone()))
            .collect()
    };
    assert_eq!(options(&told), options(&mounts));
    let shown = Shown::of(&mut to, &id).await;
    shown.has("/plain", &["rw"], &["noexec", "nosuid", "nodev"]);
    let some = ["rw", "noexec", "nodev", "nosuid", "noatime"];
    shown.has("/some", &some, &["ro"]);
    shown.has("/ro", &["ro", "noexec"], &["nosuid"]);
    shown.has("/image", &["ro", "noexec", "nosuid"], &["rw"]);
    for (options, part) in [
        (vec!["exec", "noexec"], "contradict"),
        (vec!["bind"], "is not known"),
        (vec!["noexec,rw"], "is not known"),
    ] {
        let mounts = vec![mount(&daemon, "/x", false, &options)];
        let config = container_config("refused");
        let outcome = newer::create(daemon.channel().await, &pod, &config, mounts).await;
        refused(
            outcome,
            Code::InvalidArgument,
            &["mounts[0].mount_options", part],
        );
    }
    remove(&mut to, pod).await;
    daemon.stop();
}

#[tokio::test]
async fn in_a_user_namespace() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    if !newer::features(daemon.channel().await)
        .await
        .user_namespaces_host_network
    {
        // Then kubelet asks for none.
        daemon.stop();
        return;
    }
    // The pod's root walks through the directories.
    let passable = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(daemon.path(""), passable).unwrap();
    daemon.import(&archive::good(IMAGE)).unwrap();
    let ids = vec![v1::IdMapping {
        host_id: 400_000,
        container_id: 0,
        length: 65_536,
    }];
    let own = v1::UserNamespace {
        mode: v1::NamespaceMode::Pod as i32,
        uids: ids.clone(),
        gids: ids.clone(),
    };
    let mut config = pod_config(&daemon, "mapped");
    let linux = config.linux.as_mut().unwrap();
    let security = linux.security_context.as_mut().unwrap();
    let namespaces = security.namespace_options.as_mut().unwrap();
    namespaces.userns_options = Some(own.clone());
    let pod = run_pod(&mut to, config).await.unwrap();
    let mut config = container_config("mapped");
    let linux = config.linux.as_mut().unwrap();
    let security = linux.security_context.as_mut().unwrap();
    let namespaces = security.namespace_options.as_mut().unwrap();
    namespaces.userns_options = Some(own);
    let mapped = |one: newer::Mount| newer::Mount {
        uids: ids.clone(),
        gids: ids.clone(),
        ..one
    };
    let mounts = vec![
        mapped(mount(&daemon, "/some", false, &["noexec", "nosuid"])),
        mapped(mount(&daemon, "/ro", true, &["nodev"])),
        of_image(&daemon, "/image", &["noexec"]),
    ];
    let id = newer::create(daemon.channel().await, &pod, &config, mounts)
        .await
        .unwrap();
    start(&mut to, &id).await.unwrap();
    let shown = Shown::of(&mut to, &id).await;
    shown.has("/some", &["rw", "noexec", "nosuid", "idmapped"], &["ro"]);
    shown.has("/ro", &["ro", "nodev", "idmapped"], &["rw", "noexec"]);
    shown.has("/image", &["ro", "noexec"], &["rw"]);
    remove(&mut to, pod).await;
    daemon.stop();
}
