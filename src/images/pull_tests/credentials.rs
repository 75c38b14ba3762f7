//! Who is told a credential.

use super::*;

fn challenge(realm: &str) -> Reply {
    Reply::status(401).with(
        "WWW-Authenticate",
        format!("Bearer realm=\"http://{realm}/token\",service=\"s\",scope=\"repository:a:pull\""),
    )
}

#[tokio::test]
async fn token_flows() {
    let place = tempfile::tempdir().unwrap();
    let image = sample("one");
    let realm = Liar::start(|asked| {
        let basic = asked.header("authorization") == "Basic dTpw";
        let refresh = asked.method == "POST" && asked.body.contains("refresh_token=i%26d");
        let anonymous = asked.method == "GET" && asked.header("authorization").is_empty();
        match (basic, refresh, anonymous) {
            (true, ..) => Reply::ok(r#"{"token":"T1","expires_in":300}"#),
            (_, true, _) => Reply::ok(r#"{"access_token":"T1"}"#),
            (_, _, true) => Reply::ok(r#"{"token":"T0"}"#),
            _ => Reply::status(401),
        }
    })
    .await;
    let (have, at) = (contents("a", &[("1", image)]), realm.address.clone());
    let registry = Liar::start(move |asked| match asked.header("authorization") {
        "Bearer T1" | "Bearer given" => answer(&have, asked),
        "" => challenge(&at),
        _ => Reply::status(403),
    })
    .await;
    let given = |change: fn(&mut Credentials)| {
        let mut credentials = Credentials::default();
        change(&mut credentials);
        Some(credentials)
    };
    for (what, credentials, works) in [
        (
            "password",
            given(|c| (c.username, c.password) = ("u".into(), "p".into())),
            true,
        ),
        ("auth", given(|c| c.auth = "dTpw".into()), true),
        ("identity", given(|c| c.identity_token = "i&d".into()), true),
        (
            "registry token",
            given(|c| c.registry_token = "given".into()),
            true,
        ),
        (
            "wrong",
            given(|c| (c.username, c.password) = ("u".into(), "x".into())),
            false,
        ),
        ("anonymous", None, false),
        (
            "of another registry",
            given(|c| {
                (c.username, c.password, c.server_address) =
                    ("u".into(), "p".into(), "other".into());
            }),
            false,
        ),
    ] {
        let images = store(place.path());
        let name = spec(format!("{}/a:1", registry.address));
        let before = realm.asked().len();
        let pulled = images.pull(&name, credentials.clone(), None).await;
        match pulled {
            Ok(_) => assert!(works, "{what}"),
            Err(error) => {
                assert!(!works, "{what}: {error}");
                assert_eq!(error.kind(), Kind::PermissionDenied, "{what}: {error}");
            }
        }
        if what == "password" {
            // One token for all requests, and for the next pull.
            images.pull(&name, credentials, None).await.unwrap();
            assert_eq!(realm.asked().len() - before, 1);
        }
        for image in images.list() {
            images.remove(&image.id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn redirects_never_see_credentials() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let have = contents("a", &[("1", sample("one"))]);
    let storage = Liar::start({
        let have = have.clone();
        move |asked| answer(&have, asked)
    })
    .await;
    let at = storage.address.clone();
    let busy = AtomicUsize::new(0);
    let registry = Liar::start(move |asked| {
        if asked.header("authorization") != "Basic dTpw" {
            return Reply::status(401).with("WWW-Authenticate", "Basic realm=\"r\"");
        }
        if busy.fetch_add(1, Ordering::Relaxed) == 0 {
            return Reply::status(429).with("Retry-After", "0");
        }
        match asked.path.contains("/blobs/") {
            true => {
                Reply::status(307).with("Location", format!("http://{at}{}?signed", asked.path))
            }
            false => answer(&have, asked),
        }
    })
    .await;
    let credentials = Credentials {
        username: "u".into(),
        password: "p".into(),
        ..Credentials::default()
    };
    let name = spec(format!("{}/a:1", registry.address));
    images.pull(&name, Some(credentials), None).await.unwrap();
    assert_eq!(storage.count("/blobs/"), 3);
    assert!(
        storage
            .asked()
            .iter()
            .all(|asked| asked.header("authorization").is_empty())
    );
    let error = images.pull(&name, None, None).await.unwrap_err();
    assert!(
        matches!(&error, ImageError::Shared(inner) if inner.kind() == Kind::PermissionDenied),
        "{error}"
    );
}
