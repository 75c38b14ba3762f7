//! Pulls against registries that serve, lie, hang and break off.

mod credentials;
mod redirects;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::base::error::{HasKind as _, Kind};
use crate::base::image::{Credentials, ImageSpec};
use crate::base::tasks::Tasks;
use crate::images::digest::Digest;
use crate::images::fixture::{Tar, TestImage, gzip, left_in, store};
use crate::images::liar::{Contents, Liar, Reply, answer, contents};
use crate::images::{ImageError, ImageStore, ImagesConfig};

fn sample(note: &str) -> TestImage {
    let base = Tar::new()
        .dir("bin")
        .file("bin/sh", &vec![b'#'; 300_000])
        .end();
    let mut seed = 88_172_645_463_325_252_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()[0]
    };
    let noise: Vec<u8> = (0..400_000).map(|_| random()).collect();
    let top = Tar::new()
        .file("note", note.as_bytes())
        .file("noise", &noise)
        .end();
    TestImage::new(note, &[base, top])
}

fn spec(image: impl Into<String>) -> ImageSpec {
    ImageSpec {
        image: image.into(),
        user_specified_image: "as written".into(),
        ..ImageSpec::default()
    }
}

fn impatient(root: &Path) -> ImageStore {
    let config = ImagesConfig {
        root: root.to_owned(),
        registry_config_paths: vec![root.join("certs.d")],
        pull_progress_timeout: Duration::from_millis(700),
        ..ImagesConfig::default()
    };
    ImageStore::open(config, Tasks::default()).unwrap()
}

fn hosts_toml(root: &Path, registry: &str, text: &str) {
    let directory = root.join("certs.d").join(registry);
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("hosts.toml");
    crate::store::write_atomic(
        &path,
        text.as_bytes(),
        0o600,
        crate::store::Durability::Process,
    )
    .unwrap();
}

async fn nothing_left(store: &ImageStore, root: &Path) {
    store.tasks().shutdown(Duration::from_secs(60)).await;
    assert!(store.list().is_empty());
    assert_eq!(left_in(root), Vec::<String>::new());
}

#[tokio::test]
async fn a_pull_by_tag_and_digest() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let image = sample("one");
    let registry = Liar::serving("a/b", &[("1", image.clone())]).await;
    let name = format!("{}/a/b", registry.address);
    let (send, mut steps) = tokio::sync::mpsc::channel(1000);
    let pulled = images
        .pull(&spec(format!("{name}:1")), None, Some(send))
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.repo_tags, [format!("{name}:1")]);
    assert_eq!(pulled.repo_digests, [format!("{name}@{}", image.digest())]);
    assert_eq!(pulled.spec.user_specified_image, "as written");
    let sizes: usize = image.layers.iter().map(Vec::len).sum();
    assert_eq!(pulled.size, (sizes + image.config.len()) as u64);
    let mut done = 0;
    while let Some(step) = steps.recv().await {
        done += usize::from(matches!(
            step,
            crate::base::image::Progress::Layer { done: true, .. }
        ));
    }
    assert_eq!(done, 2);
    // Again, by digest: the registry is asked, nothing is fetched.
    let blobs = registry.count("/blobs/");
    let again = images
        .pull(&spec(format!("{name}@{}", image.digest())), None, None)
        .await
        .unwrap();
    assert_eq!(again.id, image.id());
    assert_eq!(registry.count("/blobs/"), blobs);
    images
        .remove(&name.replace("/a/b", "/a/b:1"))
        .await
        .unwrap();
    nothing_left(&images, place.path()).await;
}

#[tokio::test]
async fn a_layer_is_shared_and_fetched_once() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let (one, two) = (sample("one"), sample("two"));
    let registry = Liar::serving("a", &[("1", one.clone()), ("2", two)]).await;
    let pull = |tag: &str| {
        let (images, image) = (
            images.clone(),
            spec(format!("{}/a:{tag}", registry.address)),
        );
        async move { images.pull(&image, None, None).await.unwrap() }
    };
    let tags: Vec<_> = (0..50)
        .map(|n| if n % 2 == 0 { "1" } else { "2" })
        .collect();
    futures_util::future::join_all(tags.into_iter().map(pull)).await;
    let base = format!("/blobs/{}", Digest::of(&one.layers[0]));
    assert_eq!(registry.count(&base), 1);
    assert_eq!(registry.count("/manifests/"), 2);
    assert_eq!(images.list().len(), 2);
}

