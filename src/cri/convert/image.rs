//! Images: references and credentials in, images and filesystems out.

use crate::base::clock::Timestamp;
use crate::base::image::{Credentials, FilesystemUsage, Image, ImageSpec};
use crate::cri::convert::check::{Checked, missing, printable};
use crate::cri::convert::{hashed, ordered};
use crate::cri::v1;

/// An image that must be named.
pub(in crate::cri) fn required(at: &str, given: Option<v1::ImageSpec>) -> Checked<ImageSpec> {
    let given = given.unwrap_or_default();
    let field = format!("{at}.image");
    if given.image.is_empty() {
        return Err(missing(field, "give a reference or an id of an image"));
    }
    printable(&field, &given.image)?;
    Ok(ImageSpec {
        image: given.image,
        annotations: ordered(given.annotations),
        user_specified_image: given.user_specified_image,
        runtime_handler: given.runtime_handler,
        image_ref: given.image_ref,
    })
}

/// Credentials; all empty is none.
pub(in crate::cri) fn credentials(given: Option<v1::AuthConfig>) -> Option<Credentials> {
    let given = given?;
    let credentials = Credentials {
        username: given.username,
        password: given.password,
        auth: given.auth,
        server_address: given.server_address,
        identity_token: given.identity_token,
        registry_token: given.registry_token,
    };
    let empty = Credentials {
        server_address: credentials.server_address.clone(),
        ..Credentials::default()
    };
    (credentials != empty).then_some(credentials)
}

/// An image's spec, for statuses.
pub(in crate::cri) fn spec_out(spec: &ImageSpec) -> v1::ImageSpec {
    v1::ImageSpec {
        image: spec.image.clone(),
        annotations: hashed(&spec.annotations),
        user_specified_image: spec.user_specified_image.clone(),
        runtime_handler: spec.runtime_handler.clone(),
        image_ref: spec.image_ref.clone(),
    }
}

/// An image. Its user is a number or a name, never both; without a user it is 0.
pub(in crate::cri) fn item(image: &Image) -> v1::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let (uid, username) = match user {
        "" => (Some(0), String::new()),
        text => match text.parse::<i64>() {
            Ok(uid) => (Some(uid), String::new()),
            Err(_name) => (None, text.to_owned()),
        },
    };
    v1::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| v1::Int64Value { value }),
        username,
        spec: Some(spec_out(&image.spec)),
        pinned: image.pinned,
    }
}

/// Use of a filesystem.
pub(in crate::cri) fn filesystem(usage: &FilesystemUsage) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: Timestamp::now().0,
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: usage.mountpoint.clone(),
        }),
        used_bytes: Some(v1::UInt64Value {
            value: usage.used_bytes,
        }),
        inodes_used: Some(v1::UInt64Value {
            value: usage.inodes_used,
        }),
    }
}
