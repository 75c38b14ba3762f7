//! What a redirect's target and its realm get to know: nothing of the registry's.

use super::*;

const PASSWORD: &str = "pass-w0rd";
/// `user:pass-w0rd`
const BASIC: &str = "dXNlcjpwYXNzLXcwcmQ=";
const IDENTITY: &str = "1dentity-token";
const GIVEN: &str = "g1ven-token";
const HEADER: &str = "h3ader-value";
const OWN_TOKEN: &str = "t0ken-of-the-registry";

/// Every secret that a registry may be told, in every form that it has on the way.
const SECRETS: [&str; 7] = [
    PASSWORD, BASIC, IDENTITY, GIVEN, HEADER, OWN_TOKEN, "account=",
];

/// The four ways in which somebody may be known, and none.
fn forms() -> Vec<(&'static str, Option<Credentials>)> {
    let none = Credentials::default;
    let (username, password) = ("user".to_owned(), PASSWORD.to_owned());
    vec![
        ("nobody", None),
        (
            "a password",
            Some(Credentials {
                username,
                password,
                ..none()
            }),
        ),
        (
            "auth",
            Some(Credentials {
                auth: BASIC.into(),
                ..none()
            }),
        ),
        (
            "an identity token",
            Some(Credentials {
                identity_token: IDENTITY.into(),
                ..none()
            }),
        ),
        (
            "a registry token",
            Some(Credentials {
                registry_token: GIVEN.into(),
                ..none()
            }),
        ),
    ]
}

fn password() -> Option<Credentials> {
    forms().swap_remove(1).1
}

fn bearer(realm: &str, scope: &str) -> Reply {
    let scope = if scope.is_empty() {
        String::new()
    } else {
        format!(",scope=\"{scope}\"")
    };
    let challenge = format!("Bearer realm=\"http://{realm}/token\",service=\"s\"{scope}");
    Reply::status(401).with("WWW-Authenticate", challenge)
}

fn moved(status: u16, to: impl Into<String>) -> Reply {
    Reply::status(status).with("Location", to)
}

/// Nobody here was told a secret of the registry's, nor where we come from.
fn told_nothing(what: &str, liars: &[&Liar]) {
    for asked in liars.iter().flat_map(|liar| liar.asked()) {
        let all = format!("{asked:?}");
        for secret in SECRETS {
            assert!(!all.contains(secret), "{what}: {secret} in {all}");
        }
        assert!(
            asked
                .headers
                .keys()
                .all(|name| name != "cookie" && name != "referer"),
            "{what}: {all}"
        );
    }
}

/// A realm that gives a token to nobody only; one asked with a secret answers all the same, so that it is seen.
async fn realm_for_nobody(token: &'static str) -> Liar {
    Liar::start(move |_| Reply::ok(format!("{{\"token\":\"{token}\"}}"))).await
}

/// A realm that wants to know who asks.
async fn realm_for_members() -> Liar {
    Liar::start(|asked| {
        let basic = asked.header("authorization") == format!("Basic {BASIC}");
        match basic || asked.body.contains(IDENTITY) || asked.header("authorization").is_empty() {
            true => Reply::ok(format!("{{\"token\":\"{OWN_TOKEN}\"}}")),
            false => Reply::status(401),
        }
    })
    .await
}

/// Serves `have` to who has this token, else names the realm.
async fn storage(have: Contents, token: &'static str, realm: &Liar) -> Liar {
    let at = realm.address.clone();
    Liar::start(
        move |asked| match asked.header("authorization") == format!("Bearer {token}") {
            true => answer(&have, asked),
            false => bearer(&at, ""),
        },
    )
    .await
}

/// Asks for a token of its own, then redirects `part` of what it has to `to`, where it is called `name`.
async fn vanity(
    part: &'static str,
    to: &Liar,
    name: &'static str,
    have: Contents,
    realm: &Liar,
) -> Liar {
    let (to, at) = (to.address.clone(), realm.address.clone());
    Liar::start(move |asked| match asked.header("authorization") {
        "" => bearer(&at, "repository:a:pull"),
        word if word == format!("Bearer {OWN_TOKEN}") || word == format!("Bearer {GIVEN}") => {
            match asked.path.contains(part) {
                true => moved(
                    307,
                    format!(
                        "http://{to}{}",
                        asked.path.replace("/v2/a/", &format!("/v2/{name}/"))
                    ),
                ),
                false => answer(&have, asked),
            }
        }
        _ => Reply::status(403),
    })
    .await
}

async fn pull(
    images: &ImageStore,
    registry: &str,
    who: Option<Credentials>,
) -> Result<(), ImageError> {
    let name = spec(format!("{registry}/a:1"));
    images.pull(&name, who, None).await?;
    for image in images.list() {
        images.remove(&image.id).await.unwrap();
    }
    Ok(())
}