#[tokio::test]
async fn broken_connections_are_resumed() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let image = sample("one");
    let have = contents("a", &[("1", image.clone())]);
    let big = Digest::of(&image.layers[1]).to_string();
    for ranges in [true, false] {
        let (have, part, cuts) = (have.clone(), big.clone(), AtomicUsize::new(0));
        let registry = Liar::start(move |asked| {
            let mut asked = asked.clone();
            if !ranges {
                asked.headers.remove("range");
            }
            let reply = answer(&have, &asked);
            let cut = cuts.load(Ordering::Relaxed);
            if asked.path.contains(&part) && cut < 3 {
                cuts.fetch_add(1, Ordering::Relaxed);
                let at = if ranges { 50_000 } else { 50_000 * (cut + 1) };
                return reply.cut(at);
            }
            reply
        })
        .await;
        let name = format!("{}/a:1", registry.address);
        images.pull(&spec(&name), None, None).await.unwrap();
        assert_eq!(registry.count(&big), 4);
        let asked = registry.asked();
        let resumed = asked
            .iter()
            .filter(|a| a.header("range").starts_with("bytes="))
            .count();
        assert_eq!(resumed, 3);
        images.remove(&name).await.unwrap();
    }
    nothing_left(&images, place.path()).await;
}

#[tokio::test]
async fn mirrors_in_order_with_ns_and_their_limits() {
    let place = tempfile::tempdir().unwrap();
    let images = impatient(place.path());
    let image = sample("one");
    let have = contents("a", &[("1", image.clone())]);
    let blobs_only: Contents = have.clone();
    let second = Liar::start(move |asked| answer(&blobs_only, asked)).await;
    let third = Liar::serving("a", &[("1", image.clone())]).await;
    let sub: Contents = have
        .iter()
        .map(|(path, body)| (path.replace("/v2/", "/deep/"), body.clone()))
        .collect();
    let first = Liar::start(move |asked| match asked.path.contains("/blobs/") {
        // Knows the manifest, hangs over blobs.
        true => answer(&sub, asked).stalled(10),
        false => answer(&sub, asked),
    })
    .await;
    hosts_toml(
        place.path(),
        "reg.example",
        &format!(
            "server = \"http://{}\"\n[host.\"http://{}/deep\"]\noverride_path = true\n\
             [host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n\
             [host.\"http://{}\".header]\nx-one = \"1\"\n",
            third.address, first.address, second.address, second.address
        ),
    );
    images
        .pull(&spec("reg.example/a:1"), None, None)
        .await
        .unwrap();
    assert!(
        first
            .asked()
            .iter()
            .all(|asked| asked.query == "ns=reg.example")
    );
    assert_eq!(second.count("/manifests/"), 0);
    assert!(second.count("/blobs/") >= 3);
    assert!(
        second
            .asked()
            .iter()
            .all(|asked| asked.header("x-one") == "1")
    );
    assert_eq!(third.count("/blobs/"), 0);
    // The file is read anew: now only the server is left.
    hosts_toml(
        place.path(),
        "reg.example",
        &format!("server = \"http://{}\"", third.address),
    );
    images
        .pull(&spec("reg.example/a:1"), None, None)
        .await
        .unwrap();
    assert_eq!(third.count("/manifests/"), 1);
}