#[tokio::test]
async fn what_a_redirects_target_asks_for_it_gets_from_its_own_realm() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let image = sample("one");
    let here = contents("a", &[("1", image.clone())]);
    let there = contents("org/real", &[("1", image)]);
    for part in ["/blobs/", "/manifests/", "/v2/"] {
        for (who, credentials) in forms() {
            let what = format!("{part}, {who}");
            let realm = realm_for_nobody("t0ken-of-the-storage").await;
            let target = storage(there.clone(), "t0ken-of-the-storage", &realm).await;
            let members = realm_for_members().await;
            let registry = vanity(part, &target, "org/real", here.clone(), &members).await;
            let header = format!(
                "[host.\"http://{}\".header]\nx-key = \"{HEADER}\"\n",
                registry.address
            );
            hosts_toml(place.path(), &registry.address, &header);
            pull(&images, &registry.address, credentials)
                .await
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            told_nothing(&what, &[&realm, &target]);
            // Once for all that is got there, for the repository as it is called there.
            assert_eq!(realm.asked().len(), 1, "{what}");
            assert!(
                realm.asked()[0]
                    .query
                    .contains("scope=repository%3Aorg%2Freal%3Apull"),
                "{what}"
            );
            let foreign = |asked: &crate::images::liar::Asked| {
                asked.header("authorization").contains("storage")
            };
            assert!(!registry.asked().iter().any(foreign), "{what}");
            assert!(
                registry
                    .asked()
                    .iter()
                    .all(|asked| asked.header("x-key") == HEADER),
                "{what}"
            );
        }
    }
}

#[tokio::test]
async fn a_target_that_wants_a_password_gets_none() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let here = contents("a", &[("1", sample("one"))]);
    for (who, credentials) in forms() {
        let target =
            Liar::start(|_| Reply::status(401).with("WWW-Authenticate", "Basic realm=\"r\"")).await;
        let members = realm_for_members().await;
        let registry = vanity("/blobs/", &target, "a", here.clone(), &members).await;
        let secret = credentials.is_some();
        let error = pull(&images, &registry.address, credentials)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::PermissionDenied, "{who}: {error}");
        let error = error.to_string();
        assert!(error.starts_with(&target.address), "{who}: {error}");
        assert_eq!(
            error.contains(&format!("is for {} alone", registry.address)),
            secret,
            "{who}: {error}"
        );
        told_nothing(who, &[&target]);
    }
}

#[tokio::test]
async fn a_token_endpoint_that_redirects_is_followed_without_the_secret() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let here = contents("a", &[("1", sample("one"))]);
    for status in [301, 302, 303, 307, 308] {
        for (who, credentials) in forms().into_iter().take(4) {
            let what = format!("{status}, {who}");
            let end = realm_for_nobody("t0ken-of-nobody").await;
            let to = format!("http://{}/token?scope=mine", end.address);
            // Within one place nothing changes, but for a 303; then away from it.
            let realm = Liar::start(move |asked| match asked.path.as_str() {
                "/token" => moved(status, "/token/"),
                _ => moved(status, &to),
            })
            .await;
            let registry = storage(here.clone(), "t0ken-of-nobody", &realm).await;
            pull(&images, &registry.address, credentials.clone())
                .await
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            told_nothing(&what, &[&end]);
            let asked = realm.asked();
            assert_eq!((asked.len(), end.asked().len()), (2, 1), "{what}");
            assert!(
                end.asked()[0].method == "GET" && end.asked()[0].body.is_empty(),
                "{what}"
            );
            let knows = |asked: &crate::images::liar::Asked| {
                asked.body.contains(IDENTITY) || asked.header("authorization").contains(BASIC)
            };
            assert_eq!(knows(&asked[0]), credentials.is_some(), "{what}");
            let form = !credentials.unwrap_or_default().identity_token.is_empty();
            assert_eq!(
                knows(&asked[1]),
                knows(&asked[0]) && !(form && status == 303),
                "{what}"
            );
        }
    }
    let endless = Liar::start(|_| moved(302, "/token")).await;
    let registry = storage(here, "none", &endless).await;
    let error = pull(&images, &registry.address, password())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("without end"), "{error}");
    assert!(endless.asked().len() < 20);
}

#[tokio::test]
async fn a_way_that_has_left_the_registry_comes_back_as_a_stranger() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let have = contents("a", &[("1", sample("one"))]);
    let members = realm_for_members().await;
    let back = std::sync::Arc::new(std::sync::OnceLock::new());
    let home = back.clone();
    let between = Liar::start(move |asked| {
        let home: &String = home.get().unwrap();
        moved(
            308,
            format!("http://{home}{}", asked.path.replace("/away/", "/public/")),
        )
    })
    .await;
    let (away, at) = (between.address.clone(), members.address.clone());
    let registry = Liar::start(move |asked| {
        let mut asked = asked.clone();
        let blob = asked.path.contains("/blobs/");
        match asked.path.split('/').nth(1) {
            Some("public") => {
                asked.path = asked.path.replace("/public/", "/v2/");
                answer(&have, &asked)
            }
            _ if asked.header("authorization").is_empty() => bearer(&at, ""),
            // Within itself, then away.
            Some("v2") if blob => moved(302, asked.path.replace("/v2/", "/inner/")),
            Some("inner") => moved(
                307,
                format!("http://{away}{}", asked.path.replace("/inner/", "/away/")),
            ),
            _ => answer(&have, &asked),
        }
    })
    .await;
    back.set(registry.address.clone()).unwrap();
    let header = format!(
        "[host.\"http://{}\".header]\nx-key = \"{HEADER}\"\n",
        registry.address
    );
    hosts_toml(place.path(), &registry.address, &header);
    pull(&images, &registry.address, password()).await.unwrap();
    told_nothing("between", &[&between]);
    for (part, known) in [("/v2/", true), ("/inner/", true), ("/public/", false)] {
        let asked: Vec<_> = registry
            .asked()
            .into_iter()
            .filter(|asked| asked.path.starts_with(part))
            .collect();
        assert!(asked.len() >= 3, "{part}");
        for asked in asked.iter().skip(1) {
            assert_eq!(asked.header("x-key") == HEADER, known, "{asked:?}");
            assert_eq!(
                asked.header("authorization") == format!("Bearer {OWN_TOKEN}"),
                known,
                "{asked:?}"
            );
        }
    }
}

#[tokio::test]
async fn nobody_is_led_nearer_than_the_registry_is() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let have = contents("a", &[("1", sample("one"))]);
    // The registry is on the loopback: nearer is what is on the link, in every dress.
    for target in [
        "169.254.169.254",
        "2852039166",
        "0xa9.254.0251.0376",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::1]",
        "[fd00:ec2::254]",
        "100.100.100.200:80",
    ] {
        for (what, verb) in [
            ("/blobs/", "redirects to"),
            ("/manifests/", "redirects to"),
            ("realm", "names the realm"),
            ("token", "redirects to"),
        ] {
            let to = target.to_owned();
            let realm =
                Liar::start(move |_| moved(302, format!("http://{to}/latest/meta-data"))).await;
            let (to, at, have) = (target.to_owned(), realm.address.clone(), have.clone());
            let registry = Liar::start(move |asked| match what {
                "realm" => bearer(&to, ""),
                "token" => bearer(&at, ""),
                part if asked.path.contains(part) => {
                    moved(307, format!("http://{to}/latest/meta-data"))
                }
                _ => answer(&have, asked),
            })
            .await;
            let who = password().filter(|_| what != "realm");
            let error = pull(&images, &registry.address, who).await.unwrap_err();
            assert_eq!(
                error.kind(),
                Kind::FailedPrecondition,
                "{target}, {what}: {error}"
            );
            let error = error.to_string();
            let by = if what == "token" {
                &realm.address
            } else {
                &registry.address
            };
            assert!(
                error.starts_with(&format!("{by} {verb} ")),
                "{what}: {error}"
            );
            assert!(
                error.contains("local_targets = [") && error.contains("not asked"),
                "{error}"
            );
            assert!(!error.contains(PASSWORD), "{error}");
        }
    }
}

#[tokio::test]
async fn a_redirect_brings_no_user_with_it() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let have = contents("a", &[("1", sample("one"))]);
    let target = Liar::start(|_| Reply::ok("")).await;
    let to = target.address.clone();
    let registry = Liar::start(move |asked| match asked.path.contains("/blobs/") {
        true => moved(307, format!("http://user:se-cret@{to}{}", asked.path)),
        false => answer(&have, asked),
    })
    .await;
    let error = pull(&images, &registry.address, None)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("user name") && !error.contains("se-cret"),
        "{error}"
    );
    assert!(target.asked().is_empty());
}

#[tokio::test]
async fn no_error_repeats_a_secret() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    for (who, credentials) in forms() {
        let echo = |asked: &crate::images::liar::Asked| {
            let told = format!(
                "{} {} {PASSWORD}",
                asked.header("authorization"),
                asked.body
            );
            let body = serde_json::json!({"errors": [{"message": told}]}).to_string();
            Reply {
                body: body.into_bytes(),
                ..Reply::status(403)
            }
        };
        let realm = Liar::start(echo).await;
        let at = realm.address.clone();
        let asks = Liar::start(move |_| bearer(&at, "")).await;
        let basic = Liar::start(move |asked| match asked.header("authorization") {
            "" => Reply::status(401).with("WWW-Authenticate", "Basic realm=\"r\""),
            _ => echo(asked),
        })
        .await;
        let at = realm_for_members().await.address;
        let token = Liar::start(move |asked| match asked.header("authorization") {
            "" => bearer(&at, ""),
            _ => echo(asked),
        })
        .await;
        for registry in [asks, basic, token] {
            let error = pull(&images, &registry.address, credentials.clone())
                .await
                .unwrap_err()
                .to_string();
            for secret in SECRETS {
                // The password is known to berth only when it was given; else these are the registry's own words.
                let ours = secret != PASSWORD || matches!(who, "a password" | "auth");
                assert!(!(ours && error.contains(secret)), "{who}: {error}");
            }
        }
    }
}