#[tokio::test]
async fn a_mirror_that_lies_is_passed_over() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let image = sample("one");
    let have = contents("a", &[("1", image.clone())]);
    let honest = Liar::serving("a", &[("1", image)]).await;
    let liar = Liar::start(move |asked| {
        let mut reply = answer(&have, asked);
        if asked.path.contains("/blobs/") {
            let last = reply.body.len() - 1;
            reply.body[last] ^= 1;
        }
        reply
    })
    .await;
    hosts_toml(
        place.path(),
        "reg.example",
        &format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n",
            honest.address, liar.address
        ),
    );
    images
        .pull(&spec("reg.example/a:1"), None, None)
        .await
        .unwrap();
    assert_eq!(liar.count("/blobs/"), 3);
    assert_eq!(honest.count("/blobs/"), 3);
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table")]
async fn what_goes_wrong_says_so_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let images = impatient(place.path());
    let image = sample("one");
    let have = contents("a", &[("1", image.clone())]);
    let layer = Digest::of(&image.layers[1]).to_string();
    let config = Digest::of(&image.config).to_string();
    type Lie = Box<dyn Fn(Reply, &str) -> Reply + Send + Sync>;
    let on = |part: String, lie: fn(Reply) -> Reply| -> Lie {
        Box::new(move |reply, path| {
            if path.contains(&part) {
                lie(reply)
            } else {
                reply
            }
        })
    };
    let flip = |mut reply: Reply| {
        let middle = reply.body.len() / 2;
        reply.body[middle] ^= 1;
        reply
    };
    let longer = |mut reply: Reply| {
        reply.body.push(0);
        reply
    };
    let cases: Vec<(&str, Lie, Kind)> = vec![
        (
            "forged layer",
            on(layer.clone(), |_| Reply::ok(gzip(b"x"))),
            Kind::Unavailable,
        ),
        (
            "flipped layer",
            on(layer.clone(), flip),
            Kind::FailedPrecondition,
        ),
        (
            "flipped config",
            on(config.clone(), flip),
            Kind::FailedPrecondition,
        ),
        (
            "longer layer",
            on(layer.clone(), longer),
            Kind::InvalidArgument,
        ),
        (
            "stalled layer",
            on(layer.clone(), |r| r.stalled(1000)),
            Kind::Unavailable,
        ),
        (
            "stalled manifest",
            on("/manifests/".into(), |r| r.stalled(1)),
            Kind::Unavailable,
        ),
        (
            "cut for ever",
            on(layer.clone(), |r| r.cut(0)),
            Kind::Unavailable,
        ),
        (
            "absent layer",
            on(layer.clone(), |_| Reply::status(404)),
            Kind::NotFound,
        ),
        (
            "denied",
            on("/manifests/".into(), |_| Reply::status(403)),
            Kind::PermissionDenied,
        ),
        (
            "401 without challenge",
            on("/manifests/".into(), |_| Reply::status(401)),
            Kind::PermissionDenied,
        ),
        (
            "no JSON",
            on("/manifests/".into(), |_| Reply::ok("<html>")),
            Kind::InvalidArgument,
        ),
        (
            "lying about the digest",
            on("/manifests/".into(), |r| {
                r.with("Docker-Content-Digest", Digest::of(b"else").to_string())
            }),
            Kind::FailedPrecondition,
        ),
        (
            "schema 1",
            on("/manifests/".into(), |_| {
                Reply::ok(r#"{"schemaVersion":1,"fsLayers":[]}"#)
            }),
            Kind::Unimplemented,
        ),
        (
            "manifest bomb",
            on("/manifests/".into(), |_| Reply::ok(vec![b' '; 9 << 20])),
            Kind::InvalidArgument,
        ),
        (
            "500",
            on("/manifests/".into(), |_| Reply::status(500)),
            Kind::Unavailable,
        ),
        (
            "slow down",
            on("/manifests/".into(), |_| {
                Reply::status(429).with("Retry-After", "0")
            }),
            Kind::Unavailable,
        ),
        (
            "redirects for ever",
            on("/blobs/".into(), |_| {
                Reply::status(307).with("Location", "?again")
            }),
            Kind::Unavailable,
        ),
        (
            "redirects to a file",
            on("/blobs/".into(), |_| {
                Reply::status(307).with("Location", "file:///etc/passwd")
            }),
            Kind::Unavailable,
        ),
    ];
    for (what, lie, kind) in cases {
        let have = have.clone();
        let registry = Liar::start(move |asked| lie(answer(&have, asked), &asked.path)).await;
        let name = spec(format!("{}/a:1", registry.address));
        let Err(error) = images.pull(&name, None, None).await else {
            panic!("{what}: pulled")
        };
        assert_eq!(error.kind(), kind, "{what}: {error}");
        let prefixed = error.to_string().starts_with("RegistryUnavailable: ");
        assert_eq!(
            prefixed,
            kind == Kind::Unavailable && what != "slow down",
            "{what}: {error}"
        );
    }
    let error = images
        .pull(&spec("127.0.0.1:1/a"), None, None)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("RegistryUnavailable: 127.0.0.1:1"),
        "{error}"
    );
    let registry = Liar::serving("a", &[]).await;
    let error = images
        .pull(&spec(format!("{}/a:1", registry.address)), None, None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    nothing_left(&images, place.path()).await;
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_ends() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let have = contents("a", &[("1", sample("one"))]);
    let registry = Liar::start(move |asked| match asked.path.contains("/blobs/") {
        true => answer(&have, asked).stalled(100),
        false => answer(&have, asked),
    })
    .await;
    let image = spec(format!("{}/a:1", registry.address));
    let short = tokio::time::timeout(Duration::from_millis(300), images.pull(&image, None, None));
    assert!(short.await.is_err());
    nothing_left(&images, place.path()).await;
}

#[tokio::test]
async fn indexes_and_other_compressions() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let plain: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| Tar::new().file(name, name.as_bytes()).end())
        .collect();
    let zstd = zstd::encode_all(&plain[1][..], 3).unwrap();
    let image = TestImage::packed(
        "mixed",
        &plain,
        vec![gzip(&plain[0]), zstd, plain[2].clone()],
    );
    let wrong = TestImage::new("wrong", &[]);
    let entry = |image: &TestImage, architecture: &str| {
        serde_json::json!({
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "digest": image.digest().to_string(), "size": image.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let here = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let index = |entries: Vec<serde_json::Value>| {
        serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": entries})).unwrap()
    };
    let mut have = contents("a", &[("x", image.clone()), ("y", wrong.clone())]);
    let both = index(vec![entry(&wrong, "s390x"), entry(&image, here)]);
    have.insert("/v2/a/manifests/both".into(), both.clone());
    have.insert(
        "/v2/a/manifests/none".into(),
        index(vec![entry(&wrong, "s390x")]),
    );
    let registry = Liar::start(move |asked| answer(&have, asked)).await;
    let pulled = images
        .pull(&spec(format!("{}/a:both", registry.address)), None, None)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(
        pulled.repo_digests,
        [format!("{}/a@{}", registry.address, Digest::of(&both))]
    );
    assert_eq!(pulled.layers.len(), 3);
    let error = images
        .pull(&spec(format!("{}/a:none", registry.address)), None, None)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("only for linux/s390x"),
        "{error}"
    );
}
